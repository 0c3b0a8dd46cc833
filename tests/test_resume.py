"""kill -9 at any moment, then the same command: the same bits. Nothing here is simulated, the processes are really killed.

A server process imports torch and diffusers once; each attempt at a run is a fork of it, so that many kills take little
time. Further runs are killed as a person would do it: the whole command line, started cold.
"""

from __future__ import annotations

import json
import os
import random
import re
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
    """What has to be identical: every tensor of the newest checkpoint, and all that the run leaves for a person to use."""
    newest = folder / "checkpoints" / (folder / "checkpoints" / "CURRENT").read_text().strip()
    summary = json.loads((folder / "summary.json").read_text())
    told = {k: v for k, v in summary.items() if k not in ("seconds", "command")}  # a clock, and the folder's own name
    kept = [folder / "log.jsonl", *sorted(folder.glob("best/*")), *sorted(folder.glob("rounds/*"))]
    kept += [p for room in ("samples", "export") for p in sorted((folder / room).rglob("*")) if p.is_file()]
    found = {str(p.relative_to(folder)): content(p) for p in kept}
    found |= {f"checkpoint/{p.name}": content(p) for p in sorted(newest.glob("*.safetensors"))}
    return found | {"summary.json": json.dumps(told).encode(), "report.html": b"yes" * (folder / "report.html").is_file()}


def content(path: Path) -> bytes:
    """The file's bytes; of safetensors the tensors and the header in order, which their library writes in any."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def differences(folder: Path, expected: dict[str, bytes]) -> list[str]:
    found = outcome(folder)
    return [name for name in {*found, *expected} if found.get(name) != expected.get(name)]


# ---- the server


def serve(world: str, seed: int, words: Sequence[str], trials: int, low: float = 0.0) -> None:
    """One run that is left alone, then `trials` that are killed once or twice; prints what happened as JSON.

    The first kill falls uniformly into `low`..1 of the undisturbed run's duration, the second anywhere into 0..1. Where
    the machine was faster this time and the run had ended, the trial is done again with an earlier kill. Every attempt has
    to go on from the newest checkpoint that the one before had left: starting over would end with the same bits, too.
    """
    import torch

    torch.set_num_threads(1)
    from mmpo import find, launch

    find.PLUGINS.add("tests.tiny_run")
    moments, base = random.Random(seed), Path(world)
    resumed: list[int] = []

    def attempt(name: str, kill_after: float | None = None) -> int:
        left, said = saved_step(base / name), base / f"{name}.txt"
        status = _fork(lambda: launch.run(load(base, base / name, *words)), said, kill_after)
        told = re.search(r"resumed at step (\d+)", said.read_text())
        if status == 0 and not (left is None or said.read_text().startswith(f"{base / name} is finished")):
            assert told and int(told[1]) == left, (left, said.read_text())
            resumed.append(left)
        return status

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
    print(json.dumps([killed, duration, resumed]))


def saved_step(run: Path) -> int | None:
    """The step that the newest committed checkpoint is of."""
    pointer = run / "checkpoints" / "CURRENT"
    return int(pointer.read_text()[5:11]) if pointer.exists() else None


def _fork(work: Callable[[], int], said: Path, kill_after: float | None = None) -> int:
    """Exit status of `work` in a child process, -9 when it was killed after so many seconds. said: where it prints."""
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = said.open("w", buffering=1)
            os._exit(work())
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_server(code: str) -> list[object]:
    """What a function of this module prints last, run in a process of its own."""
    code = f"from tests.test_resume import *; {code}"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def trials(world: Path, seed: int, words: Sequence[str], count: int, low: float = 0.0) -> dict[str, bytes]:
    """Run the server, hold its killed runs against the undisturbed one, and return that one's outcome."""
    killed, duration, resumed = run_server(f"serve({str(world)!r}, {seed}, {list(words)!r}, {count}, {low})")
    expected = outcome(world / "whole")
    wrong = {trial: found for trial in range(count) if (found := differences(world / f"killed-{trial}", expected))}
    print(f"\n{killed} kills in {count} runs of {duration:.1f} s: {len(wrong)} outcomes differ; resumed at steps {resumed}")
    assert isinstance(killed, int) and killed >= count and not wrong, wrong
    assert isinstance(resumed, list) and len([step for step in resumed if step > 0]) >= count / 2  # no kill came too early
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
    assert [e["event"] for e in events].count("start") == [e["event"] for e in events].count("end") == 1
    assert {"checkpoint/optimizer.safetensors", "checkpoint/policy.safetensors", "checkpoint/rng.safetensors"} <= set(whole)
    assert {"best/policy.safetensors", "export/pytorch_lora_weights.safetensors", "samples/sheet.png"} <= set(whole)
    assert len({e["loss"] for e in events if e["event"] == "train"}) > 50  # it did learn


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
    assert steps == list(range(1, 21)) and {"checkpoint/reference.safetensors", "rounds/2.parquet"} <= set(expected)


# ---- kills between the parts of a run's end, and of a second round's start

END = (JUDGE, "train.steps=3", "train.save_every=3", "eval.every=3")
PARTS: dict[str, tuple[str, ...]] = {
    "mmpo.launch:load_best": END, "mmpo.launch:write_samples": END, "mmpo.launch:record": END, "mmpo.export:write": END,
    "mmpo.checkpoint:write_atomic": END, "mmpo.launch:write_report": END,
}  # fmt: skip
ROUND = (*END, "train.rounds=2", "train.round_prompts=4", "train.round_candidates=3")
PARTS |= {"mmpo.rounds:load_best": ROUND, "mmpo.rounds:write_candidates": ROUND, "mmpo.rounds:save": ROUND}


def strike(world: str) -> None:
    """Kill runs just before each call of each part, and run them to their end. Prints the names of those runs."""
    import torch

    torch.set_num_threads(1)
    from mmpo import find, launch

    find.PLUGINS.add("tests.tiny_run")
    base, done = Path(world), []
    wholes: dict[str, tuple[str, ...]] = {"end": END, "round": ROUND}
    for whole, words in wholes.items():
        assert _fork(lambda w=words, n=whole: launch.run(load(base, base / n, *w)), base / "said.txt") == 0  # type: ignore[misc]
    for part, words in PARTS.items():
        for at in range(20):
            name = f"{part.rpartition(':')[2]}-{at}-{'round' if words is ROUND else 'end'}"

            def killed(part: str = part, words: Sequence[str] = words, name: str = name, at: int = at) -> int:
                _arm(part, at)
                return launch.run(load(base, base / name, *words))

            if (status := _fork(killed, base / "said.txt")) == 0:
                break  # there are no more calls
            assert status == -signal.SIGKILL
            assert _fork(lambda w=words, n=name: launch.run(load(base, base / n, *w)), base / "said.txt") == 0  # type: ignore[misc]
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
    done = [str(name) for name in run_server(f"strike({str(world)!r})")]
    expected = {kind: outcome(world / kind) for kind in ("end", "round")}
    wrong = {name: found for name in done if (found := differences(world / name, expected[name.rpartition("-")[2]]))}
    print(f"\n{len(done)} kills between the parts of an end and of a round's start: {len(wrong)} outcomes differ")
    assert {name.partition("-")[0] for name in done} == {part.partition(":")[2] for part in PARTS} and not wrong, wrong
