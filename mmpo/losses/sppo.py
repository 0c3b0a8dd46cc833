"""SPPO: regress each side's log-ratio onto its probability of winning."""

from __future__ import annotations

from torch import Tensor

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset({"ref"})
READS: frozenset[str] = frozenset({"link"})
PAPER: str = "arXiv 2405.00675"


def sppo(chosen: Side, rejected: Side, *, beta: float = 1e-3, soft: bool = False) -> Losses:
    """Self-play preference optimisation: the squared form of a multiplicative-weights step.

    loss = 1/2 [ratio_chosen - (P_chosen - 1/2) / beta]^2 + 1/2 [ratio_rejected - (P_rejected - 1/2) / beta]^2

    P is the probability that an answer beats the model's own. Hard: 1 and 0. Soft: the row's scores, which the pair
    builder fills with the mean of sigmoid(s_i - s_j) over the prompt's samples j, i included. TRL's `sppo_hard` is
    the hard form without the 1/2, that is, twice this.

    beta: the inverse of the paper's eta, > 0. soft: read P from the scores.
    Raises ValueError when soft and a score is not a probability.
    """
    win, lose = (_probability(chosen.score), _probability(rejected.score)) if soft else (1.0, 0.0)
    loss = (chosen.ratio - (win - 0.5) / beta) ** 2 / 2 + (rejected.ratio - (lose - 0.5) / beta) ** 2 / 2
    return Losses(loss, beta * chosen.log_ratio.detach(), beta * rejected.log_ratio.detach())


def _probability(score: Tensor) -> Tensor:
    outside = score[(score < 0) | (score > 1) | score.isnan()]
    if len(outside):
        raise ValueError(
            f"sppo.soft: the row's scores have to be win probabilities in [0, 1], got {outside[0].item():g}; "
            "convert judge scores when building the pairs, or use soft: false"
        )
    return score
