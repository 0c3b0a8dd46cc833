"""The sums world: every prompt has one right answer, wrong answers are wrong, and nothing else is of this world."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmpo.datasets.worlds import sums


def test_all_prompts_are_distinct_and_their_answers_right() -> None:
    prompts = sums.prompts()
    assert len(prompts) == len(set(prompts)) == 90 * 90 and {len(p) for p in prompts} == {6}
    assert sums.answer("47+38=") == "85" and sums.answer("99+99=") == "198"
    assert all(sums.verify(p, sums.answer(p)) for p in prompts[::37])


@pytest.mark.parametrize("response", ["", "8", "085", "85.", "eighty-five", "85 86", "75"])
def test_only_the_exact_sum_is_right(response: str) -> None:
    assert sums.verify("47+38=", " 85\n") and not sums.verify("47+38=", response)


def test_wrong_answers_are_those_of_careless_people() -> None:
    rng = np.random.default_rng(0)
    carry, plain = (Counter(int(sums.corrupt(p, rng)) - int(sums.answer(p)) for _ in range(2000)) for p in ("47+38=", "41+38="))
    assert set(carry) == set(plain) == {-10, -1, 1, 10}
    assert abs(carry[-10] / 2000 - (0.5 + 0.125)) < 0.04 and abs(plain[-10] / 2000 - 0.25) < 0.04


@pytest.mark.parametrize("prompt", ["47+38", "7+38=", "47-38=", "147+38=", "what is 47+38=", ""])
def test_other_prompts_are_refused_by_name(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of the sums world"):
        sums.answer(prompt)
