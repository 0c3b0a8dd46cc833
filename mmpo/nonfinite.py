"""A step whose loss or gradient is not finite: what is said of it, and how many of them a run may skip."""

from __future__ import annotations

from torch import Tensor

from mmpo.errors import RunFailed
from mmpo.objective import Result
from mmpo.pair import Pair
from mmpo.progress import Run, say

NAMED = 5  # pairs in a message
BUDGET = 0.01  # of the steps that may be skipped, where the recipe does not say


def broken(result: Result, bad: Tensor, pairs: list[Pair]) -> str:
    """Which pairs have a loss that is not finite, and the first term of the objective that has none for one of them."""
    if not bad.any():
        return "the loss of a pair of another process is not finite"
    ids = named([p for p, broken in zip(pairs, bad.tolist(), strict=True) if broken])
    first = next((name for name, own in result.terms.items() if not own[bad].isfinite().all()), None)
    where = f"first in the term {first}" if first else "its scores or its weight are not"
    return f"the loss of pair {ids} is not finite ({where})"


def named(pairs: list[Pair]) -> str:
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    return ", ".join(p.id for p in pairs[:NAMED]) + more


def refused(run: Run, what: str) -> dict[str, float]:
    """Stop, or skip the step as long as the recipe's budget lasts."""
    spec, advice = run.recipe.train, "Try a smaller train.lr or beta, train.precision: bf16 or fp32, or "
    if spec.on_nonfinite == "stop":
        advice += "train.on_nonfinite: skip"
        raise RunFailed(f"step {run.progress.step + 1}: {what}; the step was not applied. {advice}")
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.skipped_steps += 1
    whole = spec.steps * spec.rounds
    allowed = max(1, int((BUDGET if spec.nonfinite_budget is None else spec.nonfinite_budget) * whole))
    if run.progress.skipped_steps > allowed:
        raise RunFailed(
            f"step {run.progress.step + 1}: {what}; the step was not applied. {run.progress.skipped_steps} steps were refused "
            f"so far, train.nonfinite_budget allows {allowed} of {whole}. {advice}a larger train.nonfinite_budget"
        )
    say(run, f"step {run.progress.step + 1} skipped: {what}")
    return {"skipped": 1.0}
