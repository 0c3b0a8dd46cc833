"""A small world of collages of handwritten digits with an exact verifier: what the embedded VLM default trains on.

A prompt is a picture of several digits and a question about one of them, `In Image3, what digit is it?`; the right answer is
`It is 7.`. The usual wrong answer names the digit of another panel. The digits are the 1,797 real ones of 8 x 8 pixels that
scikit-learn ships (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI), black on white, no two of them
alike: so a collage's digits can be read back from its pixels, and neither network nor trained model is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from mmpo import media
from mmpo.pair import Block

PANEL = 8  # pixels of a digit's side
GRID = 2  # panels of a collage's side, numbered from 1 in rows
QUESTION, NAME_ALL = "What digit is it?", "What digits are there?"
SHEET = resources.files("mmpo") / "assets" / "collages" / "digits.png"
COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # of the digits 0, 1, ... 9 on the sheet, in this order

_ASKED = re.compile(r"\bIn Image(\d+), what digit is it\?")
_SAID = re.compile(r"It is (\d)\.")


@dataclass(frozen=True)
class Verdict:
    """correct: the digit of the image that was asked for. wrong_image: another digit, which is that of another image."""

    correct: bool
    wrong_image: bool


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits, (n, 8, 8) uint8 with ink 0 and paper 255, and which they are, (n,)."""
    pixels = media.pixels(SHEET.read_bytes())[..., 0]
    rows, columns = (side // PANEL for side in pixels.shape)
    tiles = pixels.reshape(rows, PANEL, columns, PANEL).swapaxes(1, 2).reshape(-1, PANEL, PANEL)
    return tiles[: sum(COUNTS)], np.repeat(np.arange(10), COUNTS)


def heldout_digits() -> np.ndarray:
    """Which digits no training collage shows, (n,) bool: every fifth."""
    return np.arange(sum(COUNTS)) % 5 == 4


@cache
def _known() -> dict[bytes, int]:
    return {tile.tobytes(): int(digit) for tile, digit in zip(*digits(), strict=True)}


def asked(place: int) -> str:
    """The question about the image at a place from 0."""
    return f"In Image{place + 1}, {QUESTION[0].lower()}{QUESTION[1:]}"


def named(shown: Sequence[int]) -> str:
    """The answer to NAME_ALL."""
    return f"They are {', '.join(str(digit) for digit in shown)}."


def answer(digit: int) -> str:
    return f"It is {digit}."


def said(response: str) -> int | None:
    """The digit of an answer, or None when it is not of the form `It is 7.`, blanks around it aside."""
    found = _SAID.fullmatch(response.strip())
    return int(found[1]) if found else None


def parse(prompt: Sequence[Block]) -> tuple[tuple[int, ...], int]:
    """The digits of a prompt's images or panels, in their order, and the place of the one that is asked for, from 0.

    One picture of a digit is one image; one of two by two of them is a collage. Raises ValueError for another prompt.
    """
    words = " ".join(str(block.data) for block in prompt if block.kind == "text")
    shown = [digit for block in prompt if block.kind == "image" for digit in _read(block)]
    place = _ASKED.search(words)
    if not place or not 1 <= int(place[1]) <= len(shown):
        raise ValueError(
            f"not a prompt of the collages world: {words!r} about {len(shown)} digits (expected e.g. {asked(1)!r})"
        )
    return tuple(shown), int(place[1]) - 1


def _read(block: Block) -> list[int]:
    """The digits of a picture. Raises ValueError when it is none of this world."""
    pixels = media.pixels(block)[..., 0]
    rows, columns = pixels.shape[0] // PANEL, pixels.shape[1] // PANEL
    tiles = [pixels[y * PANEL : (y + 1) * PANEL, x * PANEL : (x + 1) * PANEL] for y in range(rows) for x in range(columns)]
    found = [_known().get(np.ascontiguousarray(tile).tobytes()) for tile in tiles]
    if pixels.shape != (rows * PANEL, columns * PANEL) or None in found or not found:
        raise ValueError(f"not a picture of the collages world: {pixels.shape[1]} x {pixels.shape[0]} pixels, digits {found}")
    return [digit for digit in found if digit is not None]


def truth(prompt: Sequence[Block]) -> str:
    """The right answer."""
    shown, place = parse(prompt)
    return answer(shown[place])


def verify(prompt: Sequence[Block], response: str) -> Verdict:
    """What an answer is worth: only the digit counts, in the one form `It is 7.`. Raises ValueError for another prompt."""
    shown, place = parse(prompt)
    digit = said(response)
    return Verdict(digit == shown[place], digit != shown[place] and digit in shown)
