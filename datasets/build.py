"""`mmpo pairs NAME`: from a source and a builder to a folder of pairs, the same bytes however often it was killed on the way.

The source is read in parts of 32 records; each part goes through the builder's stages, on this process or on Ray's workers,
and is stored when it is done. At the end the parts become one table, and build.json says how it was made, of which data, and
what became of every row of the source and every record of the builder. A folder counts as made already only where all of that
is as it was: the settings, the code, the files of the models, the source, the tables and their media.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from tqdm import tqdm

from mmpo import __version__, find, network
from mmpo.checkpoint import write_atomic
from mmpo.datasets.builder_options import ROOM, ToolChoice, as_json, check_options, module_of, options_of
from mmpo.datasets.fingerprints import code_of, files_of, found_at
from mmpo.datasets.ledger import Ledger, Policy
from mmpo.datasets.media_store import MediaStore
from mmpo.datasets.ray_executor import Made, Part, RayExecutor
from mmpo.datasets.shards import Shards, inputs_digest
from mmpo.datasets.sources import records
from mmpo.datasets.stages import Record, Stage, execute
from mmpo.datasets.tables import kind_of, parquet_files
from mmpo.datasets.tools import Tools
from mmpo.errors import DataError, RecipeError
from mmpo.lock import RunLock
from mmpo.pair import Pair

PART = 32  # records of the source
STORY = "build.json"
NAMED = 8  # media in a message


@dataclass(frozen=True)
class Order:
    """What is asked for. options: `key=value` words of the builder. limit: read only so many records of the source."""

    builder: str
    data: Path
    out: Path
    options: tuple[str, ...] = ()
    format: str | None = None
    root: Path | None = None
    tools: ToolChoice = ToolChoice()
    seed: int = 0
    on_bad: Policy = "skip"
    limit: int | None = None
    executor: Literal["local", "ray"] = "local"
    workers: int = 2

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("limit", 1)):
            if (given := getattr(self, name)) is not None and given < least:
                raise RecipeError(f"{name}: expected at least {least}, found {given}")
        if self.executor not in ("local", "ray"):
            raise RecipeError(f"executor: expected local or ray, found {self.executor!r}")


@dataclass
class Maker:
    """Makes the pairs of a part. pool: what the builder's `prepare` returned. Sent elsewhere, it loads tools of its own."""

    builder: str
    options: Mapping[str, Any]
    choice: ToolChoice
    seed: int
    pool: Any = None

    @cached_property
    def tools(self) -> Tools:
        network.close()
        find.PLUGINS.update(self.choice.plugins)
        return self.choice.make()

    @cached_property
    def stages(self) -> list[Stage]:
        pool = {} if self.pool is None else {"pool": self.pool}
        found: list[Stage] = find.find(ROOM, self.builder)(self.tools, **self.options, **pool)
        return found

    def pairs(self, items: Iterable[Record], ledger: Ledger) -> Iterator[Pair]:
        """The pairs of some records, one at a time, provenance in their meta."""
        for record in execute(items, self.stages, seed=self.seed, ledger=ledger):
            pair = record.fields.get("pair")
            if not isinstance(pair, Pair):
                raise ValueError(
                    f"builder {self.builder}: record {record.id}: its last stage left no Pair under fields['pair']"
                )
            yield replace(pair, meta={**pair.meta, "provenance": [dict(entry) for entry in record.provenance]})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("tools", "stages")}


class LocalExecutor:
    """One part after the other, in this process."""

    def run(self, maker: Maker, parts: Iterable[Part]) -> Iterator[Made]:
        for number, inputs, items in parts:
            ledger = Ledger("skip")
            yield number, inputs, maker.pairs(items, ledger), ledger


@contextmanager
def _without_advice() -> Iterator[None]:
    """Pillow advises whoever decodes a palette with transparency, at each pass, to keep it; mmpo.media drops it on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
        yield


@_without_advice()
def build(order: Order) -> dict[str, Any]:
    """Make the pairs of an order in the folder `order.out`, or what is missing of them; returns what build.json says.

    Raises RecipeError for an unknown builder, option or tool and for a folder that holds something else, DataError for a
    source that cannot be read, or that changes while a builder that reads it twice does so, and, with on_bad "refuse", at its
    first bad row.
    """
    options = options_of(order.builder, order.options)
    module = module_of(order.builder)
    order.tools.check(order.builder, module.NEEDS, getattr(module, "ASPECTS", ()))
    check_options(order.builder, options, order.tools)
    settings, shards = _settings(order, options), Shards(order.out)
    if not shards.folder.exists() and (story := _finished(order, settings, shards)) is not None:
        return story
    if order.out.exists() and not shards.folder.exists() and any(order.out.iterdir()):
        raise RecipeError(f"--out {order.out}: expected a new or an empty folder, found one that holds something else")
    with RunLock(shards.folder):
        # It may be finished all the same: not tidied up, or by another process meanwhile.
        story = _finished(order, settings, shards) or _made(order, options, settings, shards)
        shards.close(_tables(story))
    return story


def _made(order: Order, options: Mapping[str, Any], settings: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """Make what is missing of an order's parts and, of all of them, its tables and build.json; returns what that says."""
    _take(shards, settings)
    module, maker = module_of(order.builder), Maker(order.builder, options, order.tools, order.seed)
    seen = _prepare(order, maker)
    ledger = Ledger(order.on_bad)
    count, source = _make_parts(order, maker, shards, ledger, seen)
    if seen is not None and seen.digest != source:
        raise DataError(f"{order.data}: changed while it was read; the same command begins anew")
    made, tables = Ledger("skip"), getattr(module, "TABLES", ("pairs",))
    select = partial(module.selection, **options) if hasattr(module, "selection") else None
    pairs = shards.merge(count, made, tables, select)
    story = {**settings, "pairs": pairs, "source": ledger.counts(), "records": made.counts()}
    story["sha256"] = {"source": source} | {name: digest for t in tables for name, digest in _table(order.out, t).items()}
    story["examples"] = {"source": dict(ledger.examples), "records": dict(made.examples)}
    if ledger.quarantined:
        write_atomic(order.out / "quarantine.jsonl", ledger.quarantine())
    write_atomic(order.out / STORY, (json.dumps(story, indent=1, ensure_ascii=False) + "\n").encode())
    return story


def modules_of(order: Order) -> list[str]:
    """The modules that pairs are made and written by."""
    return [module_of(order.builder).__name__, *order.tools.modules(), "mmpo.datasets.shards"]


def _settings(order: Order, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the pairs depend on, as JSON: not where they are written, nor by how many workers."""
    module = module_of(order.builder)
    code = code_of(modules_of(order))
    files = order.tools.files()
    files |= {n: files_of(found_at(str(options[n]))) for n in getattr(module, "FOLDERS", ()) if options[n] is not None}
    settings = {
        "builder": order.builder, "options": as_json(options), "seed": order.seed, "tools": order.tools.told(),
        "data": str(order.data), "format": order.format, "root": None if order.root is None else str(order.root),
        "limit": order.limit, "on_bad": order.on_bad, "mmpo": __version__, "code": code, "files": files,
    }  # fmt: skip
    return dict(json.loads(json.dumps(settings)))


def _finished(order: Order, settings: Mapping[str, Any], shards: Shards) -> dict[str, Any] | None:
    """What build.json says, and "made" when, if the folder holds the pairs that are asked for, of the source as it is now.

    Raises RecipeError where it holds others, or not what was written there.
    """
    out, note = order.out, order.out / STORY
    if not note.is_file() or shards.settings.is_file():
        return None
    story: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    _same(out, {name: story.get(name) for name in settings}, settings)
    was: dict[str, str] = story["sha256"]
    differ = [
        f"{name} is {'not what was written there' if _table(out, Path(name).stem) else 'gone'}"
        for name in _tables(story)
        if _table(out, Path(name).stem).get(name) != was[name]
    ]
    if not differ:  # tables that are whole say which media there have to be
        differ = shards.lost(_tables(story))
    if (more := len(differ) - NAMED) > 0:
        differ[NAMED:] = [f"{more} more media are gone or changed"]
    ledger = Ledger(order.on_bad)
    source = _source(order, ledger)
    for _ in tqdm(source, desc="compare", unit="record"):
        pass
    if source.digest != was["source"] or ledger.counts() != story["source"]:
        differ.append(f"{order.data} has other data: was {_sum(story['source'])}, is {_sum(ledger.counts())}")
    if differ:
        raise RecipeError([f"--out {out} has pairs made before, and something has changed since; give another folder", *differ])
    return story | {"made": f"{datetime.fromtimestamp(note.stat().st_mtime):%Y-%m-%d %H:%M}"}


def _tables(story: Mapping[str, Any]) -> list[str]:
    """The names of the tables that a finished build has written."""
    return [name for name in story["sha256"] if name != "source"]


def _table(out: Path, table: str) -> dict[str, str]:
    """The file of a table with its sha256; nothing where it is not there."""
    return files_of(out / f"{table}.parquet")


def _take(shards: Shards, settings: Mapping[str, Any]) -> None:
    """Begin a build, or go on with the one that was begun with the same settings."""
    if not shards.settings.is_file():
        shards.drop()  # nobody knows what order such parts are of
    elif any(shards.folder.glob("0*.json")):  # before the first part is there, nothing can be mixed
        _same(shards.out, json.loads(shards.settings.read_text(encoding="utf-8")), settings)
    write_atomic(shards.settings, json.dumps(settings).encode())
    for rest in (*shards.out.glob("media/.*.tmp-*"), *shards.folder.glob(".*.tmp-*")):
        rest.unlink()  # of a process that was killed while it wrote


def _same(out: Path, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises RecipeError, naming the settings, for a folder that was made or begun with others."""
    before, now = dict(_leaves(earlier)), dict(_leaves(settings))
    differ = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if differ:
        raise RecipeError([f"--out {out} holds pairs made with other settings; give another folder", *differ])


def _leaves(settings: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        yield from _leaves(value, f"{at}{name}.") if isinstance(value, Mapping) and value else [(f"{at}{name}", value)]


def _prepare(order: Order, maker: Maker) -> _Source | None:
    """Let the builder see the whole source, if it wants to; returns what it read."""
    prepare: Callable[..., Any] | None = getattr(module_of(order.builder), "prepare", None)
    if prepare is None:
        return None
    root = order.root or (order.data if order.data.is_dir() else order.data.parent)
    store = MediaStore(Shards(order.out).folder / "source", root)
    shutil.rmtree(store.folder, ignore_errors=True)  # names in it may lead to what the source was before
    seen = _source(order, Ledger(order.on_bad))
    maker.pool = prepare(tqdm(seen, desc="read", unit="record"), maker.tools, media=store, seed=order.seed, **maker.options)
    for _ in seen:  # a builder may have had enough; its parts are held to the whole source all the same
        pass
    return seen


class _Source:
    """The records of a source, how many were read, and a digest of them."""

    def __init__(self, items: Iterable[Record]) -> None:
        self.items, self.count, self._sha256 = items, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Record]:
        for item in self.items:
            self.count += 1
            self._sha256.update(inputs_digest([item]).encode())
            yield item

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()


def _source(order: Order, ledger: Ledger) -> _Source:
    return _Source(itertools.islice(records(order.data, ledger, format=order.format, root=order.root), order.limit))


def _make_parts(order: Order, maker: Maker, shards: Shards, ledger: Ledger, seen: _Source | None) -> tuple[int, str]:
    """Make the parts that are not there yet; returns how many there are, and the digest of the source.

    seen: what the builder saw beforehand. Its pairs depend on all of that, so that a part is made anew where any of it changed.
    """
    executor = RayExecutor(order.workers) if order.executor == "ray" else LocalExecutor()
    total, pool = (_total(order), "") if seen is None else (seen.count, seen.digest)
    sizes: list[int] = []
    source = _source(order, ledger)
    with tqdm(total=total, desc=order.builder, unit="record") as bar:

        def missing() -> Iterator[Part]:
            flow = iter(source)
            while items := list(itertools.islice(flow, PART)):
                number, inputs = len(sizes), pool + inputs_digest(items)
                sizes.append(len(items))
                if shards.holds(number, inputs):
                    bar.update(len(items))
                else:
                    yield number, inputs, items

        for number, inputs, pairs, made in executor.run(maker, missing()):
            shards.write(number, inputs, pairs, made)
            bar.update(sizes[number])
            bar.set_postfix_str(f"{made.used} of {made.rows} in the last part", refresh=False)
    return len(sizes), source.digest


def _total(order: Order) -> int | None:
    """About how many records there will be, for the time that is left; None where that would take reading the source."""
    rows = row_count(order.data)
    return rows if rows is None or order.limit is None else min(rows, order.limit)


def row_count(path: Path) -> int | None:
    """About how many rows a source has; None where that would take reading it."""
    kind = kind_of(path)
    if kind == "parquet":
        return sum(pq.ParquetFile(part).metadata.num_rows for part in parquet_files(path))
    if kind != "jsonl" or path.suffix == ".gz":
        return None
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def lines(story: Mapping[str, Any]) -> list[str]:
    """What became of every row and record, to print."""
    source, made = story["source"], story["records"]
    same = "same settings, code, models, source, tables and media"
    found = [f"already made on {story['made']}: {same}"] if "made" in story else []
    found += [f"source: {_sum(source)}", *_reasons(source, story["examples"]["source"])]
    return [*found, f"{story['builder']}: {_sum(made)}, {story['pairs']} pairs", *_reasons(made, story["examples"]["records"])]


def _sum(counts: Mapping[str, Any]) -> str:
    skipped, refused = (sum(counts[name].values()) for name in ("skipped", "refused"))
    return f"{counts['rows']} = {counts['used']} used + {skipped} skipped + {refused} refused"


def _reasons(counts: Mapping[str, Any], examples: Mapping[str, list[str]]) -> Iterator[str]:
    for kind in ("skipped", "refused"):
        for reason, count in counts[kind].items():
            yield f"  {kind} {count}: {reason} (e.g. {', '.join(examples.get(reason, []))})"
    yield from (f"  note {count}: {reason}" for reason, count in counts["notes"].items())
