"""Small pools of answers to vote on, made for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmpo import media
from mmpo.demos.pool import Pool, entry_of
from mmpo.pair import text


def text_pool(items: int = 6, systems: Sequence[str] = ("base", "aligned")) -> Pool:
    """Each system's answer to each prompt; no two are the same."""
    asked = [(str(i), system) for i in range(items) for system in systems]
    entries = [entry_of(i, system, (text(f"Question {i}?"),), text(f"Answer {i}{system[:1]}."), int(i)) for i, system in asked]
    return Pool(Path("/nowhere"), tuple(entries))


def doubled_pool(items: int = 4) -> Pool:
    """Two different answers of each of two systems to each prompt."""
    asked = [(str(i), system, take) for i in range(items) for system in ("base", "aligned") for take in (0, 1)]
    entries = [entry_of(i, system, (text(f"Question {i}?"),), text(f"{i} {system} {take}"), take) for i, system, take in asked]
    return Pool(Path("/nowhere"), tuple(entries))


def picture(seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def picture_folder(root: Path, items: int = 6, systems: Sequence[str] = ("base", "aligned")) -> Path:
    """root/<system>/<item>.png, with prompts.jsonl beside them."""
    for k, system in enumerate(systems):
        (root / system).mkdir(parents=True, exist_ok=True)
        for i in range(items):
            (root / system / f"{i:03d}.png").write_bytes(media.encode(picture(1000 * k + i)))
    lines = [f'{{"item": "{i:03d}", "prompt": "picture {i}", "seed": {70 + i}}}\n' for i in range(items)]
    (root / "prompts.jsonl").write_text("".join(lines))
    return root
