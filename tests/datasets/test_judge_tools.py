"""Judges as tools: what they are asked, what they are understood to say, and what is no answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mmpo.datasets.judge_tools import (
    HELPSTEER,
    QUALITY,
    ModelPairs,
    ModelPoints,
    Scale,
    asked,
    judge_pairs,
    judge_points,
    parsed_score,
    parsed_verdict,
    parsed_yes_no,
)
from mmpo.judging import Blocks, JudgeResult
from mmpo.pair import Block, image, text
from tests.datasets.judged import Says, told

PHOTO = image(np.zeros((2, 2, 3), np.uint8))
PROMPT = (PHOTO, text("What is it?"))
FIVE = "helpfulness: 4\ncorrectness: 3\ncoherence: 2\ncomplexity: 1\nverbosity: 0"


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("correctness: 3", 3), ("Correctness = 0", 0), ("- **correctness:** 4", 4), ("* correctness: 2/4", 2), (FIVE, 3),
        ("so:\ncorrectness: 1\nDone.", 1), ("correctness: 10", None), ("correctness: 5", None), ("correctness: -1", None),
        ("correctness: 3.5", None), ("correctness: three", None), ("correctness: 3 or 4", None), ("correctness 3", None),
        ("correctness: 3\ncorrectness: 3", None), ("3", None), ("", None), ("incorrectness: 3", None),
        ("its correctness: 3", None), ("correctness: 2/10", None), ("correctness: 99999999999999999999", None),
    ],
)  # fmt: skip
def test_a_score_is_a_whole_number_on_a_line_of_its_own(reply: str, value: float | None) -> None:
    assert parsed_score(reply, "correctness", Scale("", 0, 4)) == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("yes", 1), ("Yes.", 1), (" **Yes**, the cat is there.", 1), ("NO", 0), ("No, it is a dog.", 0), ("yes and no", None),
        ("I think yes", None), ("", None), ("Nobody", None), ("not", None), ("No. Yes.", None), ("yesterday", None),
    ],
)  # fmt: skip
def test_yes_or_no_begins_the_reply_and_is_said_alone(reply: str, value: float | None) -> None:
    assert parsed_yes_no(reply) == value


@pytest.mark.parametrize(
    ("reply", "side"),
    [
        ("Both good.\nBetter answer: 1", "first"), ("better answer: Answer 2.", "second"), ("**Better answer:** 2", "second"),
        ("Answer 1 is better", None), ("Better answer: 1\nBetter answer: 2", None), ("Better answer: 3", None),
        ("Better answer: 1 or 2", None), ("The better answer: 1", None), ("Better answer: 12", None), ("", None),
    ],
)  # fmt: skip
def test_a_verdict_is_one_line_of_its_own(reply: str, side: str | None) -> None:
    assert parsed_verdict(reply) == side


def test_the_aspects_of_a_sheet_cost_one_question_an_answer() -> None:
    model = Says(lambda asked, seed: FIVE if "its answer:\ngood" in asked else "no idea\nverbosity: 1")
    judge = ModelPoints(model)
    found = {a: judge([PROMPT, PROMPT], ["good", "bad"], a) for a in HELPSTEER}
    assert found["helpfulness"] == [4, None] and found["correctness"] == [3, None] and found["verbosity"] == [0, 1]
    assert model.calls == 1 and judge.unparsable == {
        "helpfulness": 1, "correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 0,
    }  # fmt: skip
    assert judge([PROMPT], ["good"], "helpfulness") == [4] and model.calls == 2, "other answers are asked anew"
    assert judge([(text("What?"),)], ["good"], "verbosity") == [0] and model.calls == 3, "and so are other prompts"
    assert all(options == {"max_new_tokens": 128} and seed == 0 for _, seed, options in model.asked), "greedy"
    question = model.asked[0][0]
    assert [b.kind for b in question] == ["text", "image", "text", "text"]
    assert all(f"- {name}, 0 to 4" in told(question) for name in HELPSTEER)


def test_a_statement_is_asked_about_with_yes_or_no() -> None:
    model = Says(lambda asked, seed: "Yes" if "cat" in asked else "maybe")
    judge = ModelPoints(model, [QUALITY])
    assert judge([PROMPT] * 2, ["A cat.", "A dog."], "holds") == [1, None] and judge.unparsable == {"holds": 1}
    with pytest.raises(ValueError, match="no aspect 'helpfulness'; this one has holds, quality"):
        judge([PROMPT], ["A cat."], "helpfulness")


def test_a_duel_shows_both_answers_and_the_media() -> None:
    judge = ModelPairs(model := Says(lambda asked, seed: "Because.\nBetter answer: " + "12"["Answer 2:\nlong" in asked]))
    assert judge([PROMPT, PROMPT], ["short", "long"], ["long", "short"]) == ["second", "first"]
    assert PHOTO in model.asked[0][0] and judge.unparsable == {"verdict": 0}
    assert ModelPairs(Says(lambda asked, seed: "both"))([PROMPT], ["a"], ["b"]) == [None]


def test_a_conversation_is_shown_as_one_turn() -> None:
    picture = Block("image", PHOTO.data, role="user")
    shown = asked((text("Be short.", "system"), picture, text("What?", "user")), "<", ">")
    assert [b.role for b in shown] == [None] * 5 and told(shown) == "<System: Be short.\nUser: What?\n>"
    assert shown[2].digest == PHOTO.digest


def long_words(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
    """Scores 1 a letter; nothing for the answer "?"; tells the number of vowels."""
    said = [told(a) for a in answers]
    scores = torch.tensor([float("nan") if s == "?" else float(len(s)) for s in said], dtype=torch.float64)
    vowels = torch.tensor([float(sum(c in "aeiou" for c in s)) for s in said], dtype=torch.float64)
    return JudgeResult(scores, parts={"vowels": vowels})


def test_a_scorer_gives_points_by_its_score_and_its_parts() -> None:
    judge = judge_points(long_words, ("quality", "vowels"))
    assert judge([PROMPT] * 3, ["to", "?", "queue"], "quality") == [2, None, 5]
    assert judge([PROMPT] * 2, ["to", "queue"], "vowels") == [1, 4]
    with pytest.raises(ValueError, match="no aspect 'holds'; this one was made for quality, vowels"):
        judge([PROMPT], ["to"], "holds")
    graded = judge_points(long_words, rescale=(2, 6, 0, 4))
    assert graded([PROMPT] * 4, ["a", "to", "queue", "long word"], "quality") == [0, 0, 3, 4]


def test_a_scorer_decides_duels_by_more_than_a_margin() -> None:
    prompts, first, second = [PROMPT] * 4, ["long", "a", "to", "?"], ["to", "abc", "to", "to"]
    assert judge_pairs(long_words)(prompts, first, second) == ["first", "second", None, None]
    assert judge_pairs(long_words, least=2)(prompts, first, second) == [None] * 4
