"""The exact judge of the shapes world: reads the picture back and compares it with its caption. Needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpo.datasets.worlds.shapes import SIZE, Verdict, verify
from mmpo.judging import Blocks, Judge, JudgeResult, batches, caption_of, picture_of


def shapes(path: str | Path | None = None, device: str = "cpu") -> Judge:
    """Scores in [0, 1] with `correct` and the parts of mmpo.datasets.worlds.shapes.verify.

    Pictures of another size are resized to 64 x 64 first. path must be None, device is not used.
    Raises ValueError for a path, and on judging when a caption is not of the shapes world.
    """
    if path is not None:
        raise ValueError(f"judge shapes needs no weights, found path={str(path)!r}")

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        verdicts = [_verdict(p[0], a[0]) for p, a in batches(prompts, answers, 1)]
        names = list(verdicts[0].parts) if verdicts else []
        return JudgeResult(
            _column([v.score for v in verdicts]),
            torch.tensor([v.correct for v in verdicts], dtype=torch.bool),
            {name: _column([v.parts[name] for v in verdicts]) for name in names},
        )

    return judge


def _verdict(prompt: Blocks, answer: Blocks) -> Verdict:
    picture = picture_of(answer)
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    return verify(np.asarray(picture, np.float32) / np.float32(255), caption_of(prompt))


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
