"""Several answers to one question, for builders that judge them: sampled, or those that the source has already."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mmpo.datasets.pairing import digest, pair_id
from mmpo.datasets.stages import Dropped, Record, Result, Stage, at_least
from mmpo.datasets.tools import Generator
from mmpo.pair import Block, Pair, text

T = TypeVar("T")


def sampled(generator: Generator | None, count: int, *, temperature: float, max_new_tokens: int, batch: int) -> Stage:
    """A stage that leaves the different answers to a question under `candidates`, as texts.

    A source's own candidates are taken, if they are texts; otherwise the generator answers `count` times, each time with a
    seed of its own and nothing else changed. Empty answers and copies are left out; a record with fewer than two is dropped.
    Raises ValueError for a count below 2, for a temperature of 0, at which all answers are one, and on running without a
    generator where the source has no candidates.
    """
    at_least(max_new_tokens=(max_new_tokens, 1))
    if count < 2 or temperature <= 0:
        raise ValueError(f"answers: expected at least 2 at a temperature above 0, found {count} at {temperature}")

    def run(records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        fresh = [(r, g) for r, g in zip(records, randoms, strict=True) if "candidates" not in r.fields]
        seeds = [int(seed) for _, random in fresh for seed in random.integers(2**31, size=count)]
        prompts = [record.prompt for record, _ in fresh for _ in range(count)]
        said = _answered(generator, prompts, seeds, max_new_tokens=max_new_tokens, temperature=temperature)
        new = dict(zip((r.id for r, _ in fresh), regrouped(said, [count] * len(fresh)), strict=True))
        return [_having(record, new.get(record.id, record.fields.get("candidates", []))) for record in records]

    return Stage("answers", batch, run)


def _answered(generator: Generator | None, prompts: list[tuple[Block, ...]], seeds: list[int], **options: Any) -> list[str]:
    if not prompts:
        return []
    if generator is None:
        raise ValueError("answers: the source has no candidates, and there is no generator to answer its questions")
    return [answer.text for answer in generator(prompts, seeds, **options)]


def _having(record: Record, answers: Sequence[str | Block]) -> Result:
    if not all(isinstance(a, str) for a in answers):
        return Dropped("candidates that are no text")
    whole = [str(a).strip() for a in answers]
    different = list(dict.fromkeys(a for a in whole if a))
    if len(different) < 2:
        return Dropped("fewer than two different answers")
    return record.having({"answers": len(whole), "different": len(different)}, candidates=different)


def regrouped(values: Sequence[T], lengths: Iterable[int]) -> list[list[T]]:
    """A flat list as lists of the given lengths, in order."""
    rest = iter(values)
    return [list(itertools.islice(rest, n)) for n in lengths]


def answer_of(prompt: Sequence[Block], words: str) -> tuple[Block, ...]:
    """An answer as blocks: the assistant's turn where the prompt is a conversation."""
    return (text(words, "assistant" if any(b.role for b in prompt) else None),)


def judged_pair(record: Record, chosen: str, rejected: str, scores: Mapping[str, float], meta: Mapping[str, Any]) -> Pair:
    """Two answers to a record's question as a pair."""
    sides = answer_of(record.prompt, chosen), answer_of(record.prompt, rejected)
    name = pair_id(record.prompt, *sides)
    return Pair(name, record.prompt, *sides, scores=dict(scores), group=digest(*record.prompt), meta=dict(meta))


def number(value: Any) -> float | None:
    """A judge's score as a number; None for no vote, and for one that is not finite, which is neither above nor below another.

    Raises ValueError for text, which would compare as text ("10" < "2").
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"expected a number or None from the judge, found {type(value).__name__} {value!r}")
    return float(value) if math.isfinite(value) else None
