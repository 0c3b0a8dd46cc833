"""The random numbers of a denoiser's draw, a function of its key alone (`mmpo.modality.DrawKey`)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mmpo.modality import DrawKey
from mmpo.schema import DrawConfig


class Draw:
    """The random numbers of one draw: each stream is seeded by what it is for, so none depends on another's use."""

    def __init__(self, key: DrawKey, spec: DrawConfig, prompt_dropout: float):
        self.key, self.spec = key, spec
        self.dropped = prompt_dropout > 0 and bool(torch.rand((), generator=self._stream("prompt")) < prompt_dropout)

    def seed(self, purpose: str) -> int:
        name = f"{self.key.seed}\0{self.key.sample}\0{self.key.index}\0{purpose}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")

    def _stream(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(purpose))

    def time(self, member: str) -> Tensor:
        """Place on the noise schedule in [0, 1), by the recipe's density."""
        stream = self._stream("time/" + member)
        if self.spec.timesteps == "logit_normal":
            place = torch.sigmoid(self.spec.logit_mean + self.spec.logit_std * torch.randn((), generator=stream))
        elif self.spec.timesteps == "grid":  # a low-discrepancy walk over the draws of one pair
            offset = torch.rand((), generator=torch.Generator().manual_seed(self._first(member)))
            place = (offset + self.key.index * 0.6180339887498949) % 1.0
        else:
            place = torch.rand((), generator=stream)
        return (self.spec.t_min + (self.spec.t_max - self.spec.t_min) * place).clamp(max=1 - 1e-6)

    def _first(self, member: str) -> int:
        name = f"{self.key.seed}\0{self.key.sample}\0grid/{member}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")

    def noise(self, shape: torch.Size, member: str) -> Tensor:
        return torch.randn(shape, generator=self._stream("noise/" + member))
