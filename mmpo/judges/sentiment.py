"""How positive a text is, by VADER's lexicon and rules. Needs no weights, but the package vaderSentiment (extra sentiment)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from mmpo.errors import MissingExtra
from mmpo.judging import Blocks, Judge, JudgeResult, batches, caption_of, words_of


def sentiment(path: str | Path | None = None, device: str = "cpu") -> Judge:
    """VADER's compound score of the answer alone (Hutto and Gilbert 2014), -1 to 1. device is not used.

    Raises ValueError for a path, and on judging when an answer is not text.
    """
    if path is not None:
        raise ValueError(f"judge sentiment needs no weights, found path={str(path)!r}")
    if importlib.util.find_spec("vaderSentiment") is None:
        raise MissingExtra("vaderSentiment", "sentiment")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        asked = [(caption_of(p[0]), words_of(a[0])) for p, a in batches(prompts, answers, 1)]
        scores = [float(analyzer.polarity_scores(said)["compound"]) for _, said in asked]
        return JudgeResult(torch.tensor(scores, dtype=torch.float64))

    return judge
