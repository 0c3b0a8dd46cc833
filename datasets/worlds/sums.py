"""A small world of two-digit sums with an exact verifier: what the embedded text default trains on.

A prompt is `47+38=`, its right answer `85`. Wrong answers are those of careless people: the carry forgotten (`75`), off by
one, or off by ten. Nothing here needs a network or a trained model.
"""

from __future__ import annotations

import re

import numpy as np

LOW, HIGH = 10, 99  # the summands

_SUM = re.compile(r"(\d{2})\+(\d{2})=")


def parse(prompt: str) -> tuple[int, int]:
    """The two summands of a prompt. Raises ValueError naming the prompt when it is not of this world."""
    found = _SUM.fullmatch(prompt.strip())
    if not found:
        raise ValueError(f"not a prompt of the sums world: {prompt!r} (expected two summands of two digits, e.g. '47+38=')")
    return int(found[1]), int(found[2])


def prompts() -> list[str]:
    """All 8,100 sums, in a fixed order."""
    return [f"{a}+{b}=" for a in range(LOW, HIGH + 1) for b in range(LOW, HIGH + 1)]


def answer(prompt: str) -> str:
    """The right answer."""
    return str(sum(parse(prompt)))


def corrupt(prompt: str, rng: np.random.Generator) -> str:
    """A wrong answer: half of the time the forgotten carry, where there is one to forget, else off by one or by ten."""
    a, b = parse(prompt)
    if a % 10 + b % 10 > 9 and rng.random() < 0.5:
        return str(a + b - 10)
    return str(a + b + (-10, -1, 1, 10)[rng.integers(4)])


def verify(prompt: str, response: str) -> bool:
    """Whether a response is the right sum: its digits and nothing else, blanks around them aside."""
    return response.strip() == answer(prompt)
