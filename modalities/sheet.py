"""Pictures for people: base above aligned, on the same prompts and seeds, with the captions under them."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmpo.evaluate import Samples
from mmpo.pair import Block

TILE, GAP, MARGIN = 144, 12, 96
COLUMNS, BANDS = 6, 3
INK, PAPER, GOOD, BAD = (32, 33, 36), (255, 255, 255), (24, 128, 56), (178, 58, 46)


def to_png(block: Block) -> bytes:
    """An image block as PNG bytes."""
    return block.data if isinstance(block.data, bytes) else _png(Image.fromarray(np.asarray(block.data)))


def contact_sheet(captions: Sequence[str], base: Samples, aligned: Samples) -> bytes:
    """The first 18 prompts in test order (the first seed of each; nothing is picked by hand), base above aligned.

    A coloured bar under a picture is the judge's verdict, where it has a hard one: green right, red wrong.
    """
    order = _first_of_each(captions)[: COLUMNS * BANDS]
    bands = -(-len(order) // COLUMNS)
    small, label = ImageFont.load_default(11), ImageFont.load_default(14)
    height = 2 * TILE + 3 * GAP + 44
    sheet = Image.new("RGB", (MARGIN + COLUMNS * (TILE + GAP) + GAP, GAP + bands * height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, i in enumerate(order):
        x, y = MARGIN + (place % COLUMNS) * (TILE + GAP), GAP + (place // COLUMNS) * height
        for row, (name, samples) in enumerate((("base", base), ("aligned", aligned))):
            top = y + row * (TILE + GAP)
            if place % COLUMNS == 0:
                pen.text((GAP, top + TILE // 2 - 8), name, INK, label)
            picture = Image.fromarray(np.asarray(samples.blocks[i].data)).resize((TILE, TILE), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x, top))
            if samples.correct is not None:
                pen.rectangle((x, top + TILE + 1, x + TILE - 1, top + TILE + 4), GOOD if samples.correct[i] else BAD)
        pen.multiline_text((x, y + 2 * (TILE + GAP)), textwrap.fill(captions[i], 24), INK, small, spacing=2)
    return _png(sheet)


def _first_of_each(captions: Sequence[str]) -> list[int]:
    return list({c: i for i, c in reversed(list(enumerate(captions)))}.values())[::-1]


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
