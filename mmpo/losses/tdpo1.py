"""TDPO1: DPO with the difference of the two sides' token-level KL as its margin."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"kl_ref", "ref"})
READS: frozenset[str] = frozenset({"margin"})
PAPER: str = "arXiv 2404.11999"


def tdpo1(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Losses:
    """Token-level DPO, first form.

    K    = sum over units of KL(reference || policy), over the whole vocabulary
    z    = beta [log_ratio_chosen - log_ratio_rejected - (K_rejected - K_chosen)] - margin
    loss = -log sigmoid(z)

    The gradient passes through both K. log 2 when policy = reference.

    beta: per nat, > 0.
    """
    win, lose = (beta * (s.log_ratio + s.extras["kl_ref"]) for s in (chosen, rejected))
    return Losses(F.softplus(chosen.margin - (win - lose)), win.detach(), lose.detach())
