"""What a percentile bootstrap cannot tell: units that all agree have no spread to draw again."""

from __future__ import annotations


def unanimous(value: float, units: int, level: float = 0.95) -> tuple[float, float]:
    """The bounds of a mean in [0, 1] of `units` independent units that all have the same value.

    An outcome that `units` draws did not show has at most probability u = 1 - ((1 - level) / 2) ** (1 / units), at that level;
    the bounds are what the mean would be if such outcomes, all zeros or all ones, were that frequent. For a value of 0 or 1
    it is the exact interval of Clopper and Pearson 1934, Biometrika 26.
    """
    unseen = 1 - ((1 - level) / 2) ** (1 / units)
    return value * (1 - unseen), value + (1 - value) * unseen
