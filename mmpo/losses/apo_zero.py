"""APO-zero: raise the chosen side and lower the rejected side, each on its own."""

from __future__ import annotations

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
PAPER: str = "arXiv 2408.06266"


def apo_zero(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Losses:
    """Anchored preference optimisation for pairs whose chosen side is better than what the model writes.

    loss = sigmoid(-beta ratio_chosen) + sigmoid(beta ratio_rejected)

    1 when policy = reference. The opposite case is `apo_down`.

    beta: per nat, > 0.
    """
    loss = (-beta * chosen.ratio).sigmoid() + (beta * rejected.ratio).sigmoid()
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
