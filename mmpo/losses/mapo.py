"""MaPO: widen a margin between the two denoising errors, without a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpo.limits import Positive
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"err"})
READS: frozenset[str] = frozenset()
PAPER: str = "arXiv 2406.06424"


def mapo(chosen: Side, rejected: Side, *, beta: float = 0.1, kappa: Positive = 0.5, timesteps: Positive = 1000.0) -> Losses:
    """Margin-aware preference optimisation of denoisers: the chosen side's training error plus a margin term.

    loss = err_chosen - beta log sigmoid(T [s(err_chosen) - s(err_rejected)]),  s(err) = kappa err / (e^(kappa err) - 1)

    s falls from 1 at err = 0 to 0: a bounded likelihood. err + beta log 2 when both errors are equal. The authors'
    code computes exp(x) - 1, off by 1 in the logit at err = 1e-4 in fp32; here it is expm1 and a series.

    beta: weight of the margin term. kappa: steepness of s (the code's `snr_value`). timesteps: T.
    """
    better, worse = (s.extras["err"] / s.units for s in (chosen, rejected))
    win, lose = timesteps * _likelihood(kappa * better), timesteps * _likelihood(kappa * worse)
    return Losses(better + beta * F.softplus(lose - win), win.detach(), lose.detach())


def _likelihood(x: Tensor) -> Tensor:
    """x / (e^x - 1) for x >= 0, as x e^-x / (1 - e^-x): neither it nor its gradient overflows or divides by 0."""
    small = x < 0.05
    series = 1 - x / 2 + x**2 / 12 - x**4 / 720
    safe = torch.where(small, 1.0, x)
    return torch.where(small, series, -safe * torch.exp(-safe) / torch.expm1(-safe))
