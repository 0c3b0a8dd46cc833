"""Append-only logs of a run, one JSON object a line, that a resumed run can wind back to its checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpo import masking


class RunLog:
    """A JSONL file that only grows, except when a run resumes: then it is cut back to what the checkpoint had seen.

    Call `truncate` before the first `append`, with the checkpoint's offset, or with 0 for a run that starts over.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, keys sorted, NaN and infinities as the strings "NaN", "Infinity" and "-Infinity".

        Numbers of numpy and torch (one element) are written as numbers. The line survives a kill of this process once
        `append` returns, and a power cut once `offset` does. On an OSError (disk full) the line is taken back whole.
        """
        line = memoryview(json.dumps(_plain(record), sort_keys=True, allow_nan=False).encode() + b"\n")
        start = os.fstat(self._fd).st_size
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            os.ftruncate(self._fd, start)
            error.filename = str(self.path)  # a descriptor has no name
            raise

    def offset(self) -> int:
        """Length of the log in bytes, all of it durable: what a checkpoint stores."""
        os.fsync(self._fd)
        return os.fstat(self._fd).st_size

    def truncate(self, offset: int) -> int:
        """Cut the log back to `offset` bytes; returns how many lines that dropped, a torn last line counted as one.

        ValueError when the log is shorter than that or has no line end there: it is not the log of this checkpoint.
        """
        size = os.fstat(self._fd).st_size
        if not 0 <= offset <= size:
            raise ValueError(
                f"{self.path} has {size} bytes, the checkpoint has seen {offset}: lines were lost. "
                f"Put the log back, or resume a copy of the checkpoint in a new folder"
            )
        if offset and os.pread(self._fd, 1, offset - 1) != b"\n":
            raise ValueError(
                f"{self.path}: no line ends at byte {offset}: the log was edited, or belongs to another run. Put it back"
            )
        dropped = os.pread(self._fd, size - offset, offset)
        os.ftruncate(self._fd, offset)
        os.fsync(self._fd)
        return len(dropped.splitlines())

    def close(self) -> None:
        """Make the log durable and close it."""
        os.fsync(self._fd)
        os.close(self._fd)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return masking.in_text(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain(value.item()) if hasattr(value, "item") else value


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, without a torn last line."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines() if line]
