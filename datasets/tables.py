"""Reads the rows of parquet, JSON, JSON lines and CSV files, each with its location, and tells the four apart by content.

A row that cannot be read (bad JSON, bad UTF-8, too long, too many columns) comes out as a BadField in its place, with a
reason of its own, so that a reader can count it and go on. A file that cannot be read at all is a DataError. JSON lines and
CSV may be gzipped. Byte order marks and line ends of any system are no part of a row.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmpo.datasets.json_rows import list_items, parsed
from mmpo.datasets.ledger import BadField, Row, TextRow
from mmpo.errors import DataError, RecipeError

BATCH = 64  # rows of parquet in memory at once: a row of Pick-a-Pic is about a megabyte
MAX_LINE = 8 * 2**20  # bytes of a line of JSON, characters of a line of CSV
MAX_RECORD = 100  # lines of a CSV record, and how far ahead the end of a quotation is looked for
SAMPLE = 100  # rows that tell a table's columns: the first alone may be a damaged one
NAMED = 8  # files of a folder in a message
SPLITS = {name: name for name in ("train", "test", "validation", "dev", "eval")}
SPLITS |= {"training": "train", "testing": "test", "valid": "validation", "val": "validation", "evaluation": "eval"}
UNNAMED = "unnamed"  # the split of a file whose name says none: most of them are to be trained on
Located = tuple[str, Row | BadField]

csv.field_size_limit(MAX_LINE)  # the library's own limit is 128 KiB, for the whole process


def kind_of(path: Path) -> str:
    """ "folder", "parquet", "json" (one list), "jsonl" or "csv", by the first bytes. Raises DataError when it is none.

    A file called .jsonl or .ndjson is "jsonl" whatever its first line looks like, because that line may be a damaged one.
    """
    if path.is_dir():
        return "parquet" if parquet_files(path) else "folder"
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    with _opened(path) as file:
        head, zipped = file.read(4096), isinstance(file, gzip.GzipFile)
    if head[:4] == b"PAR1" and not zipped:
        return "parquet"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or re.match(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]", head):
        raise DataError(f"{path}: expected text in UTF-8; found UTF-16 (`iconv -f UTF-16 -t UTF-8 {path}` rewrites it)")
    start, suffix = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1], _suffix(path)
    if start == b"{" or suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if start == b"[" and not zipped:
        return "json"
    if suffix in (".csv", ".tsv"):
        return "csv"
    expected = "JSON lines or CSV inside gzip" if zipped else "parquet, JSON, JSON lines, CSV or a folder"
    raise DataError(f"{path}: expected {expected}; found a file starting with {head[:16]!r}")


def columns_of(path: Path) -> frozenset[str]:
    """The columns of a table (for JSON, the keys of its first readable rows), or the names of a folder's entries.

    Raises DataError, with the first problem, where none of the first SAMPLE rows of JSON can be read.
    """
    kind = kind_of(path)
    if kind == "folder":
        return frozenset(p.name for p in path.iterdir())
    if kind == "parquet":
        return frozenset(_parquet(parquet_files(path)[0]).schema_arrow.names)
    if kind == "csv":
        return frozenset(csv_header(path))
    head = list(itertools.islice(rows_of(path), SAMPLE))
    rows = [row for _, row in head if not isinstance(row, BadField)]
    if head and not rows:
        if kind == "jsonl" and is_one_object(path):
            raise DataError(
                f"{path}: expected a JSON list of rows, or one JSON object a line; found one object over many lines"
            )
        where, problem = head[0]
        many = f"the first {SAMPLE} rows are all bad" if len(head) == SAMPLE else "no row can be read"
        raise DataError(f"{path}: {many}: {where} {problem}; where later ones are good, set the format")
    return frozenset(key for row in rows for key in row)


def is_one_object(path: Path) -> bool:
    """Whether a file that reads as no lines of JSON is one object, written over several of them."""
    with _opened(path) as file:
        text = file.read(MAX_LINE + 1)
    try:
        return len(text) <= MAX_LINE and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _suffix(path: Path) -> str:
    """The suffix in lower case, without regard to .gz."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unzipped where it is gzip."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        opener: Any = gzip.open if zipped else open
        with opener(path, "rb") as file:
            yield file
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end: {error}") from error


def _lines(file: IO[Any], ends: Any) -> Iterator[Any]:
    """Lines of a file; None stands for one over MAX_LINE, the rest of which is passed over."""
    while line := file.readline(MAX_LINE + 1):
        short = len(line) <= MAX_LINE
        yield line if short else None
        while not short and line and not line.endswith(ends):
            line = file.readline(MAX_LINE)


def _too_long(name: str) -> BadField:
    return BadField(name, f"at most {MAX_LINE} bytes", "more", "too long")


def rows_of(path: Path, columns: Sequence[str] | None = None) -> Iterator[Located]:
    """All rows of a table with their locations, `name:row N` from 0, or `name:line N` from 1 for lines of text.

    columns: of parquet, read these only.
    """
    readers = {"json": json_rows, "jsonl": jsonl_rows, "csv": csv_rows}
    kind = kind_of(path)
    if kind == "parquet":
        return parquet_rows(path, columns)
    if kind not in readers:
        raise DataError(f"{path}: expected a table (parquet, {', '.join(readers)}), found a folder without parquet files")
    return readers[kind](path)


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or all *.parquet of a folder and its sub-folders, sorted, without those that are hidden.

    Raises DataError where names of several splits stand side by side, or one that is not to be trained on beside a file of no
    named split: read as one, they are training on the test split.
    """
    if path.is_file():
        return [path]
    found = _parquets(path, hidden=False)
    splits = {_split(part.relative_to(path)) or UNNAMED: part for part in reversed(found)}
    if len(splits) > 1 and splits.keys() != {"train", UNNAMED}:
        named = ", ".join(f"{split} ({splits[split].relative_to(path).as_posix()})" for split in sorted(splits))
        raise DataError(f"{path}: parquet files of {len(splits)} splits: {named}; name one file, or a folder of one split")
    return found


def _parquets(path: Path, hidden: bool) -> list[Path]:
    """A folder's parquet files that are hidden, or those that are not: a dot means being written, or left over."""
    found = (p for p in path.rglob("*.parquet") if p.is_file())
    return sorted(p for p in found if any(part.startswith(".") for part in p.relative_to(path).parts) == hidden)


def _split(name: Path) -> str | None:
    """The split that a file's name, or else its innermost folder's, says it is of: train of train_sft-0.parquet."""
    words = (word for part in reversed(name.with_suffix("").parts) for word in re.split("[^a-z]+", part.lower()))
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def files_told(path: Path, table: str | None = None) -> list[str]:
    """What is read of a folder of parquet, and what is not, to print; nothing of any other path.

    table: the one file that is read, by its name, where the others are tables of their own.
    """
    if not path.is_dir() or not (found := parquet_files(path)):
        return []
    own = None if table is None else path / table
    read, others = [part for part in found if own in (None, part)], [part for part in found if own not in (None, part)]
    hidden = _parquets(path, hidden=True)
    told = [f"{path}: reads {len(read)} parquet file{'s' * (len(read) != 1)}: {_listed(read, path) or 'none'}"]
    told += [f"{path}: leaves out {len(others)} with tables of their own: {_listed(others, path)}"] if others else []
    return told + ([f"{path}: leaves out {len(hidden)} with a hidden name: {_listed(hidden, path)}"] if hidden else [])


def _listed(files: Sequence[Path], folder: Path) -> str:
    names = [p.relative_to(folder).as_posix() for p in files]
    return ", ".join(names if len(names) <= NAMED else [*names[: NAMED - 1], "...", names[-1]])


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Located]:
    """Rows of a file or folder of parquet, read 64 at a time; `columns`: read these only, where the file has them."""
    for part in parquet_files(path):
        table = _parquet(part)
        kept = None if columns is None else [c for c in columns if c in table.schema_arrow.names]
        batches = table.iter_batches(BATCH, columns=kept)
        name = part.name if part == path else part.relative_to(path).as_posix()
        number = itertools.count()
        try:
            for batch in batches:
                for row in _rows_in(batch):
                    yield f"{name}:row {next(number)}", row
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{part}: damaged parquet after row {next(number) - 1}: {error}") from error


def _rows_in(batch: pa.RecordBatch) -> list[Row | BadField]:
    """The rows of a batch; where one of them holds what Python has no value for, that row alone is bad."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        if batch.num_rows == 1:
            reason = "bad UTF-8" if isinstance(error, UnicodeDecodeError) else "unreadable row"
            return [BadField("(row)", "text in UTF-8 and values in range", str(error)[:200], reason)]
        return [row for i in range(batch.num_rows) for row in _rows_in(batch.slice(i, 1))]


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def json_rows(path: Path) -> Iterator[Located]:
    """The objects of one JSON list; a bad one is a row of its own. Raises DataError where the list itself is broken."""
    try:
        items = list(list_items(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON: {error}") from error
    for number, item in enumerate(items):
        yield f"{path.name}:row {number}", parsed(item, "(row)")


def jsonl_rows(path: Path) -> Iterator[Located]:
    """One JSON object per line; blank lines are no rows."""
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, b"\n"), start=1):
            if line is None:
                yield f"{path.name}:line {number}", _too_long("(line)")
            elif line.strip():
                yield f"{path.name}:line {number}", parsed(line)


def csv_header(path: Path) -> list[str]:
    """The column names of a CSV file. Raises DataError when there are none, or one of them twice."""
    _, header = next(_records(path), (0, []))
    if isinstance(header, BadField):
        raise DataError(f"{path}: not readable CSV: header: {header}")
    if len(set(header)) < len(header):
        raise DataError(f"{path}: not readable CSV: the header names a column twice: {', '.join(header)[:200]}")
    return header


def csv_rows(path: Path) -> Iterator[Located]:
    """Rows of a CSV (or, by its suffix, TSV) file with a header; empty cells are None, blank lines are no rows."""
    header = csv_header(path)
    for number, cells in itertools.islice(_records(path), 1, None):
        row: Row | BadField
        if isinstance(cells, BadField):
            row = cells
        elif len(cells) != len(header):
            row = BadField("(row)", f"{len(header)} columns", f"{len(cells)}", "wrong number of columns")
            row.raw = repr(cells)
        else:
            row = TextRow((name, cell or None) for name, cell in zip(header, cells, strict=True))
        yield f"{path.name}:line {number}", row


def _records(path: Path) -> Iterator[tuple[int, list[str] | BadField]]:
    """The records of a CSV file with the number of their first line.

    A quotation that does not end within MAX_RECORD lines spoils the line it starts in and no other.
    """
    separator = "\t" if _suffix(path) == ".tsv" else ","
    with _opened(path) as file:
        # Bytes that are no UTF-8 become lone surrogates, so that they spoil their own record only.
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        lines, waiting, number = _lines(text, ("\n", "\r")), deque[str | None](), 1
        while taken := list(itertools.islice(itertools.chain(_drained(waiting), lines), 1)):
            record: list[str] | BadField | None
            if taken[0] is None:
                record = _too_long("(line)")
            else:
                record = _record(taken, itertools.chain(_drained(waiting), lines), separator)
            if isinstance(record, BadField):
                record.raw = taken[0]
                waiting.extendleft(reversed(taken[1:]))
                del taken[1:]
            if record:  # a blank line has no cells
                yield number, record
            number += len(taken)


def _drained(waiting: deque[str | None]) -> Iterator[str | None]:
    while waiting:
        yield waiting.popleft()


def _record(taken: list[Any], more: Iterator[str | None], separator: str) -> list[str] | BadField:
    """The cells of the record that starts with the one line in `taken`; lines that it goes on in are added there."""

    def supply() -> Iterator[str]:
        yield taken[0].removeprefix("\ufeff")
        for line in itertools.islice(more, MAX_RECORD - 1):
            taken.append(line)
            if line is None:
                return
            yield line

    try:
        cells = next(csv.reader(supply(), delimiter=separator, strict=True), [])
        "".join(cells).encode()
    except csv.Error as error:
        return BadField("(line)", "a CSV record", str(error), "bad CSV")
    except UnicodeEncodeError:
        return BadField("(line)", "text in UTF-8", "other bytes", "bad UTF-8")
    return cells


def write_parquet(path: Path, schema: pa.Schema, rows: Iterable[Row], durable: bool = False) -> int:
    """Write rows as one parquet file, replaced as a whole, BATCH rows a group (each group has a header); returns how many.

    durable: have it on the disk before it takes the place of another.
    """
    partial, count, iterator = path.with_name(path.name + ".partial"), 0, iter(rows)
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            while group := list(itertools.islice(iterator, BATCH)):
                writer.write_table(pa.Table.from_pylist(group, schema))
                count += len(group)
        if durable:
            sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # still there only when something was raised
    return count


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, rows: Iterable[Row], also: Sequence[str] = ()) -> int:
    """Write rows as one file, replaced as a whole: a JSON list if it is called .json, otherwise JSON lines; returns how many.

    A name that ends in .jsonl.gz is gzipped, the same bytes for the same rows. also: endings with which the caller writes
    something else, for the message. Raises RecipeError for any other ending.
    """
    if _suffix(path) not in (".json", ".jsonl", ".ndjson") or path.name.endswith(".json.gz"):
        raise RecipeError(f"{path}: expected a name that ends in {', '.join(('.jsonl', '.jsonl.gz', *also))} or .json")
    start, between, end = ("[\n", ",\n", "\n]\n") if _suffix(path) == ".json" else ("", "\n", "\n")
    partial, count = path.with_name(path.name + ".partial"), 0
    try:
        with open(partial, "wb") as raw, _zipped(raw, path) as file:
            for count, row in enumerate(rows, start=1):
                file.write(((between if count > 1 else start) + json.dumps(row, ensure_ascii=False)).encode())
            file.write((end if count else (start + end).lstrip("\n")).encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _zipped(raw: IO[bytes], path: Path) -> Any:
    """The file itself, or a gzip stream into it that carries no time and no name."""
    return gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else contextlib.nullcontext(raw)
