"""AOT: the distribution of the policy's gaps is to lie above that of the reference's, whatever pair they belong to."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.collective import of_same_rank
from mmpo.limits import FlipRate
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset()
BATCH_STATISTICS: bool = True
PAPER: str = "arXiv 2406.05882"


def aot(chosen: Side, rejected: Side, *, beta: float = 0.01, label_smoothing: FlipRate = 0.0) -> Losses:
    """Alignment by optimal transport, paired: first-order stochastic dominance of gaps.

    u    = logp_chosen - logp_rejected of the policy,  v = the reference's gap of the same place in sorted order
    z    = beta (u - v)
    loss = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

    Both are sorted over the rows of all ranks, so the loss depends on the whole batch; for one row it is DPO. log 2 when
    policy = reference. The link is not read: gaps of likelihoods are compared, not ratios.

    beta: per nat, > 0. label_smoothing: e, in [0, 0.5), or ValueError.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"aot.label_smoothing: expected a flip rate in [0, 0.5), got {label_smoothing}")
    gap = chosen.logp - rejected.logp
    logits = beta * (gap - of_same_rank(chosen.reference - rejected.reference, by=gap))
    loss = F.softplus(-logits) + label_smoothing * logits
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
