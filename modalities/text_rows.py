"""Places in a batch of rows: what the model reads of an answer, which states predict its tokens, and back to (B, U).

B pairs, U scored tokens of a branch, T scored tokens of a whole call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpo.modalities.text_tokens import Tokens


def read(row: Tokens) -> Tensor:
    """The answer's tokens up to the last one whose state predicts a scored token."""
    return row.ids[row.prompt_length : int(row.units[-1])]


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
