"""Over-optimisation: the policy keeps getting better at telling the pairs apart, and worse at what it generates."""

from __future__ import annotations

from collections.abc import Sequence

from mmpo.diagnosis import Flag, Record, evaluations

TOLERANCE = 0.2  # share of the judge's best gain that may be lost again before it counts


def over_optimisation(records: Sequence[Record]) -> Flag | None:
    """A flag when pair accuracy has not fallen since the judge's best evaluation, but the judge's score has.

    Reads `eval/judge` and `eval/pair_accuracy` of all evaluations, step 0 included. The fall has to exceed a fifth of
    the best gain over the base, and half a point in a hundred of the score.
    """
    seen = [r for r in evaluations(records) if "eval/judge" in r and "eval/pair_accuracy" in r]
    if len(seen) < 3:
        return None
    base, last, best = seen[0], seen[-1], max(seen, key=lambda r: r["eval/judge"])
    fall = best["eval/judge"] - last["eval/judge"]
    if (
        fall <= max(TOLERANCE * (best["eval/judge"] - base["eval/judge"]), 0.005)
        or last["eval/pair_accuracy"] < best["eval/pair_accuracy"]
    ):
        return None
    return Flag(
        "over_optimisation",
        f"from step {best['step']} to step {last['step']} the judge's score of held-out samples fell from "
        f"{best['eval/judge']:.3f} to {last['eval/judge']:.3f}, while accuracy on held-out pairs went from "
        f"{best['eval/pair_accuracy']:.3f} to {last['eval/pair_accuracy']:.3f}: "
        "the policy is fitting the pairs beyond what they say about samples",
        f"{_keep(best['step'])} then fewer steps, a larger beta, a smaller lr, "
        "an anchor (- {loss: nll, of: chosen, weight: 1.0}, err_anchor for denoisers), or fresh pairs of the policy's own "
        "samples (--rounds 2)",
    )


def _keep(step: int) -> str:
    """The base has no checkpoint of its own: best/ holds the best of the steps that were taken."""
    return f"keep the checkpoint of step {step} (it is under best/);" if step else "keep the base, as no step improved on it;"
