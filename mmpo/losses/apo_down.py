"""APO-down: lower both sides, the rejected one more."""

from __future__ import annotations

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
PAPER: str = "arXiv 2408.06266"


def apo_down(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Losses:
    """Anchored preference optimisation for pairs whose chosen side is worse than what the model writes.

    loss = sigmoid(beta ratio_chosen) + sigmoid(-beta (ratio_chosen - ratio_rejected))

    1 when policy = reference. The first term lowers the chosen side on purpose; the opposite case is `apo_zero`.

    beta: per nat, > 0.
    """
    logits = beta * (chosen.ratio - rejected.ratio)
    loss = (beta * chosen.ratio).sigmoid() + (-logits).sigmoid()
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
