"""Likelihood displacement: the margin grows although the chosen answers become less likely too."""

from __future__ import annotations

from collections.abc import Sequence

from mmpo.diagnosis import Flag, Record, evaluations

REWARD = 0.25  # implicit reward, beta times the drift, below which a loss on the chosen side is too small to matter
ERRORS = 2.0  # standard errors over held-out pairs by which the drift has to exceed its bound


def displacement(records: Sequence[Record]) -> Flag | None:
    """A flag when held-out chosen answers lost more log-likelihood against the reference than the margin gained.

    Reads `eval/drift_chosen` (nats below the reference, positive = less likely), its standard error over the pairs,
    `eval/margin` and the shares `eval/fell_*` of the last evaluation, and beta of the start. A margin of 1 / beta nats is one
    unit of reward, so the loss counts from a quarter of that on, and only as far as it cannot be the choice of held-out
    pairs. Beta is 1 where the objective has none.
    """
    seen = [r for r in evaluations(records) if "eval/drift_chosen" in r and r["step"] > 0]
    if not seen:
        return None
    last, start = seen[-1], next((r for r in records if r.get("event") == "start"), {})
    drift, margin = last["eval/drift_chosen"], last["eval/margin"]
    beta, error = start.get("beta") or 1.0, last.get("eval/drift_chosen_error", 0.0)
    if not drift - ERRORS * error > max(margin, 0.0) or beta * drift < REWARD:
        return None
    return Flag(
        "displacement",
        f"at step {last['step']} the chosen answers of held-out pairs are {drift:.3g} nats (a reward of "
        f"{-beta * drift:.3g}) less likely than under the reference, more than the margin of {margin:.3g} nats that was won"
        f"{_shares(last)}: both sides are being unlearnt",
        "add an anchor on the chosen side (- {loss: err_anchor, of: chosen, weight: 1.0} for denoisers, nll for tokens), "
        "lower the lr, or drop pairs whose two sides are nearly the same (data.ches_keep for tokens)",
    )


def _shares(record: Record) -> str:
    if "eval/fell_both" not in record:
        return ""
    chosen, both = record["eval/fell_chosen"], record["eval/fell_both"]
    return f" (the chosen answer fell in {chosen:.0%} of the pairs, both answers in {both:.0%})"
