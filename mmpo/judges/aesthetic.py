"""LAION's aesthetic predictor: how pleasing a picture is, whatever its caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpo.clip import load_clip
from mmpo.judging import Blocks, Judge, JudgeResult, existing, score_in_batches
from mmpo.limits import Count
from mmpo.weights import loading

HEAD = "LAION's improved aesthetic head (sac+logos+ava1-l14-linearMSE) as .safetensors or .pth"


def aesthetic(
    path: str | Path | None = None,
    device: str = "cpu",
    *,
    head: str | Path | None = None,
    architecture: str = "ViT-L-14-quickgelu",
    allow_download: bool = False,
    batch_size: Count = 16,
) -> Judge:
    """LAION aesthetic predictor v2 (linear MSE): a linear stack 768-1024-128-64-16-1 on the L2-normalised image embedding.

    path: OpenAI's CLIP ViT-L/14 (which was trained with quick GELU) as an open_clip checkpoint or directory. head: the
    predictor's own weights, always local. allow_download: with no path, fetch CLIP. Scores are about 1 to 10.
    Raises ValueError when weights are missing or do not fit.
    """
    mlp = load_head(existing(head, "aesthetic", HEAD, "head")).to(device)
    clip = load_clip(path, architecture, device, "aesthetic", "openai" if allow_download else None)

    def score(captions: list[str], pictures: list[Image.Image]) -> Tensor:
        return mlp(clip.images(pictures)).squeeze(-1)

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        return JudgeResult(score_in_batches(score, prompts, answers, batch_size))

    return judge


def load_head(path: Path) -> nn.Module:
    """The predictor's layers under their published names, layers.0 to layers.7; no activations between them, as trained."""
    widths, dropouts = (768, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Linear(inputs, outputs), *([nn.Dropout(dropouts[i])] if i < len(dropouts) else [])]
    model = nn.ModuleDict({"layers": nn.Sequential(*layers)})
    with loading(path, HEAD):
        safe = path.suffix == ".safetensors"
        model.load_state_dict(load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True))
    return model["layers"].eval().requires_grad_(False)
