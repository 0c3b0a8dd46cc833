"""Log-ratios drawn for people: words by how their likelihood moved, a map over a picture, a strip over the noise schedule.

Blue is more likely than under the base, orange less; both are told apart by readers who do not see red and green as two
colours, and the numbers are beside them in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mmpo import media

MORE, LESS = (37, 99, 235), (217, 119, 6)  # blue, orange
COLOURS = {  # which Gradio lays half transparent on light and dark: the text on them keeps a contrast of 4.5
    "much less likely": "#c2560a",
    "less likely": "#d9a441",
    "more likely": "#7aa5e8",
    "much more likely": "#2563eb",
}
SMALL, LARGE = 0.25, 2.0  # nats: below, a token is as likely as it was; from here on it is much more or less likely
LEGEND: Mapping[str, str] = {
    "text": "Colours say how the aligned model's likelihood of each token differs from its base's: **blue** tokens became "
    "more likely, **orange** ones less; strong colours are beyond 2 nats (a factor of 7), none is below a quarter of a nat.",
    "image": "The map says where the aligned model predicts this picture better than its base does: **blue** regions became "
    "more likely, **orange** ones less; all pictures of a run of this page share one scale. The strip below it says when: from "
    "nearly clean (left) to nearly noise (right), bars up are more likely, bars down less.",
}
BINS = 10  # of the noise schedule
LARGEST = 512  # pixels of a map's longer side


def label(value: float) -> str | None:
    """In words, what a token's log-ratio in nats is: one of COLOURS, or None for one that is as likely as it was."""
    if abs(value) < SMALL:
        return None
    return f"{'much ' if abs(value) >= LARGE else ''}{'more' if value > 0 else 'less'} likely"


def spans(words: str, tokens: Sequence[tuple[int, int, float]]) -> list[tuple[str, str | None]]:
    """The text in pieces, each with its label; what no token spells has none. Tokens that share a character count together.

    tokens: start, end and nats, as `LogRatios.tokens`; -1, -1 spells nothing.
    """
    found: list[tuple[int, int, float]] = []
    for start, end, value in sorted(t for t in tokens if 0 <= t[0] < t[1] <= len(words)):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]), found[-1][2] + value)
        else:
            found.append((start, end, value))
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for start, end, value in found:
        if start > at:
            pieces.append((words[at:start], None))
        pieces.append((words[start:end], label(value)))
        at = end
    return [*pieces, (words[at:], None)] if at < len(words) else pieces


def scale_of(maps: Sequence[np.ndarray]) -> float:
    """What full colour means on maps that are shown together: nearly their largest value, so that one spot hides no others."""
    values = np.abs(np.concatenate([m.ravel() for m in maps])) if maps else np.zeros(1)
    return float(np.quantile(values, 0.98)) or float(values.max()) or 1.0


def overlay(picture: np.ndarray, regions: np.ndarray, scale: float) -> bytes:
    """PNG of the picture in grey with its regions in colour. picture: (H, W, 3) uint8; regions: (h, w) nats; scale: as full."""
    size = _shown(picture.shape[1], picture.shape[0])
    grey = np.asarray(Image.fromarray(picture).convert("L").resize(size, Image.Resampling.BICUBIC), np.float64)[..., None]
    places = Image.fromarray(np.clip(regions / scale, -1, 1).astype(np.float32), "F")
    share = np.asarray(places.resize(size, Image.Resampling.BILINEAR), np.float64)[..., None]
    colour = np.where(share > 0, np.array(MORE, np.float64), np.array(LESS, np.float64))
    strength = 0.85 * np.abs(share)
    paper = 110 + 0.5 * grey  # pale, so that both colours stand out of it
    return media.encode((paper * (1 - strength) + colour * strength).clip(0, 255).round().astype(np.uint8))


def _shown(width: int, height: int) -> tuple[int, int]:
    """A small picture is made larger by a whole number, so that its regions can be seen; a large one smaller."""
    longer = max(width, height)
    factor = LARGEST // longer if longer <= LARGEST else LARGEST / longer
    return max(1, round(width * factor)), max(1, round(height * factor))


def by_time(times: Sequence[tuple[float, float]]) -> list[float | None]:
    """Mean nats in each of BINS parts of the noise schedule; None where no draw fell."""
    found: list[list[float]] = [[] for _ in range(BINS)]
    for place, value in times:
        found[min(int(place * BINS), BINS - 1)].append(value)
    return [sum(values) / len(values) if values else None for values in found]


def strip(bars: Sequence[float | None], scale: float) -> bytes:
    """SVG of bars over the noise schedule, up for more likely, down for less. scale: nats of the longest."""
    width, half = 24, 28
    shapes = []
    for i, value in enumerate(bars):
        if value is None:
            continue
        height = min(abs(value) / scale, 1.0) * half
        colour = MORE if value > 0 else LESS
        top = half - height if value > 0 else half
        shapes.append(f'<rect x="{i * width + 2}" y="{top:.2f}" width="{width - 4}" height="{height:.2f}" fill="rgb{colour}"/>')
    long = width * len(bars)
    line = f'<path d="M0 {half}H{long}" stroke="#7a8699" stroke-width="1"/>'
    box = f'viewBox="0 0 {long} {2 * half}" width="{long}" height="{2 * half}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(shapes)}{line}</svg>'.encode()
