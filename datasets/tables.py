"""Reads the rows of parquet, JSON, JSON lines and CSV files, each with its location, and tells the four apart by content.

A row that cannot be read (bad JSON, bad UTF-8, too many columns) comes out as a BadField in its place, so that a reader
can count it and go on. A file that cannot be read at all is a DataError.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmpo.datasets.ledger import BadField, Row
from mmpo.errors import DataError

BATCH = 64  # rows of parquet in memory at once: a row of Pick-a-Pic is about a megabyte
Located = tuple[str, Row | BadField]


def kind_of(path: Path) -> str:
    """ "folder", "parquet", "json" (one list), "jsonl" or "csv", by the first bytes. Raises DataError when it is none."""
    if path.is_dir():
        return "parquet" if parquet_files(path) else "folder"
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        head = file.read(4096)
    if head[:4] == b"PAR1":
        return "parquet"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        return "json"
    if start == b"{":
        return "jsonl"
    if path.suffix.lower() in (".csv", ".tsv") and b"\0" not in head:
        return "csv"
    raise DataError(f"{path}: expected parquet, JSON, JSON lines, CSV or a folder; found a file starting with {head[:16]!r}")


def columns_of(path: Path) -> frozenset[str]:
    """The columns of a table (of its first row, for JSON), or the names of a folder's entries."""
    kind = kind_of(path)
    if kind == "folder":
        return frozenset(p.name for p in path.iterdir())
    if kind == "parquet":
        return frozenset(_parquet(parquet_files(path)[0]).schema_arrow.names)
    for _, row in itertools.islice(rows_of(path), 1):
        return frozenset() if isinstance(row, BadField) else frozenset(row)
    return frozenset()


def rows_of(path: Path) -> Iterator[Located]:
    """All rows of a table with their locations, `name:row N` from 0, or `name:line N` from 1 for lines of text."""
    readers = {"parquet": parquet_rows, "json": json_rows, "jsonl": jsonl_rows, "csv": csv_rows}
    kind = kind_of(path)
    if kind not in readers:
        raise DataError(f"{path}: expected a table ({', '.join(readers)}), found a folder without parquet files")
    return readers[kind](path)


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or all *.parquet of a folder and its sub-folders, sorted."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*.parquet") if p.is_file())


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Located]:
    """Rows of a file or folder of parquet, read 64 at a time; `columns`: read these only, where the file has them."""
    for part in parquet_files(path):
        table = _parquet(part)
        kept = None if columns is None else [c for c in columns if c in table.schema_arrow.names]
        batches = table.iter_batches(BATCH, columns=kept)
        number = itertools.count()
        try:
            for batch in batches:
                for row in batch.to_pylist():
                    yield f"{part.name}:row {next(number)}", row
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{part}: damaged parquet after row {next(number) - 1}: {error}") from error


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def json_rows(path: Path) -> Iterator[Located]:
    """The objects of one JSON list."""
    try:
        items = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a JSON list of objects, found {type(items).__name__}")
    for number, item in enumerate(items):
        yield f"{path.name}:row {number}", _object(item)


def jsonl_rows(path: Path) -> Iterator[Located]:
    """One JSON object per line; blank lines are no rows."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:line {number}", _parsed(line)


def _parsed(line: bytes) -> Row | BadField:
    try:
        return _object(json.loads(line.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        return BadField("(line)", "a JSON object in UTF-8", f"{type(error).__name__}: {error}"[:200], "unreadable line")


def _object(item: Any) -> Row | BadField:
    return item if isinstance(item, dict) else BadField("(row)", "a JSON object", type(item).__name__, "unreadable line")


def csv_rows(path: Path) -> Iterator[Located]:
    """Rows of a CSV (or, by its suffix, TSV) file with a header."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            for row in reader:
                wrong = None in row or None in row.values()
                yield f"{path.name}:line {reader.line_num}", _width(row, reader) if wrong else row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable CSV: {error}") from error


def _width(row: dict[Any, Any], reader: csv.DictReader[str]) -> BadField:
    expected = len(reader.fieldnames or ())
    found = expected + len(row[None]) if None in row else sum(v is not None for v in row.values())
    return BadField("(row)", f"{expected} columns", f"{found}", "unreadable line")


def write_parquet(path: Path, schema: pa.Schema, rows: Iterable[Row]) -> int:
    """Write rows as one parquet file, replaced as a whole, BATCH rows a group (each group has a header); returns how many."""
    partial, count, iterator = path.with_name(path.name + ".partial"), 0, iter(rows)
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            while group := list(itertools.islice(iterator, BATCH)):
                writer.write_table(pa.Table.from_pylist(group, schema))
                count += len(group)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # still there only when something was raised
    return count
