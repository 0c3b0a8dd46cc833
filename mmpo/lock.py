"""One writer per run folder."""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class RunBusy(ValueError):
    """Another live process is writing to the same run folder."""


class RunLock:
    """The right to write to a run folder, held from construction until `release` or the end of this process.

    A kernel lock (flock) on `run.lock`: when the holder dies, however it dies, the lock is free. Inside the file: the
    holder's pid, host and start of the lock. RunBusy when another holder is alive, OSError where `run.lock` is a link, which
    would lead to another file. Forked children do not share it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = os.open(folder / "run.lock", FLAGS, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 1000, 0).decode(errors="replace")
            self._close()
            raise RunBusy(f"{folder} is being written by another process: {holder or 'just started'}. Stop it first") from error
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()} since {started}".encode(), 0)
        os.register_at_fork(after_in_child=self._close)  # a surviving data loader worker must not hold a dead run's lock

    def release(self) -> None:
        """Let others write."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
