"""Folders of ready-made samples, one folder a system, as the pages read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmpo.datasets.worlds import shapes


def picture_samples(root: Path, count: int = 3, systems: tuple[str, ...] = ("base", "aligned")) -> Path:
    """Drawings of the shapes world, another one for each system; prompts.jsonl has their captions."""
    rng, captions = np.random.default_rng(0), shapes.captions()
    items = [(f"item{i}", captions[40 * i]) for i in range(count)]
    for system in systems:
        (root / system).mkdir(parents=True)
        for name, caption in items:
            picture = Image.fromarray((shapes.render(caption, rng) * 255).astype(np.uint8))
            picture.resize((256, 256), Image.Resampling.NEAREST).save(root / system / f"{name}.png")
    write_prompts(root, items)
    return root


def text_samples(root: Path, items: list[tuple[str, str, dict[str, str]]]) -> Path:
    """items: file stem, prompt, and the answer of each system."""
    for name, _, answers in items:
        for system, answer in answers.items():
            (root / system).mkdir(parents=True, exist_ok=True)
            (root / system / f"{name}.txt").write_text(answer, encoding="utf-8")
    write_prompts(root, [(name, prompt) for name, prompt, _ in items])
    return root


def write_prompts(root: Path, items: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"item": name, "prompt": prompt}) for name, prompt in items]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
