"""CHES scores: which preference pairs will displace the likelihood of their chosen answer, told before any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpo.errors import RecipeError
from mmpo.modality import DrawKey
from mmpo.pair import Pair


def ches(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Centred hidden embedding similarity, (B,): <h+, h-> - ||h+||^2 (arXiv 2410.08847, definition 2).

    chosen, rejected: (B, D), the final hidden states that predict an answer's tokens, summed. The higher, the more the
    chosen answer loses when DPO trains on the pair.
    """
    return (chosen * rejected).sum(-1) - chosen.square().sum(-1)


def ln_ches(chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor) -> Tensor:
    """CHES of the means of the states instead of their sums, (B,), which compares pairs of different lengths.

    The authors' script takes lengths from the padded tensor and drops its last column; here they are the scored tokens.
    """
    return ches(chosen / chosen_length[:, None], rejected / rejected_length[:, None])


@torch.no_grad()
def score(modality: Any, model: nn.Module, pairs: Sequence[Pair], batch: int = 32) -> dict[str, Tensor]:
    """`ches` and `ln_ches` of pairs under a model, (n,) fp64 each on the CPU; NaN where a pair lacks a side.

    Raises RecipeError for a modality without hidden states of tokens.
    """
    if "hidden_sum" not in modality.PROVIDES:
        raise RecipeError("data.ches_keep: CHES needs hidden states of tokens, which this modality does not have")
    found: dict[str, list[Tensor]] = {"ches": [], "ln_ches": []}
    for start in range(0, len(pairs), batch):
        part = list(pairs[start : start + batch])
        drawn = modality.draw(modality.encode(part), [DrawKey(0, "ches/" + p.id, 0) for p in part], model)
        scores = modality.score(model, drawn, frozenset({"hidden_sum"}))
        sides = [scores[side] for side in ("chosen", "rejected")]
        sums, lengths = [s.extras["hidden_sum"].double() for s in sides], [s.mask.sum(-1).double() for s in sides]
        absent = (lengths[0] == 0) | (lengths[1] == 0)
        for name, values in (("ches", ches(*sums)), ("ln_ches", ln_ches(*sums, *lengths))):
            found[name].append(values.masked_fill(absent, torch.nan).cpu())
    return {name: torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64) for name, parts in found.items()}


def keep(modality: Any, model: nn.Module, pairs: Sequence[Pair], share: float) -> list[Pair]:
    """The `share` of the pairs with the lowest ln-CHES under `model`, in their order; at least one pair.

    Of equal scores the first stay; a pair that lacks a side has no score and comes last.
    """
    count = max(1, round(share * len(pairs)))
    order = score(modality, model, pairs)["ln_ches"].nan_to_num(torch.inf).argsort(stable=True)[:count]
    return [pairs[i] for i in sorted(order.tolist())]
