"""The exact judge of the sums world: right or wrong, with no credit for nearly right. Needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mmpo.datasets.worlds.sums import verify
from mmpo.judging import Blocks, Judge, JudgeResult, batches, caption_of, words_of


def sums(path: str | Path | None = None, device: str = "cpu") -> Judge:
    """Scores 1 for the exact sum and 0 for anything else, which `correct` says as well. device is not used.

    Raises ValueError for a path, and on judging when a prompt is not of the sums world or an answer is not text.
    """
    if path is not None:
        raise ValueError(f"judge sums needs no weights, found path={str(path)!r}")

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        right = [verify(caption_of(p[0]), words_of(a[0])) for p, a in batches(prompts, answers, 1)]
        correct = torch.tensor(right, dtype=torch.bool)
        return JudgeResult(correct.double(), correct)

    return judge
