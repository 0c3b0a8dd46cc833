"""Which pairs a run trains on: within the modality's limits, not displaced, and readable by every term of the objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmpo import ches
from mmpo.errors import DataError, RecipeError
from mmpo.objective import Objective
from mmpo.pair import Pair
from mmpo.prepare import Prepared
from mmpo.schema import Recipe


def admitted(data: Prepared, modality: Any) -> Prepared:
    """The pairs that the modality can score within the recipe's limits; what is left out or changed is counted and said."""
    train, counts = modality.admit(data.train)
    heldout, more = modality.admit(data.heldout)
    shifted, others = modality.admit(data.shifted)
    counts = {n: counts.get(n, 0) + more.get(n, 0) + others.get(n, 0) for n in {**counts, **more, **others}}
    if not train:
        told = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none left out"
        raise DataError(f"{data.account['source']}: no pairs to train on ({told})")
    return replace(data, train=train, heldout=heldout, shifted=shifted, account=data.account | {"limits": counts})


def undisplaced(recipe: Recipe, data: Prepared, modality: Any) -> Prepared:
    """The pairs without those that CHES tells to displace their chosen answer, where the recipe asks for that."""
    if recipe.data.ches_keep is None:
        return data
    train = ches.keep(modality, modality.model, data.train, recipe.data.ches_keep)
    dropped = data.account["dropped"] | {"pair: ln-CHES above the share kept": len(data.train) - len(train)}
    return replace(data, train=train, account=data.account | {"dropped": dropped})


def check_pairs(objective: Objective, pairs: list[Pair]) -> None:
    """RecipeError where a term of the objective reads a side, a branch or spans that a pair does not have."""
    for pair in pairs:
        for term in objective.terms:
            unmarked = [b for b in term.of if b not in pair.spans and pair.branch(b)]
            if lacking := [b for b in term.of if "@" in b and not pair.branch(b)]:
                raise RecipeError(f"row {pair.id} has no branch {lacking[0]}, which {term.name} reads (objective: of:)")
            if term.weights == "spans" and unmarked:
                raise RecipeError(
                    f"row {pair.id} has no spans of its {unmarked[0]} side, by which {term.name} weighs units "
                    "(weights: spans); a side that counts as a whole has an empty list of spans"
                )
    if objective.needs_pairs:
        for pair in pairs:
            if not (pair.chosen and pair.rejected):
                side = "rejected" if pair.chosen else "chosen"
                raise RecipeError(
                    f"row {pair.id} has no {side} side, which {objective.terms[0].name} needs; for unpaired rows use loss: kto"
                )
