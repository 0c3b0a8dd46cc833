"""The suite's own format: a folder that holds all of its pairs, whatever their media, sides and branches.

    pairs.parquet               one row a pair; meta and provenance as JSON
    media/<sha256>.<suffix>     each distinct image, video or sound once, as the bytes of its file

Read again, a pair is what it was: ids, blocks with roles and paths, arrays as arrays, spans, branches, scores. The table is
replaced last and as a whole, so that a folder whose writing was interrupted is what it was before, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import pyarrow as pa

from mmpo import media
from mmpo.datasets.fields import checked_text, finite, list_field, number_field, shown, text_field, undecodable
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.media_files import NAME, MediaFiles
from mmpo.datasets.tables import parquet_rows, sync, write_parquet
from mmpo.datasets.wording import Unsayable, written
from mmpo.errors import DataError
from mmpo.pair import Block, Branch, Kind, Pair, Role, Span

TABLE = "pairs.parquet"
BLOCKS = pa.list_(
    pa.struct([(name, pa.string()) for name in ("kind", "role", "text", "media", "path")] + [("array", pa.bool_())])
)
SPANS = pa.list_(pa.struct([("start", pa.int64()), ("end", pa.int64()), ("weight", pa.float64())]))
SCHEMA = pa.schema(
    [("id", pa.string()), ("prompt", BLOCKS), ("chosen", BLOCKS), ("rejected", BLOCKS)]
    + [(name, pa.float64()) for name in ("weight", "margin", "label")]
    + [("group", pa.string()), ("scores", pa.map_(pa.string(), pa.float64())), ("spans", pa.map_(pa.string(), SPANS))]
    + [("branches", pa.map_(pa.string(), pa.struct([("prompt", BLOCKS), ("response", BLOCKS)])))]
    + [("meta", pa.string()), ("provenance", pa.string())]
)
Open = Callable[[str, Any], Block]  # (field, a cell of BLOCKS) -> the block


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind == "parquet" and columns >= set(SCHEMA.names)


def mmpo(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """The pairs of a folder, or of its table given by name, with the ids they were written with.

    ties: "drop" skips pairs with label 0.5, "soft" keeps them. root: where media/ is, the table's folder by default. Blocks
    of equal content that are in use are one object, so that a picture of many pairs is in memory once. Each medium has to
    have the sha256 of its name, and each image has to open.
    """
    table = path / TABLE if path.is_dir() else path
    opened = partial(_block, root or table.parent, WeakValueDictionary())
    return import_rows(parquet_rows(table), lambda row: [_pair(row, ties, opened)], ledger)


def pair_of(row: Row, root: Path) -> Pair:
    """The pair of one row of a table whose media/ is in `root`. Raises BadField."""
    return _pair(row, "soft", partial(_block, root, WeakValueDictionary()))


def _pair(row: Row, ties: str, opened: Open) -> Pair:
    label = number_field(row, "label", 1.0, least=0.0)
    if label == 0.5 and ties == "drop":
        raise Skip("tie")
    told = _object(row, "meta")
    if row.get("provenance") is not None:
        told |= {"provenance": _json(row, "provenance")}
    scores = {str(name): finite(score, f"scores.{name}") for name, score in row.get("scores") or ()}
    prompt, chosen, rejected = (_blocks(row, name, opened) for name in ("prompt", "chosen", "rejected"))
    return Pair(
        text_field(row, "id"), prompt, chosen, rejected,
        weight=number_field(row, "weight", 1.0, least=0.0), margin=number_field(row, "margin", 0.0), label=label,
        scores=scores, group=row.get("group"), meta=told, spans=_spans(row.get("spans") or ()),
        branches={str(name): _branch(cells, f"branches.{name}", opened) for name, cells in row.get("branches") or ()},
    )  # fmt: skip


def _branch(cells: Any, name: str, opened: Open) -> Branch:
    if not isinstance(cells, dict):
        raise BadField(name, "an object with prompt and response", shown(cells), "bad branches")
    return Branch(*(_blocks(cells, part, opened, f"{name}.") for part in ("prompt", "response")))


def _blocks(row: Row, name: str, opened: Open, before: str = "") -> tuple[Block, ...]:
    return tuple(opened(f"{before}{name}[{i}]", cell) for i, cell in enumerate(list_field(row, name)))


def _block(root: Path, known: WeakValueDictionary[Any, Block], name: str, cell: Any) -> Block:
    """A block of its cell, its medium read and checked where no block in use has the same."""
    if not isinstance(cell, dict) or cell.get("kind") not in get_args(Kind) or cell.get("role") not in (None, *get_args(Role)):
        raise BadField(name, "a block with kind, role and text or media", shown(cell), "bad block")
    kind, role, file, path = (cell.get(key) for key in ("kind", "role", "media", "path"))
    if kind == "text":
        return Block("text", checked_text(cell.get("text"), f"{name}.text"), path, role)
    key = kind, role, file, path, bool(cell.get("array"))
    block = known.get(key)
    if block is None:
        block = known[key] = _medium(root, cell, f"{name}.media")
    return block


def _medium(root: Path, cell: Mapping[str, Any], name: str) -> Block:
    """A block whose content is a file under media/."""
    found = NAME.fullmatch(str(cell.get("media")))
    if not found:
        raise BadField(name, "media/<sha256>.<suffix>", shown(cell.get("media")), "bad name of a medium")
    try:
        data: Any = media.read(root, found.string, sha256=found.group(1))
        if cell["kind"] == "image":
            opened = media.pixels(data)
            data = opened if cell.get("array") else data
    except media.ForbiddenPath as error:
        raise BadField(name, "a file under the dataset root", str(error), error.reason) from error
    except DataError as error:
        raise undecodable(name, error) from error
    return Block(cell["kind"], data, cell.get("path"), cell.get("role"))


def _spans(items: Iterable[tuple[str, Any]]) -> dict[str, tuple[Span, ...]]:
    try:
        return {side: tuple(Span(s["start"], s["end"], s["weight"]) for s in spans) for side, spans in items}
    except (KeyError, TypeError, ValueError) as error:
        raise BadField("spans", "ranges of characters and their weights", str(error)) from error


def _json(row: Row, name: str) -> Any:
    try:
        return json.loads(row[name])
    except (TypeError, ValueError) as error:
        raise BadField(name, "JSON", f"{shown(row[name])} ({error})") from error


def _object(row: Row, name: str) -> dict[str, Any]:
    found = {} if row.get(name) is None else _json(row, name)
    if not isinstance(found, dict):
        raise BadField(name, "a JSON object", shown(found))
    return found


def write_mmpo(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of any kind to the folder `path`; returns the number of rows. An earlier dataset there is replaced.

    Memory does not grow with the media: each is written when its first pair comes. `meta["provenance"]` gets a column of its
    own. When writing fails, what was added is taken away again. Raises DataError for a folder that holds something else, two
    pairs of one id, meta that is no JSON, and media that are arrays of video or sound.
    """
    if path.exists() and not (path.is_dir() and ((path / TABLE).is_file() or not any(path.iterdir()))):
        raise DataError(f"{path}: expected a new folder, an empty one or one with {TABLE}, found something else there")
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with MediaFiles(path) as files:
            ids: set[str] = set()
            rows = written(pairs, lambda pair, _: row_of(pair, files, ids), ledger)
            count = write_parquet(path / TABLE, SCHEMA, files.settled(rows), durable=True)
        sync(path)
        files.prune()
        return count
    except BaseException:
        if new and not any(path.iterdir()):
            path.rmdir()
        raise


def row_of(pair: Pair, files: MediaFiles, ids: set[str]) -> dict[str, Any]:
    """The row of a pair, its media put into `files`. ids: of the pairs before it, to which its own is added."""
    if pair.id in ids:
        raise Unsayable(pair.id, "the id of an earlier pair; ids have to differ")
    meta = dict(pair.meta)
    provenance = meta.pop("provenance", None)
    sides = {name: _cells(getattr(pair, name), files) for name in ("prompt", "chosen", "rejected")}
    told = {name: getattr(pair, name) for name in ("weight", "margin", "label", "group")}
    told["scores"] = list(pair.scores.items())
    told["spans"] = [(side, [vars(span) for span in spans]) for side, spans in pair.spans.items()]
    told["branches"] = [
        (name, {"prompt": _cells(branch.prompt, files), "response": _cells(branch.response, files)})
        for name, branch in pair.branches.items()
    ]
    told["meta"] = _dumped(pair, meta) if meta else None
    told["provenance"] = None if provenance is None else _dumped(pair, provenance)
    ids.add(pair.id)
    return {"id": pair.id, **sides, **told}


def _cells(blocks: Iterable[Block], files: MediaFiles) -> list[dict[str, Any]]:
    return [_cell(block, files) for block in blocks]


def _cell(block: Block, files: MediaFiles) -> dict[str, Any]:
    cell = {"kind": block.kind, "role": block.role, "path": block.path}
    if block.kind == "text":
        return cell | {"text": block.data, "array": False}
    return cell | {"media": files.put(block), "array": not isinstance(block.data, bytes)}


def _dumped(pair: Pair, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise Unsayable(pair.id, "its meta is no JSON") from error
