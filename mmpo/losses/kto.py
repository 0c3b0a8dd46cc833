"""KTO: learn from single answers marked desirable or undesirable, without pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from mmpo.collective import global_mean
from mmpo.limits import NonNegative
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"label", "link"})
BATCH_STATISTICS: bool = True
PAPER: str = "arXiv 2402.01306"


def kto(
    completion: Side,
    *,
    beta: float = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
    utility: Literal["kto", "loss_averse"] = "kto",
) -> Losses:
    """Kahneman-Tversky optimisation of unpaired answers; on denoisers it is Diffusion-KTO (arXiv 2404.04465).

    v    = beta (ratio - z0),  z0 = max(0, mean of ratio over the present rows of all ranks), without gradient
    loss = weight_desirable sigmoid(-v) where label = 1,  weight_undesirable sigmoid(v) where label = 0

    A label in between mixes the two. With utility "loss_averse" softplus takes the place of the sigmoid. Absent rows
    have loss and gradient 0. z0 averages the rows' own prompts and answers, as Diffusion-KTO does, on text as well, where
    the authors average answers to other rows' prompts: a deviation, under which z0 rises as the desirable answers do.
    Who has their estimate passes it as the extra `kl_baseline`, (B,) nats, averaged over ranks and clamped.

    beta: per nat, > 0. desirable_weight, undesirable_weight: balance unequal counts, the authors advise
    1 <= (desirable_weight n_desirable) / (undesirable_weight n_undesirable) <= 4/3.
    """
    ratio = torch.where(completion.present, completion.ratio, 0.0)
    estimate = completion.extras.get("kl_baseline")
    baseline = global_mean(ratio[completion.present]).clamp(min=0) if estimate is None else estimate.detach()
    value = beta * (ratio - baseline)
    cost = torch.sigmoid if utility == "kto" else F.softplus
    desirable = desirable_weight * completion.label * cost(-value)
    undesirable = undesirable_weight * (1 - completion.label) * cost(value)
    loss = torch.where(completion.present, desirable + undesirable, 0.0)
    return Losses(loss, metrics={"kl": baseline.expand_as(loss)})
