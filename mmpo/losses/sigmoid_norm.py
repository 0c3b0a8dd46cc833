"""Length-normalised DPO: Tulu 3's loss."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link", "margin"})
PAPER: str = "arXiv 2411.15124"


def sigmoid_norm(chosen: Side, rejected: Side, *, beta: float = 5.0) -> Losses:
    """DPO on log-ratios per unit, so that the length of an answer does not enter its reward.

    loss = -log sigmoid(z),  z = beta (ratio_chosen / length_chosen - ratio_rejected / length_rejected) - margin

    log 2 when policy = reference. For one unit (images) it is DPO.

    beta: per nat per unit, > 0; larger than DPO's, as the ratios are means.
    """
    logits = beta * (chosen.mean_ratio - rejected.mean_ratio) - chosen.margin
    return Losses(F.softplus(-logits), beta * chosen.mean_ratio.detach(), beta * rejected.mean_ratio.detach())
