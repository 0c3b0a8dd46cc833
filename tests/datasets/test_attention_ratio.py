"""Selection by attention on cases made by hand: what MIA-DPO's ratios are, and where its thresholds cut."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mmpo.datasets.attention_ratio import grid_ratio, inset_ratio, sequence_ratio, unseen
from mmpo.datasets.builders import collage
from mmpo.datasets.collage_images import cells
from mmpo.datasets.tools import Answer
from mmpo.modalities.vlm_regions import over_picture

CANVAS = {  # of tiles of 448 with margins of 40: rows, columns, width, height
    2: (1, 2, 936, 488), 3: (1, 3, 1424, 488), 4: (2, 2, 936, 976), 6: (2, 3, 1424, 976), 9: (3, 3, 1424, 1464),
}  # fmt: skip


def test_sequence_ratio() -> None:
    assert sequence_ratio([0.1, 0.3], 1) == pytest.approx(0.75)
    assert sequence_ratio([0.2, 0.2, 0.1], 0, [576, 576, 576]) == pytest.approx(0.4)
    assert sequence_ratio([0.4, 0.2], 0, [200, 50]) == pytest.approx(0.002 / 0.006)  # less on each token, though more in all
    with pytest.raises(ValueError):
        sequence_ratio([0.4, 0.2], 0, [200])


@pytest.mark.parametrize("count", sorted(CANVAS))
def test_grid_ratio_of_tiles(count: int) -> None:
    rows, columns, width, height = CANVAS[count]
    boxes = [(x * 488, y * 488 + 40, x * 488 + 448, y * 488 + 488) for y in range(rows) for x in range(columns)]
    even = np.ones((24, 24))
    assert [grid_ratio(even, boxes, (width, height), k) for k in range(count)] == pytest.approx([1 / count] * count)
    pixels = np.zeros((height, width))  # one cell per pixel: the ratio by counting
    left, top, right, bottom = boxes[-1]
    pixels[top:bottom, left:right] = 3
    pixels[boxes[0][1] : boxes[0][3], : boxes[0][2]] += 1
    pixels[:40] = 7  # the strip of the labels belongs to no tile
    assert grid_ratio(pixels, boxes, (width, height), count - 1) == pytest.approx(3 / 4)
    assert grid_ratio(even, cells((width, height), rows, columns), (width, height), 0) == pytest.approx(1 / count, rel=0.01)


def test_grid_ratio_divides_a_token_by_area() -> None:
    mass = np.array([[1.0, 2.0, 4.0]])  # three tokens over 30 pixels
    assert grid_ratio(mass, [(0, 0, 15, 10), (15, 0, 30, 10)], (30, 10), 0) == pytest.approx(2 / 7)
    assert grid_ratio(mass, [(0, 0, 15, 10), (15, 0, 30, 5)], (30, 10), 0) == pytest.approx(2 / 4.5)


@pytest.mark.parametrize("count", sorted(CANVAS))
def test_panels_that_a_processor_cuts_off_are_no_evidence(count: int) -> None:
    """CLIP's crop at 336 pixels of a grid: of three in a row it sees the middle one alone, which would always be looked at."""
    rows, columns, width, height = CANVAS[count]
    regions = [{"box": [x * 488, y * 488 + 40, x * 488 + 448, y * 488 + 488]} for y in range(rows) for x in range(columns)]
    made = {"kind": "grid", "regions": regions, "cells": cells((width, height), rows, columns), "size": [width, height]}
    for padded in (False, True):
        images = SimpleNamespace(
            do_resize=True, do_center_crop=True, do_pad=padded, size={"shortest_edge": 336},
            crop_size={"height": 336, "width": 336},
        )  # fmt: skip
        mass = over_picture(np.full(576, 1 / 576), SimpleNamespace(image_processor=images), "llava", (width, height))
        hidden = [0, 2] if count == 3 and not padded else []
        assert mass is not None and unseen(mass, [r["box"] for r in regions], (width, height)) == hidden
        for target in range(1, count + 1):
            answer = Answer("a b", 2.0, (1.0,), mass, (576,))
            for how in ("boxes", "cells"):
                if hidden:
                    with pytest.raises(LookupError, match="a panel that the model does not see"):
                        collage._ratio({**made, "target": target}, answer, how)
                else:
                    assert 0.7 / count < collage._ratio({**made, "target": target}, answer, how) < 1


def test_no_attention_has_no_share() -> None:
    empty = np.zeros((4, 4))
    for ratio in (
        lambda: sequence_ratio([0.0, 0.0], 1),
        lambda: sequence_ratio([float("nan"), 0.1], 1),
        lambda: grid_ratio(empty, [(0, 0, 5, 10), (5, 0, 10, 10)], (10, 10), 0),
        lambda: inset_ratio(empty),
    ):
        with pytest.raises(LookupError, match="no attention on any image"):
            ratio()
    record = collage.Record("r", (), "x", {"made": {"kind": "inset"}})
    found = collage._answered(record, Answer("a b", 2.0, (0.0,), empty), True, "boxes")
    assert isinstance(found, collage.Dropped) and str(found) == "no attention on any image"


def test_inset_ratio() -> None:
    mass = np.ones((24, 24))
    assert inset_ratio(mass) == pytest.approx(16 * 16 / (24 * 24))
    mass[4:20, 4:20] = 5
    assert inset_ratio(mass) == pytest.approx(5 * 256 / (5 * 256 + 576 - 256))
    assert inset_ratio(np.ones((1, 1))) == 1


@pytest.mark.parametrize(
    ("kind", "count", "threshold", "at_threshold"),
    [("sequence", 2, 0.8, True), ("sequence", 3, 0.7, True), ("sequence", 4, 0.6, True), ("sequence", 5, 0.6, True),
     ("grid", 2, 0.7, False), ("grid", 3, 0.6, False), ("grid", 4, 0.5, False), ("grid", 6, 0.4, False),
     ("grid", 9, 0.3, False), ("inset", 2, 0.8, False)],
)  # fmt: skip
def test_thresholds_of_the_paper(kind: str, count: int, threshold: float, at_threshold: bool) -> None:
    """A pair is kept while attention on the asked image is below the threshold; in sequences, at it as well."""
    limits = collage._Limits(collage.SEQUENCE_RATIOS, collage.GRID_RATIOS, 0.8, 1.1, None, 0.0)

    def kept(share: float) -> bool:
        made, answer = case(kind, count, share)
        record = collage.Record("r", (), "x", {"kind": kind, "count": count, "ratio": collage._ratio(made, answer, "boxes")})
        return collage._elsewhere(record, limits)

    assert kept(threshold - 1e-3) and not kept(threshold + 1e-3)
    exact = collage.Record("r", (), "x", {"kind": kind, "count": count, "ratio": threshold})
    assert collage._elsewhere(exact, limits) is at_threshold


def case(kind: str, count: int, share: float) -> tuple[dict[str, object], Answer]:
    """A composite of `count` images and an answer that looked at its second one by `share`, elsewhere evenly."""
    others = (1 - share) / (count - 1)
    if kind == "sequence":
        masses = [others] * count
        masses[1] = share
        return {"kind": kind, "target": 2}, Answer("", 2.0, tuple(masses), None, (4,) * count)
    if kind == "inset":
        region = np.full((24, 24), (1 - share) / 320)
        region[4:20, 4:20] = share / 256
        return {"kind": kind, "target": 1}, Answer("", 2.0, (1.0,), region, (576,))
    rows, columns, _, _ = CANVAS[count]
    weights = np.full(rows * columns, others)
    weights[1] = share
    region = weights.reshape(rows, columns).repeat(6, 0).repeat(6, 1)
    boxes = cells((60 * columns, 60 * rows), rows, columns)
    regions = [{"box": list(box)} for box in boxes]
    return {"kind": kind, "target": 2, "regions": regions, "size": [60 * columns, 60 * rows]}, Answer("", 2.0, (1.0,), region)
