"""Texts as vectors of their runs of letters, without any network: near copies are near, and meaning is not looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmpo.datasets.tools import Embedder
from mmpo.pair import Block

SIZE = 1024  # dimensions, into which runs are hashed


def letters(path: str | Path | None = None, device: str = "cpu", *, longest: int = 3) -> Embedder:
    """Counts of all runs of up to `longest` characters, hashed, as a vector of length 1. device is not used.

    Raises ValueError for a path, and for a block that is not text.
    """
    if path is not None:
        raise ValueError(f"embedder letters needs no weights, found path={str(path)!r}")

    def embed(blocks: Sequence[Block]) -> np.ndarray:
        if strangers := {b.kind for b in blocks} - {"text"}:
            raise ValueError(f"embedder letters: expected texts, found {', '.join(sorted(strangers))}")
        counts = np.zeros((len(blocks), SIZE), np.float32)
        for row, block in zip(counts, blocks, strict=True):
            for run in _runs(str(block.data), longest):
                row[int.from_bytes(hashlib.sha256(run.encode()).digest()[:4], "big") % SIZE] += 1
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    return embed


def _runs(words: str, longest: int) -> list[str]:
    framed = f"\0{words}\0"  # so that the empty text has a run, too
    return [framed[i : i + n] for n in range(1, longest + 1) for i in range(len(framed) - n + 1)]
