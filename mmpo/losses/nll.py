"""NLL: supervised fine-tuning on the chosen side, alone or as a regulariser beside a preference loss."""

from __future__ import annotations

from typing import Literal

from mmpo.scores import Losses, Side

NEEDS: frozenset[str] = frozenset()
READS: frozenset[str] = frozenset()
PAPER: str = "arXiv 2404.19733"


def nll(chosen: Side, *, length_norm: Literal["mean", "sum"] = "mean") -> Losses:
    """Negative log-likelihood of the chosen side; beside DPO it is iterative RPO's second term.

    loss = -logp_chosen / length, or -logp_chosen

    On denoisers logp is -(T/2) w(t) err, so this is the T/2-fold training error; `err_anchor` is the plain one.

    length_norm: "mean" over the units of the row, nats per unit, or their "sum", nats.
    """
    return Losses(-chosen.mean_logp if length_norm == "mean" else -chosen.logp)
