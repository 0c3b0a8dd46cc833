"""IPO: regress the gap between the two log-ratios onto a fixed target."""

from __future__ import annotations

from typing import Literal

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
PAPER: str = "arXiv 2310.12036 eq. 17"


def ipo(chosen: Side, rejected: Side, *, beta: float = 0.1, length_norm: Literal["mean", "sum"] = "mean") -> Losses:
    """Identity preference optimisation: no sigmoid, so no drive to an infinite margin.

    loss = (ratio_chosen - ratio_rejected - 1 / (2 beta))^2

    1 / (4 beta^2) when policy = reference. The paper's ratios are sums; means over units, as in TRL and HALOs, keep
    one beta usable across lengths. For one unit (images) the two coincide.

    beta: the paper's tau, > 0; a target gap of 1 / (2 beta) nats, per unit with "mean". length_norm: see above.
    """
    by_mean = length_norm == "mean"
    gap = chosen.mean_ratio - rejected.mean_ratio if by_mean else chosen.ratio - rejected.ratio
    loss = (gap - 1 / (2 * beta)) ** 2
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
