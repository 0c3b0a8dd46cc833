"""T9: of two writers one wins, and the lock of a dead process is free, whatever its file says."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mmpo.lock import RunBusy, RunLock
from tests.reliability.counters import counter

TIMES = 50


def writer(folder: Path, go: int, done: int) -> int:
    """A child that takes the lock when `go` is closed and says "1" into `done`, or "0" when it was refused."""
    child = os.fork()
    if child == 0:
        os.read(go, 1)
        try:
            lock = RunLock(folder)
        except RunBusy:
            os.write(done, b"0")
            os._exit(3)
        os.write(done, b"1")
        time.sleep(10)
        lock.release()
        os._exit(0)
    return child


@pytest.mark.slow
def test_of_two_writers_one_wins(tmp_path: Path) -> None:
    began = time.monotonic()
    for trial in range(TIMES):
        (go, start), (answers, done) = os.pipe(), os.pipe()
        children = [writer(tmp_path / str(trial), go, done) for _ in range(2)]
        os.write(start, b"xx")
        said = os.read(answers, 1) + os.read(answers, 1)
        assert sorted(said) == sorted(b"01")
        with pytest.raises(RunBusy, match=rf"pid ({children[0]}|{children[1]}) on "):
            RunLock(tmp_path / str(trial))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for fd in (go, start, answers, done):
            os.close(fd)
    counter("T9", "two writers at once", TIMES, "exactly one won each time", time.monotonic() - began)


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    began = time.monotonic()
    (go, start), (answers, done) = os.pipe(), os.pipe()
    for trial in range(TIMES):
        holder = writer(tmp_path, go, done)
        os.write(start, b"x")
        assert os.read(answers, 1) == b"1"
        with pytest.raises(RunBusy, match=f"pid {holder} on "):
            RunLock(tmp_path)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        if trial % 2:  # as if its number had been given to a process that is alive
            (tmp_path / "run.lock").write_text(f"pid {os.getpid()} on {os.uname().nodename} since 2024-01-01")
        with RunLock(tmp_path):
            assert (tmp_path / "run.lock").read_text().startswith(f"pid {os.getpid()} on ")
    for fd in (go, start, answers, done):
        os.close(fd)
    counter("T9", "locks of dead processes", TIMES, "all taken over, none before the death", time.monotonic() - began)
