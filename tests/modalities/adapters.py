"""The diffusion adapter on tiny checkpoints, pairs of tiny pictures, and the documented streams of a draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpo.cache import Cache
from mmpo.modalities.diffusion import Adapter
from mmpo.modalities.diffusion_config import ModelConfig
from mmpo.modality import DrawKey
from mmpo.pair import Block, Pair, image, text
from mmpo.schema import DrawConfig

CAPTIONS = ("a red circle", "the blue dog", "a cat on the left")


def adapter(
    folder: Path, *, draw: dict[str, Any] | None = None, dropout: float = 0.0, cache: Cache | None = None, **model: Any
) -> Adapter:
    """The adapter on a checkpoint, with a LoRA of rank 2 unless `model` says otherwise."""
    torch.manual_seed(0)  # of the LoRA's A
    config = ModelConfig(path=str(folder), **({"lora": {"rank": 2}} | model))
    return Adapter(config, DrawConfig(**(draw or {})), cache or Cache(None), torch.device("cpu"), dropout)


def picture(seed: int, height: int = 16, width: int = 16) -> Block:
    return image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_pairs(count: int = 3) -> list[Pair]:
    return [Pair(f"p{i}", (text(CAPTIONS[i % len(CAPTIONS)]),), (picture(2 * i),), (picture(2 * i + 1),)) for i in range(count)]


def keys(pairs: Sequence[Pair], index: int = 0, seed: int = 0) -> list[DrawKey]:
    return [DrawKey(seed, p.id, index) for p in pairs]


def perturb(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Move every trainable parameter, as training would: a fresh LoRA has B = 0 and changes nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def stream(key: DrawKey, purpose: str) -> torch.Generator:
    """A draw's generator, written down a second time: a change of it would change the draws of every run there is."""
    name = f"{key.seed}\0{key.sample}\0{key.index}\0{purpose}"
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the plain module's names, whether or not peft wraps it."""
    found = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.clone() for n, g in found.items() if g is not None}


@contextmanager
def calls(module: nn.Module) -> Iterator[list[int]]:
    """The batch size of every forward call of a module."""
    seen: list[int] = []
    hook = module.register_forward_hook(lambda m, args, kwargs, out: seen.append(_rows(args, kwargs)), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return len(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))
