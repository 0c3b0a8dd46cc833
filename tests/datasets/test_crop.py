"""mDPO's crops: their share of the area, what is in them, and that they belong to their pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmpo import media
from mmpo.datasets.builders.crop import RATIO, crop, crop_box
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.stages import Record, execute
from mmpo.datasets.tools import Tools
from mmpo.pair import Branch, Pair, Span, image, text
from tests.datasets.picture_tools import picture

GRADIENT = np.stack(np.broadcast_arrays(np.arange(90)[:, None], np.arange(120), np.full((90, 120), 7)), -1).astype(np.uint8)


def pair(*prompt: object) -> Pair:
    blocks = prompt or (image(media.encode(GRADIENT)), text("Where?"))
    return Pair("p", blocks, (text("here"),), (text("there"),), margin=0.5, spans={"chosen": (Span(0, 2, 2.0),)})  # type: ignore[arg-type]


def built(source: Pair, seed: int = 0, **options: float) -> tuple[list[Pair], Ledger]:
    ledger = Ledger()
    records = [Record(source.id, source.prompt, "here", {"source": source})]
    return [r.fields["pair"] for r in execute(records, crop(Tools(), **options), seed=seed, ledger=ledger)], ledger


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 1), st.integers(0, 10**6))
def test_boxes_lie_inside_and_have_their_share(width: int, height: int, share: float, seed: int) -> None:
    left, top, right, bottom = crop_box((width, height), share, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert abs(w * h - share * width * height) <= (w + h) / 2 + 1  # half a pixel a side, and at least one pixel
    longest = RATIO * (1 + 1 / min(w, h))
    assert w == width or h == height or max(w, h) <= longest * min(w, h) + 1


def test_places_and_sizes_are_spread_over_the_whole_picture() -> None:
    random = np.random.default_rng(0)
    boxes = np.array([crop_box((100, 80), random.uniform(0.01, 0.2), random) for _ in range(2000)])
    shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 8000
    assert np.histogram(shares, 4, (0.01, 0.2))[0].min() > 400  # uniform in area
    assert boxes[:, 0].min() == boxes[:, 1].min() == 0 and boxes[:, 2].max() == 100 and boxes[:, 3].max() == 80


def test_the_branch_is_the_chosen_answer_beneath_the_scaled_crop() -> None:
    source = pair()
    ((made,), _) = built(source)
    condition, response = made.branches["chosen@crop"].prompt, made.branches["chosen@crop"].response
    ((left, top, right, bottom),) = made.meta["crops"]
    assert 0.009 <= (right - left) * (bottom - top) / (90 * 120) <= 0.205
    inside = Image.fromarray(GRADIENT[top:bottom, left:right]).resize((120, 90), Image.Resampling.BILINEAR)
    assert np.abs(media.pixels(condition[0]).astype(int) - np.asarray(inside)).max() <= 1
    assert condition[1:] == source.prompt[1:] and response == source.chosen
    assert replace(made, branches={}, meta={}) == source


def test_a_crop_is_a_function_of_seed_and_record() -> None:
    one, same, other = (built(pair(), seed)[0][0].meta["crops"] for seed in (1, 1, 2))
    assert one == same != other


def test_every_picture_is_cropped_and_earlier_branches_stay() -> None:
    source = pair(picture("red", (40, 40)), text("and"), picture("blue", (50, 30)), text("Which?"))
    source = replace(source, branches={"chosen@retrieved": Branch(source.prompt, source.chosen)})
    ((made,), _) = built(source)
    assert len(made.meta["crops"]) == 2 and set(made.branches) == {"chosen@retrieved", "chosen@crop"}
    kinds = [b.kind for b in made.branches["chosen@crop"].prompt]
    assert kinds == ["image", "text", "image", "text"]


def test_what_cannot_be_cropped_is_counted() -> None:
    made, ledger = built(pair(text("no picture")))
    assert not made and ledger.skipped == {"crop: no image in the prompt": 1}
    made, ledger = built(pair(image(b"\x89PNG broken"), text("Where?")))
    assert not made and ledger.skipped == {"crop: unreadable media": 1}
    ledger = Ledger()
    assert not list(execute([Record("a", (picture("red"),), "x")], crop(Tools()), seed=0, ledger=ledger))
    assert ledger.skipped == {"crop: no pair in the source": 1}


@pytest.mark.parametrize("options", [{"smallest": 0.0}, {"smallest": 0.3}, {"largest": 1.5}])
def test_shares_in_the_wrong_order_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < smallest <= largest <= 1"):
        crop(Tools(), **options)
