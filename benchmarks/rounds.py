"""Interleaved rounds and the ratio of their medians: how every benchmark here measures time."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def step(self) -> Callable[[int], object]:
        """Takes the number of the step."""


def measure(contestants: Sequence[Contestant], rounds: int, batches: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """(rounds, 2) seconds of process CPU and of wall clock per contestant, in turns that begin with another one each round."""
    seconds: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contestants}
    for number in range(warmup + rounds):
        for place in range(len(contestants)):
            contestant = contestants[(number + place) % len(contestants)]
            cpu, wall = time.process_time(), time.perf_counter()
            contestant.step(number % batches)
            seconds[contestant.name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: np.array(values[warmup:]) for name, values in seconds.items()}


def ratio(slow: np.ndarray, fast: np.ndarray, draws: int = 10_000) -> dict[str, float]:
    """The ratio of medians, with its 95 % bootstrap interval over rounds (a round's two times stay together)."""
    rows = np.random.default_rng(0).integers(len(slow), size=(draws, len(slow)))
    spread = np.median(slow[rows], axis=1) / np.median(fast[rows], axis=1)
    low, high = np.quantile(spread, [0.025, 0.975])
    return {"value": float(np.median(slow) / np.median(fast)), "low": float(low), "high": float(high)}


def machine(*modules: Any) -> dict[str, Any]:
    """What a measurement was made on and with: these modules, by version."""
    state = {"python": platform.python_version(), "versions": {m.__name__: m.__version__ for m in modules}}
    return state | {"processors": os.cpu_count(), "threads": torch.get_num_threads()}
