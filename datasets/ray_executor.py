"""The parts of a build on the workers of a Ray cluster, or of this machine: `mmpo pairs ... --executor ray`.

The driver reads the source once and sends parts out, at most two for each worker at a time, so that memory grows with the
workers and not with the data. RAY_ADDRESS names a cluster; there, --out, --data and the models' paths have to be on a file
system that all its machines see.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from mmpo.datasets.ledger import Ledger
from mmpo.datasets.stages import Record
from mmpo.errors import MissingExtra
from mmpo.pair import Pair

Part = tuple[int, str, list[Record]]  # number, digest of the inputs, records
Made = tuple[int, str, Iterable[Pair], Ledger]  # number, digest, pairs, and what became of the records once they are all there
AHEAD = 2  # parts that wait at each worker


class RayExecutor:
    """Runs parts on `workers` actors, each with tools of its own, and gives their pairs in the order of the parts."""

    def __init__(self, workers: int) -> None:
        try:
            self.ray = importlib.import_module("ray")
        except ImportError as error:
            raise MissingExtra("ray", "ray") from error
        self.workers = workers

    def run(self, maker: Any, parts: Iterable[Part]) -> Iterator[Made]:
        """maker: a builds.Maker, which is sent to each worker once."""
        ray, ours = self.ray, not self.ray.is_initialized()
        if ours:
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        actors: list[Any] = []
        try:
            shared = ray.put(maker)
            needs = {"num_cpus": 0, "num_gpus": int(maker.choice.device.startswith("cuda"))}  # Ray hides GPUs nobody asked for
            actors = [ray.remote(**needs)(_Actor).remote(shared) for _ in range(self.workers)]
            waiting: deque[tuple[int, str, Any]] = deque()
            for turn, (number, inputs, records) in enumerate(parts):
                waiting.append((number, inputs, actors[turn % self.workers].made.remote(records)))
                if len(waiting) == AHEAD * self.workers:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for actor in actors:
                ray.kill(actor)
            if ours:
                ray.shutdown()

    def _next(self, waiting: deque[tuple[int, str, Any]]) -> Made:
        number, inputs, reference = waiting.popleft()
        try:
            pairs, ledger = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(getattr(error, "cause", None), Exception) else error from None
        return number, inputs, pairs, ledger


class _Actor:
    def __init__(self, maker: Any) -> None:
        self.maker = maker

    def made(self, records: list[Record]) -> tuple[list[Pair], Ledger]:
        ledger = Ledger("skip")
        return list(self.maker.pairs(records, ledger)), ledger
