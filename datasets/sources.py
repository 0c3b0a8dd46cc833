"""What builders start from: the rows of any dataset as records, and a question's text without its images."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, holds_candidates, pairs, rows
from mmpo.datasets.pairing import Candidate, by_prompt
from mmpo.datasets.stages import Dropped, Record
from mmpo.pair import Block, Pair


def records(path: Path, ledger: Ledger, *, format: str | None = None, root: Path | None = None) -> Iterator[Record]:
    """The rows of a dataset, one record each; of scored candidates, one record a prompt.

    The chosen side is the known answer. A row with two sides is kept whole under the field `source`; candidates are under
    `candidates`, with `scores` where all of them have one. An id that occurs again gets a number.
    """
    chosen = format or detect(path)
    if holds_candidates(chosen):
        made = map(_of_group, by_prompt(rows(path, ledger, format=chosen, root=root)).items())
    else:
        made = map(_of_pair, pairs(path, ledger, format=chosen, root=root, ties="soft"))
    return _numbered(made)


def _of_pair(pair: Pair) -> Record:
    answer = "\n".join(str(b.data) for b in pair.chosen if b.kind == "text") or None
    fields: dict[str, Any] = {"source": pair} if pair.chosen and pair.rejected else {}
    return Record(pair.id, pair.prompt, answer, fields | ({"meta": pair.meta} if pair.meta else {}))


def _of_group(group: tuple[str, list[Candidate]]) -> Record:
    name, answers = group
    fields: dict[str, Any] = {"candidates": [a.block if a.block.kind != "text" else str(a.block.data) for a in answers]}
    if all(a.score is not None for a in answers):
        fields["scores"] = [a.score for a in answers]
    return Record(name, answers[0].prompt, None, fields)


def _numbered(items: Iterable[Record]) -> Iterator[Record]:
    seen: Counter[str] = Counter()
    for record in items:
        seen[record.id] += 1
        yield record if seen[record.id] == 1 else dataclasses.replace(record, id=f"{record.id}#{seen[record.id]}")


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation about one image, without it. before: system turns. turns: the rest; the first is the question."""

    image: Block
    before: tuple[Block, ...]
    turns: tuple[Block, ...]

    @property
    def text(self) -> str:
        return str(self.turns[0].data)

    @property
    def last(self) -> str:
        """What the record's answer answers: the last thing that was asked."""
        return str(next(b.data for b in reversed(self.turns) if b.role in (None, "user")))


def about_one_image(record: Record) -> Question:
    """The question of a record whose prompt shows exactly one image. Raises Dropped for others."""
    images = [block for block in record.prompt if block.kind == "image"]
    if len(images) != 1 or any(block.kind not in ("image", "text") for block in record.prompt):
        raise Dropped("not exactly one image")
    texts = [block for block in record.prompt if block.kind == "text"]
    before = tuple(block for block in texts if block.role == "system")
    turns = [block for block in texts if block.role != "system"]
    first = list(itertools.takewhile(lambda block: block.role == turns[0].role, turns))
    question = " ".join(filter(None, (str(block.data).strip() for block in first)))  # the image may stand between its parts
    if not question or first[0].role not in (None, "user"):
        raise Dropped("no question")
    return Question(images[0], before, (dataclasses.replace(first[0], data=question), *turns[len(first) :]))
