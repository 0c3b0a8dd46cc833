"""Tools made by hand for the builders that judge: generators and judges of a few lines, and a way to run a builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmpo.datasets.ledger import Ledger
from mmpo.datasets.shards import Shards
from mmpo.datasets.stages import Record, Stage, execute
from mmpo.datasets.tools import Answer, Prompt
from mmpo.pair import Pair, text


class Says:
    """A generator that says what a function makes of the prompt's texts and the seed, and remembers how it was asked."""

    def __init__(self, words: Callable[[str, int], str]) -> None:
        self.words, self.calls, self.asked = words, 0, list[tuple[Prompt, int, dict[str, Any]]]()

    def __call__(self, prompts: Sequence[Prompt], seeds: Sequence[int], **options: Any) -> list[Answer]:
        self.calls += 1
        self.asked += [(p, s, options) for p, s in zip(prompts, seeds, strict=True)]
        return [Answer(self.words(told(p), s)) for p, s in zip(prompts, seeds, strict=True)]


class Grades:
    """A point judge by a function of (answer, aspect)."""

    def __init__(self, grade: Callable[[str, str], Any]) -> None:
        self.grade, self.asked = grade, list[tuple[str, str, str]]()

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str], aspect: str) -> list[Any]:
        self.asked += [(told(p), a, aspect) for p, a in zip(prompts, answers, strict=True)]
        return [self.grade(a, aspect) for a in answers]


class Duels:
    """A pair judge by a function of (first, second)."""

    def __init__(self, verdict: Callable[[str, str], Any]) -> None:
        self.verdict, self.asked = verdict, list[tuple[str, str]]()

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[Any]:
        self.asked += list(zip(first, second, strict=True))
        return [self.verdict(a, b) for a, b in zip(first, second, strict=True)]


def told(prompt: Prompt) -> str:
    return "".join(str(b.data) for b in prompt if b.kind == "text")


def record(id: str = "a", *candidates: str, question: str = "What is there?") -> Record:
    """A question, with candidates where some are given."""
    return Record(id, (text(question),), fields={"candidates": list(candidates)} if candidates else {})


def built(stages: Sequence[Stage], *records: Record, seed: int = 0) -> tuple[list[Record], dict[str, int]]:
    """What comes out, and why the rest was dropped."""
    ledger = Ledger("skip")
    found = list(execute(records, stages, seed=seed, ledger=ledger))
    return found, dict(ledger.skipped)


def merged(folder: Path, pairs: Sequence[Pair], *how: Any) -> dict[str, int]:
    """Write pairs as a build of two parts does at its end; returns what was noted of them."""
    shards, ledger, half = Shards(folder), Ledger("skip"), len(pairs) // 2
    shards.folder.mkdir(parents=True)
    for number, part in enumerate((pairs[:half], pairs[half:])):
        shards.write(number, "inputs", part, Ledger("skip"))
    shards.merge(2, ledger, *how)
    return dict(ledger.notes)


def words(found: Record) -> tuple[str, str]:
    """The chosen and the rejected side of a record's pair."""
    pair = found.fields["pair"]
    return told(pair.chosen), told(pair.rejected)
