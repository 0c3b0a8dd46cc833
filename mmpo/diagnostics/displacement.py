"""Likelihood displacement: the margin grows although the chosen answers become less likely too."""

from __future__ import annotations

from collections.abc import Sequence

from mmpo.diagnosis import Flag, Record, evaluations


def displacement(records: Sequence[Record]) -> Flag | None:
    """A flag when held-out chosen answers lost more log-likelihood against the reference than the margin gained.

    Reads `eval/drift_chosen` (nats below the reference, positive = less likely) and `eval/margin` of the last evaluation.
    """
    seen = [r for r in evaluations(records) if "eval/drift_chosen" in r and r["step"] > 0]
    if not seen or seen[-1]["eval/drift_chosen"] <= max(seen[-1]["eval/margin"], 0.0):
        return None
    last = seen[-1]
    return Flag(
        "displacement",
        f"at step {last['step']} the chosen answers of held-out pairs are {last['eval/drift_chosen']:.3g} nats less likely than under the "
        f"reference, more than the margin of {last['eval/margin']:.3g} nats that was won: both sides are being unlearnt",
        "add an anchor on the chosen side (- {loss: err_anchor, of: chosen, weight: 1.0} for denoisers, nll for tokens), lower the lr, "
        "or drop pairs whose two sides are nearly the same",
    )
