"""T8: a disk that takes no more stops the run, names the file, and costs nothing: the run goes on when there is room."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.utils import set_seed

from mmpo import cli
from mmpo.checkpoint import load_latest
from mmpo.progress import Run
from mmpo.runfolder import clear_leftovers
from mmpo.saving import resume
from mmpo.train import train
from tests.killed_runs import JUDGE, content, fork, ready, run_server, stop_at
from tests.reliability.counters import FULL, counter
from tests.tiny_run import line_run, make_world, settings

pytestmark = pytest.mark.slow

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
SIZES = 50
STOPPED, FINISHED = 74, 0


def serve(folder: str, count: int) -> None:
    """Stop copies of a run of one layer by limits on the size of a file and by errors of its n-th write, then go on.

    Prints how many of each stopped, and what the command line told of `count` other errors.
    """
    ready()
    os.fsync = lambda fd: None  # nothing is killed here
    base = Path(folder)
    for name, end in (("whole", None), ("half", 4)):
        assert fork(lambda n=name, e=end: _train(base / n, e), base / "said.txt") == FINISHED  # type: ignore[misc]
    largest = max(p.stat().st_size for p in (base / "half").rglob("*") if p.is_file())
    stopped = {"limits": 0, "errors": 0}
    for i in range(SIZES):
        stopped["limits"] += _trial(base, lambda size=i * (largest + 512) // (SIZES - 1): _limit(size))  # type: ignore[misc]
    for code in CODES:
        at = 0
        while _trial(base, lambda n=at, c=code: _fail(n, c)):  # type: ignore[misc]
            at += 1
        stopped["errors"] += at
    print(json.dumps([stopped["limits"], stopped["errors"], [_told(base, trial) for trial in range(count)]]))


def _trial(base: Path, arm: Callable[[], None]) -> bool:
    """Whether a run stopped that goes on from step 4 on such a disk; either way nothing is lost and nothing is left over."""
    folder = base / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / "half", folder)

    def go_on(arm: Callable[[], None] | None = None) -> int:
        run = _seeded(folder)
        assert resume(run)
        if arm:
            arm()
        try:
            train(run, 6)
        except OSError as error:
            assert str(folder) in str(error.filename), error
            return STOPPED
        return FINISHED

    status = fork(lambda: go_on(arm), base / "said.txt")
    assert status in (STOPPED, FINISHED)
    found = load_latest(folder / "checkpoints")
    assert found is not None and not found.skipped and found.step in ((4, 6) if status == STOPPED else (6,))
    assert not list(folder.rglob(".*.tmp-*"))
    clear_leftovers(folder)
    assert fork(go_on, base / "said.txt") == FINISHED
    assert _result(folder) == _result(base / "whole")
    return status == STOPPED


def _train(folder: Path, end: int | None) -> int:
    if end is not None:
        stop_at(end)
    train(_seeded(folder), 6)
    return FINISHED


def _seeded(folder: Path) -> Run:
    set_seed(0)
    return line_run(folder, optimizer="adamw", save_every=2, keep=2)


def _result(run: Path) -> dict[str, bytes]:
    newest = run / "checkpoints" / (run / "checkpoints" / "CURRENT").read_text().strip()
    return {p.name: content(p) for p in (run / "log.0.jsonl", *newest.glob("*.safetensors"))}


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _fail(at: int, code: int) -> None:
    """Let the write number `at` of this process put down half of its bytes and fail."""
    real, seen = os.write, [0]

    def write(fd: int, data: bytes | memoryview) -> int:
        seen[0] += 1
        if seen[0] - 1 == at:
            real(fd, data[: len(data) // 2])
            raise OSError(code, os.strerror(code))
        return real(fd, data)

    os.write = write  # type: ignore[assignment]


def _told(base: Path, trial: int) -> list[object]:
    """The command line's exit code on a disk that fills up at one write or another, and what it said."""
    shutil.rmtree(base / "run", ignore_errors=True)

    def train() -> int:
        sys.stderr = sys.stdout
        _fail(1 + 4 * trial, CODES[trial % 3])
        return cli.main(["train", "--modality", "diffusion", *settings(base, base / "run", JUDGE, "train.steps=3")])

    status = fork(train, base / "said.txt")
    return [status, (base / "said.txt").read_text()]


def test_full_disks(tmp_path: Path) -> None:
    began = time.monotonic()
    limits, errors, told = run_server("reliability.test_disk", f"serve({str(make_world(tmp_path))!r}, {6 if FULL else 3})")
    assert isinstance(limits, int) and isinstance(errors, int) and limits >= SIZES // 2 and errors >= 3 * 9
    for trial, (status, said) in enumerate(told):  # type: ignore[arg-type, var-annotated]
        last = said.splitlines()[-1]
        assert status == 1 and last.startswith("mmpo: [Errno"), said
        assert os.strerror(CODES[trial % 3]) in last and str(tmp_path / "run") in last
        assert "repeat the command, which goes on from the newest checkpoint in" in last
    what, result = "file size limits and ENOSPC, EIO, EROFS at each write", "stopped with the file named, 0 results differ"
    counter("T8", what, SIZES + errors, result, time.monotonic() - began)
