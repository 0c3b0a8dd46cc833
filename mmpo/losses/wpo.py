"""WPO: DPO on pairs weighed by how likely the policy is to write them itself."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mmpo.limits import FlipRate
from mmpo.losses.dpo import dpo
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"log_sum_p2", "ref"})
READS: frozenset[str] = frozenset({"label", "link", "margin"})
PAPER: str = "arXiv 2406.11827"


def wpo(chosen: Side, rejected: Side, *, beta: float = 0.01, label_smoothing: FlipRate = 0.0, clamp: bool = True) -> Losses:
    """Weighted preference optimisation: simulates on-policy learning on the answers of other models.

    loss = w_chosen w_rejected dpo,  log w = mean over units of (logp - log sum_v p_v^2), without gradient

    sum_v p_v^2 is the policy's own expected probability: an answer sampled from the policy has a weight of about 1.

    beta, label_smoothing: see `dpo`. clamp: the product at most 1, as the authors' code has it; TRL's has not.
    """
    log_weight = _log_weight(chosen) + _log_weight(rejected)
    weight = (log_weight.clamp(max=0) if clamp else log_weight).exp()
    losses = dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    return replace(losses, loss=weight * losses.loss, metrics={"wpo_weight": weight})


def _log_weight(side: Side) -> Tensor:
    return ((side.logp - side.extras["log_sum_p2"]) / side.units).detach()
