"""Over-optimisation told from the likelihoods alone: the policy grows sure of itself, and nothing shows that it should."""

from __future__ import annotations

from collections.abc import Sequence

from mmpo.diagnosis import Flag, Record, evaluations

LASTING = 3  # evaluations in a row
ENTROPY = 0.10  # share of the largest entropy so far that has to be gone
MASS = 0.02  # and of the probability of the 10 likeliest tokens


def entropy_fall(records: Sequence[Record]) -> Flag | None:
    """A flag when confidence has been falling for the last evaluations and the judge's best one was before them.

    Reads `eval/top_entropy`, which falls when DPO and IPO over-optimise, and `eval/top_mass`, which falls when a hinge loss
    does (arXiv 2410.11677). Each of the last three evaluations has to be below the largest value before it by 10 % of the
    entropy or by 0.02 of the mass. The paper stops there; but a policy that grows sure of right answers loses entropy, too,
    so where there is a judge (`eval/judge`), a score that is still at its best speaks against the flag.
    """
    seen = [r for r in evaluations(records) if "eval/top_entropy" in r and "eval/top_mass" in r]
    start = len(seen) - LASTING
    if start < 1:
        return None
    name, peak = next(((n, p) for n, share in _BELOW if (p := _peak(seen, start, n, share)) is not None), ("", 0))
    judged = [r["eval/judge"] for r in seen if "eval/judge" in r]
    if not name or (len(judged) == len(seen) and max(judged[start:]) > max(judged[:start])):
        return None
    what = {"eval/top_entropy": "entropy", "eval/top_mass": "probability"}[name]
    most, last = seen[peak], seen[-1]
    return Flag(
        "entropy_fall",
        f"the {what} of the 10 likeliest tokens of held-out answers was {most[name]:.3f} at step {most['step']}, has been well "
        f"below that for {LASTING} evaluations and is {last[name]:.3f} at step {last['step']}, and no judge's score rose "
        "meanwhile: the policy grows sure of itself for nothing",
        f"stop at step {most['step']}, or soon after (eval.every shows it closer); a larger beta, a smaller lr, or an "
        "anchor on the chosen side",
    )


_BELOW = (("eval/top_entropy", ENTROPY), ("eval/top_mass", MASS))


def _peak(seen: Sequence[Record], start: int, name: str, bound: float) -> int | None:
    """Where the largest value was, if all from `start` on are below the largest before them by more than a share `bound`."""
    values = [r[name] for r in seen]
    if any(value > (1 - bound) * max(values[:i]) for i, value in enumerate(values) if i >= start):
        return None
    return values.index(max(values))
