"""SmPO: DPO whose logit is scaled by how certain the preference is."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import Positive
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"label", "link"})
PAPER: str = "arXiv 2506.02698"


def smpo(chosen: Side, rejected: Side, *, beta: float = 2.0, scale: Positive = 10.0) -> Losses:
    """Smoothed preference optimisation of denoisers, with the label p from a reward model.

    loss = -log sigmoid(scale (2 p - 1) beta (ratio_chosen - ratio_rejected))

    log 2 when policy = reference; a tie, p = 1/2, has no gradient; p < 1/2 prefers the other side. The authors' code
    scales the whole batch by its first row's p; here every row has its own.

    beta: per nat, > 0; 2 is the authors' 2000 for SD 1.5, as logp carries T = 1000. scale: the authors' 10.
    """
    logits = scale * (2 * chosen.label - 1) * beta * (chosen.ratio - rejected.ratio)
    return Losses(F.softplus(-logits), beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
