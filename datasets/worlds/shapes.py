"""A small captioned world of coloured shapes, with an exact verifier: what the embedded diffusion default trains on.

A caption names objects, their colours, their number and where they stand:

    a red circle left of a blue square        a green cross above a purple triangle        three yellow squares

`render` draws a caption (pixels from signed distances, so anti-aliased and resolution-free), `verify` reads a picture
back: it segments the palette's colours, takes connected components, compares each with the four shapes' templates and
checks count and position. The score is 1 for a perfect picture and changes smoothly with the pixels while the same objects
are seen in them; `correct` is the hard verdict.
Nothing here needs a network, a font or a trained model.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SIZE = 64
BACKGROUND = (0.97, 0.96, 0.94)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.15, 0.35, 0.85),
    "yellow": (0.96, 0.78, 0.10),
    "purple": (0.55, 0.20, 0.70),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis (0 x, 1 y), sign
NUMBERS = {"two": 2, "three": 3}

_PAIR = re.compile(r"an? (\w+) (\w+) (left of|right of|above|below) an? (\w+) (\w+)")
_COUNT = re.compile(r"(two|three) (\w+) (circle|square|triangle|cross)(?:es|s)")
_SINGLE = re.compile(r"an? (\w+) (\w+)")

Image = NDArray[np.float32]  # (SIZE, SIZE, 3) in [0, 1]


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: `objects` are (colour, shape); `relation` says how object 0 stands to object 1."""

    objects: tuple[tuple[str, str], ...]
    relation: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1] is the geometric mean of the smooth parts; `correct` is true when every part is right."""

    score: float
    correct: bool
    parts: dict[str, float]


def parse(caption: str) -> Scene:
    """The scene a caption describes. Raises ValueError naming the caption when it is not of this world."""
    if m := _PAIR.fullmatch(caption):
        scene = Scene(((m[1], m[2]), (m[4], m[5])), m[3])
    elif m := _COUNT.fullmatch(caption):
        scene = Scene(((m[2], m[3]),) * NUMBERS[m[1]])
    elif m := _SINGLE.fullmatch(caption):
        scene = Scene(((m[1], m[2]),))
    else:
        raise ValueError(f"not a caption of the shapes world: {caption!r} (expected e.g. 'a red circle left of a blue square')")
    for colour, shape in scene.objects:
        if colour not in COLOURS or shape not in SHAPES:
            known = f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}"
            raise ValueError(f"caption {caption!r}: unknown object '{colour} {shape}' ({known})")
    return scene


def captions() -> list[str]:
    """All 1,340 captions, in a fixed order: 1,280 relations of two colours, 40 counts, 20 single objects."""
    things = list(itertools.product(COLOURS, SHAPES))
    relations = [
        f"a {c1} {s1} {r} a {c2} {s2}"
        for (c1, s1), (c2, s2) in itertools.product(things, things)
        if c1 != c2
        for r in RELATIONS
    ]
    counts = [f"{n} {c} {_plural(s)}" for n in NUMBERS for c, s in things]
    return relations + counts + [f"a {c} {s}" for c, s in things]


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def corrupt(caption: str, rng: np.random.Generator) -> str:
    """The caption with one thing wrong (a colour, a shape, or the relation or number): what careless annotators write."""
    scene = parse(caption)
    what = rng.integers(3 if len(scene.objects) > 1 else 2)
    if what == 2 and scene.relation:
        others = [r for r in RELATIONS if r != scene.relation]
        return caption.replace(f" {scene.relation} ", f" {others[rng.integers(3)]} ")
    if what == 2:
        return caption.replace("two", "#").replace("three", "two").replace("#", "three")
    used = {c for c, _ in scene.objects}
    colour, shape = scene.objects[0 if scene.relation is None else rng.integers(2)]
    if what == 0:
        fresh = [c for c in COLOURS if c not in used]
        return caption.replace(colour, fresh[rng.integers(len(fresh))])
    fresh = [s for s in SHAPES if s != shape]
    new = fresh[rng.integers(3)]
    if scene.relation is None and len(scene.objects) > 1:
        return caption.replace(_plural(shape), _plural(new))
    return caption.replace(f"{colour} {shape}", f"{colour} {new}")


def render(caption: str, rng: np.random.Generator) -> Image:
    """Draw a caption with random sizes and places. Returns (SIZE, SIZE, 3) float32 in [0, 1]."""
    scene = parse(caption)
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUND
    for (colour, shape), (x, y) in zip(scene.objects, _places(scene, rng), strict=True):
        radius = rng.uniform(8.5, 11.5)
        cover = _cover(shape, x, y, radius)[..., None]
        image = image * (1 - cover) + np.asarray(COLOURS[colour], np.float32) * cover
    return image.astype(np.float32)


def speckle(image: Image, rng: np.random.Generator) -> Image:
    """The picture with two to four stray specks on it: the dirt of scraped pictures, whatever their captions say."""
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(5, SIZE - 5, 2)
        cover = _cover("circle", x, y, rng.uniform(2.8, 4.5))[..., None]
        colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
        image = image * (1 - cover) + np.asarray(colour, np.float32) * cover
    return image.astype(np.float32)


def _places(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    near, far = SIZE * 0.27, SIZE * 0.73
    if scene.relation:
        axis, sign = RELATIONS[scene.relation]
        along = (near, far) if sign < 0 else (far, near)
        across = rng.uniform(SIZE * 0.38, SIZE * 0.62, 2)
        both = [(a + rng.uniform(-3, 3), c) for a, c in zip(along, across, strict=True)]
        return both if axis == 0 else [(c, a) for a, c in both]
    cells = [(near, near), (far, near), (near, far), (far, far)]
    if len(scene.objects) == 1:
        return [tuple(rng.uniform(SIZE * 0.35, SIZE * 0.65, 2))]
    chosen = rng.permutation(4)[: len(scene.objects)]
    return [(cells[i][0] + rng.uniform(-3, 3), cells[i][1] + rng.uniform(-3, 3)) for i in chosen]


_GRID_Y, _GRID_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _cover(shape: str, x: float, y: float, radius: float) -> Image:
    """Share of each pixel inside the shape, (SIZE, SIZE) in [0, 1], from its signed distance in pixels."""
    dx, dy = _GRID_X - x, _GRID_Y - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - radius * 0.9
    elif shape == "triangle":  # equilateral, point up
        side = 0.866 * abs(dx) - 0.5 * dy
        distance = np.maximum(side - radius * 0.55, dy - radius * 0.8)
    else:  # a plus sign
        arm, half = radius * 1.05, radius * 0.36
        upright = np.maximum(abs(dx) - half, abs(dy) - arm)
        distance = np.minimum(upright, np.maximum(abs(dx) - arm, abs(dy) - half))
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Component:
    colour: str
    area: float
    x: float
    y: float
    shapes: dict[str, float]  # probability of each shape


def verify(image: Image, caption: str) -> Verdict:
    """Read a picture back and hold it against its caption.

    image: (SIZE, SIZE, 3) in [0, 1]. Parts, each in [0, 1]: `colour` (the wanted colours cover a plausible area),
    `shape` (probability of the wanted shape), `count` (as many objects as asked), `place` (the relation holds, in
    units of 4 px), `clean` (how close every pixel is to the palette, and nothing that was not asked for).
    """
    scene = parse(caption)
    components, purity = read(image)
    wanted: dict[str, list[str]] = {}
    for colour, shape in scene.objects:
        wanted.setdefault(colour, []).append(shape)
    parts = {"colour": 1.0, "shape": 1.0, "count": 1.0, "place": 1.0}
    found: list[Component | None] = []
    for colour, shapes in wanted.items():
        mine = sorted((c for c in components if c.colour == colour), key=lambda c: -c.area)
        area = sum(c.area for c in mine)
        parts["colour"] *= min(1.0, area / (150.0 * len(shapes))) if area else 0.0
        parts["count"] *= float(np.exp(-abs(len(mine) - len(shapes))))
        kept = mine[: len(shapes)]
        parts["shape"] *= float(np.mean([c.shapes[shapes[0]] for c in kept])) if kept else 0.0
        found.append(mine[0] if mine else None)
    if scene.relation:
        parts["place"] = _place(scene.relation, found[0], found[1])
    stray = sum(c.area for c in components if c.colour not in wanted)
    parts["clean"] = purity * float(np.exp(-stray / 100.0))
    floor = {name: max(value, 0.02) for name, value in parts.items()}
    score = float(np.exp(np.mean(np.log(list(floor.values())))))
    exact = parts["count"] > 0.99 and parts["clean"] > 0.5
    return Verdict(score, bool(exact and min(parts["colour"], parts["shape"], parts["place"]) > 0.5), parts)


def _place(relation: str, first: Component | None, second: Component | None) -> float:
    if first is None or second is None:
        return 0.0
    axis, sign = RELATIONS[relation]
    gap = (first.x - second.x) if axis == 0 else (first.y - second.y)
    other = (first.y - second.y) if axis == 0 else (first.x - second.x)
    return float(1 / (1 + np.exp(-(sign * gap - abs(other)) / 4.0)))


def read(image: Image) -> tuple[list[Component], float]:
    """All objects in a picture, and its purity: mean closeness of its pixels to the palette (1 = all on it)."""
    names = list(COLOURS)
    palette = np.array([BACKGROUND, *COLOURS.values()], np.float32)
    distance = ((image[:, :, None, :] - palette) ** 2).sum(-1)  # (SIZE, SIZE, 1 + colours)
    nearest = distance.argmin(-1)
    purity = float(np.exp(-distance.min(-1).mean() / 0.02))
    components = []
    for index, colour in enumerate(names, start=1):
        labels, number = ndimage.label(nearest == index)
        for label in range(1, number + 1):
            mask = labels == label
            if mask.sum() >= 24:  # smaller specks are anti-aliasing between two other colours
                components.append(_component(colour, mask.astype(np.float32)))
    return components, purity


def _component(colour: str, mask: Image) -> Component:
    area = float(mask.sum())
    overlaps = {}
    rows, cols = np.nonzero(mask)
    centre_x = (cols.min() + cols.max() + 1) / 2
    centre_y = (rows.min() + rows.max() + 1) / 2
    for shape in SHAPES:
        overlaps[shape] = _best_overlap(mask, shape, centre_x, centre_y, max(np.ptp(cols) + 1, np.ptp(rows) + 1) / 2)
    logits = np.array(list(overlaps.values())) / 0.06
    weights = np.exp(logits - logits.max())
    shapes = dict(zip(SHAPES, (weights / weights.sum() * max(overlaps.values())).tolist(), strict=True))
    return Component(colour, area, float(cols.mean() + 0.5), float(rows.mean() + 0.5), shapes)


# Half extent of a template of radius 1 (width and height differ only for the triangle), and its centre's offset in y.
_EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.1, "cross": 1.05}
_OFFSET = {"triangle": 0.15}


def _best_overlap(mask: Image, shape: str, x: float, y: float, half: float) -> float:
    """Intersection over union with the shape's template laid over the component's bounding box."""
    radius = half / _EXTENT[shape]
    template = _cover(shape, x, y + _OFFSET.get(shape, 0.0) * radius, radius)
    return float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
