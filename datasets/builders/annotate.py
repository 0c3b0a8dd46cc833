"""Candidates graded on five metrics, and three kinds of training rows from the same table (arXiv 2402.10884).

A judge grades each answer 0 to 4 for helpfulness, correctness, coherence, complexity and verbosity, HelpSteer's metrics. The
table then serves preference pairs for DPO, the best answers for fine-tuning (rejection sampling), and SteerLM rows, in
which the grades stand in the prompt, so that the model can later be asked for the best ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mmpo.datasets.pairing import digest, pair_id
from mmpo.datasets.sampling import answer_of, judged_pair, number, regrouped, sampled
from mmpo.datasets.stages import Dropped, Record, Result, Stage, each
from mmpo.datasets.tools import Tools
from mmpo.pair import Block, Pair, text

NEEDS: frozenset[str] = frozenset({"point_judge"})
METRICS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ASPECTS: frozenset[str] = frozenset(METRICS)
RANKED_BY = METRICS[:3]
TABLES = ("pairs", "best", "steer")
HIGHEST = 4

Row = Mapping[str, Any]  # "answer", and a grade under each metric


def annotate(
    tools: Tools,
    *,
    rows: Literal["pairs", "best", "steer", "all"] = "pairs",
    answers: int = 4,
    temperature: float = 0.7,
    max_new_tokens: int = 512,
    min_gap: int = 2,
    best_at_least: int = 0,
    batch: int = 4,
) -> list[Stage]:
    """Rows of one kind from a table of graded answers, or of all three, each kind in a table of its own.

    A generator is needed only where the source has no candidates. An answer with a grade that is missing or no whole number
    from 0 to 4 is not in the table. An answer's score is helpfulness + correctness + coherence.
    rows: pairs are the best answer against one drawn from those at least `min_gap` below it; best is the best answer of a
    question alone, if it scores `best_at_least` (12, a perfect score, in the authors' notebook); steer is every answer after
    a prompt that tells its grades. Rows of the last two kinds have no rejected side and train with `loss: nll`.
    """
    judge = tools.point_judge
    if judge is None:
        raise ValueError("annotate: expected a point_judge")
    if min_gap < 1:
        raise ValueError(f"annotate.min_gap: expected at least 1, or the sides of a pair are equal, got {min_gap}")

    def grade(records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        asked = [(record.prompt, answer) for record in records for answer in record.fields["candidates"]]
        prompts, said = [p for p, _ in asked], [a for _, a in asked]
        grades = {metric: [whole(v) for v in judge(prompts, said, metric)] for metric in METRICS}
        found = [{"answer": a} | {m: grades[m][i] for m in METRICS} for i, a in enumerate(said)]
        tables = regrouped(found, [len(record.fields["candidates"]) for record in records])
        return [_graded(record, table) for record, table in zip(records, tables, strict=True)]

    def make(record: Record, random: np.random.Generator) -> list[Record]:
        table, kinds = record.fields["table"], TABLES if rows == "all" else (rows,)
        found: dict[str, list[Pair]] = {
            "pairs": preferred(record, table, random, min_gap) if "pairs" in kinds else [],
            "best": best(record, table, best_at_least) if "best" in kinds else [],
            "steer": [steered(record, row) for row in table] if "steer" in kinds else [],
        }
        if not any(found.values()):
            raise Dropped("no two answers far enough apart" if rows == "pairs" else "no answer good enough")
        told = {"rows": {kind: len(found[kind]) for kind in kinds}}
        return [
            dataclasses.replace(record.having(told, pair=_placed(pair, kind, rows)), id=f"{record.id}/{kind}-{i}")
            for kind, pairs in found.items()
            for i, pair in enumerate(pairs)
        ]

    sampling = sampled(tools.generator, answers, temperature=temperature, max_new_tokens=max_new_tokens, batch=batch)
    return [sampling, Stage("grades", batch, grade), each("rows", make)]


def _placed(pair: Pair, kind: str, rows: str) -> Pair:
    """The pair, told which table it goes into where there are several."""
    return dataclasses.replace(pair, meta={**pair.meta, "table": kind}) if rows == "all" else pair


def whole(value: Any) -> int | None:
    """A grade: a whole number from 0 to 4, or None. Raises ValueError for text."""
    found = number(value)
    return int(found) if found is not None and found in range(HIGHEST + 1) else None


def score(row: Row) -> int:
    """helpfulness + correctness + coherence, 0 to 12."""
    return sum(int(row[metric]) for metric in RANKED_BY)


def _graded(record: Record, table: Sequence[Row]) -> Result:
    complete = [dict(row) for row in table if None not in row.values()]
    told = {"table": [[row[m] for m in METRICS] for row in complete], "not_graded": len(table) - len(complete)}
    return record.having(told, table=complete) if complete else Dropped("no answer with all five grades")


def preferred(record: Record, table: Sequence[Row], random: np.random.Generator, min_gap: int) -> list[Pair]:
    """The best answer against one drawn from those at least `min_gap` below it; nothing where there is none."""
    chosen = max(table, key=score)
    below = [row for row in table if score(row) <= score(chosen) - min_gap and row is not chosen]
    if not below:
        return []
    rejected = below[int(random.integers(len(below)))]
    sides = {"chosen": chosen, "rejected": rejected}
    grades = {side: {m: row[m] for m in METRICS} for side, row in sides.items()}
    scores = {side: float(score(row)) for side, row in sides.items()}
    return [judged_pair(record, chosen["answer"], rejected["answer"], scores, {"answers": grades})]


def best(record: Record, table: Sequence[Row], least: int) -> list[Pair]:
    """The best answer alone, if it scores at least that much."""
    row = max(table, key=score)
    return [_alone(record, record.prompt, row)] if score(row) >= least else []


def steered(record: Record, row: Row) -> Pair:
    """An answer to the prompt that asks for its grades."""
    return _alone(record, with_grades(record.prompt, row), row)


def with_grades(prompt: Sequence[Block], grades: Mapping[str, int]) -> tuple[Block, ...]:
    """The prompt with `Helpfulness:4,Correctness:4,...` at the end of its last text; also for asking a trained model.

    Raises ValueError where the prompt has no text or a metric is missing.
    """
    places = [i for i, block in enumerate(prompt) if block.kind == "text"]
    if not places or set(METRICS) - set(grades):
        raise ValueError(f"steer: expected a prompt with text and {', '.join(METRICS)}, found {sorted(grades)}")
    line = ",".join(f"{metric.capitalize()}:{grades[metric]}" for metric in METRICS)
    last = prompt[places[-1]]
    asked = text(f"{last.data!s}\n{line}", last.role)
    return (*prompt[: places[-1]], asked, *prompt[places[-1] + 1 :])


def _alone(record: Record, prompt: tuple[Block, ...], row: Row) -> Pair:
    """An answer without another side; its group is the record's question, whatever the prompt adds: no split divides them."""
    side = answer_of(prompt, row["answer"])
    meta = {"answers": {"chosen": {m: row[m] for m in METRICS}}}
    scores, group = {"chosen": float(score(row))}, digest(*record.prompt)
    return Pair(pair_id(prompt, side, ()), prompt, side, scores=scores, group=group, meta=meta)
