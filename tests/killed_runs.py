"""Runs that are really killed, and what has to be identical afterwards.

A server process imports once what a run needs; each attempt at a run is a fork of it, so that many kills take little time.
"""

from __future__ import annotations

import importlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.tiny_run import load, settings

ROOT = Path(__file__).resolve().parent.parent
JUDGE = "judge.name=tests.tiny_run:brightness"
NEEDED = {
    "diffusers": ("StableDiffusionPipeline", "AutoencoderKL", "UNet2DConditionModel", "DDPMScheduler"),
    "transformers": ("CLIPTextModel", "CLIPTokenizer"),
    "mmpo.modalities.diffusion": ("Adapter",),
    "mmpo.launch": ("run",),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


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


def ready() -> None:
    """What a server does first: one thread, as the runs that it is compared with, and the tests' own judge allowed.

    Libraries import their parts when they are first asked for, so they are asked for here, or each fork would import them
    again. The runs' reports have no curves, which are drawn from the log alone and take a third of a tiny run's time.
    """
    import torch

    from mmpo import find, report

    for module, names in NEEDED.items():
        for name in names:
            getattr(importlib.import_module(module), name)
    torch.set_num_threads(1)
    find.PLUGINS.add("tests.tiny_run")
    report.curves = lambda *_, **__: []


def serve(world: str, seed: int, words: Sequence[str], runs: int, low: float, high: float, most: int, kills: int) -> None:
    """One run that is left alone, then at least `runs` that are killed, at least `kills` times in all.

    Each kill of a run falls uniformly into `low`..`high` of the undisturbed run's duration; there are up to `most` of them,
    as long as the run does not end before. Where the machine was faster this time and the run had ended before its first
    kill, that is its duration from then on, and the run is done again with an earlier kill. Every attempt has to go on from
    the newest checkpoint that the one before had left: starting over would end with the same bits, too. Prints what happened
    as JSON.
    """
    from mmpo import launch

    ready()
    moments, base = random.Random(seed), Path(world)
    resumed: list[int] = []

    def attempt(name: str, kill_after: float | None = None) -> int:
        left, said = saved_step(base / name), base / f"{name}.txt"
        status = fork(lambda: launch.run(load(base, base / name, *words)), said, kill_after)
        if told := re.search(r"resumed at step (\d+)", said.read_text()):
            assert int(told[1]) == left, (left, said.read_text())
            resumed.append(int(told[1]))
        else:
            assert status != 0 or left is None or said.read_text().startswith(f"{base / name} is finished")
        return status

    assert attempt("warm") == 0  # what is imported on the way is in the file cache now
    started = time.monotonic()
    assert attempt("whole") == 0
    duration = time.monotonic() - started
    killed = trial = 0
    while trial < runs or killed < kills:
        name, moment = f"killed-{trial}", moments.uniform(low, high) * duration
        began = time.monotonic()
        while attempt(name, moment) != -signal.SIGKILL:
            duration = min(duration, time.monotonic() - began)
            shutil.rmtree(base / name)
            moment, began = min(moments.uniform(low, high) * duration, 0.9 * moment), time.monotonic()
        statuses = [-signal.SIGKILL]
        while statuses[-1] == -signal.SIGKILL and len(statuses) < most:
            statuses.append(attempt(name, moments.uniform(low, high) * duration))
        assert statuses[-1] in (0, -signal.SIGKILL) and attempt(name) == 0
        killed += statuses.count(-signal.SIGKILL)
        trial += 1
    print(json.dumps([trial, killed, duration, resumed]))


def saved_step(run: Path) -> int | None:
    """The step of the checkpoint to go on from: the committed one, or the first, whole but killed before it was committed."""
    pointer = run / "checkpoints" / "CURRENT"
    names = [pointer.read_text()] if pointer.exists() else [path.name for path in pointer.parent.glob("step-*")]
    return int(names[0][5:11]) if names else None


def fork(work: Callable[[], int], said: Path, kill_after: float | None = None) -> int:
    """Exit status of `work` in a child process, -9 when it was killed after so many seconds. said: where it prints."""
    child = begin(work, said)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))
    if deadline is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin(work: Callable[[], int], said: Path) -> int:
    """Start `work` in a child process; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = said.open("w", buffering=1)
            os._exit(work())
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def stop_at(step: int) -> None:
    """Let this process end, with status 0, right after it has saved a step."""
    from mmpo import train
    from mmpo.progress import Run

    real = train.save

    def save(run: Run) -> None:
        real(run)
        if run.progress.step == step:
            os._exit(0)

    train.save = save


def run_servers(module: str, calls: Sequence[str]) -> list[list[object]]:
    """Several at the same time, for machines of two cores."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: run_server(module, call), calls))


def run_server(module: str, call: str) -> list[object]:
    """What a call of a module's function prints last, in a process of its own."""
    code = f"from tests.{module} import *; {call}"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def trials(
    world: Path, seed: int, words: Sequence[str], runs: int, *, low: float = 0, high: float = 1, most: int = 2, kills: int = 0
) -> tuple[dict[str, bytes], int]:
    """Run the server and hold its killed runs against the undisturbed one; returns that one's outcome and the kills."""
    given = (str(world), seed, list(words), runs, low, high, most, kills)
    count, killed, duration, resumed = run_server("killed_runs", f"serve{given!r}")
    assert isinstance(count, int) and isinstance(killed, int) and isinstance(resumed, list)
    expected = outcome(world / "whole")
    wrong = {trial: found for trial in range(count) if (found := differences(world / f"killed-{trial}", expected))}
    print(f"\n{killed} kills in {count} runs of {duration:.1f} s: {len(wrong)} outcomes differ; resumed at steps {resumed}")
    assert count >= runs and killed >= max(count, kills) and not wrong, wrong
    assert len([step for step in resumed if step > 0]) >= count / 2  # no kill came too early
    return expected, killed


# ---- the command line, started cold


def start(world: Path, out: Path, *words: str) -> subprocess.Popen[bytes]:
    """`mmpo train` in a process of its own."""
    command = [sys.executable, "-m", "mmpo", "train", "--modality", "diffusion", "--plugin", "tests.tiny_run"]
    return subprocess.Popen([*command, *settings(world, out, *words)], env=ENVIRONMENT, stdout=-3, stderr=-3, cwd=ROOT)


def killed_cold(world: Path, shares: Sequence[float], expected: dict[str, bytes], *words: str) -> None:
    """The whole command: left alone once, then killed after each share of its duration and started again."""
    began = time.monotonic()
    assert start(world, world / "cold", *words).wait() == 0
    duration = time.monotonic() - began
    assert not differences(world / "cold", expected)
    for trial, share in enumerate(shares):
        while (status := _killed(world, world / f"cold-{trial}", share * duration, *words)) == 0:  # it was faster this time
            shutil.rmtree(world / f"cold-{trial}")
            duration *= 0.8
        assert status == -signal.SIGKILL
        assert start(world, world / f"cold-{trial}", *words).wait() == 0
        assert not differences(world / f"cold-{trial}", expected)


def _killed(world: Path, out: Path, after: float, *words: str) -> int:
    process = start(world, out, *words)
    time.sleep(after)
    process.kill()
    return process.wait()
