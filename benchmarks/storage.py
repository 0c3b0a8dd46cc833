"""What checkpoints, log, ledger and manifest cost a run of the embedded default, and how fast digests are.

    python -m benchmarks.storage [--steps 160] [--out benchmarks/results/storage.json]

The run is `mmpo train --modality diffusion` with its own settings; every call that stores is timed, on the wall clock
(fsync waits) and in processor time. A calibration run without any of them would differ by less than its noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from mmpo import checkpoint, drift, launch, prepare, rounds, runlog, train
from mmpo import recipe as recipes

ROUNDS = 7
SIZE = 256 * 2**20  # bytes digested per round


class Clock:
    """Seconds and calls of the functions it was given, by name. Calls inside of calls count once."""

    def __init__(self) -> None:
        self.wall: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.inside = False

    def wrap(self, owner: Any, name: str) -> None:
        setattr(owner, name, self._timed(f"{owner.__name__.rsplit('.', 1)[-1]}.{name}", getattr(owner, name)))

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self.inside:
                return function(*args, **named)
            self.inside, wall, cpu = True, time.perf_counter(), time.process_time()
            try:
                return function(*args, **named)
            finally:
                self.inside = False
                self.wall[label] += time.perf_counter() - wall  # type: ignore[assignment]
                self.cpu[label] += time.process_time() - cpu  # type: ignore[assignment]
                self.calls[label] += 1

        return call


def run_cost(steps: int) -> dict[str, Any]:
    """Share of a default run that goes into storing, per kind of file."""
    clock = Clock()
    for owner, name in (
        (train, "save"), (checkpoint, "write_best"), (runlog.RunLog, "append"), (prepare, "keep_account"),
        (drift, "claim_recipe"), (drift, "claim_inputs"),
    ):  # fmt: skip
        clock.wrap(owner, name)
    launch.save = rounds.save = train.save  # type: ignore[attr-defined]
    launch.keep_account = prepare.keep_account
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        launch.run(recipes.load(None, [f"out={folder}/run", f"train.steps={steps}"], "diffusion"))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        stored = sum(p.stat().st_size for p in Path(folder, "run", "checkpoints").rglob("*") if p.is_file())
    parts = {n: {"calls": clock.calls[n], "wall": round(clock.wall[n], 4), "cpu": round(clock.cpu[n], 4)} for n in clock.calls}
    share = {"wall": sum(clock.wall.values()) / wall, "cpu": sum(clock.cpu.values()) / cpu}
    return {"steps": steps, "seconds": round(wall, 1), "share": share, "parts": parts, "checkpoint_bytes": stored}


def digest_speed() -> dict[str, list[float]]:
    """GB/s of the digests of checkpoint files, of tensors and of media: lowest, median, highest of the rounds, in turns."""
    data = np.random.default_rng(0).bytes(SIZE)
    tensors = {"a": torch.frombuffer(bytearray(data), dtype=torch.float32)}
    found: dict[str, list[float]] = {"checkpoint": [], "tensors": [], "media": []}
    for _ in range(ROUNDS):
        for name, digest in (
            ("checkpoint", lambda: blake3(data).hexdigest()),
            ("tensors", lambda: checkpoint.digest_tensors(tensors)),
            ("media", lambda: hashlib.sha256(data).hexdigest()),
        ):
            start = time.perf_counter()
            digest()
            found[name].append(SIZE / (time.perf_counter() - start) / 1e9)
    return {name: [round(float(np.quantile(v, q)), 3) for q in (0, 0.5, 1)] for name, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = {
        "load_before": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "digests_gb_per_s": digest_speed(),
        "run": run_cost(given.steps),
    }
    told = json.dumps(result, indent=2)
    print(told)
    if given.out:
        given.out.write_text(told + "\n")


if __name__ == "__main__":
    main()
