"""One writer per run folder: a second one is told who the first is, and a dead one's lock is free."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmpo.lock import RunBusy, RunLock


def in_child(action: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
        except RunBusy:
            os._exit(3)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path):
    with RunLock(tmp_path / "run") as lock:
        with pytest.raises(RunBusy, match=rf"run is being written.*pid {os.getpid()} on {os.uname().nodename} since 20\d\d-"):
            RunLock(tmp_path / "run")
        assert isinstance(lock, RunLock)
        assert exit_code(in_child(lambda: RunLock(tmp_path / "run"))) == 3
    assert exit_code(in_child(lambda: RunLock(tmp_path / "run"))) == 0


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_lock_of_a_killed_process_is_free_even_while_its_workers_live(tmp_path: Path):
    def hold_and_wait() -> None:
        lock = RunLock(tmp_path)
        worker = in_child(lambda: time.sleep(20))
        (tmp_path / "worker").write_text(str(worker))
        time.sleep(20)
        lock.release()

    holder = in_child(hold_and_wait)
    worker = tmp_path / "worker"
    wait_for(lambda: worker.exists() and worker.read_text())
    with pytest.raises(RunBusy, match=f"pid {holder} on"):
        RunLock(tmp_path)
    os.kill(holder, signal.SIGKILL)
    exit_code(holder)
    os.kill(int(worker.read_text()), 0)  # the worker is alive
    with RunLock(tmp_path):
        os.kill(int(worker.read_text()), signal.SIGKILL)


def test_a_link_is_no_lock(tmp_path: Path) -> None:
    """What it leads to would be written over: somebody else may have put it into a folder that is open to all."""
    (kept := tmp_path / "kept").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(kept)
    with pytest.raises(OSError):
        RunLock(tmp_path / "run")
    assert kept.read_text() == "mine"
