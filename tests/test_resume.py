"""kill -9 at any moment, then the same command: the same bits. Nothing here is simulated, the processes are really killed.

A server process imports torch and diffusers once; each attempt at a run is a fork of it, so that many kills take little
time. Two further runs are killed as a person would do it: the whole command line, started cold.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.tiny_run import load, make_world, settings

ROOT = Path(__file__).resolve().parent.parent
JUDGE = "judge.name=tests.tiny_run:brightness"
STEPS = (JUDGE, "train.steps=60")
ROUNDS = (JUDGE, "train.steps=10", "train.rounds=2", "train.round_prompts=4", "train.round_candidates=3")
TRIALS = 10
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.slow


def outcome(folder: Path) -> dict[str, bytes]:
    """What has to be identical: log, best weights, export, and every tensor of the newest checkpoint."""
    newest = folder / "checkpoints" / (folder / "checkpoints" / "CURRENT").read_text().strip()
    files = [
        folder / "log.jsonl",
        folder / "best" / "policy.safetensors",
        folder / "export" / "pytorch_lora_weights.safetensors",
    ]
    return {path.name: path.read_bytes() for path in files} | {
        f"checkpoint/{path.name}": path.read_bytes() for path in sorted(newest.glob("*.safetensors"))
    }


def differences(folder: Path, expected: dict[str, bytes]) -> list[str]:
    found = outcome(folder)
    return [name for name in {*found, *expected} if found.get(name) != expected.get(name)]


# ---- the server


def serve(world: str, seed: int, words: Sequence[str], trials: int, low: float = 0.0) -> None:
    """One run that is left alone, then `trials` that are killed once or twice; prints what happened as JSON.

    The first kill falls uniformly into `low`..1 of the undisturbed run's duration, the second anywhere into 0..1. Where
    the machine was faster this time and the run had ended, the trial is done again with an earlier kill.
    """
    import torch

    torch.set_num_threads(1)
    from mmpo import find, launch

    find.PLUGINS.add("tests.tiny_run")
    moments, base = random.Random(seed), Path(world)

    def attempt(name: str, kill_after: float | None = None) -> int:
        return _fork(lambda: launch.run(load(base, base / name, *words)), kill_after)

    assert attempt("warm") == 0  # what is imported on the way is in the file cache now
    started = time.monotonic()
    assert attempt("whole") == 0
    duration = time.monotonic() - started
    killed = 0
    for trial in range(trials):
        name, moment = f"killed-{trial}", moments.uniform(low, 1) * duration
        while attempt(name, moment) != -signal.SIGKILL:
            shutil.rmtree(base / name)
            moment *= 0.9
        second = attempt(name, moments.uniform(0, 1) * duration)
        killed += 1 + (second == -signal.SIGKILL)
        assert second in (0, -signal.SIGKILL) and attempt(name) == 0
    print(json.dumps([killed, duration]))


def _fork(work: Callable[[], int], kill_after: float | None) -> int:
    """Exit status of `work` in a child process, -9 when it was killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os._exit(work())
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trials(world: Path, seed: int, words: Sequence[str], count: int, low: float = 0.0) -> dict[str, bytes]:
    """Run the server, hold its killed runs against the undisturbed one, and return that one's outcome."""
    code = f"from tests.test_resume import serve; serve({str(world)!r}, {seed}, {list(words)!r}, {count}, {low})"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    killed, duration = json.loads(done.stdout.splitlines()[-1])
    expected = outcome(world / "whole")
    wrong = {trial: found for trial in range(count) if (found := differences(world / f"killed-{trial}", expected))}
    print(f"\n{killed} kills in {count} runs of {duration:.1f} s: {len(wrong)} outcomes differ")
    assert killed >= count and not wrong, wrong
    return expected


# ---- what has to hold


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> dict[str, bytes]:
    """The outcome of a run that nobody disturbs, after the killed ones were found to have the same."""
    return trials(world, 20240601, STEPS, TRIALS)


def test_a_killed_run_ends_with_the_same_bits(whole: dict[str, bytes]) -> None:
    events = [json.loads(line) for line in whole["log.jsonl"].splitlines()]
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, 61))  # no step lost, none logged twice
    assert [e["step"] for e in events if e["event"] == "eval"] == list(range(0, 61, 5))
    assert {"checkpoint/optimizer.safetensors", "checkpoint/policy.safetensors", "checkpoint/rng.safetensors"} <= set(whole)


def test_the_command_line_killed_and_started_again(world: Path, whole: dict[str, bytes]) -> None:
    command = [sys.executable, "-m", "mmpo", "train", "--modality", "diffusion", "--plugin", "tests.tiny_run"]

    def start(name: str) -> subprocess.Popen[bytes]:
        words = settings(world, world / name, *STEPS)
        return subprocess.Popen([*command, *words], env=ENVIRONMENT, stdout=-3, stderr=-3, cwd=ROOT)

    began = time.monotonic()
    assert start("cold").wait() == 0
    duration = time.monotonic() - began
    assert not differences(world / "cold", whole)
    for trial, share in enumerate((0.5, 0.85)):
        process = start(f"cold-{trial}")
        time.sleep(share * duration)
        process.kill()
        assert process.wait() == -9
        assert start(f"cold-{trial}").wait() == 0
        assert not differences(world / f"cold-{trial}", whole)


def test_a_second_round_that_is_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    expected = trials(world, 7, ROUNDS, 4, low=0.4)
    steps = [json.loads(line)["step"] for line in expected["log.jsonl"].splitlines() if b'"train"' in line]
    assert steps == list(range(1, 21)) and "checkpoint/reference.safetensors" in expected
    first = (world / "whole" / "rounds" / "2.parquet").read_bytes()
    assert all((world / f"killed-{trial}" / "rounds" / "2.parquet").read_bytes() == first for trial in range(4))
