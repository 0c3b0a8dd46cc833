"""Embedders without weights: vectors of length 1 in which near copies are near."""

from __future__ import annotations

import numpy as np
import pytest

from mmpo.find import find
from mmpo.pair import image, text


def test_pixels_are_the_cosine_of_ink() -> None:
    embed = find("datasets.embedders", "pixels")(side=2)
    dark, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    half = white.copy()
    half[:2] = 0
    found = embed([image(dark), image(half), image(white), image(half.repeat(3, 0).repeat(3, 1))])
    assert np.allclose(np.linalg.norm(found, axis=1), 1) and found.dtype == np.float32
    assert np.isclose(found[0] @ found[2], 1) and np.allclose(found[1], found[3])  # size does not matter
    assert np.isclose(found[0] @ found[1], (256 * 2 + 2) / (2 * np.sqrt(2 * 256**2 + 2)))
    assert embed([]).shape == (0, 4)


def test_letters_are_the_cosine_of_runs() -> None:
    embed = find("datasets.embedders", "letters")(longest=1)
    found = embed([text("ab"), text("aab"), text("cd"), text("")])
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert np.isclose(found[0] @ found[1], (4 + 2 + 1) / np.sqrt(6 * 9))  # the frame counts twice on both sides
    assert np.isclose(found[0] @ found[2], 4 / 6)
    longer = find("datasets.embedders", "letters")()
    near = longer([text("It is 7."), text("It is 3."), text("It is 7.")])
    assert near[0] @ near[2] > 0.999 and 0.5 < near[0] @ near[1] < 0.9


@pytest.mark.parametrize(("name", "block"), [("pixels", text("a")), ("letters", image(np.zeros((2, 2, 3), np.uint8)))])
def test_other_blocks_and_weights_are_refused(name: str, block: object) -> None:
    with pytest.raises(ValueError, match=f"embedder {name}: expected"):
        find("datasets.embedders", name)()([block])
    with pytest.raises(ValueError, match="needs no weights"):
        find("datasets.embedders", name)(path="x")
