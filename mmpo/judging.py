"""Judges: what they are given, what they return, and how they read a prompt and an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from mmpo.media import open_image
from mmpo.pair import Block

Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class JudgeResult:
    """scores: (N,) float64 on the CPU, higher is better. correct: (N,) bool, only from judges that know the truth.

    parts: (N,) float64 each, what the score is made of, by name. rates: (N,) bool each, what else is true of the answers,
    by name; their means are logged and reported beside the score.
    """

    scores: Tensor
    correct: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    rates: dict[str, Tensor] = field(default_factory=dict)


class Judge(Protocol):
    """Scores answers to prompts. Deterministic, without gradient, and each row on its own: batching changes nothing.

    A judge is a file of mmpo/judges, made by the function of the file's name: `name(path=None, device="cpu", **options)`.
    """

    def __call__(self, prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult: ...


def caption_of(prompt: Blocks) -> str:
    """The prompt's text. Raises ValueError when it has none."""
    words = " ".join(str(block.data) for block in prompt if block.kind == "text")
    if not words.strip():
        raise ValueError(f"a judge needs a prompt with text, found {[b.kind for b in prompt] or 'nothing'}")
    return words


def words_of(answer: Blocks) -> str:
    """The answer's text, which may be empty. Raises ValueError when it is not text only."""
    if not answer or any(block.kind != "text" for block in answer):
        raise ValueError(f"a judge of text needs an answer of text, found {[b.kind for b in answer] or 'nothing'}")
    return " ".join(str(block.data) for block in answer)


def picture_of(answer: Blocks) -> Image.Image:
    """The answer's only image, upright RGB. Raises ValueError when it has none or several."""
    images = [block for block in answer if block.kind == "image"]
    if len(images) != 1:
        raise ValueError(f"an image judge needs an answer with one image, found {[b.kind for b in answer] or 'nothing'}")
    return open_image(images[0])


def score_in_batches(
    score: Callable[[list[str], list[Image.Image]], Tensor],
    prompts: Sequence[Blocks],
    answers: Sequence[Blocks],
    size: int,
) -> Tensor:
    """All scores, (N,) float64 on the CPU, from a function of at most `size` captions and pictures at once."""
    with torch.inference_mode():
        parts = [score([caption_of(p) for p in ps], [picture_of(a) for a in xs]) for ps, xs in batches(prompts, answers, size)]
    scores = torch.cat([part.double().cpu() for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
    if not scores.isfinite().all():
        raise ValueError(
            f"the judge gave a score that is not finite at row {int((~scores.isfinite()).nonzero()[0])}: check its weights"
        )
    return scores.clone()  # out of inference mode, so that callers may use it as any tensor


def batches(
    prompts: Sequence[Blocks], answers: Sequence[Blocks], size: int
) -> Iterator[tuple[Sequence[Blocks], Sequence[Blocks]]]:
    """Slices of at most `size` rows. Raises ValueError when there are more prompts than answers or fewer."""
    if len(prompts) != len(answers):
        raise ValueError(f"expected one answer per prompt, found {len(prompts)} prompts and {len(answers)} answers")
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size], answers[start : start + size]


def existing(path: str | Path | None, judge: str, expected: str, setting: str = "path", kind: str = "judge") -> Path:
    """The local weights of a judge. Raises ValueError that says what belongs there when they are not given or missing.

    setting: the judge's argument that names them; those of `path` can be downloaded as well. kind: what is no judge.
    """
    if path is None:
        advice = ", or allow_download=true" if setting == "path" else ""
        raise ValueError(f"{kind} {judge}: no weights; set {setting} to {expected}{advice}")
    if not Path(path).exists():
        raise ValueError(f"{kind} {judge}: {path} does not exist; expected {expected}")
    return Path(path)
