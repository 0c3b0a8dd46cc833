"""T1: many SIGKILLs of a tiny diffusion run, at any moment and again while it recovers; the bits are the same."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.killed_runs import JUDGE, killed_cold, outcome, start, trials
from tests.reliability.counters import FULL, counter
from tests.tiny_run import make_world

WORDS = (JUDGE, "train.steps=12", "train.save_every=3", "eval.every=6", "data.prompt_dropout=0.2")
KILLS = 200 if FULL else 40
COLD = 20

pytestmark = pytest.mark.slow


def test_killed_again_and_again(tmp_path: Path) -> None:
    began, world = time.monotonic(), make_world(tmp_path)

    def half(seed: int) -> tuple[dict[str, bytes], int]:
        folder = world / str(seed)
        folder.mkdir()
        for name in ("pipe", "rows.parquet"):
            (folder / name).symlink_to(world / name)
        return trials(folder, seed, WORDS, KILLS // 20, low=0.2, most=4, kills=KILLS // 2)

    with ThreadPoolExecutor(2) as pool:  # two servers, for machines of two cores
        (expected, killed), (_, more) = pool.map(half, (1, 2))
    assert expected.keys() >= {"log.jsonl", "best/policy.safetensors", "summary.json", "checkpoint/optimizer.safetensors"}
    counter("T1", "SIGKILL of a forked run", killed + more, "0 outcomes differ", time.monotonic() - began)


@pytest.mark.skipif(not FULL, reason="tests/test_resume.py kills two cold starts; MMPO_FULL=1 kills twenty more")
def test_cold_starts_of_the_command_line(tmp_path: Path) -> None:
    began, moments, world = time.monotonic(), random.Random(2), make_world(tmp_path)
    assert start(world, world / "whole", *WORDS).wait() == 0
    killed_cold(world, [moments.uniform(0.2, 0.9) for _ in range(COLD)], outcome(world / "whole"), *WORDS)
    counter("T1", "SIGKILL of the command line", COLD, "0 outcomes differ", time.monotonic() - began)
