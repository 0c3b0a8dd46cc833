"""R-DPO: DPO that discounts pairs the longer side would win by length alone."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import NonNegative
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link", "margin"})
PAPER: str = "arXiv 2403.19159"


def rdpo(chosen: Side, rejected: Side, *, beta: float = 0.1, alpha: NonNegative = 0.05) -> Losses:
    """Length-regularised DPO.

    loss = -log sigmoid(z),  z = beta (ratio_chosen - ratio_rejected) + alpha (length_chosen - length_rejected) - margin

    DPO when the lengths are equal, and so on every image. A longer chosen side starts with a larger z, hence a
    smaller gradient.

    beta: per nat, > 0. alpha: per unit, >= 0.
    """
    longer = chosen.length - rejected.length
    logits = beta * (chosen.ratio - rejected.ratio) + alpha * longer - chosen.margin
    return Losses(F.softplus(-logits), beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
