"""DiscoPOP: the loss that a language model discovered, a blend of logistic and exponential."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import Share
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link", "margin"})
PAPER: str = "arXiv 2406.08414"


def discopop(chosen: Side, rejected: Side, *, beta: float = 0.05, temperature: Share = 0.05) -> Losses:
    """Log-ratio modulated loss (LRML).

    z    = beta (ratio_chosen - ratio_rejected) - margin
    loss = -(1 - m) log sigmoid(z) + m e^-z,  m = sigmoid(z / temperature)

    (1 + log 2) / 2 when policy = reference. Not convex: next to z = 0 it rises with z.

    beta: per nat, > 0. temperature: width of the blend, in (0, 1]. Raises ValueError outside: m e^-z would overflow.
    """
    if not 0 < temperature <= 1:
        raise ValueError(f"discopop.temperature: expected a value in (0, 1], got {temperature}")
    logits = beta * (chosen.ratio - rejected.ratio) - chosen.margin
    logistic = (-logits / temperature).sigmoid() * F.softplus(-logits)
    exponential = (-F.softplus(-logits / temperature) - logits).exp()  # m e^-z, whose factors alone are 0 and infinite
    return Losses(logistic + exponential, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
