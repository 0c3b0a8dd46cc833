"""ORPO: supervised fine-tuning with an odds-ratio penalty, without a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset()
READS: frozenset[str] = frozenset()
PAPER: str = "arXiv 2403.07691"


def orpo(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Losses:
    """Odds-ratio preference optimisation.

    loss = -u_chosen - beta log sigmoid(log odds(u_chosen) - log odds(u_rejected)),  log odds(u) = u - log(1 - e^u)

    u is the mean log-likelihood per unit, so e^u has to be a probability: token models, not denoisers.

    beta: the paper's lambda, the weight of the odds-ratio term (TRL's name).
    """
    win, lose = _log_odds(chosen.mean_logp), _log_odds(rejected.mean_logp)
    loss = -chosen.mean_logp + beta * F.softplus(lose - win)
    return Losses(loss, beta * chosen.mean_logp.detach(), beta * rejected.mean_logp.detach())


def _log_odds(u: Tensor) -> Tensor:
    """The clamp keeps a side of probability 1 at odds of a million, where the log still has a gradient in fp32."""
    u = u.clamp(max=-1e-6)
    return u - torch.log(-torch.expm1(u))
