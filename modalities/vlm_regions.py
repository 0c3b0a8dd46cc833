"""Where in a picture an image's tokens look: maps of one number per token, laid over the picture that was asked about.

A tower sees a picture squeezed to its own size, with its sides cut off, or padded to a square; some see it in tiles and once as
a whole, and then the view of the whole is what is laid over the picture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]  # left, top, right, bottom
WHOLE = {  # where the view of the whole picture is among an image's tokens, by model type; there is one view only, where None
    "llava": None, "llava_onevision": "first", "gemma3": "first", "internvl": "last", "idefics3": "last", "smolvlm": "last",
}  # fmt: skip
VIEW = ("num_image_tokens", "image_seq_length", "image_seq_len")  # what processors call the number of a view's tokens
FINE = 4  # cells per token and side of a map that had to be moved: a cell at an edge belongs to two tokens


def over_picture(
    weights: np.ndarray, processor: Any, model_type: str, size: tuple[int, int], grid: tuple[int, int, int] | None = None
) -> np.ndarray | None:
    """Weights of one image's tokens (k,), as a map (h, w) over the whole picture; None where its tokens form no known grid.

    What the tower saw beside the picture, its padding, is left out; where it did not see the picture there is zero.
    processor: of a model of `model_type`. size: width and height of the picture. grid: of its patches, before they are merged
    (time, rows, columns), where the processor tells it.
    """
    laid = _laid(np.asarray(weights), processor, model_type, grid)
    if laid is None:
        return None
    box = seen(processor.image_processor, *size) if model_type == "llava" else (0, 0, *size)
    if np.allclose(box, (0, 0, *size)):
        return laid
    down = _shares(laid.shape[0], box[1], box[3], size[1])
    across = _shares(laid.shape[1], box[0], box[2], size[0])
    return down @ laid @ across.T


def seen(images: Any, width: int, height: int) -> Box:
    """What a CLIP processor shows of a picture, in the picture's pixels; beyond its edges where it is padded."""
    wide, high = (max(width, height),) * 2 if getattr(images, "do_pad", False) else (width, height)
    if images.do_center_crop:
        edge, least = images.size.get("shortest_edge") if images.do_resize else min(wide, high), min(wide, high)
        across, down = images.crop_size["width"], images.crop_size["height"]
        if edge:
            wide, high = across * least / edge, down * least / edge
        else:  # squeezed to the size it has in each direction
            wide, high = across * wide / images.size["width"], down * high / images.size["height"]
    return (width - wide) / 2, (height - high) / 2, (width + wide) / 2, (height + high) / 2


def _laid(weights: np.ndarray, processor: Any, model_type: str, grid: tuple[int, int, int] | None) -> np.ndarray | None:
    """The weights of the whole picture's view, in rows and columns."""
    if grid is not None:
        merge = processor.image_processor.merge_size
        return weights.reshape(grid[1] // merge, grid[2] // merge) if grid[0] == 1 else None
    if model_type not in WHOLE:
        return None
    counts = [getattr(processor, name) for name in VIEW if getattr(processor, name, None)]
    count = counts[0] if counts and WHOLE[model_type] else len(weights)
    side = math.isqrt(count)
    if side * side != count:
        return None
    return (weights[-count:] if WHOLE[model_type] == "last" else weights[:count]).reshape(side, side)


def _shares(tokens: int, start: float, end: float, length: float) -> np.ndarray:
    """How much of each token lies in each of the equal parts of 0 to `length`, where the tokens divide start to end."""
    parts = FINE * max(1, round(tokens * length / (end - start)))
    edges = (np.linspace(0, length, parts + 1) - start) / (end - start) * tokens
    own = np.arange(tokens)
    return np.clip(np.minimum(edges[1:, None], own + 1) - np.maximum(edges[:-1, None], own), 0, None)
