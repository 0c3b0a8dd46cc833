"""Claims: statements of answers, their checks, the pairs, and the balance of lengths."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpo.datasets.builders.claims import balanced, best_ratio, claims, parsed_statements, selection
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import pairs
from mmpo.datasets.tools import Tools
from mmpo.pair import Pair, text
from tests.datasets.judged import Grades, Says, built, merged, record, words

FALSE = ("dog", "blue")


def holds(statement: str, aspect: str) -> float | None:
    assert aspect == "holds"
    return None if "perhaps" in statement else float(not any(word in statement for word in FALSE))


def tools(*answers: str) -> tuple[Tools, Says, Grades]:
    """A generator with these answers in turn, which splits a text at its semicolons; a judge that denies dogs and blue."""

    def say(asked: str, seed: int) -> str:
        if not asked.startswith("Split"):
            return next(turn)
        listed = asked.split("Answer: ")[1].split("; ")
        return "I cannot." if listed == ["odd"] else "Here:\n" + "\n".join(f"- {item}" for item in listed)

    turn = itertools.cycle(answers or ("?",))
    model, judge = Says(say), Grades(holds)
    return Tools(generator=model, point_judge=judge), model, judge


def test_an_answer_scores_minus_the_number_of_its_denied_statements() -> None:
    given, model, judge = tools("a cat; a hat", "a dog; a cat", "a dog; blue")
    found, drops = built(claims(given, answers=3, pairs_per_prompt=9), record("r"))
    assert not drops and {words(r) for r in found} == {
        ("a cat; a hat", "a dog; a cat"), ("a cat; a hat", "a dog; blue"), ("a dog; a cat", "a dog; blue"),
    }  # fmt: skip
    by_words = {words(r): r.fields["pair"] for r in found}
    widest = by_words["a cat; a hat", "a dog; blue"]
    assert widest.scores == {"chosen": 0, "rejected": -2}
    assert widest.meta["answers"]["rejected"] == {"statements": ["a dog", "blue"], "denied": ["a dog", "blue"]}
    assert {r.id for r in found} == {"r/0", "r/1", "r/2"} and len(judge.asked) == 6
    assert all(told.startswith("What is there?") for told, _, _ in judge.asked), "the judge sees the question with its images"
    sampling = [options for asked, _, options in model.asked if not asked[0].data.startswith("Split")]  # type: ignore[union-attr, arg-type]
    assert sampling == [{"max_new_tokens": 512, "temperature": 0.7}] * 3


def test_answers_differ_in_their_seeds_alone() -> None:
    given, model, _ = tools("a cat; a hat", "a dog; a cat")
    built(claims(given, answers=4), record("r"))
    sampled = [(asked, seed) for asked, seed, options in model.asked if "temperature" in options]
    assert len({seed for _, seed in sampled}) == 4 and len({asked for asked, _ in sampled}) == 1
    again = tools("a cat; a hat", "a dog; a cat")
    built(claims(again[0], answers=4, batch=1), record("other"), record("r"))
    assert [seed for _, seed, o in again[1].asked if "temperature" in o][4:] == [seed for _, seed in sampled], "batches do not"


def test_two_pairs_a_question_and_the_least_gap() -> None:
    source = record("r", "a", "b; dog", "c; dog; blue", "d; dog; blue; blue dog")
    found, _ = built(claims(tools()[0]), source)
    assert len(found) == 2
    gaps = {tuple(words(r)) for r in built(claims(tools()[0], min_gap=3), source)[0]}
    assert gaps == {("a", "d; dog; blue; blue dog")}
    assert {frozenset(map(words, built(claims(tools()[0]), source, seed=s)[0])) for s in range(8)} > {
        frozenset(map(words, found))
    }


def test_what_cannot_be_parsed_leaves_the_answer_out() -> None:
    """Not a yes, not a no, and not an answer without errors."""
    source = record("r", "odd", "a perhaps; a cat", "a cat", "a dog")
    found, _ = built(claims(tools()[0]), source)
    assert [words(r) for r in found] == [("a cat", "a dog")]
    told = {k: v for entry in found[0].provenance for k, v in entry.items()}
    assert told["not_split"] == 1 and told["not_judged"] == 1 and told["scores"] == [0, -1]


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        (("same", "same ", ""), "answers: fewer than two different answers"),
        (("odd", "a cat"), "statements: fewer than two answers with statements"),
        (("perhaps", "a cat"), "checks: fewer than two answers with every statement judged"),
        (("a cat", "a hat"), "pairs: no two answers differ enough in denied statements"),
    ],
)
def test_why_a_question_is_dropped(candidates: tuple[str, ...], reason: str) -> None:
    assert built(claims(tools()[0]), record("r", *candidates)) == ([], {reason: 1})


def test_sentences_can_be_the_statements() -> None:
    given, model, judge = tools()
    found, _ = built(claims(given, split="sentences"), record("r", "It is a cat. It has a hat.", "It is a dog! It is blue."))
    assert len(found) == 1 and model.calls == 0
    assert [s for _, s, _ in judge.asked] == ["It is a cat.", "It has a hat.", "It is a dog!", "It is blue."]


def test_a_list_of_statements_is_a_list() -> None:
    assert parsed_statements("- One.\n * Two. \n3. Three.\n4) Four.\n- One.") == ["One.", "Two.", "Three.", "Four."]
    assert parsed_statements("One. Two.") is None and parsed_statements("") is None and parsed_statements("-") is None


# The balance ------------------------------------------------------------------------------------------------------------


def test_the_balance_drops_short_chosen_sides() -> None:
    """Chosen 10 against 10 twice, and 5 against 10: at r >= 0.5 all stay and chosen is shorter by a sixth."""
    lengths = [(10, 10), (10, 10), (5, 10)]
    assert best_ratio(lengths) == 0.0
    assert [balanced(*n, 0.0) for n in lengths] == [True, True, False]
    longer = [(15, 10), (5, 10)]  # a long chosen side is made up for by a short one, from r = 0.5 on
    assert best_ratio(longer) == 0.5 and balanced(5, 10, 0.5) and not balanced(5, 10, 0.48)
    assert best_ratio([]) is None and best_ratio([(1, 200)]) is None, "no r below 1 keeps the pair"


def test_the_balance_tells_why_a_pair_is_left_out() -> None:
    sides = [("one two", "one two"), ("one two", "one two"), ("one", "one two")]
    why = selection(iter(sides))
    assert [why(*s) for s in sides] == [None, None, "chosen shorter than the length balance allows"]
    off = selection(iter(sides), length_balance=False, answers=3)
    assert [off(*s) for s in sides] == [None] * 3 == [selection(iter([]))(*s) for s in sides]


def test_a_build_leaves_out_what_unbalances(tmp_path: Path) -> None:
    sides = {"a": ("one two", "two one"), "b": ("one", "two one"), "c": ("two one", "one two")}
    made = [Pair(name, (text("q"),), (text(c),), (text(r),)) for name, (c, r) in sides.items()]
    noted = merged(tmp_path, made, ("pairs",), partial(selection, length_balance=True, answers=10))
    assert noted == {"pair left out: chosen shorter than the length balance allows": 1}
    assert [p.id for p in pairs(tmp_path, Ledger("refuse"))] == ["a", "c"]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=12))
def test_the_ratio_is_the_best_of_the_grid(lengths: list[tuple[int, int]]) -> None:
    """Against the definition, written out."""
    best: tuple[float, float] | None = None
    for i in range(50):
        kept = [(c, r) for c, r in lengths if (r - c) / r <= i / 50]
        if kept:
            chosen, rejected = (sum(n[side] for n in kept) / len(kept) for side in (0, 1))
            off = abs(chosen - rejected) / rejected
            if best is None or off < best[0] - 1e-12:
                best = (off, i / 50)
    assert best_ratio(lengths) == (None if best is None else pytest.approx(best[1]))


@pytest.mark.parametrize("value", [0.3, 2, -1])
def test_a_statement_holds_or_does_not(value: float) -> None:
    unsure, _, _ = tools("The sky is red. It is night.", "The sky is red.")
    judged = dataclasses.replace(unsure, point_judge=Grades(lambda statement, aspect: value))
    with pytest.raises(ValueError, match=rf"stage checks, record a: expected 1 .* 0 or None from the judge, found {value}"):
        built(claims(judged, answers=2, split="sentences"), record())
    nothing = dataclasses.replace(unsure, point_judge=Grades(lambda statement, aspect: float("nan")))
    _, why = built(claims(nothing, answers=2, split="sentences"), record())
    assert why == {"checks: fewer than two answers with every statement judged": 1}
