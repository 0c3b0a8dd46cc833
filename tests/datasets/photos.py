"""Real photographs as a source of pairs, and a generator that is no model: for tests and measurements of builders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mmpo import media
from mmpo.datasets.tools import Answer, Prompt


@cache
def photos() -> dict[str, np.ndarray]:
    """Photographs out of scikit-image and scikit-learn, (H, W, 3) uint8, of different sizes and shapes."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    samples = load_sample_images()
    return found | {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}


def crops(count: int, side: int = 96, seed: int = 0) -> list[np.ndarray]:
    """Different crops of the photographs, of many shapes, (H, W, 3) uint8 each."""
    random, whole, made = np.random.default_rng(seed), list(photos().values()), []
    for i in range(count):
        picture = whole[i % len(whole)]
        height, width = (int(n) for n in random.integers(side // 2, side, 2))
        top, left = int(random.integers(picture.shape[0] - height)), int(random.integers(picture.shape[1] - width))
        made.append(picture[top : top + height, left : left + width].copy())
    return made


def write_llava(folder: Path, pictures: Sequence[np.ndarray], subset: str = "photos") -> Path:
    """LLaVA conversations about pictures, one each, as a JSON file with PNG files beside it; returns the file."""
    (folder / subset).mkdir(parents=True)
    rows = []
    for i, picture in enumerate(pictures):
        name = f"{subset}/{i:05}.png"
        (folder / name).write_bytes(media.encode(picture, compress_level=1))
        asked = {"from": "human", "value": f"<image>\nWhat is in photo {i}?"}
        rows.append({"id": f"q{i}", "image": name, "conversations": [asked, {"from": "gpt", "value": f"This is photo {i}."}]})
    file = folder / "questions.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


class Guess:
    """Answers with a few letters that follow from prompt and seed; looks at all images alike, or only at number `sees`."""

    def __init__(self, sees: int | None = None, side: int = 24) -> None:
        self.sees, self.side = sees, side

    def __call__(self, prompts: Sequence[Prompt], seeds: Sequence[int], **options: Any) -> list[Answer]:
        return [self._answer(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _answer(self, prompt: Prompt, seed: int) -> Answer:
        said = hashlib.sha256("".join(b.digest for b in prompt).encode() + str(seed).encode()).hexdigest()[:8]
        images = sum(block.kind == "image" for block in prompt)
        mass = tuple(1.0 if self.sees in (None, i) else 0.01 for i in range(images))
        region = np.ones((self.side, self.side)) if images == 1 else None
        return Answer(f"It may be {said}.", perplexity=1.5, image_mass=mass, region_mass=region)


def guess(path: Path | None = None, device: str = "cpu") -> Guess:
    """As a plugin: `--generator tests.datasets.photos:guess --plugin tests.datasets.photos`."""
    return Guess()


def outdated(path: Path | None = None, device: str = "cpu") -> Any:
    """A generator of a plugin that does not take all that builders say."""

    def answer(
        prompts: Sequence[Prompt], seeds: Sequence[int], *, max_new_tokens: int = 8, temperature: float = 0.0
    ) -> list[Answer]:
        raise AssertionError("called in spite of it")

    return answer


def curious(tools: Any, *, pool: Any = None) -> list[Any]:
    """A builder that looks at its tools before the first record."""
    return [tools.generator.side, *pool]
