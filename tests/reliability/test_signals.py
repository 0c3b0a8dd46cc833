"""T13: SIGTERM and SIGINT at any moment: the exit code says so, what is saved is whole, and the bits are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest

from tests.killed_runs import JUDGE, begin, differences, fork, outcome, ready, run_servers
from tests.reliability.counters import FULL, counter
from tests.tiny_run import make_world, settings

WORDS = (JUDGE, "train.steps=12", "train.save_every=3", "eval.every=6")
COUNT = 50 if FULL else 8
GRACE = 10.0  # seconds

pytestmark = pytest.mark.slow


def serve(world: str, first: int, count: int) -> None:
    """Signal `count` runs of the command line, check what they saved, and run them to their end.

    Prints how many stopped at a step's end, how many before the first or after the last one, and the longest wait.
    """
    from mmpo import cli
    from mmpo.checkpoint import load_latest

    ready()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes away from background jobs
    warnings.simplefilter("error", UserWarning)
    base, moments = Path(world), random.Random(first)

    def train(name: str) -> int:
        return cli.main(["train", "--modality", "diffusion", *settings(base, base / name, *WORDS)])

    def interrupted(name: str, number: int, after: float) -> tuple[int, float]:
        child = begin(lambda: train(name), base / f"{name}.txt")
        time.sleep(after)
        sent = time.monotonic()
        os.kill(child, number)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - sent

    for name in (f"warm-{first}", f"whole-{first}"):
        started = time.monotonic()
        assert fork(lambda n=name: train(n), base / f"{name}.txt") == 0  # type: ignore[misc]
    duration, saved, longest = time.monotonic() - started, 0, 0.0
    for trial in range(first, first + count):
        name, number = f"signalled-{trial}", (signal.SIGTERM, signal.SIGINT)[trial % 2]
        after = moments.uniform(0, 1) * duration
        while (end := interrupted(name, number, after))[0] == 0:  # it was faster this time
            shutil.rmtree(base / name)
            after *= 0.9
        # without a step to finish, SIGTERM does what it always does, and a shell calls that 143 as well
        assert end[0] == 128 + number or (number, end[0]) == (signal.SIGTERM, -signal.SIGTERM), (number, end)
        found = load_latest(base / name / "checkpoints")
        saved += found is not None and found.step > 0
        longest = max(longest, end[1])
        assert fork(lambda n=name: train(n), base / f"{name}.txt") == 0  # type: ignore[misc]
    print(json.dumps([saved, longest]))


def test_signals_at_any_moment(tmp_path: Path) -> None:
    began, world = time.monotonic(), make_world(tmp_path)
    calls = [f"serve({str(world)!r}, {first}, {COUNT // 2})" for first in (0, COUNT // 2)]
    found = run_servers("reliability.test_signals", calls)
    saved, longest = sum(int(str(s)) for s, _ in found), max(float(str(w)) for _, w in found)
    expected = outcome(world / "whole-0")
    wrong = {n: differ for n in range(COUNT) if (differ := differences(world / f"signalled-{n}", expected))}
    result = f"{len(wrong)} outcomes differ, {saved} had steps saved, longest wait {longest:.1f} s"
    counter("T13", "SIGTERM and SIGINT", COUNT, result, time.monotonic() - began)
    assert not wrong and longest < GRACE and saved >= COUNT / 4
