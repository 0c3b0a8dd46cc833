"""Places in a batch of rows: what the model reads of an answer, which states predict its tokens, and back to (B, U).

B pairs, U scored tokens of a branch, T scored tokens of a whole call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmpo.errors import DataError
from mmpo.kernels.token_stats import Head
from mmpo.modalities.text_tokens import Tokens, span_weights
from mmpo.pair import Pair
from mmpo.scores import Scores

Group = dict[tuple[str, int], Tokens]  # rows under one prompt, by branch and pair


def grouped(pairs: Sequence[Mapping[str, Tokens]]) -> list[Group]:
    """The rows of pairs by branch and pair, those of a pair under one and the same prompt together."""
    found: dict[tuple[int, bytes], Group] = {}
    for i, rows in enumerate(pairs):
        for branch, row in rows.items():
            found.setdefault((i, row.asked), {})[branch, i] = row
    return list(found.values())


def read(row: Tokens) -> Tensor:
    """The answer's tokens up to the last one whose state predicts a scored token."""
    return row.ids[row.prompt_length : int(row.units[-1])]


def lengths(rows: Sequence[Tokens]) -> tuple[int, list[int]]:
    """Tokens of a pair's prompts, the different ones together, and of its answers."""
    prompts = {row.asked: row.prompt_length for row in rows}
    return sum(prompts.values()), [len(read(row)) for row in rows]


def total(lengths: tuple[int, list[int]]) -> int:
    """Tokens of a prompt and its longest answer."""
    return lengths[0] + max(lengths[1])


def predictors(row: Tokens, prompt: range, branch: range) -> Tensor:
    """Positions, in the packed row, of the states that predict a row's scored tokens: the first by the prompt's last."""
    after = row.units - row.prompt_length
    return torch.where(after == 0, prompt[-1], branch.start + after - 1)


def mask_of(rows: Sequence[Tokens | None]) -> Tensor:
    """(B, U) bool from the number of scored tokens of each row; all false where there is no row."""
    lengths = torch.tensor([0 if r is None else int(r.supervised.sum()) for r in rows])
    return torch.arange(max(1, int(lengths.max()))) < lengths[:, None]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(T, ...) values of a branch's scored tokens to (B, U, ...), 0 elsewhere."""
    spread = values.new_zeros(*mask.shape, *values.shape[1:])
    return spread.masked_scatter(mask.view(*mask.shape, *[1] * (values.ndim - 1)), values)


def unit_weights(
    given: Sequence[Mapping[str, Tensor]], masks: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor] | None:
    """(B, U) by branch from each pair's weights (U,) by branch, 1 for the rows without; None where no pair has any."""
    if not any(given):
        return None
    found = {branch: torch.ones(mask.shape) for branch, mask in masks.items()}
    for i, weights in enumerate(given):
        for branch, own in weights.items():
            found[branch][i, : len(own)] = own
    return {branch: values.to(device) for branch, values in found.items()}


def states_of(against: Mapping[str, Scores] | None, masks: Mapping[str, Tensor]) -> tuple[Tensor, Head]:
    """The reference's states in the order of the batch's scored tokens, (T, D), and its head."""
    states = {b: s.states for b, s in (against or {}).items()}
    if not states or any(s is None for s in states.values()):
        raise ValueError("a divergence from the reference needs its states: score it with wants={'states'} first")
    hidden = torch.cat([states[b].hidden[mask] for b, mask in masks.items()])  # type: ignore[union-attr]
    return hidden, next(iter(states.values())).head  # type: ignore[union-attr]


def content_of(pair: Pair, branches: Sequence[str]) -> str:
    """Names all of a pair that its tokens depend on."""
    sides = [(n, [b.digest for b in x.prompt], [b.digest for b in x.response]) for n in branches if (x := pair.branch(n))]
    return repr((sides, sorted(pair.spans.items())))


def span_weights_of(pair: Pair, branch: str, row: Tokens) -> Tensor:
    """(U,) of a branch that has spans. Raises DataError, naming the pair, where they do not fit its text."""
    found = pair.branch(branch)
    assert found is not None
    try:
        return span_weights(row, found.response, pair.spans[branch])
    except ValueError as error:
        raise DataError(f"pair {pair.id}, {branch}: {error}") from error
