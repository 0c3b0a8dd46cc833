"""The collages world: real digits, prompts that are read back from their pixels, and an exact verdict."""

from __future__ import annotations

import gzip
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpo import media
from mmpo.datasets.collage_images import grid
from mmpo.datasets.worlds import collages
from mmpo.pair import Block, image, text


def prompt(tiles: Sequence[int], place: int) -> tuple[Block, ...]:
    """A collage of digits by their number, made by the builder's own geometry."""
    pictures = [Image.fromarray(collages.digits()[0][i]).convert("RGB") for i in tiles]
    made = grid(pictures, tile=collages.PANEL, margin=0, label=0)
    return image(media.encode(np.asarray(made.picture))), text(collages.asked(place))


def test_the_sheet_has_all_digits_of_scikit_learn_and_no_two_alike() -> None:
    tiles, which = collages.digits()
    assert (
        len({t.tobytes() for t in tiles}) == len(tiles) == 1797 and tuple(Counter(which.tolist()).values()) == collages.COUNTS
    )
    folder = importlib.util.find_spec("sklearn")
    if folder is None or folder.origin is None:
        pytest.skip("scikit-learn is not installed")
    with gzip.open(Path(folder.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    order = np.argsort(table[:, -1], kind="stable")
    assert np.array_equal(which, table[order, -1])
    assert np.array_equal(tiles.reshape(-1, 64), np.round((16 - table[order, :-1]) * 255 / 16))


def test_a_fifth_of_each_digit_is_held_out() -> None:
    held, which = collages.heldout_digits(), collages.digits()[1]
    assert abs(held.mean() - 0.2) < 0.01 and all(abs(held[which == d].mean() - 0.2) < 0.02 for d in range(10))


@pytest.mark.parametrize("place", range(4))
def test_a_collage_is_read_back_from_its_pixels(place: int) -> None:
    tiles = [5, 400, 900, 1790]
    shown, asked = collages.parse(prompt(tiles, place))
    assert shown == tuple(collages.digits()[1][tiles]) and asked == place
    assert collages.truth(prompt(tiles, place)) == f"It is {shown[place]}."


def test_images_one_after_the_other_are_read_as_well() -> None:
    tiles, which = collages.digits()
    blocks = [b for i in (3, 700) for b in (text("Image:"), image(np.repeat(tiles[i][..., None], 3, -1)))]
    assert collages.parse([*blocks, text(collages.asked(1))]) == ((which[3], which[700]), 1)


def test_the_verdict_tells_right_from_another_image_from_neither() -> None:
    asked = prompt([0, 200, 400, 600], 1)  # 0 1 2 3
    said = {"It is 1.": (True, False), " It is 1.\n": (True, False), "It is 3.": (False, True), "It is 9.": (False, False)}
    said |= {"1": (False, False), "It is 1. It is 3.": (False, False), "": (False, False)}
    for words, expected in said.items():
        found = collages.verify(asked, words)
        assert (found.correct, found.wrong_image) == expected, words


def test_other_prompts_are_refused() -> None:
    asked = prompt([0, 200, 400, 600], 1)
    with pytest.raises(ValueError, match="not a prompt of the collages world"):
        collages.parse([asked[0], text("What is this?")])
    with pytest.raises(ValueError, match="about 4 digits"):
        collages.parse([asked[0], text(collages.asked(4))])
    with pytest.raises(ValueError, match="not a picture of the collages world: 16 x 16 pixels"):
        collages.parse([image(np.zeros((16, 16, 3), np.uint8)), asked[1]])
    with pytest.raises(ValueError, match="not a picture of the collages world: 17 x 16 pixels"):
        collages.parse([image(np.full((16, 17, 3), 255, np.uint8)), asked[1]])
