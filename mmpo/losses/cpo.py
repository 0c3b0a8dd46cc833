"""CPO: DPO with a uniform reference, held up by the chosen side's likelihood."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import NonNegative
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset()
READS: frozenset[str] = frozenset({"margin"})
PAPER: str = "arXiv 2401.08417"


def cpo(chosen: Side, rejected: Side, *, beta: float = 0.1, alpha: NonNegative = 1.0) -> Losses:
    """Contrastive preference optimisation.

    loss = -log sigmoid(z) - alpha logp_chosen / length,  z = beta (logp_chosen - logp_rejected) - margin

    beta: per nat, > 0. alpha: weight of the likelihood term, in nats per unit.
    """
    logits = beta * (chosen.logp - rejected.logp) - chosen.margin
    loss = F.softplus(-logits) - alpha * chosen.mean_logp
    return Losses(loss, beta * chosen.logp.detach(), beta * rejected.logp.detach())
