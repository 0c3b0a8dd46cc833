"""Reward anchor: keeps the chosen side's likelihood from falling while preferences are learned."""

from __future__ import annotations

from torch.nn import functional as F

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
PAPER: str = "arXiv 2406.11839"


def reward_anchor(chosen: Side, *, beta: float = 0.1, delta: float = 0.0) -> Losses:
    """mDPO's third term: the chosen side's reward is to be above a fixed value.

    loss = -log sigmoid(beta ratio_chosen - delta)

    log 2 when policy = reference and delta = 0. It is the chosen half of BCO with a delta that does not move.

    beta: per nat, > 0. delta: the anchor, in units of reward. Behaviour checked against luka-group/mDPO@2221bb3
    `mdpo_trainer.py`.
    """
    return Losses(F.softplus(delta - beta * chosen.ratio))
