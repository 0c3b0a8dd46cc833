"""Append-only logs of a run, one JSON object a line, that a resumed run can wind back to its checkpoint."""

from __future__ import annotations

import hashlib
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

    def digest(self, offset: int) -> str:
        """sha256, in hex, of the first `offset` bytes: what a checkpoint stores beside it."""
        h, done = hashlib.sha256(), 0
        while done < offset and (part := os.pread(self._fd, min(2**20, offset - done), done)):
            h.update(part)
            done += len(part)
        return h.hexdigest()

    def torn(self) -> bool:
        """Whether the last line was cut off by a kill."""
        size = os.fstat(self._fd).st_size
        return size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def truncate(self, offset: int, digest: str | None = None) -> int:
        """Cut the log back to `offset` bytes; returns how many lines that dropped, a torn last line counted as one.

        digest: of those bytes, None where it is not known. ValueError when the log is shorter, has no line end there, or
        other bytes: it is not the log of this checkpoint.
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
        if digest is not None and self.digest(offset) != digest:
            raise ValueError(
                f"{self.path}: its first {offset} bytes are not those that the checkpoint has seen: the log was edited or "
                f"damaged. Put it back, or start the run again in a new folder"
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
    """The records of a log, without a torn last line. ValueError, with the line, where one is no JSON."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records += [json.loads(line)] if line else []
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: damaged ({error}); put the log back, or start the run again elsewhere"
            ) from error
    return records
