"""DPOP (Smaug): DPO with a penalty where the chosen side falls below the reference."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import NonNegative
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link", "margin"})
PAPER: str = "arXiv 2402.13228"


def dpop(chosen: Side, rejected: Side, *, beta: float = 0.3, penalty: NonNegative = 50.0) -> Losses:
    """DPO-positive: guards against likelihood displacement inside the sigmoid.

    loss = -log sigmoid(z),  z = beta [ratio_chosen - ratio_rejected - penalty max(0, -log_ratio_chosen)] - margin

    DPO wherever the chosen side is at or above the reference; log 2 when policy = reference.

    beta: per nat, > 0. penalty: the paper's lambda.
    """
    fallen = F.relu(-chosen.log_ratio)
    logits = beta * (chosen.ratio - rejected.ratio - penalty * fallen) - chosen.margin
    return Losses(F.softplus(-logits), beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
