"""SimPO: a margin between length-normalised likelihoods, without a reference."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import NonNegative
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset()
READS: frozenset[str] = frozenset({"margin"})
PAPER: str = "arXiv 2405.14734 eq. 6"


def simpo(chosen: Side, rejected: Side, *, beta: float = 2.0, gamma_beta_ratio: NonNegative = 0.5) -> Losses:
    """Simple preference optimisation.

    loss = -log sigmoid(z - gamma),  z = beta (logp_chosen / length - logp_rejected / length) - margin

    gamma is the same for every row, the margin is the row's own.

    beta: per nat, > 0, 2 to 10. gamma_beta_ratio: gamma / beta, the gap aimed at in nats per unit; 0.1 to 0.8.
    """
    logits = beta * (chosen.mean_logp - rejected.mean_logp - gamma_beta_ratio) - chosen.margin
    return Losses(F.softplus(-logits), beta * chosen.mean_logp.detach(), beta * rejected.mean_logp.detach())
