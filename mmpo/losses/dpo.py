"""DPO: raise the chosen side's log-ratio over the rejected side's."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.limits import FlipRate
from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"label", "link", "margin"})
PAPER: str = "arXiv 2305.18290 eq. 7"


def dpo(chosen: Side, rejected: Side, *, beta: float = 0.1, label_smoothing: FlipRate = 0.0) -> Losses:
    """Direct preference optimisation; on denoisers it is Diffusion-DPO (arXiv 2311.12908 eq. 14).

    z    = beta (ratio_chosen - ratio_rejected) - margin
    loss = -(1 - e) log sigmoid(z) - e log sigmoid(-z) = softplus(-z) + e z

    e is the probability that the row prefers its rejected side: the row's 1 - label, flipped with probability
    label_smoothing. Exactly log 2, for every e, when policy = reference and margin = 0. With label_smoothing > 0 and
    certain labels it is conservative DPO (cDPO). The row's margin is MODPO's and ODPO's: what the chosen side has to
    win by, in units of reward.

    beta: strength of the pull to the reference, per nat, > 0. label_smoothing: in [0, 0.5), or ValueError.
    Behaviour checked against the original authors' `preference_loss`.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo.label_smoothing: expected a flip rate in [0, 0.5), got {label_smoothing}")
    logits = beta * (chosen.ratio - rejected.ratio) - chosen.margin
    flipped = 1 - chosen.label + label_smoothing * (2 * chosen.label - 1)
    loss = F.softplus(-logits) + flipped * logits
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())
