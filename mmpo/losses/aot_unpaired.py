"""AOT, unpaired: the distribution of chosen log-ratios is to lie above that of rejected ones."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mmpo.collective import of_same_rank
from mmpo.limits import FlipRate
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset()
BATCH_STATISTICS: bool = True
PAPER: str = "arXiv 2406.05882"


def aot_unpaired(chosen: Side, rejected: Side, *, beta: float = 0.01, label_smoothing: FlipRate = 0.0) -> Losses:
    """Alignment by optimal transport, unpaired: a chosen answer is compared with the rejected one of its place.

    z    = beta (log_ratio_chosen - log_ratio_rejected), each sorted over the rows of all ranks
    loss = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

    The prompts of the two need not be the same. The loss depends on the whole batch; for one row it is DPO. log 2 when
    policy = reference.

    beta: per nat, > 0. label_smoothing: e, in [0, 0.5), or ValueError.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"aot_unpaired.label_smoothing: expected a flip rate in [0, 0.5), got {label_smoothing}")
    win, lose = chosen.log_ratio, rejected.log_ratio

    def cost(gap: Tensor) -> Tensor:
        return F.softplus(-beta * gap) + label_smoothing * beta * gap

    loss = cost(win - of_same_rank(lose, by=win))
    mirrored = cost(of_same_rank(win, by=lose) - lose)  # the same terms in the order of the rejected sides,
    loss = loss + mirrored - mirrored.detach()  # for their gradient: the two of a term may be rows of different ranks
    return Losses(loss, beta * win.detach(), beta * lose.detach())
