"""Images as vectors of their own pixels, without any network: for pictures of one kind and size, such as the small worlds'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmpo.datasets.tools import Embedder
from mmpo.media import open_image
from mmpo.pair import Block


def pixels(path: str | Path | None = None, device: str = "cpu", *, side: int = 16) -> Embedder:
    """How dark each of side x side grey pixels is, as a vector of length 1 (a white picture's are all alike).

    device is not used. Raises ValueError for a path, and for a block that is not an image.
    """
    if path is not None:
        raise ValueError(f"embedder pixels needs no weights, found path={str(path)!r}")

    def embed(blocks: Sequence[Block]) -> np.ndarray:
        if strangers := {b.kind for b in blocks} - {"image"}:
            raise ValueError(f"embedder pixels: expected images, found {', '.join(sorted(strangers))}")
        small = [open_image(b).convert("L").resize((side, side), Image.Resampling.BOX) for b in blocks]
        ink = 256 - np.array([np.asarray(s, np.float32).ravel() for s in small]).reshape(len(small), side * side)
        return ink / np.linalg.norm(ink, axis=1, keepdims=True)

    return embed
