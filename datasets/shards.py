"""Finished parts of a build on disk, so that a build that was killed goes on where it was.

.building/settings.json     what was asked for; the parts of one build are never mixed with those of another. Gone first
                            when the build is finished
.building/000012.table      the pairs of one part, as rows of the format `mmpo`
.building/000012.json       written last: digests of what went in and of the table, and what became of each record
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmpo.datasets.formats.mmpo import SCHEMA, row_of
from mmpo.datasets.ledger import EXAMPLES, Ledger
from mmpo.datasets.media_files import FOLDER as MEDIA
from mmpo.datasets.media_files import NAME, MediaFiles, prune
from mmpo.datasets.stages import Record
from mmpo.datasets.tables import parquet_rows, sync, write_parquet
from mmpo.pair import Block, Pair

FOLDER = ".building"

Why = Callable[[str, str], str | None]  # the words of the chosen and of the rejected side
Select = Callable[[Iterable[tuple[str, str]]], Why]


def inputs_digest(records: Sequence[Record]) -> str:
    """sha256 of what a part is made of: ids, prompts, answers, and what the source said beside them."""
    h = hashlib.sha256()
    for record in records:
        fields = json.dumps(record.fields, sort_keys=True, default=_told)
        h.update(json.dumps([record.id, [b.digest for b in record.prompt], record.answer, fields]).encode())
    return h.hexdigest()


def _told(value: Any) -> Any:
    """What json cannot say, for a digest."""
    if isinstance(value, Block):
        return value.digest
    return dict(value) if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else repr(value)


@dataclass(frozen=True)
class Shards:
    """The parts of one build in `out`/.building; media are in `out`/media, where they stay."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out / FOLDER

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"

    def holds(self, number: int, inputs: str) -> bool:
        """Whether a part is there, whole to the byte with all its media, and of these inputs."""
        note = self._note(number)
        if note is None or note["inputs"] != inputs or not self._table(number).is_file():
            return False
        table = hashlib.sha256(self._table(number).read_bytes()).hexdigest()
        return table == note["table"] and all(self._whole(name) for name in note["media"])

    def _whole(self, name: str) -> bool:
        """Whether a medium has the content that it is named after."""
        path, found = self.out / name, NAME.fullmatch(name)
        return path.is_file() and found is not None and hashlib.sha256(path.read_bytes()).hexdigest() == found.group(1)

    def write(self, number: int, inputs: str, pairs: Iterable[Pair], ledger: Ledger) -> None:
        """Write a part: its pairs one at a time, their media as they come, and its account once all pairs are there.

        Nothing waits for the disk: after a crash of the machine `holds` finds out what did not get there.
        """
        files, buffer = MediaFiles(self.out), io.BytesIO()
        rows = [row_of(pair, files, set()) for pair in pairs]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
        _replace(self._table(number), buffer.getvalue())
        table = hashlib.sha256(buffer.getvalue()).hexdigest()
        counts = {"used": ledger.used, "skipped": dict(ledger.skipped), "examples": dict(ledger.examples)}
        note = {"inputs": inputs, "table": table, "media": sorted(set(files.names.values())), "counts": counts}
        _replace(self.folder / f"{number:06}.json", json.dumps(note).encode())

    def merge(self, count: int, ledger: Ledger, tables: Sequence[str] = ("pairs",), select: Select | None = None) -> int:
        """Make pairs.parquet of the first `count` parts; returns the number of pairs.

        tables: the first is pairs; further ones, NAME.parquet, take the pairs whose meta names them under "table". select: sees
        the words of both sides of every pair, and returns what tells of one pair why it is left out, or None. That, and a pair
        that an earlier part has already, is noted. ledger: takes the accounts of all parts.
        """
        for number in range(count):
            counts = (self._note(number) or {})["counts"]
            ledger.used += counts["used"]
            ledger.skipped += Counter(counts["skipped"])
            for reason, places in counts["examples"].items():
                ledger.examples[reason] = [*ledger.examples[reason], *places][:EXAMPLES]
        why = select(map(_sides, self._rows(count, Ledger("skip")))) if select else lambda *sides: None
        for path in sorted((self.out / MEDIA).glob("*")):
            sync(path)  # before there are tables that name it
        total = 0
        for number, table in enumerate(tables):
            rows = self._rows(count, ledger if number == 0 else Ledger("skip"))
            kept = (row for row in rows if len(tables) == 1 or _table_of(row) == table)
            found = write_parquet(self.out / f"{table}.parquet", SCHEMA, _selected(kept, why, ledger))
            total += found
            if number and not found:
                (self.out / f"{table}.parquet").unlink()
        return total

    def media(self, tables: Iterable[str]) -> set[str]:
        """The names of all media of tables, which are called by the names of their files."""
        columns = ("prompt", "chosen", "rejected", "branches")
        rows = (row for table in tables for _, row in parquet_rows(self.out / table, columns))
        return {name for row in rows for name in _media_of(row)}

    def lost(self, tables: Iterable[str]) -> list[str]:
        """What is wrong with media of tables: a line for each that is gone or has not the content that it is named after."""
        wrong = [name for name in sorted(self.media(tables)) if not self._whole(name)]
        return [f"{name} is {'not what was written there' if (self.out / name).is_file() else 'gone'}" for name in wrong]

    def drop(self) -> None:
        """Forget all parts."""
        for path in self.folder.glob("[0-9]*"):
            path.unlink()

    def close(self, tables: Iterable[str]) -> None:
        """Take away the parts, and media that no table names, such as those of a part that was made anew.

        The settings go first: without them the folder is a finished one, wherever the rest of this is interrupted.
        """
        self.settings.unlink(missing_ok=True)
        prune(self.out, self.media(tables))
        shutil.rmtree(self.folder)

    def _rows(self, count: int, ledger: Ledger) -> Iterator[Any]:
        seen: set[bytes] = set()
        for number in range(count):
            for _, row in parquet_rows(self._table(number)):
                name = hashlib.sha256(row["id"].encode()).digest()[:12]  # type: ignore[index]
                if name in seen:
                    ledger.notes["pair made twice (kept once)"] += 1
                else:
                    seen.add(name)
                    yield row

    def _note(self, number: int) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / f"{number:06}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.keys() >= {"inputs", "table", "media", "counts"} else None

    def _table(self, number: int) -> Path:
        return self.folder / f"{number:06}.table"


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)


def _selected(rows: Iterable[Mapping[str, Any]], why: Why, ledger: Ledger) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        if reason := why(*_sides(row)):
            ledger.notes[f"pair left out: {reason}"] += 1
        else:
            yield row


def _sides(row: Mapping[str, Any]) -> tuple[str, str]:
    """The words of a row's two sides."""
    chosen, rejected = (" ".join(block["text"] or "" for block in row[side] or ()) for side in ("chosen", "rejected"))
    return chosen, rejected


def _media_of(row: Any) -> Iterator[str]:
    """The names of the media in a row's sides and branches."""
    branches = (blocks for _, branch in row["branches"] or () for blocks in branch.values())
    for blocks in (row["prompt"], row["chosen"], row["rejected"], *branches):
        yield from (block["media"] for block in blocks or () if block["media"])


def _table_of(row: Mapping[str, Any]) -> str:
    return str(json.loads(row["meta"] or "{}").get("table", "pairs"))
