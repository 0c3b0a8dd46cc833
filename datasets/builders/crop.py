"""mDPO's third branch (arXiv 2406.11839): the chosen answer beneath a small crop of its picture.

Any pairs about images will do. Its objective is three terms, `[{loss: dpo}, {loss: dpo, of: [chosen, "chosen@crop"]},
{loss: reward_anchor}]`. Crops as in luka-group/mDPO@2221bb3 `mdpo_trainer.py`, with one difference: there each forward pass
draws its own, so that policy and reference score different pictures; here a crop belongs to its pair.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from mmpo import media
from mmpo.datasets.stages import Dropped, Record, Stage, each
from mmpo.datasets.tools import Tools
from mmpo.pair import Block, Branch, Pair

NEEDS: frozenset[str] = frozenset()
RATIO = 4 / 3  # most of a crop's width to its height, and of height to width, as in torchvision's RandomResizedCrop

Box = tuple[int, int, int, int]


def crop(tools: Tools, *, smallest: float = 0.01, largest: float = 0.2) -> list[Stage]:
    """Stages that give the pairs of the source a branch `chosen@crop`, and leave everything else of them as it is.

    smallest, largest: share of a picture's area that is kept; the crop is scaled back to the picture's size. Every picture of
    a prompt is cropped. Raises ValueError for shares outside (0, 1] or in the wrong order.
    """
    if not 0 < smallest <= largest <= 1:
        raise ValueError(f"crop: expected 0 < smallest <= largest <= 1, got {smallest} and {largest}")

    def cropped(record: Record, random: np.random.Generator) -> Record:
        source = record.fields.get("source")
        if not isinstance(source, Pair):
            raise Dropped("no pair in the source")
        if not any(b.kind == "image" for b in source.prompt):
            raise Dropped("no image in the prompt")
        boxes: list[Box] = []
        prompt = tuple(_cropped(b, smallest, largest, random, boxes) if b.kind == "image" else b for b in source.prompt)
        branches = {**source.branches, "chosen@crop": Branch(prompt, source.chosen)}
        pair = dataclasses.replace(source, id=record.id, branches=branches, meta={**source.meta, "crops": boxes})
        return record.having({"crops": [list(box) for box in boxes]}, pair=pair)

    return [each("crop", cropped)]


def _cropped(block: Block, smallest: float, largest: float, random: np.random.Generator, boxes: list[Box]) -> Block:
    picture = media.open_image(block)
    boxes.append(crop_box(picture.size, random.uniform(smallest, largest), random))
    scaled = picture.resize(picture.size, Image.Resampling.BILINEAR, box=boxes[-1])
    return Block("image", media.encode(np.asarray(scaled)), role=block.role)


def crop_box(size: tuple[int, int], share: float, random: np.random.Generator) -> Box:
    """A random box (left, top, right, bottom) with `share` of the area, its sides rounded to pixels and at least one.

    size: width and height. The ratio of its sides is drawn log-uniformly from 1 / RATIO to RATIO; a box that would not fit into
    the picture becomes longer instead of smaller.
    """
    width, height = size
    area = share * width * height
    across = min(width, math.sqrt(area * math.exp(random.uniform(-1, 1) * math.log(RATIO))))
    down = min(height, area / across)
    across = min(width, area / down)
    w, h = max(1, round(across)), max(1, round(down))
    left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
    return left, top, left + w, top + h
