"""Filters of pairs of answers by their wording: bounding boxes, lengths, edit distance."""

from __future__ import annotations

import re

NUMBER = r"-?(?:\d*\.?\d+|\d+\.)"
BOUNDING_BOX = re.compile(rf"[\[(]\s*{NUMBER}(\s*,\s*{NUMBER}){{3}}\s*[\])]")


def holds_box(answer: str) -> bool:
    """Whether an answer holds the coordinates of a box, which lose their meaning when the image moves: [0.1, 0.2, 0.5, 0.9]."""
    return bool(BOUNDING_BOX.search(answer))


def length_ratio(first: str, second: str) -> float:
    """Characters of the longer text over those of the shorter one, at least 1; infinite when one is empty."""
    short, long = sorted((len(first), len(second)))
    return long / short if short else float("inf") if long else 1.0


def edit_distance(first: str, second: str) -> float:
    """Levenshtein's distance over the length of the longer text: 0 for equal texts, 1 when nothing stays in place."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1] / max(len(first), len(second), 1)
