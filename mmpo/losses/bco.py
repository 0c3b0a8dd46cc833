"""BCO: a classifier of chosen against rejected answers, its threshold the mean of all rewards so far."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, stack
from torch.nn import functional as F

from mmpo.collective import running_mean
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
STATE: dict[str, float] = {"delta": 0.0, "count": 0.0}
BATCH_STATISTICS: bool = True
PAPER: str = "arXiv 2404.04656"


def bco(chosen: Side, rejected: Side, *, beta: float = 0.1, shift: bool = True, state: Mapping[str, Tensor]) -> Losses:
    """Binary classifier optimisation, on pairs.

    loss = -log sigmoid(a - delta) - log sigmoid(-(b - delta)),  a = beta ratio_chosen,  b = beta ratio_rejected

    delta is the mean of a and b over all rows of all ranks since the run began, this batch included, without gradient. The
    prompt density weights of the paper (UDM) are not computed here; a row's own weight takes their place. 2 log 2 when
    policy = reference. For answers without a counterpart see `bco_unpaired`.

    beta: per nat, > 0. shift: false holds delta at 0, which is TRL's `bco_pair` and the form in InternVL's mix.
    """
    a, b = beta * chosen.ratio, beta * rejected.ratio
    mean, count = running_mean(stack([a, b]), state["delta"], state["count"])
    delta = mean if shift else 0 * mean
    loss = F.softplus(delta - a) + F.softplus(b - delta)
    rewards = beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach()
    return Losses(loss, *rewards, metrics={"bco_delta": delta.expand_as(a)}, state={"delta": mean, "count": count})
