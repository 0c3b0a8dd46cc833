"""RLAIF-V: pairs from checking the claims of a model's own answers one by one (arXiv 2405.17220).

The model answers a question several times; each answer is split into statements, a judge says of every statement whether it is
true of what is shown, and an answer scores minus the number of statements that are not. Of all pairs with a gap of at least 1
some are drawn. As errors grow with length, chosen answers tend to be the short ones: the length balance drops pairs whose
chosen side is shorter by more than a share r, for the r at which both sides are about equally long on average.

Behaviour checked against utils/get_preference_pairs.py and utils/get_pairs_filter_shorten.py of RLHF-V/RLAIF-V@83d917b. Not
as there: the judge sees the statement itself instead of a question made of it by a second model; its reply counts instead of
the probability of its first token; what cannot be parsed leaves the answer out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from mmpo.datasets.judge_tools import HOLDS
from mmpo.datasets.pairing import Candidate, pair_up
from mmpo.datasets.sampling import answer_of, number, regrouped, sampled
from mmpo.datasets.sentences import sentences
from mmpo.datasets.stages import Dropped, Record, Result, Stage, each
from mmpo.datasets.tools import Generator, Prompt, Tools
from mmpo.pair import Pair, text

NEEDS: frozenset[str] = frozenset({"generator", "point_judge"})
ASPECTS: frozenset[str] = frozenset({HOLDS})
STEP = 0.02  # of the length balance
BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,3}[.)])\s+(\S.*?)\s*$", re.MULTILINE)


def claims(
    tools: Tools,
    *,
    answers: int = 10,
    temperature: float = 0.7,
    max_new_tokens: int = 512,
    split: Literal["model", "sentences"] = "model",
    min_gap: int = 1,
    pairs_per_prompt: int = 2,
    length_balance: bool = True,
    batch: int = 4,
) -> list[Stage]:
    """Pairs of the model's own answers, by the number of statements that the judge says no to.

    split: who makes statements of an answer: the generator, which is asked to, or the ends of its sentences. length_balance:
    read by `selection`. batch: questions answered at once.
    """
    judge = tools.point_judge
    if tools.generator is None or judge is None:
        raise ValueError("claims: expected a generator and a point_judge")
    for name, value in (("min_gap", min_gap), ("pairs_per_prompt", pairs_per_prompt), ("answers", answers)):
        if value < 1:
            raise ValueError(f"claims.{name}: expected at least 1, got {value}")
    splitter = _by_model(tools.generator, max_new_tokens) if split == "model" else _by_sentences

    def divide(records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        asked = [(record.prompt, answer) for record in records for answer in record.fields["candidates"]]
        found = regrouped(splitter(asked), [len(r.fields["candidates"]) for r in records])
        return [_divided(record, statements) for record, statements in zip(records, found, strict=True)]

    def conquer(records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        asked = [(r.prompt, claim) for r in records for claims in r.fields["statements"] for claim in claims]
        said = judge([prompt for prompt, _ in asked], [claim for _, claim in asked], HOLDS)
        verdicts = regrouped([verdict(v) for v in said], [sum(map(len, r.fields["statements"])) for r in records])
        return [_checked(record, found) for record, found in zip(records, verdicts, strict=True)]

    def pair(record: Record, random: np.random.Generator) -> list[Record]:
        return _paired(record, int(random.integers(2**31)), min_gap, pairs_per_prompt)

    sampling = sampled(tools.generator, answers, temperature=temperature, max_new_tokens=max_new_tokens, batch=batch)
    return [sampling, Stage("statements", batch, divide), Stage("checks", batch, conquer), each("pairs", pair)]


Splitter = Callable[[Sequence[tuple[Prompt, str]]], list[list[str] | None]]  # (prompt, answer) -> statements, None: unparsable


def _by_sentences(asked: Sequence[tuple[Prompt, str]]) -> list[list[str] | None]:
    return [[s.strip() for s in sentences(answer)] for _, answer in asked]


def _by_model(generator: Generator, max_new_tokens: int) -> Splitter:
    def split(asked: Sequence[tuple[Prompt, str]]) -> list[list[str] | None]:
        questions = [_split_question(prompt, answer) for prompt, answer in asked]
        replies = generator(questions, [0] * len(questions), max_new_tokens=max_new_tokens)
        return [parsed_statements(reply.text) for reply in replies]

    return split


def _split_question(prompt: Prompt, answer: str) -> Prompt:
    question = " ".join(str(b.data) for b in prompt if b.kind == "text")
    return (
        text(
            "Split the answer below into short statements, each of which says one thing that can be checked by looking. Write "
            "every statement as a whole sentence that is understood without the others, on a line of its own that begins with "
            f"'- '. Add nothing that the answer does not say.\n\nQuestion: {question}\nAnswer: {answer}"
        ),
    )


def parsed_statements(reply: str) -> list[str] | None:
    """The different items of a list with dashes or numbers; None where the reply is no such list."""
    return list(dict.fromkeys(BULLET.findall(reply))) or None


def _divided(record: Record, statements: Sequence[list[str] | None]) -> Result:
    kept = [(a, s) for a, s in zip(record.fields["candidates"], statements, strict=True) if s]
    told = {"not_split": len(statements) - len(kept)}
    if len(kept) < 2:
        return Dropped("fewer than two answers with statements")
    return record.having(told, candidates=[a for a, _ in kept], statements=[s for _, s in kept])


def verdict(value: Any) -> float | None:
    """Whether a statement holds, 1 or 0, or None for no vote. Raises ValueError for a score: how high would be true?"""
    found = number(value)
    if found not in (None, 0, 1):
        raise ValueError(f"expected 1 (the statement holds), 0 or None from the judge, found {value!r}")
    return found


def _checked(record: Record, verdicts: Sequence[float | None]) -> Result:
    """Only answers all of whose statements were judged keep a score: an unparsed check is neither a yes nor a no."""
    found = regrouped(verdicts, [len(s) for s in record.fields["statements"]])
    rows = [
        {"answer": a, "statements": s, "denied": [claim for claim, held in zip(s, v, strict=True) if not held]}
        for a, s, v in zip(record.fields["candidates"], record.fields["statements"], found, strict=True)
        if None not in v
    ]
    if len(rows) < 2:
        return Dropped("fewer than two answers with every statement judged")
    return record.having({"not_judged": len(found) - len(rows)}, checked=rows)


def _paired(record: Record, seed: int, min_gap: int, limit: int) -> list[Record]:
    group = [
        Candidate(record.prompt, answer_of(record.prompt, row["answer"])[0], -len(row["denied"]), meta=_told(row))
        for row in record.fields["checked"]
    ]
    pairs, drops = pair_up({record.id: group}, "margin", margin=min_gap, max_per_prompt=limit, seed=seed)
    if not pairs:
        raise Dropped("no two answers differ enough in denied statements")
    told = {"scores": [-len(row["denied"]) for row in record.fields["checked"]], "not_paired": drops}
    return [_numbered(record, number, told, pair) for number, pair in enumerate(pairs)]


def _numbered(record: Record, number: int, told: dict[str, Any], pair: Pair) -> Record:
    made = record.having(told, pair=pair)
    return Record(f"{record.id}/{number}", made.prompt, made.answer, made.fields, made.provenance)


def _told(row: dict[str, Any]) -> dict[str, Any]:
    return {"statements": list(row["statements"]), "denied": list(row["denied"])}


def selection(sides: Iterable[tuple[str, str]], *, length_balance: bool = True, **_: Any) -> Callable[[str, str], str | None]:
    """Sees (chosen, rejected) of every pair once, then tells of one why the balance of lengths leaves it out, or None."""
    ratio = best_ratio((len(c.split()), len(r.split())) for c, r in sides) if length_balance else None

    def why(chosen: str, rejected: str) -> str | None:
        kept = ratio is None or balanced(len(chosen.split()), len(rejected.split()), ratio)
        return None if kept else "chosen shorter than the length balance allows"

    return why


def balanced(chosen: int, rejected: int, r: float) -> bool:
    """Whether the chosen side is shorter than the rejected one by at most a share r of it, in words."""
    return (rejected - chosen) / rejected <= r


def best_ratio(lengths: Iterable[tuple[int, int]], step: float = STEP) -> float | None:
    """The r of 0, step, 2 step, ... below 1 whose kept pairs have the least |mean chosen - mean rejected| / mean rejected.

    lengths: words of (chosen, rejected) of all pairs. The smallest such r; None where no r keeps a pair, or there are none.
    """
    counts = Counter(lengths)
    steps = round(1 / step)
    grid = [i / steps for i in range(steps)]  # divided as lengths are, so that equality is equality
    scored = [(imbalance, r) for r in grid if (imbalance := _imbalance(counts, r)) is not None]
    return min(scored)[1] if scored else None


def _imbalance(counts: Counter[tuple[int, int]], r: float) -> float | None:
    kept = {lengths: n for lengths, n in counts.items() if balanced(*lengths, r)}
    chosen, rejected = (sum(lengths[side] * n for lengths, n in kept.items()) for side in (0, 1))
    return abs(chosen - rejected) / rejected if rejected else None
