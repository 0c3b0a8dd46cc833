"""Where in a picture, and when in the noise schedule, a denoiser's likelihood has moved (`mmpo.modality.LogRatios`).

    r[h, w] = -(T/2) w(t) (sq_policy[h, w] - sq_base[h, w]) / (h w),   sq: squared error, mean over channels, T = 1000

averaged over draws of (t, eps) that policy and base share. Regions add up to the difference of the two likelihoods. All
answers to all prompts meet the same draws, so that what is compared differs in the picture alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from mmpo import reference as references
from mmpo.modality import DrawKey, LogRatios
from mmpo.pair import Block, Pair

T = 1000.0
NAME = "explained"
DRAWS = 32
CHUNK = 8  # draws of one model call


def surrogate(weight: Tensor, err: Tensor) -> Tensor:
    """logp = -(T/2) w(t) err, in nats."""
    return -(T / 2) * weight * err


@torch.no_grad()
def by_region(
    adapter: Any,
    model: nn.Module,
    base: references.Reference,
    prompt: tuple[Block, ...],
    answer: Block,
    seed: int,
    draws: int = DRAWS,
) -> LogRatios:
    """The mean over `draws` draws, as the recipe draws them, by region of the latent and by draw; no prompt is dropped."""
    (encoded,) = adapter.encode([Pair(NAME, prompt, (answer,))])
    keys = (DrawKey(seed, NAME, index) for index in itertools.count())
    kept = list(itertools.islice((k for k in keys if not adapter.drops(k)), draws))
    parts, times = [], []
    for start in range(0, draws, CHUNK):
        part = kept[start : start + CHUNK]
        batch = adapter.draw([encoded] * len(part), part, model)
        with base.active(model) as module:
            before = _by_place(adapter, module, batch)
        parts.append(_by_place(adapter, model, batch) - before)
        times.append(batch.time)
    regions, time = torch.cat(parts).double().cpu(), torch.cat(times).cpu()
    values = regions.sum((1, 2))
    pairs = tuple(zip(time.tolist(), values.tolist(), strict=True))
    return LogRatios(float(values.mean()), regions=regions.mean(0).numpy(), times=pairs)


def _by_place(adapter: Any, model: nn.Module, batch: Any) -> Tensor:
    """(N, h, w) that add up to the surrogate log-likelihood of each row."""
    squares = adapter.squares(model, batch).mean(1)
    return surrogate(batch.weight[:, None, None], squares) / squares[0].numel()
