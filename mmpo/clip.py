"""open_clip models from local weights: the image and text embeddings that several judges are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmpo.judging import existing
from mmpo.weights import loading

WEIGHTS = "an open_clip checkpoint file (.safetensors, .pt) or a directory with open_clip_config.json and its weights"


class Clip:
    """A frozen open_clip model. Embeddings are (N, D) fp32 with norm 1."""

    def __init__(self, model: nn.Module, prepare: Callable[[Image.Image], Tensor], tokenize: Callable, device: str) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.prepare, self.tokenize, self.device = prepare, tokenize, device

    def images(self, pictures: list[Image.Image]) -> Tensor:
        pixels = torch.stack([self.prepare(p) for p in pictures]).to(self.device)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)  # type: ignore[operator]

    def texts(self, captions: list[str]) -> Tensor:
        return F.normalize(self.model.encode_text(self.tokenize(captions).to(self.device)).float(), dim=-1)  # type: ignore[operator]

    def cosine(self, captions: list[str], pictures: list[Image.Image]) -> Tensor:
        """Cosine of each caption with its picture, (N,)."""
        return (self.texts(captions) * self.images(pictures)).sum(-1)


def load_clip(
    path: str | Path | None, architecture: str, device: str, judge: str, download: str | None = None, kind: str = "judge"
) -> Clip:
    """An open_clip model in fp32. judge, kind: whose it is, for messages.

    path: see WEIGHTS; a file needs `architecture`, an open_clip model name, a directory says its own. download: open_clip's
    tag of published weights, used only when path is None. Checkpoints are read without pickle's code execution
    (weights_only) and strictly: a missing or surplus weight is an error. Raises ValueError when the weights are missing or
    the architecture would itself need a download.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if path is None and download:
        name, options = architecture, {"pretrained": download}
    else:
        name, options = _local(existing(path, judge, WEIGHTS, kind=kind), architecture, f"{kind} {judge}")
    with loading(path or name, WEIGHTS):
        model = open_clip.create_model(name, **options, weights_only=True, require_pretrained=True, device="cpu")
    prepare = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return Clip(model, prepare, open_clip.get_tokenizer(name), device)


def _local(path: Path, architecture: str, whose: str) -> tuple[str, dict[str, Any]]:
    """open_clip's model name and options for weights on disk."""
    import open_clip

    if path.is_dir():
        if not (path / "open_clip_config.json").is_file():
            raise ValueError(f"{whose}: {path} has no open_clip_config.json; expected {WEIGHTS}")
        with loading(path / "open_clip_config.json", "an open_clip configuration"):
            own = json.loads((path / "open_clip_config.json").read_bytes())["model_cfg"]
        _check_local(own, str(path), whose)
        return f"local-dir:{path}", {}
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"{whose}: open_clip has no architecture {architecture!r}; see open_clip.list_models()")
    _check_local(config, architecture, whose)
    return architecture, {"pretrained": str(path)}


def _check_local(config: dict[str, Any], name: str, whose: str) -> None:
    """Refuse parts that another library would fetch, and with them the code they may bring."""
    if remote := {"hf_model_name", "hf_tokenizer_name"} & {k for k, v in config.get("text_cfg", {}).items() if v}:
        raise ValueError(f"{whose}: {name} takes its {remote.pop()} from a hub; give an architecture that is all open_clip's")
