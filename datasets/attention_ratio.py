"""How much of a model's attention was on the image it was asked about: the ratios of MIA-DPO's selection.

Behaviour checked against Liuziyu77/MIA-DPO@a85c51a gen_data/gen_chosen_rejected. Each ratio raises LookupError, with a
reason in a few words, where there is no attention to take a share of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEAST_SEEN = 0.25  # of a panel: CLIP's crop shows half of the outer ones of two rows of three, and a sliver of those of one row


def sequence_ratio(image_mass: Sequence[float], target: int, tokens: Sequence[int] | None = None) -> float:
    """Mean attention on a token of one image over the sum of these means of all images.

    image_mass: attention on all tokens of each image. target: from 0. tokens: of each image, as some models give larger images
    more of them; None: all have as many.
    """
    means = [mass / count for mass, count in zip(image_mass, tokens or [1] * len(image_mass), strict=True)]
    return _share(means[target], sum(means))


def grid_ratio(region_mass: np.ndarray, boxes: Sequence[Sequence[int]], size: Sequence[int], target: int) -> float:
    """Attention inside of one box over that inside of all boxes.

    region_mass: (h, w), laid over the whole picture of `size` (width, height) pixels. boxes: left, top, right, bottom in
    pixels; a token that a box covers in part counts in part.
    """
    masses = [_within(region_mass, box, size) for box in boxes]
    return _share(masses[target], sum(masses))


def unseen(region_mass: np.ndarray, boxes: Sequence[Sequence[int]], size: Sequence[int]) -> list[int]:
    """Which boxes were cut off by a processor: less than LEAST_SEEN of their area has any attention.

    What is seen gets some, however little, by the softmax.
    """
    (height, width), shown = region_mass.shape, (region_mass > 0).astype(float)
    pixel = height * width / (size[0] * size[1])
    areas = [(right - left) * (bottom - top) * pixel for left, top, right, bottom in boxes]
    return [k for k, (box, area) in enumerate(zip(boxes, areas, strict=True)) if _within(shown, box, size) < LEAST_SEEN * area]


def inset_ratio(region_mass: np.ndarray, share: float = 2 / 3) -> float:
    """Attention in the middle `share` of both sides (16 of LLaVA's 24 tokens) over all attention."""
    height, width = region_mass.shape
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return _share(region_mass[top : top + rows, left : left + columns].sum(), region_mass.sum())


def _share(part: float, whole: float) -> float:
    if not (math.isfinite(whole) and whole > 0):
        raise LookupError("no attention on any image")
    return float(part / whole)


def _within(region_mass: np.ndarray, box: Sequence[int], size: Sequence[int]) -> float:
    height, width = region_mass.shape
    left, top, right, bottom = box
    across = _overlap(left / size[0] * width, right / size[0] * width, width)
    down = _overlap(top / size[1] * height, bottom / size[1] * height, height)
    return float(down @ region_mass @ across)


def _overlap(start: float, end: float, count: int) -> np.ndarray:
    """How much of each of `count` intervals of length 1 lies between start and end."""
    edges = np.arange(count + 1)
    return np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, 1)
