"""Stages: how a builder of pairs is put together, and what runs it.

A builder is a file of `datasets/builders/` with a function of the same name. It returns stages; each takes records and
returns, one result per record, the record with something added, several records, or the reason why it is dropped:

    NEEDS: frozenset[str] = frozenset({"generator"})             # names of Tools that have to be given

    def blind(tools: Tools, *, max_new_tokens: int = 64) -> list[Stage]:    # its keyword-only arguments are its options
        return [Stage("answer", 8, answer), each("pair", pair)]

The last stage leaves a Pair under `fields["pair"]`. What needs the whole source (images to draw from, an index) is a second
function of the same file,

    def prepare(records: Iterable[Record], tools: Tools, *, media: MediaStore, seed: int, <options>) -> Any

with the options of the builder (those it does not read go into `**_`). It sees every record once before the first stage
runs, and what it returns reaches the builder as the keyword `pool`. A pool is read-only, can be sent to another process, and
holds keys of `media` instead of pictures, so that it does not grow with pixels.

What only the finished pairs together can tell (RLAIF-V's balance of lengths) is a third function,

    def selection(sides: Iterable[tuple[str, str]], *, <options>) -> Callable[[str, str], str | None]

which sees the words of both sides of every pair and returns what tells of one pair why it is left out, or None. A builder with
`TABLES` makes a table of each kind of rows it names; a Pair's meta says under "table" which one it goes into. `FOLDERS` names
the options that are paths of files which the pairs depend on, such as a tokenizer's, or names of what the hub's cache has.

Whatever is random in a stage comes from the generator it is given, which depends on (seed, stage, record id) and nothing
else: neither order nor batches nor workers change a pair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmpo.datasets.ledger import Ledger
from mmpo.datasets.tools import Unanswerable
from mmpo.errors import DataError
from mmpo.pair import Block


@dataclass(frozen=True)
class Record:
    """A question, its known answer, and what the stages have found out.

    prompt: images stand where the model sees them. answer: None where the source knows none.
    fields: JSON values, Blocks, lists of these, and Pairs: `pair` is what a builder makes, `source` the row it started
    from where that had two sides, `candidates` and `scores` the answers and their scores where it had several.
    provenance: one JSON object per stage that the record went through, with the stage's name under "stage".
    """

    id: str
    prompt: tuple[Block, ...]
    answer: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    provenance: tuple[Mapping[str, Any], ...] = ()

    def having(self, told: Mapping[str, Any] | None = None, /, **fields: Any) -> Record:
        """The record with further fields; told: what this stage wants to have in its provenance, as JSON values."""
        provenance = (*self.provenance, told) if told else self.provenance
        return dataclasses.replace(self, fields={**self.fields, **fields}, provenance=provenance)


class Dropped(Exception):
    """A record that is left out by design; the argument is the counted reason, a few words that are the same for all."""


Result = Record | Sequence[Record] | Dropped


@dataclass(frozen=True)
class Stage:
    """One step of a builder. batch: how many records `run` is given at most, for models that like batches.

    run: (records, their random generators) -> one result per record: a Record, several with ids of their own, or Dropped.
    """

    name: str
    batch: int
    run: Callable[[Sequence[Record], Sequence[np.random.Generator]], Sequence[Result]]

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1 record, found {self.batch}")


def at_least(**given: tuple[float, float]) -> None:
    """Raises ValueError for an option, (value, least), that is below its least."""
    for name, (value, least) in given.items():
        if not value >= least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")


def each(name: str, function: Callable[[Record, np.random.Generator], Record | Sequence[Record]]) -> Stage:
    """A stage of one record at a time; `function` raises Dropped. Media that do not open drop their record."""

    def result(record: Record, random: np.random.Generator) -> Result:
        try:
            return function(record, random)
        except Dropped as reason:
            return reason
        except DataError:
            return Dropped("unreadable media")

    return Stage(name, 1, lambda records, randoms: [result(r, g) for r, g in zip(records, randoms, strict=True)])


def random_of(seed: int, stage: str, id: str) -> np.random.Generator:
    """The generator of one record in one stage."""
    digest = hashlib.sha256(f"{seed}\0{stage}\0{id}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def execute(records: Iterable[Record], stages: Sequence[Stage], *, seed: int, ledger: Ledger) -> Iterator[Record]:
    """Run records through the stages, one batch at a time: memory does not grow with their number.

    ledger: `used` counts what comes out, `skipped` each record that was dropped, as "stage: reason".
    Raises ValueError when two stages have one name, or a stage breaks its contract.
    """
    repeated = {s.name for s in stages if [t.name for t in stages].count(s.name) > 1}
    if repeated:
        raise ValueError(f"stages: expected different names, found {', '.join(sorted(repeated))} twice")
    flow = iter(records)
    for stage in stages:
        flow = _through(stage, flow, seed, ledger)
    for record in flow:
        ledger.used += 1
        yield record


def _through(stage: Stage, records: Iterator[Record], seed: int, ledger: Ledger) -> Iterator[Record]:
    while batch := list(itertools.islice(records, stage.batch)):
        results = _results(stage, batch, seed)
        if len(results) != len(batch):
            raise ValueError(f"stage {stage.name}: expected {len(batch)} results, one per record, found {len(results)}")
        for record, result in zip(batch, results, strict=True):
            if isinstance(result, Dropped):
                ledger.skip(record.id, f"{stage.name}: {result}")
            else:
                yield from _told(stage, record, result)


def _results(stage: Stage, batch: Sequence[Record], seed: int) -> Sequence[Result]:
    """What a stage makes of a batch; where a tool cannot take one of its records, of each alone, and that one is dropped.

    Raises the ValueError of a tool or builder with the stage and its records.
    """
    try:
        return stage.run(batch, [random_of(seed, stage.name, record.id) for record in batch])
    except Unanswerable as problem:
        if len(batch) == 1:
            return [Dropped(problem.reason)]
        return [result for record in batch for result in _results(stage, [record], seed)]
    except ValueError as problem:
        ids = f"record {batch[0].id}" if len(batch) == 1 else f"one of {len(batch)} records, {batch[0].id} to {batch[-1].id}"
        kind = DataError if isinstance(problem, DataError) else ValueError
        raise kind(f"stage {stage.name}, {ids}: {problem}") from problem


def _told(stage: Stage, before: Record, result: Record | Sequence[Record]) -> Iterator[Record]:
    """What a stage made of a record, each with one entry of provenance for it."""
    made = [result] if isinstance(result, Record) else list(result)
    if len({record.id for record in made}) < len(made):
        raise ValueError(f"stage {stage.name}: record {before.id}: expected an id of its own for each of {len(made)} records")
    for record in made:
        entry: dict[str, Any] = {"stage": stage.name}
        for told in record.provenance[len(before.provenance) :]:
            entry |= told
        yield dataclasses.replace(record, provenance=(*before.provenance, entry))
