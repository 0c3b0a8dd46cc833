"""Pictures that are one colour, and tools that know nothing else: what builders are tested with where no model is needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ImageColor

from mmpo import media
from mmpo.datasets.stages import Record
from mmpo.datasets.tools import Answer, Prompt
from mmpo.pair import Block, image, text


def picture(colour: str, size: tuple[int, int] = (8, 6), shade: int = 0) -> Block:
    """A PNG of one colour; `shade` makes another file of nearly the same."""
    rgb = np.clip(np.array(ImageColor.getrgb(colour)) + shade, 0, 255).astype(np.uint8)
    return image(media.encode(np.full((size[1], size[0], 3), rgb, np.uint8)))


def record(id: str, colour: str, answer: str | None, question: str = "What is it?") -> Record:
    return Record(id, (picture(colour), text(question)), answer)


def by_colour(blocks: Sequence[Block]) -> np.ndarray:
    """Image embedder: the mean colour, as a direction."""
    found = np.array([media.pixels(b).reshape(-1, 3).mean(0) + 1 for b in blocks])
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


def by_words(blocks: Sequence[Block]) -> np.ndarray:
    """Text embedder: how often each word occurs, as a direction; the cosine of equal texts is 1."""
    counts = [re.findall(r"\w+", str(b.data).lower()) or [""] for b in blocks]
    words = sorted({w for count in counts for w in count})
    found = np.array([[count.count(w) for w in words] for count in counts], np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


class Scripted:
    """A generator that answers by a function of (prompt, seed, prefix) and remembers what it was asked."""

    def __init__(self, say: Any) -> None:
        self.say = say
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, prefixes: Sequence[str] | None = None, **options: Any
    ) -> list[Answer]:
        self.calls.append({"prompts": list(prompts), "seeds": list(seeds), "prefixes": prefixes, **options})
        begun = prefixes if prefixes is not None else [""] * len(prompts)
        return [Answer(p + self.say(prompt, seed, p)) for prompt, seed, p in zip(prompts, seeds, begun, strict=True)]
