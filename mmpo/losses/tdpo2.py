"""TDPO2: TDPO with a strength of its own for the KL margin, which only the rejected side's KL follows."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import NonNegative
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"kl_ref", "ref"})
READS: frozenset[str] = frozenset({"margin"})
PAPER: str = "arXiv 2404.11999"


def tdpo2(chosen: Side, rejected: Side, *, beta: float = 0.1, alpha: NonNegative = 0.5) -> Losses:
    """Token-level DPO, second form.

    K    = sum over units of KL(reference || policy), over the whole vocabulary
    z    = beta [log_ratio_chosen - log_ratio_rejected - alpha (K_rejected - K_chosen)] - margin
    loss = -log sigmoid(z)

    No gradient passes through K_chosen, so that the chosen side's KL is not driven up. log 2 when policy = reference.

    beta: per nat, > 0. alpha: strength of the KL margin, >= 0.
    """
    kl = rejected.extras["kl_ref"] - chosen.extras["kl_ref"].detach()
    logits = beta * (chosen.log_ratio - rejected.log_ratio - alpha * kl) - chosen.margin
    win, lose = (beta * (s.log_ratio + s.extras["kl_ref"]) for s in (chosen, rejected))
    return Losses(F.softplus(-logits), win.detach(), lose.detach())
