"""kill -9 at any moment, then the same command: the same bits. Nothing here is simulated, the processes are really killed.

Runs are killed as forks of a server, many in little time (`tests.killed_runs`), and as a person would do it: the whole
command line, started cold.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.killed_runs import JUDGE, differences, fork, killed_cold, outcome, ready, run_server, trials
from tests.tiny_run import load, make_world

STEPS = (JUDGE, "train.steps=24")
ROUNDS = (JUDGE, "train.steps=10", "train.rounds=2", "train.round_prompts=4", "train.round_candidates=3")
TRIALS = 4  # tests/reliability/test_kills.py has many more, of shorter runs

pytestmark = pytest.mark.slow


# ---- what has to hold


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    """The outcome of a run that nobody disturbs, after the killed ones were found to have the same."""
    return trials(world, 20240601, STEPS, TRIALS, low=0.3)[0]


def test_a_killed_run_ends_with_the_same_bits(whole: dict[str, bytes]) -> None:
    events = [json.loads(line) for line in whole["log.jsonl"].splitlines()]
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, 25))  # no step lost, none logged twice
    assert [e["step"] for e in events if e["event"] == "eval"] == [0, 5, 10, 15, 20, 24]
    assert [e["event"] for e in events].count("start") == [e["event"] for e in events].count("end") == 1
    assert {"checkpoint/optimizer.safetensors", "checkpoint/policy.safetensors", "checkpoint/rng.safetensors"} <= set(whole)
    assert {"best/policy.safetensors", "export/pytorch_lora_weights.safetensors", "samples/sheet.png"} <= set(whole)
    assert len({e["loss"] for e in events if e["event"] == "train"}) > 20  # it did learn


def test_the_command_line_killed_and_started_again(world: Path, whole: dict[str, bytes]) -> None:
    killed_cold(world, (0.5, 0.85), whole, *STEPS)


def test_a_second_round_that_is_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    expected, _ = trials(world, 7, ROUNDS, 2, low=0.4)
    steps = [json.loads(line)["step"] for line in expected["log.jsonl"].splitlines() if b'"train"' in line]
    assert steps == list(range(1, 21)) and {"checkpoint/reference.safetensors", "rounds/2.parquet"} <= set(expected)


# ---- kills between the parts of a run's end, and of a second round's start

END = (JUDGE, "train.steps=3", "train.save_every=3", "eval.every=3")
PARTS: dict[str, tuple[str, ...]] = {
    "mmpo.finish:load_best": END, "mmpo.finish:write_samples": END, "mmpo.finish:record": END, "mmpo.export:write": END,
    "mmpo.checkpoint:write_atomic": END, "mmpo.finish:write_report": END,
}  # fmt: skip
ROUND = (*END, "train.rounds=2", "train.round_prompts=4", "train.round_candidates=3")
PARTS |= {"mmpo.rounds:load_best": ROUND, "mmpo.rounds:write_candidates": ROUND, "mmpo.rounds:save": ROUND}


def strike(world: str) -> None:
    """Kill runs just before each call of each part, and run them to their end. Prints the names of those runs.

    They go on from copies of a run that was killed before the first of these parts: of its training, T1 and T2 have the kills.
    """
    from mmpo import launch

    ready()
    base, done = Path(world), []

    def run(name: str, words: Sequence[str], part: str | None = None, at: int = 0) -> int:
        def work() -> int:
            if part:
                _arm(part, at)
            return launch.run(load(base, base / name, *words))

        return fork(work, base / "said.txt")

    for kind, words in (("end", END), ("round", ROUND)):
        parts = [part for part in PARTS if PARTS[part] is words]
        assert run(kind, words) == 0 and run(f"{kind}-begun", words, parts[0]) == -signal.SIGKILL
        for part in parts:
            for at in range(20):
                name = f"{part.rpartition(':')[2]}-{at}-{kind}"
                shutil.copytree(base / f"{kind}-begun", base / name)
                if (status := run(name, words, part, at)) == 0:
                    break  # there are no more calls
                assert status == -signal.SIGKILL and run(name, words) == 0
                done.append(name)
    print(json.dumps(done))


def _arm(part: str, at: int) -> None:
    """End this process where it would call a function for the time number `at`."""
    module, _, name = part.partition(":")
    target = sys.modules.get(module) or __import__(module, fromlist=[name])
    real, seen = getattr(target, name), [0]

    def call(*args: object, **kwargs: object) -> object:
        seen[0] += 1
        if seen[0] - 1 == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(target, name, call)


def test_a_kill_between_any_two_parts_loses_nothing(tmp_path: Path) -> None:
    """Best weights, samples, the log's end, export, summary and report; the next round's weights, samples, checkpoint."""
    world = make_world(tmp_path)
    done = [str(name) for name in run_server("test_resume", f"strike({str(world)!r})")]
    expected = {kind: outcome(world / kind) for kind in ("end", "round")}
    wrong = {name: found for name in done if (found := differences(world / name, expected[name.rpartition("-")[2]]))}
    print(f"\n{len(done)} kills between the parts of an end and of a round's start: {len(wrong)} outcomes differ")
    assert {name.partition("-")[0] for name in done} == {part.partition(":")[2] for part in PARTS} and not wrong, wrong
