"""Deterministic inversion: which noise would have led to this picture? (DDIM-InPO, and SmPO's ReNoise.)

InPO (arXiv 2503.18454) treats each x_t as a one-step generator of x0 and finds x_t by running the sampler backwards
from x0 under the current policy; the target is the noise that x_t implies, (x_t - a x0) / s. Winner and loser then have
noises of their own, the one place where they do not share it.

Differences from the authors' code, on purpose: the level is drawn from the inversion grid itself, so the time of the
target is the level that was really reached (theirs is up to a tenth of the schedule off); any batch size (theirs reads
the first row's time for all); one formula for eps, v and flow models. Behaviour checked against JaydenLyh/InPO train.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmpo.modalities.families import Loaded
from mmpo.modalities.noise import NoiseProcess
from mmpo.schema import DrawConfig


@torch.no_grad()
def invert(
    loaded: Loaded, model: nn.Module, clean: Tensor, time: Tensor, condition: Any, seeds: list[int], spec: DrawConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert each row to its own level. Returns t (N,), x_t (N, C, H, W) and the implied noise, same shape.

    clean: (N, C, H, W) latents. time: (N,) in [0, 1); its tenth (for 10 steps) picks the level. seeds: one per row, for
    the eta noise. Rows that have reached their level wait, masked, while the others go on.
    """
    process, steps = loaded.process, spec.inversion_steps
    levels = process.levels(steps, tokens=loaded.tokens(clean)).flip(0).to(clean.device)  # ascending noise
    goal = (time * steps).long().clamp(max=steps - 1)
    noises = [torch.Generator().manual_seed(s) for s in seeds]
    predict = _predictor(loaded, model, condition)
    x, current = clean, None
    for i, level in enumerate(levels[: int(goal.max()) + 1]):
        target = level.expand(len(x))
        moved = (
            _renoise(process, predict, x, current, target)
            if spec.mode == "renoise"
            else _ddim(process, predict, x, current, target)
        )
        if spec.mode == "inversion" and spec.inversion_eta and current is not None:
            jitter = torch.stack([torch.randn(x.shape[1:], generator=g) for g in noises]).to(x)
            moved = moved + spec.inversion_eta * _spread(process, current, target, x.ndim) * jitter
        x = torch.where((goal >= i).view(-1, *[1] * (x.ndim - 1)), moved, x)
        current = target
    t = levels[goal]
    a, s = (_shape(f(t), x.ndim) for f in (process.a, process.s))
    return t, x, (x - a * clean) / s


Predict = Callable[[Tensor, Tensor], Tensor]


def _predictor(loaded: Loaded, model: nn.Module, condition: Any) -> Predict:
    return lambda x, t: loaded.denoise(model, x, t, condition).float()


def _ddim(process: NoiseProcess, predict: Predict, x: Tensor, current: Tensor | None, target: Tensor) -> Tensor:
    """One inverse step; the model is asked where the step starts (at the clean end: at the smallest time there is)."""
    start = torch.zeros_like(target) if current is None else current
    return process.step(x, predict(x, start), current, target)


def _renoise(process: NoiseProcess, predict: Predict, x: Tensor, current: Tensor | None, target: Tensor) -> Tensor:
    """A step with the mean of the predictions at its start and at its first guess of the end (ReNoise)."""
    start = torch.zeros_like(target) if current is None else current
    first = predict(x, start)
    guess = process.step(x, first, current, target)
    return process.step(x, 0.5 * (first + predict(guess, target)), current, target)


def _spread(process: NoiseProcess, low: Tensor, high: Tensor, ndim: int) -> Tensor:
    """Standard deviation of q(x_low | x_high, x0): s_low sqrt(1 - (a_high s_low / (a_low s_high))^2)."""
    ratio = process.a(high) * process.s(low) / (process.a(low) * process.s(high))
    return _shape(process.s(low) * (1 - ratio.square()).clamp(min=0).sqrt(), ndim)


def _shape(value: Tensor, ndim: int) -> Tensor:
    return value.float().view(-1, *[1] * (ndim - 1))
