"""Robust DPO: DPO's loss, made unbiased under labels that are flipped with a known probability."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import FlipRate
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link", "margin"})
PAPER: str = "arXiv 2403.00409"


def robust(chosen: Side, rejected: Side, *, beta: float = 0.1, label_smoothing: FlipRate = 0.1) -> Losses:
    """Provably robust DPO: in expectation over the flips, the DPO loss of the clean labels.

    z    = beta (ratio_chosen - ratio_rejected) - margin
    loss = [-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2 e) = softplus(-z) - e z / (1 - 2 e)

    DPO when e = 0; log 2 when policy = reference. Unbounded below as z grows, unlike cDPO: watch the margin.

    beta: per nat, > 0. label_smoothing: e, the rate of flipped labels in the data, in [0, 0.5).
    Raises ValueError outside that range.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust.label_smoothing: expected a flip rate in [0, 0.5), got {label_smoothing}")
    logits = beta * (chosen.ratio - rejected.ratio) - chosen.margin
    loss = F.softplus(-logits) - label_smoothing / (1 - 2 * label_smoothing) * logits
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
