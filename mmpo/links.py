"""Links: how a log-ratio becomes a reward. Reverse KL (the identity) is DPO; the others are f-DPO's divergences.

Source: Beyond Reverse KL (f-DPO), arXiv 2309.16240, table 1: reward = beta f'(pi/ref) up to a constant. The constant
cancels between chosen and rejected; here it is chosen so that every link is 0 with slope 1 where policy = reference
(Jensen-Shannon: slope 1/2), which is what the losses that read one side at a time (NCA, APO, KTO, SPPO) rely on.
u is the log-ratio, in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ALPHA = 0.5
STEEPEST = 20.0  # nats; e^20 squared and summed over 10^9 parameters still fits fp32, so gradient clipping stays finite


def reverse_kl(u: Tensor) -> Tensor:
    """f(r) = r log r, f'(e^u) = u + 1: the identity."""
    return u


def forward_kl(u: Tensor) -> Tensor:
    """f(r) = -log r, f'(e^u) = -e^-u. Continued as a straight line below u = -20."""
    return -_expm1(-u)


def jensen_shannon(u: Tensor) -> Tensor:
    """f(r) = r log r - (r + 1) log((r + 1) / 2), f'(e^u) = log(2 e^u / (1 + e^u))."""
    return math.log(2) - F.softplus(-u)


def alpha_divergence(u: Tensor, alpha: float = ALPHA) -> Tensor:
    """f'(e^u) = -e^(-alpha u) / alpha with the paper's alpha in (0, 1), which TRL calls 1 - alpha.

    Reverse KL as alpha -> 0, forward KL as alpha -> 1. Continued as a straight line below u = -20 / alpha.
    """
    return -_expm1(-alpha * u) / alpha


LINKS = {f.__name__: f for f in (reverse_kl, forward_kl, jensen_shannon, alpha_divergence)}


def apply(name: str, u: Tensor, alpha: float = ALPHA) -> Tensor:
    """The named link of log-ratios u, any shape; alpha is the alpha divergence's. Raises ValueError for an unknown name."""
    if name not in LINKS:
        raise ValueError(f"link: expected one of {', '.join(LINKS)}, got {name!r}")
    return alpha_divergence(u, alpha) if name == alpha_divergence.__name__ else LINKS[name](u)


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1, continued as its tangent above STEEPEST: a clamp alone would stop the gradient of the worst rows."""
    return torch.expm1(x.clamp(max=STEEPEST)) + math.exp(STEEPEST) * F.relu(x - STEEPEST)
