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


def test_a_fall_from_a_base_that_was_never_passed_counts_from_half_a_hundredth_on() -> None:
    records = [START, judged(0, 0.6, 0.5), judged(10, 0.59, 0.6)]
    assert flags([*records, judged(20, 0.594, 0.7)]) == ["over_optimisation"]
    assert flags([*records, judged(20, 0.596, 0.7)]) == []


@pytest.mark.parametrize("records", [[], [START], [{"event": "eval", "step": 5}], [judged(0, 0.5, 0.5), judged(5, 0.1, 0.9)]])
def test_logs_that_say_too_little_raise_nothing(records: list[dict[str, Any]]) -> None:
    assert flags(records) == []


def test_every_flag_says_what_was_seen_and_what_to_try() -> None:
    found = diagnose([START, judged(0, 0.6, 0.5), judged(10, 0.7, 0.8), judged(20, 0.6, 0.9) | displaced(0.6, 0.5, step=20)])
    assert sorted(f.name for f in found) == names("diagnostics")
    for flag in found:
        assert "step 20" in flag.text and flag.advice and "nan" not in flag.text
