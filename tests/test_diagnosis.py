"""Diagnostics on logs made by hand: they speak when there is something, are silent when there is not, and survive gaps."""

from __future__ import annotations

from typing import Any

import pytest

from mmpo.diagnosis import diagnose
from mmpo.find import names

START = {"event": "start", "beta": 2.0}


def displaced(drift: float, margin: float, error: float = 0.0, step: int = 10) -> dict[str, Any]:
    values = {"eval/drift_chosen": drift, "eval/drift_chosen_error": error, "eval/margin": margin}
    return {"event": "eval", "step": step, **values}


def judged(step: int, judge: float, accuracy: float) -> dict[str, Any]:
    return {"event": "eval", "step": step, "eval/judge": judge, "eval/pair_accuracy": accuracy}


def flags(records: list[dict[str, Any]]) -> list[str]:
    return [flag.name for flag in diagnose(records)]


@pytest.mark.parametrize(
    ("record", "raised"),
    [
        (displaced(drift=0.6, margin=0.5), True),  # 0.6 nats lost, 0.5 won, a reward of 1.2
        (displaced(drift=0.4, margin=0.5), False),  # lost less than won
        (displaced(drift=0.6, margin=0.5, error=0.06), False),  # within two standard errors
        (displaced(drift=0.12, margin=-1.0), False),  # a reward of 0.24: too small to matter
        (displaced(drift=0.13, margin=-1.0), True),
        (displaced(drift=-5.0, margin=-9.0), False),  # more likely than under the reference
        (displaced(drift=9.0, margin=0.0, step=0), False),  # the base's own evaluation
    ],
)
def test_displacement(record: dict[str, Any], raised: bool) -> None:
    assert flags([START, record]) == ["displacement"] * raised


def test_only_the_last_evaluation_is_displaced_or_not() -> None:
    assert flags([START, displaced(0.6, 0.5), displaced(0.1, 0.5, step=20)]) == []


@pytest.mark.parametrize(
    ("last", "raised"),
    [
        (judged(30, 0.67, 0.9), True),  # 0.03 of a gain of 0.1 are lost
        (judged(30, 0.69, 0.9), False),  # a tenth of it
        (judged(30, 0.67, 0.79), False),  # pair accuracy fell with it: it is not the pairs that are over-fitted
        (judged(30, 0.75, 0.9), False),  # still rising
    ],
)
def test_over_optimisation(last: dict[str, Any], raised: bool) -> None:
    assert flags([START, judged(0, 0.6, 0.5), judged(10, 0.7, 0.8), last]) == ["over_optimisation"] * raised


def test_over_optimisation_names_weights_that_are_there() -> None:
    """The best of the steps is under best/; the base never is."""
    (flag,) = diagnose([START, judged(0, 0.6, 0.5), judged(10, 0.7, 0.8), judged(20, 0.5, 0.9)])
    assert "keep the checkpoint of step 10 (it is under best/)" in flag.advice
    (flag,) = diagnose([START, judged(0, 0.7, 0.5), judged(10, 0.6, 0.8), judged(20, 0.5, 0.9)])
    assert "keep the base" in flag.advice and "best/" not in flag.advice


def test_a_fall_from_a_base_that_was_never_passed_counts_from_half_a_hundredth_on() -> None:
    records = [START, judged(0, 0.6, 0.5), judged(10, 0.59, 0.6)]
    assert flags([*records, judged(20, 0.594, 0.7)]) == ["over_optimisation"]
    assert flags([*records, judged(20, 0.596, 0.7)]) == []


@pytest.mark.parametrize("records", [[], [START], [{"event": "eval", "step": 5}], [judged(0, 0.5, 0.5), judged(5, 0.1, 0.9)]])
def test_logs_that_say_too_little_raise_nothing(records: list[dict[str, Any]]) -> None:
    assert flags(records) == []


def sure(step: int, entropy: float, mass: float = 1.0, judge: float | None = None) -> dict[str, Any]:
    record = {"event": "eval", "step": step, "eval/top_entropy": entropy, "eval/top_mass": mass}
    return record if judge is None else record | {"eval/judge": judge}


@pytest.mark.parametrize(
    ("values", "raised"),
    [
        ([(1.0, 1.0), (0.89, 1.0), (0.88, 1.0), (0.8, 1.0)], True),
        ([(1.0, 1.0), (0.91, 1.0), (0.88, 1.0), (0.8, 1.0)], False),  # one of the three is within 10 %
        ([(1.0, 1.0), (0.5, 1.0), (0.5, 1.0)], False),  # two evaluations are not lasting
        ([(0.9, 1.0), (1.0, 1.0), (0.95, 1.0), (0.85, 1.0), (0.85, 1.0)], False),  # the largest so far was 1.0
        ([(1.0, 1.0), (1.0, 0.97), (1.0, 0.97), (1.0, 0.97)], True),  # the mass falls, as under a hinge loss
        ([(1.0, 1.0), (1.0, 0.99), (1.0, 0.97), (1.0, 0.97)], False),
    ],
)
def test_entropy_fall(values: list[tuple[float, float]], raised: bool) -> None:
    assert flags([START, *(sure(i, *v) for i, v in enumerate(values))]) == ["entropy_fall"] * raised


@pytest.mark.parametrize(("last", "raised"), [(0.69, True), (0.7, True), (0.71, False)])
def test_a_judge_at_its_best_speaks_for_a_policy_that_is_sure(last: float, raised: bool) -> None:
    """Right answers are given with less entropy than guesses."""
    values = [(1.0, 0.7), (0.8, 0.6), (0.7, 0.6), (0.6, last)]
    assert flags([START, *(sure(i, e, judge=j) for i, (e, j) in enumerate(values))]) == ["entropy_fall"] * raised


def test_displacement_tells_the_shares_of_pairs() -> None:
    shares = {"eval/fell_chosen": 0.75, "eval/fell_both": 0.5}
    (flag,) = diagnose([START, displaced(0.6, 0.5) | shares])
    assert "fell in 75% of the pairs, both answers in 50%" in flag.text


def test_every_flag_says_what_was_seen_and_what_to_try() -> None:
    entropies = [sure(0, 1.0), sure(5, 0.8), sure(10, 0.7), sure(20, 0.6)]
    values = [
        judged(0, 0.7, 0.5),
        judged(5, 0.7, 0.6),
        judged(10, 0.7, 0.8),
        judged(20, 0.6, 0.9) | displaced(0.6, 0.5, step=20),
    ]
    found = diagnose([START, *(e | v for e, v in zip(entropies, values, strict=True))])
    assert sorted(f.name for f in found) == names("diagnostics")
    for flag in found:
        assert "step 20" in flag.text and flag.advice and "nan" not in flag.text
