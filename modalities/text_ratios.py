"""Where in an answer of text a model's likelihood has moved: token by token (`mmpo.modality.LogRatios`)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from mmpo import reference as references
from mmpo.modality import DrawKey, LogRatios
from mmpo.pair import Block, Pair

NAME = "explained"


@torch.no_grad()
def by_token(
    adapter: Any, model: nn.Module, base: references.Reference, prompt: tuple[Block, ...], answer: Block, seed: int
) -> LogRatios:
    """log policy - log base of every scored token, with its characters; the prompt is never dropped here.

    Raises DataError for an answer without a token to score, or one that is too long for the model.
    """
    encoded = adapter.encode([Pair(NAME, prompt, (answer,))])
    keys = (DrawKey(seed, NAME, index) for index in itertools.count())
    batch = adapter.draw(encoded, [next(k for k in keys if not adapter.drops(k))], model)
    before = references.score(base, adapter, model, batch)
    assert before is not None
    after = adapter.score(model, batch)["chosen"]
    ratios = (after.logp - before["chosen"].logp).double()[after.mask].tolist()
    row = encoded[0].rows["chosen"]
    places = row.offsets[row.supervised].tolist()
    tokens = tuple((start, end, value) for (start, end), value in zip(places, ratios, strict=True))
    return LogRatios(sum(ratios), tokens)
