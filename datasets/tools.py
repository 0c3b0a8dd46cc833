"""The tools that builders of pairs are given: what answers, embeds and judges, as plain callables.

A builder never loads a model. It names what it needs (`NEEDS`) and is handed callables of these shapes, so that a test
hands it a function of three lines and `mmpo pairs` a model. Every tool is a function of its arguments alone: what comes out
for one prompt does not depend on what else is in the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import numpy as np

from mmpo.pair import Block

Prompt = tuple[Block, ...]


@dataclass(frozen=True)
class Answer:
    """What a generator said.

    perplexity: exp(-mean over its tokens of log max p), from the raw logits at temperature 1; 1 for a model that was certain.
    image_mass: mean attention mass on each image of the prompt, in their order; only where attention was asked for.
    region_mass: (h, w) attention map of the prompt's single image, laid over the whole picture; only where asked for, and where
    its tokens form a grid; 0 where the model did not see it.
    image_tokens: how many tokens each of these images has; where image_mass is.
    """

    text: str
    perplexity: float | None = None
    image_mass: tuple[float, ...] | None = None
    region_mass: np.ndarray | None = None
    image_tokens: tuple[int, ...] | None = None


class Unanswerable(ValueError):
    """A prompt that a generator cannot take, such as one beyond its context. reason: what its record is counted as."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Generator(Protocol):
    """Answers prompts; `modalities/vlm_generate.py` makes one of a model's folder."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        hide_images: float = 0.0,
        prefixes: Sequence[str] | None = None,
        attention: bool = False,
        hide_seeds: Sequence[int] | None = None,
    ) -> list[Answer]:
        """One answer a prompt, each a function of its prompt and seeds. Raises Unanswerable for a prompt that it cannot take.

        temperature: 0 is greedy. hide_images: share of image keys hidden from all later tokens (BDHS: 0.99). prefixes: the
        beginnings of the answers, to be continued; they are part of the answer's text. attention: fill the masses. hide_seeds:
        draw the hidden keys by these; None: by `seeds`.
        """
        ...


class Embedder(Protocol):
    """Images or texts as vectors; `datasets/embedders/` has some."""

    def __call__(self, blocks: Sequence[Block]) -> np.ndarray:
        """(N, D) float32, each row of length 1."""
        ...


class PointJudge(Protocol):
    """Scores answers one by one."""

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str], aspect: str) -> list[float | None]:
        """One score an answer, higher is better; None where the judge's words hold no score."""
        ...


class PairJudge(Protocol):
    """Says which of two answers is better."""

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> list[Literal["first", "second"] | None]:
        """One verdict a prompt; None where the judge's words hold none."""
        ...


@dataclass(frozen=True)
class Tools:
    """What a builder was given; None is what it was not given."""

    generator: Generator | None = None
    image_embedder: Embedder | None = None
    text_embedder: Embedder | None = None
    pair_judge: PairJudge | None = None
    point_judge: PointJudge | None = None


TOOLS: tuple[str, ...] = tuple(f.name for f in fields(Tools))
