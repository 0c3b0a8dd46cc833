"""NCA: noise-contrastive alignment, which holds the chosen side's likelihood in place."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
PAPER: str = "arXiv 2402.05369"


def nca(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Losses:
    """Noise-contrastive alignment, pair form: optimises absolute rewards, so both sides cannot fall together.

    loss = -log sigmoid(a) - 1/2 log sigmoid(-a) - 1/2 log sigmoid(-b),  a = beta ratio_chosen,  b = beta ratio_rejected

    2 log 2 when policy = reference. The chosen reward is drawn to log 2 (sigmoid = 2/3), not to infinity.

    beta: per nat, > 0; the authors use 0.01 on text.
    """
    a, b = beta * chosen.ratio, beta * rejected.ratio
    loss = F.softplus(-a) + F.softplus(a) / 2 + F.softplus(b) / 2
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
