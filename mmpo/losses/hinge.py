"""Hinge: DPO's margin under the loss of a support vector machine."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link", "margin"})
PAPER: str = "arXiv 2309.06657"


def hinge(chosen: Side, rejected: Side, *, beta: float = 0.1) -> Losses:
    """Hinge loss on the reward margin (SLiC's loss in RSO's form): satisfied pairs stop pulling.

    loss = max(0, 1 - z),  z = beta (ratio_chosen - ratio_rejected) - margin

    1 when policy = reference and margin = 0.

    beta: per nat, > 0; a pair is satisfied once its gap exceeds 1 / beta nats.
    """
    logits = beta * (chosen.ratio - rejected.ratio) - chosen.margin
    return Losses(F.relu(1 - logits), beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
