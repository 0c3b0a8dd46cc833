"""EXO: match the pair's preference distribution by reverse KL."""

from __future__ import annotations

import math

from torch.nn import functional as F

from mmpo.limits import SomeFlipRate
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
PAPER: str = "arXiv 2402.00856"


def exo(chosen: Side, rejected: Side, *, beta: float = 0.1, label_smoothing: SomeFlipRate = 1e-3) -> Losses:
    """Efficient exact optimisation, pair form: KL(policy's preference || smoothed label), the reverse of cDPO's.

    q    = sigmoid(beta (ratio_chosen - ratio_rejected))
    loss = q log(q / (1 - e)) + (1 - q) log((1 - q) / e)

    Smallest, 0, at q = 1 - e; beyond that the loss rises again, and pairs far from it in either direction have a
    vanishing gradient.

    beta: per nat, > 0. label_smoothing: e, in (0, 0.5). Raises ValueError outside that range.
    """
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"exo.label_smoothing: expected a value in (0, 0.5), as log 0 is not finite; got {label_smoothing}")
    logits = beta * (chosen.ratio - rejected.ratio)
    win = logits.sigmoid() * (-F.softplus(-logits) - math.log1p(-label_smoothing))
    lose = (-logits).sigmoid() * (-F.softplus(logits) - math.log(label_smoothing))
    return Losses(win + lose, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
