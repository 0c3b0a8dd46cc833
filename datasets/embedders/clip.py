"""Images and texts in one space, by an open_clip model: what Re-Align retrieves its images with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpo.clip import load_clip
from mmpo.datasets.tools import Embedder
from mmpo.datasets.vectors import in_batches
from mmpo.media import open_image
from mmpo.pair import Block


def clip(
    path: str | Path | None = None,
    device: str = "cpu",
    *,
    architecture: str = "ViT-L-14",
    allow_download: bool = False,
    batch_size: int = 16,
) -> Embedder:
    """CLIP (arXiv 2103.00020), by default the ViT-L/14 of Re-Align; texts beyond its 77 tokens are cut by its tokenizer.

    path: an open_clip checkpoint file of `architecture`, or a directory with open_clip_config.json. allow_download: with no
    path, fetch OpenAI's weights. Raises ValueError when there are no weights, and for a block that is neither image nor text.
    """
    model = load_clip(path, architecture, device, "clip", "openai" if allow_download else None, kind="embedder")

    def encode(blocks: Sequence[Block]) -> Tensor:
        found: dict[int, Tensor] = {}
        for kind in sorted({b.kind for b in blocks}):
            at = [i for i, b in enumerate(blocks) if b.kind == kind]
            if kind == "image":
                vectors = model.images([open_image(blocks[i]) for i in at])
            elif kind == "text":
                vectors = model.texts([str(blocks[i].data) for i in at])
            else:
                raise ValueError(f"embedder clip: expected images and texts, found {kind}")
            found |= dict(zip(at, vectors, strict=True))
        return torch.stack([found[i] for i in range(len(blocks))])

    return in_batches(encode, batch_size)
