"""BCO on single answers marked desirable or undesirable."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpo.collective import running_mean
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"label", "link"})
STATE: dict[str, float] = {"delta": 0.0, "count": 0.0}
BATCH_STATISTICS: bool = True
PAPER: str = "arXiv 2404.04656"


def bco_unpaired(completion: Side, *, beta: float = 0.1, state: Mapping[str, Tensor]) -> Losses:
    """Binary classifier optimisation of unpaired answers.

    loss = -log sigmoid(r - delta) where label = 1,  -log sigmoid(-(r - delta)) where label = 0,  r = beta ratio

    delta is the mean of r over all present rows of all ranks since the run began, as in `bco`. A label in between mixes the
    two. Absent rows have loss and gradient 0. A row that has both sides has half the loss of `bco`: their mean.

    beta: per nat, > 0.
    """
    reward = beta * torch.where(completion.present, completion.ratio, 0.0)
    delta, count = running_mean(reward[completion.present], state["delta"], state["count"])
    logits = reward - delta
    cost = completion.label * F.softplus(-logits) + (1 - completion.label) * F.softplus(logits)
    loss = torch.where(completion.present, cost, 0.0)
    return Losses(loss, metrics={"bco_delta": delta.expand_as(loss)}, state={"delta": delta, "count": count})
