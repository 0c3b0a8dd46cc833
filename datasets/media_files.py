"""Media of a written dataset as files beside it: each distinct one once, named by the sha256 of its content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from mmpo import media
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.tables import sync, write_json, write_parquet
from mmpo.datasets.wording import written
from mmpo.errors import DataError
from mmpo.pair import Block

T = TypeVar("T")
P = TypeVar("P")
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FOLDER = "media"
NAME = re.compile(rf"{FOLDER}/([0-9a-f]{{64}})\.[0-9a-z]+")
STARTS = (  # where the telling bytes of a format are, and what they are
    ("png", 0, b"\x89PNG"), ("jpg", 0, b"\xff\xd8\xff"), ("gif", 0, b"GIF8"), ("bmp", 0, b"BM"), ("webp", 8, b"WEBP"),
    ("avi", 8, b"AVI "), ("wav", 8, b"WAVE"), ("mp4", 4, b"ftyp"), ("mkv", 0, b"\x1aE\xdf\xa3"), ("flac", 0, b"fLaC"),
    ("ogg", 0, b"OggS"), ("mp3", 0, b"ID3"),
)  # fmt: skip


def file_bytes(block: Block) -> bytes:
    """The file of a block: its own bytes, or the array (H, W, 3) of an image as PNG, from which it can be had again."""
    if isinstance(block.data, bytes):
        return block.data
    if block.kind != "image" or not isinstance(block.data, np.ndarray):
        raise DataError(f"{block.kind} as {type(block.data).__name__}: expected the bytes of a file")
    return media.encode(block.data)


def suffix(data: bytes) -> str:
    """What a file of these bytes is usually called, without the dot; "bin" when they say nothing."""
    return next((name for name, at, start in STARTS if data[at : at + len(start)] == start), "bin")


def write_pictured(
    pairs: Iterable[P],
    path: Path,
    ledger: Ledger | None,
    row: Callable[[P, Ledger | None, Callable[[Block], Any]], dict[str, Any]],
    schema: pa.Schema | None = None,
) -> int:
    """Write pairs with pictures as one table, replaced as a whole; returns the number of rows.

    A file called .parquet (where there is a schema) has the pictures inside, as Hugging Face's {"bytes", "path"}. Beside JSON
    lines, or one list in a .json, they are files of media/. row: (pair, ledger, cell of a picture) -> the row.
    """
    if path.suffix.lower() == ".parquet" and schema is not None:
        inside = written(pairs, lambda pair, told: row(pair, told, lambda b: {"bytes": file_bytes(b), "path": b.path}), ledger)
        return write_parquet(path, schema.with_metadata(features(schema)), inside)
    with MediaFiles(path.parent) as files:
        also = [".parquet"] if schema is not None else []
        return write_json(path, files.settled(written(pairs, lambda pair, told: row(pair, told, files.put), ledger)), also)


def features(schema: pa.Schema) -> dict[bytes, bytes]:
    """The note that makes Hugging Face's datasets open the pictures of a parquet file."""
    known = {name: _feature(schema.field(name).type) for name in schema.names}
    return {b"huggingface": json.dumps({"info": {"features": known}}).encode()}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == PICTURE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind.fields}
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


class MediaFiles:
    """Writes media to `root`/media while a dataset is written; leaving it with an error takes away what it has added.

    root: the folder that the names start from, where the dataset's table is. Files that are there already are not written
    again, so that a table which is replaced stays whole until then. `settled` makes all of them durable at the
    end, which costs far less than file by file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[tuple[str, bool], str] = {}
        self._added: list[Path] = []

    def put(self, block: Block) -> str:
        """The name of a block's file, media/<sha256>.<suffix>, which is then there."""
        key = block.digest, isinstance(block.data, bytes)
        if key not in self.names:
            data = file_bytes(block)
            name = f"{FOLDER}/{hashlib.sha256(data).hexdigest()}.{suffix(data)}"
            path = self.root / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._added.append(path)
                partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
                try:
                    partial.write_bytes(data)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
            self.names[key] = name
        return self.names[key]

    def settled(self, rows: Iterable[T]) -> Iterator[T]:
        """The rows of a table, and after the last one every medium on the disk: before the table can take its place."""
        yield from rows
        for path in self._added:
            sync(path)
        if self._added:
            sync(self.root / FOLDER)

    def prune(self) -> None:
        """Take away files of media/ that an earlier table left there and this one does not name."""
        prune(self.root, set(self.names.values()))

    def __enter__(self) -> MediaFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            return
        for path in self._added:
            path.unlink(missing_ok=True)
        folder = self.root / FOLDER
        if self._added and not any(folder.iterdir()):
            folder.rmdir()


def prune(root: Path, wanted: AbstractSet[str]) -> None:
    """Take away media of `root`/media, files called by their sha256, whose names are not wanted."""
    for path in root.glob(f"{FOLDER}/*"):
        if NAME.fullmatch(name := f"{FOLDER}/{path.name}") and name not in wanted:
            path.unlink()
