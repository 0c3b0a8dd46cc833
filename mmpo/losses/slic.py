"""SLiC: a margin between plain log-likelihoods, held up by the chosen side's own."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import NonNegative
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset()
READS: frozenset[str] = frozenset({"margin"})
PAPER: str = "arXiv 2305.10425"


def slic(chosen: Side, rejected: Side, *, delta: NonNegative = 1.0, alpha: NonNegative = 0.1) -> Losses:
    """Sequence likelihood calibration, without a reference.

    loss = max(0, delta + margin - (logp_chosen - logp_rejected)) - alpha logp_chosen / length

    The regulariser is the authors' cross-entropy with the chosen side as its target.

    delta: nats that the chosen side has to win by. alpha: weight of the likelihood term, in nats per unit.
    """
    gap = chosen.logp - rejected.logp
    loss = F.relu(delta + chosen.margin - gap) - alpha * chosen.mean_logp
    return Losses(loss, chosen.logp.detach(), rejected.logp.detach())
