"""Composite pictures of MIA-DPO as pure functions of pictures: a grid with labels, and a picture within a picture.

Geometry and labels are those of the released code (Liuziyu77/MIA-DPO, gen_instruction). Its labels are in Arial, which may
not be passed on; ours are in DejaVu Sans, which comes with matplotlib.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}  # pictures: rows, columns
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are excluded


@dataclass(frozen=True)
class Composite:
    """A picture made of others. boxes: where each of them was pasted, in their order.

    cells: the even parts of the canvas that count as each of theirs, with the margins; noise is laid on a cell.
    """

    picture: Image.Image
    boxes: tuple[Box, ...]
    cells: tuple[Box, ...]


def fitted(picture: Image.Image, width: float, height: float) -> Image.Image:
    """The picture in the largest size of its aspect that fits into width x height, larger or smaller, by Lanczos."""
    scale = min(width / picture.width, height / picture.height)
    across, down = (
        max(1, min(int(most), round(side * scale))) for side, most in ((picture.width, width), (picture.height, height))
    )
    return picture.resize((across, down), Image.Resampling.LANCZOS)


def grid(pictures: Sequence[Image.Image], *, tile: int = 448, margin: int = 40, label: int = 36) -> Composite:
    """Pictures in rows of cells on white, each at the top left of its cell, and `Image1`, `Image2`, ... above them.

    tile: side of a cell's square, pixels. margin: between cells, and the height of the strip above each that holds its
    label. label: size of the letters, pixels; 0: none. Raises ValueError for a number of pictures that GRIDS has no layout for.
    """
    if len(pictures) not in GRIDS:
        raise ValueError(f"grid: expected {', '.join(map(str, GRIDS))} pictures, found {len(pictures)}")
    rows, columns = GRIDS[len(pictures)]
    step = tile + margin
    canvas = Image.new("RGB", (columns * step - margin, rows * step), "white")
    corners = [(k % columns * step, k // columns * step + margin) for k in range(len(pictures))]
    draw, boxes = ImageDraw.Draw(canvas), []
    for k, (x, y) in enumerate(corners if label else ()):  # on the strip's lower edge; DejaVu is two pixels higher than Arial
        draw.text((x + margin // 2, y), f"Image{k + 1}", fill="black", font=font(label), anchor="ld")
    for picture, (x, y) in zip(pictures, corners, strict=True):  # over labels that are too large for their strip
        small = fitted(picture, tile, tile)
        canvas.paste(small, (x, y))
        boxes.append((x, y, x + small.width, y + small.height))
    return Composite(canvas, tuple(boxes), cells(canvas.size, rows, columns))


def inset(outer: Image.Image, inner: Image.Image, *, share: float = 0.7) -> Composite:
    """`inner` at the centre of `outer`, as large as fits into `share` of its width and of its height."""
    small = fitted(inner, max(1.0, share * outer.width), max(1.0, share * outer.height))
    canvas = outer.convert("RGB")
    x, y = (canvas.width - small.width) // 2, (canvas.height - small.height) // 2
    canvas.paste(small, (x, y))
    whole = (0, 0, canvas.width, canvas.height)
    return Composite(canvas, ((x, y, x + small.width, y + small.height),), (whole,))


def cells(size: tuple[int, int], rows: int, columns: int) -> tuple[Box, ...]:
    """A canvas cut evenly, row by row."""
    width, height = size
    return tuple(
        (c * width // columns, r * height // rows, (c + 1) * width // columns, (r + 1) * height // rows)
        for r in range(rows)
        for c in range(columns)
    )


def noisy(picture: Image.Image, box: Box, sigma: float, random: np.random.Generator) -> np.ndarray:
    """The picture with Gaussian noise of `sigma` (of 255) in a box, clipped and rounded: (H, W, 3) uint8."""
    array = np.array(picture)
    left, top, right, bottom = box
    region = array[top:bottom, left:right]
    noise = random.standard_normal(region.shape, np.float32) * np.float32(sigma)
    array[top:bottom, left:right] = np.rint(np.clip(region + noise, 0, 255)).astype(np.uint8)
    return array


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans out of matplotlib, laid out without libraries that one machine has and another has not."""
    import matplotlib  # here: it is slow to import, and most builders draw nothing

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
