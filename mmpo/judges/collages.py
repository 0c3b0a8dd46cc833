"""The exact judge of the collages world: right, or another image's digit, or neither. Needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mmpo.datasets.worlds.collages import Verdict, verify
from mmpo.judging import Blocks, Judge, JudgeResult, batches, caption_of, words_of


def collages(path: str | Path | None = None, device: str = "cpu") -> Judge:
    """Scores 1 for the right digit and 0 for anything else, which `correct` says as well. device is not used.

    rates: `wrong_image`, the answers that are wrong and name the digit of another image or panel. Raises ValueError for a
    path, and on judging when a prompt is not of the collages world or an answer is not text.
    """
    if path is not None:
        raise ValueError(f"judge collages needs no weights, found path={str(path)!r}")

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        verdicts = [_verdict(p[0], a[0]) for p, a in batches(prompts, answers, 1)]
        correct = torch.tensor([v.correct for v in verdicts], dtype=torch.bool)
        wrong_image = torch.tensor([v.wrong_image for v in verdicts], dtype=torch.bool)
        return JudgeResult(correct.double(), correct, rates={"wrong_image": wrong_image})

    return judge


def _verdict(prompt: Blocks, answer: Blocks) -> Verdict:
    said = words_of(answer)
    caption_of(prompt)  # refuses a prompt without text in the words of all judges
    return verify(prompt, said)
