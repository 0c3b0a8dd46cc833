"""One cache for everything frozen: latents, text embeddings, errors of a fixed reference.

Entries are addressed by a digest of everything they were computed from, so none is ever out of date, and carry a digest of
their content, so a damaged one is recomputed and counted instead of used. Losing the file costs time, never a result.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from blake3 import blake3
from torch import Tensor, nn

from mmpo.checkpoint import digest_tensors, from_bytes, to_bytes

T = TypeVar("T")
TABLE = "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, value BLOB NOT NULL, digest BLOB NOT NULL)"
# SQLITE_ERROR is what the fixed statements below give on a table of another shape; a locked or full disk is none of these.
DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ}
KEYS_PER_QUERY = 500
WAIT_FOR_WRITERS = 60.0  # seconds


class Cache:
    """Dicts of tensors by 32-byte key, in memory and, with a path, in one SQLite file that processes may share.

    path: the file; None keeps entries in memory only. memory: bytes of the most recently used entries kept in memory;
    without a file, older ones are forgotten. Counters, of single keys: `hits`, `misses`, and `damaged` (entries or files
    whose content was not what had been written; also counted as misses). For use by one thread; forks reconnect.
    """

    def __init__(self, path: Path | None, memory: int = 512 << 20):
        self.path, self.memory = path, memory
        self.hits = self.misses = self.damaged = 0
        self._recent: OrderedDict[bytes, bytes] = OrderedDict()
        self._recent_bytes = 0
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._run(lambda connection: None)

    def get_many(self, keys: Sequence[bytes]) -> list[dict[str, Tensor] | None]:
        """The entries in the order of the keys, on the CPU and owned by the caller; None for each that must be computed."""
        absent = list(dict.fromkeys(k for k in keys if k not in self._recent))
        stored = self._read(absent) if self.path is not None else {}
        found = [self._recent[k] if k in self._recent else stored.get(k) for k in keys]
        for key, value in zip(keys, found, strict=True):
            if value is None:
                self.misses += 1
            else:
                self.hits += 1
                self._remember(key, value)
        return [None if value is None else from_bytes(value) for value in found]

    def put_many(self, items: Iterable[tuple[bytes, dict[str, Tensor]]]) -> None:
        """Store entries, in one transaction; a key that is there already is replaced."""
        values = {key: to_bytes(tensors) for key, tensors in items}
        for key, value in values.items():
            self._remember(key, value)
        if self.path is not None and values:
            rows = [(key, value, _digest(key, value)) for key, value in values.items()]
            self._run(lambda connection: connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows))

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        self._connection = None

    def _remember(self, key: bytes, value: bytes) -> None:
        self._recent_bytes += len(value) - len(self._recent.pop(key, b""))
        self._recent[key] = value
        while self._recent_bytes > self.memory:
            self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    def _read(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """Stored values whose digest holds; the others are dropped from the file and counted."""
        rows = self._run(lambda connection: _select(connection, keys)) or []
        good = {key: value for key, value, digest in rows if isinstance(value, bytes) and _is_whole(key, value, digest)}
        bad = [(key, digest) for key, _, digest in rows if key not in good]
        if bad:
            self.damaged += len(bad)
            # the digest keeps a good entry that another process has written in the meantime
            self._run(lambda connection: connection.executemany("DELETE FROM entries WHERE key = ? AND digest = ?", bad))
        return good

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """Run `action` in a transaction. A damaged file is moved aside and `action` is tried once more, on a new one."""
        for attempt in range(2):
            try:
                connection = self._open()
                with connection:
                    return action(connection)
            except sqlite3.DatabaseError as error:
                if attempt or not _means_damage(error):
                    raise OSError(f"cache {self.path}: {error}; check the disk's space and the file's rights") from error
                self._move_aside(error)
        return None

    def _open(self) -> sqlite3.Connection:
        """This process's connection: SQLite's must not be carried across a fork."""
        if self._pid != os.getpid():
            self._inherited = self._connection  # kept, because even closing it would disturb the parent's
            self._connection, self._pid = None, os.getpid()
        if self._connection is None:
            connection = sqlite3.connect(str(self.path), timeout=WAIT_FOR_WRITERS)
            connection.text_factory = bytes
            for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL", TABLE):
                _patiently(connection, statement)
            self._connection = connection
        return self._connection

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        assert self.path is not None
        self.close()
        self.damaged += 1
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):  # there is no journal, or another process was faster
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        warnings.warn(f"cache {self.path}: {error}; moved to {aside.name}, its entries are computed again", stacklevel=4)


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Execute a statement; where another process has the file, again: of a change to WAL SQLite does not wait by itself."""
    deadline = time.monotonic() + WAIT_FOR_WRITERS
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _select(connection: sqlite3.Connection, keys: list[bytes]) -> list[tuple[bytes, object, object]]:
    rows: list[tuple[bytes, object, object]] = []
    for start in range(0, len(keys), KEYS_PER_QUERY):
        chunk = keys[start : start + KEYS_PER_QUERY]
        rows += connection.execute(f"SELECT key, value, digest FROM entries WHERE key IN ({','.join('?' * len(chunk))})", chunk)
    return rows


def _means_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    return code in DAMAGE or code & 0xFF in DAMAGE


def _is_whole(key: bytes, value: bytes, digest: object) -> bool:
    """As written, and tensors: a digest proves only that whoever wrote the row could count."""
    if digest != _digest(key, value):
        return False
    try:
        from_bytes(value)
    except ValueError:
        return False
    return True


def _digest(key: bytes, value: bytes) -> bytes:
    """Binds a value to its key: two entries that traded places do not pass."""
    return blake3(key).update(value).digest()


def key(*parts: str | bytes | int | float | None) -> bytes:
    """sha256 of the parts, each with its type and length: different parts give different keys.

    1, 1.0, True and "1" differ, and so do ("ab", "c") and ("a", "bc"). TypeError for anything that is none of these types.
    """
    h = hashlib.sha256()
    for part in parts:
        kind, data = type(part).__name__, _part(part)
        h.update(f"{kind} {len(data)} ".encode() + data)
    return h.digest()


def _part(part: object) -> bytes:
    if isinstance(part, str):
        return part.encode("utf-8", "surrogatepass")
    if isinstance(part, bytes):
        return part
    if isinstance(part, float):
        return struct.pack(">d", part)
    if part is None or isinstance(part, int):
        return str(part).encode()
    raise TypeError(f"cache key: expected str, bytes, int, float or None, got {type(part).__name__}: {part!r}")


def digest_module(module: nn.Module) -> str:
    """BLAKE3, in hex, of names, dtypes, shapes and bytes of all parameters and buffers: the identity of a frozen model.

    It does not cover the configuration (a scale in a config file): whatever else changes the output belongs in the key too.
    """
    return digest_tensors({**dict(module.named_parameters()), **dict(module.named_buffers())})
