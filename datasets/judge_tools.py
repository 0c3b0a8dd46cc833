"""Judges of answers as tools: a model asked in words of ours, and the scorers of mmpo/judges.

A model's reply counts only where it has exactly the asked form. Anything else is None, never a vote and never a 0, and is
counted by the judge in `unparsable`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmpo.datasets.tools import Generator, PairJudge, PointJudge, Prompt
from mmpo.judging import Judge
from mmpo.pair import text

Side = Literal["first", "second"]
YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
VERDICT = re.compile(r"^[\s*_#>-]*better answer[\s*_]*:[\s*_]*(?:answer\s*)?([12])[\s*_.]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Scale:
    """What an aspect means, and the whole numbers that a judge may give it, low to high; high is best."""

    about: str
    low: int = 0
    high: int = 4


Sheet = Mapping[str, Scale]  # aspects that are asked for in one question

HELPSTEER: Sheet = {
    "helpfulness": Scale("how much the answer helps with what was asked"),
    "correctness": Scale("whether it is true of the image and of the world, with nothing of importance left out"),
    "coherence": Scale("whether it is clear, consistent with itself and well written"),
    "complexity": Scale("how much knowledge of the subject it took to write it"),
    "verbosity": Scale("how long and detailed it is for what was asked"),
}
QUALITY: Sheet = {"quality": Scale("accuracy, completeness, clarity and relevance taken together", 0, 100)}
SHEETS: tuple[Sheet, ...] = (HELPSTEER, QUALITY)
HOLDS = "holds"  # the aspect of one statement: 1 where it is true of the prompt's images, 0 where it is not


def asked(prompt: Prompt, before: str, after: str) -> Prompt:
    """A question about a conversation: it is shown between two texts, as one turn, media where they stood."""
    shown = [
        text(f"{b.role.capitalize()}: {b.data!s}\n") if b.role and b.kind == "text" else dataclasses.replace(b, role=None)
        for b in prompt
    ]
    return (text(before), *shown, text(after))


class ModelPoints:
    """A PointJudge of any Generator, which answers greedily.

    sheets: the aspects it knows; those of one sheet are asked for in one question, as in arXiv 2402.10884, so that asking for
    the aspects of the same answers one after the other costs one call. The aspect "holds" is a question of yes or no about
    one statement. Asking for an aspect that is in no sheet raises ValueError.
    unparsable: how many replies held no score, by aspect.
    """

    def __init__(self, generator: Generator, sheets: Sequence[Sheet] = SHEETS, max_new_tokens: int = 128) -> None:
        self.generator, self.sheets, self.max_new_tokens = generator, tuple(sheets), max_new_tokens
        self.unparsable: Counter[str] = Counter()
        self._last: tuple[object, list[str]] = (None, [])

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str], aspect: str) -> list[float | None]:
        if aspect == HOLDS:
            questions = [_statement_question(p, a) for p, a in zip(prompts, answers, strict=True)]
            found = [parsed_yes_no(reply) for reply in self._replies(questions)]
        else:
            sheet = next((s for s in self.sheets if aspect in s), None)
            if sheet is None:
                known = [HOLDS, *(name for s in self.sheets for name in s)]
                raise ValueError(f"judge: no aspect {aspect!r}; this one has {', '.join(known)}")
            questions = [_sheet_question(p, a, sheet) for p, a in zip(prompts, answers, strict=True)]
            found = [parsed_score(reply, aspect, sheet[aspect]) for reply in self._replies(questions)]
        self.unparsable[aspect] += found.count(None)
        return found

    def _replies(self, questions: Sequence[Prompt]) -> list[str]:
        """What the model says; the last questions are remembered, for the other aspects of their sheet."""
        name = [[block.digest for block in question] for question in questions]
        if self._last[0] != name:
            said = self.generator(questions, [0] * len(questions), max_new_tokens=self.max_new_tokens)
            self._last = (name, [answer.text for answer in said])
        return self._last[1]


class ModelPairs:
    """A PairJudge of any Generator: reasons in free words, then a line with the verdict (arXiv 2503.05236, appendix).

    unparsable: how many replies held no verdict, or two, under "verdict".
    """

    def __init__(self, generator: Generator, max_new_tokens: int = 512) -> None:
        self.generator, self.max_new_tokens = generator, max_new_tokens
        self.unparsable: Counter[str] = Counter()

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[Side | None]:
        questions = [_duel_question(p, a, b) for p, a, b in zip(prompts, first, second, strict=True)]
        said = self.generator(questions, [0] * len(questions), max_new_tokens=self.max_new_tokens)
        found = [parsed_verdict(answer.text) for answer in said]
        self.unparsable["verdict"] += found.count(None)
        return found


def parsed_score(reply: str, aspect: str, scale: Scale) -> float | None:
    """The whole number in the only line that reads `aspect: number`; None without one, with two, or outside of the scale."""
    line = rf"^[\s*_#>-]*{re.escape(aspect)}[\s*_]*[:=][\s*_]*(\d+)(?:\s*/\s*{scale.high})?[\s*_.]*$"
    found = re.findall(line, reply, re.IGNORECASE | re.MULTILINE)
    value = int(found[0]) if len(found) == 1 and len(found[0]) < 10 else scale.low - 1
    return float(value) if scale.low <= value <= scale.high else None


def parsed_yes_no(reply: str) -> float | None:
    """1 for a reply that begins with yes and has no "no" in it, 0 for the reverse, None for anything else."""
    first = YES_NO.match(reply)
    said = {word.lower() for word in re.findall(r"\b(yes|no)\b", reply, re.IGNORECASE)}
    return None if first is None or len(said) != 1 else float(said == {"yes"})


def parsed_verdict(reply: str) -> Side | None:
    """The answer named by the only verdict line of a reply; None without one or with several."""
    found = VERDICT.findall(reply)
    if len(found) != 1:
        return None
    return "first" if found[0] == "1" else "second"


def _sheet_question(prompt: Prompt, answer: str, sheet: Sheet) -> Prompt:
    aspects = "\n".join(f"- {name}, {s.low} to {s.high}: {s.about}" for name, s in sheet.items())
    form = "\n".join(f"{name}: <number>" for name in sheet)
    return asked(
        prompt,
        "You grade the answer of an assistant. This is what it was asked:\n",
        f"\nThis is its answer:\n{answer}\n\nGive a whole number for each of these:\n{aspects}\n"
        f"Write nothing but these lines, each with its number:\n{form}",
    )


def _statement_question(prompt: Prompt, statement: str) -> Prompt:
    return asked(
        prompt,
        "Somebody was asked this:\n",
        f"\nOne statement of the answer is:\n{statement}\n\n"
        "Is this statement true of what is shown? Answer with yes or no only.",
    )


def _duel_question(prompt: Prompt, first: str, second: str) -> Prompt:
    return asked(
        prompt,
        "You compare two answers of an assistant. This is what it was asked:\n",
        f"\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}\n\nWeigh how accurate, complete, clear and relevant each of them is; "
        "neither their order nor their length counts, and there is no tie. Give your reasons in a few sentences, then write "
        "as the last line either\nBetter answer: 1\nor\nBetter answer: 2",
    )


def judge_points(
    judge: Judge, aspects: Sequence[str] = ("quality",), rescale: tuple[float, float, int, int] | None = None
) -> PointJudge:
    """One of mmpo/judges as a PointJudge.

    An aspect is the judge's part of that name, or its score where it has none; only `aspects` are answered, others raise
    ValueError. rescale: (from low, from high, to low, to high): scores are mapped linearly, limited and rounded to whole
    numbers, e.g. (-1, 1, 0, 4) to make five grades of a sentiment. A score that is not finite is None.
    """
    known = tuple(aspects)

    def points(prompts: Sequence[Prompt], answers: Sequence[str], aspect: str) -> list[float | None]:
        if aspect not in known:
            raise ValueError(f"judge: no aspect {aspect!r}; this one was made for {', '.join(known)}")
        result = judge(prompts, [(text(answer),) for answer in answers])
        values = [float(v) for v in result.parts.get(aspect, result.scores).tolist()]
        return [None if not math.isfinite(v) else v if rescale is None else _graded(v, *rescale) for v in values]

    return points


def _graded(value: float, from_low: float, from_high: float, low: int, high: int) -> float:
    share = min(max((value - from_low) / (from_high - from_low), 0.0), 1.0)
    return float(math.floor(low + share * (high - low) + 0.5))


def judge_pairs(judge: Judge, least: float = 0.0) -> PairJudge:
    """One of mmpo/judges as a PairJudge: the higher score wins by more than `least`; anything closer is no verdict."""
    score: Callable[..., list[float | None]] = judge_points(judge)

    def pairs(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[Side | None]:
        a, b = score(prompts, first, "quality"), score(prompts, second, "quality")
        return [_winner(x, y, least) for x, y in zip(a, b, strict=True)]

    return pairs


def _winner(first: float | None, second: float | None, least: float) -> Side | None:
    if first is None or second is None or abs(first - second) <= least:
        return None
    return "first" if first > second else "second"
