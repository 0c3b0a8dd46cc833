"""The nouns: a Pair of answers to one prompt, made of Blocks of text or media.

Letter legend, used in every shape of this project:
    B pairs   U units of a likelihood (tokens, frames, streams; 1 for images)   N rows of one model call
    V vocabulary   D hidden size   C channels   F frames   H, W height and width   t timestep
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

Kind = Literal["text", "image", "video", "audio"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Block:
    """One piece of a prompt or an answer.

    data: text as `str`; media as encoded file `bytes`, or as an array (image (H, W, 3) uint8).
    path: where the bytes came from, kept for messages only; loading is done by the importers, under their root.
    role: who says it in a conversation ("system", "user", "assistant", "tool"); None where the data do not say.
    """

    kind: Kind
    data: str | bytes | np.ndarray
    path: str | None = None
    role: Role | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 of kind, role and content: two blocks with the same digest are the same block."""
        spoken = "" if self.role is None else f"/{self.role}"  # nothing without a role, so that such digests stay as they were
        h = hashlib.sha256(f"{self.kind}{spoken}".encode() + b"\0")
        if isinstance(self.data, str):
            h.update(self.data.encode())
        elif isinstance(self.data, bytes):
            h.update(self.data)
        else:
            h.update(f"{self.data.dtype}{self.data.shape}".encode())
            h.update(np.ascontiguousarray(self.data).tobytes())
        return h.hexdigest()


def text(value: str, role: Role | None = None) -> Block:
    return Block("text", value, role=role)


def image(value: bytes | np.ndarray, path: str | None = None) -> Block:
    return Block("image", value, path)


@dataclass(frozen=True)
class Span:
    """Characters start to end (excluded) of a response's text, and the weight of their units in its likelihood.

    Raises ValueError for an empty or negative range, and for a weight that is negative or not finite.
    """

    start: int
    end: int
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"span: expected 0 <= start < end, got start {self.start}, end {self.end}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"span: expected a finite weight >= 0, got {self.weight}")


@dataclass(frozen=True)
class Pair:
    """A preference: `chosen` is better than `rejected` as an answer to `prompt`.

    An unpaired row (KTO) has only one of the two sides; the other is the empty tuple.
    weight: multiplies the row's loss. margin: added to what the chosen side must win by, in units of reward.
    label: probability that `chosen` is really the better one (1 = certain, 0.5 = tie), read by losses with soft labels.
    scores: judge scores by side, e.g. {"chosen": 0.9, "rejected": 0.2}. group: rows of one prompt share it.
    spans: by side, ranges of the response's text that count more or less than the rest, whose characters weigh 1; a side
    with an empty tuple was looked at and counts as a whole, one that is missing was not.
    branches: further (response, condition) combinations by name, e.g. {"chosen@crop": Branch(...)}.
    """

    id: str
    prompt: tuple[Block, ...]
    chosen: tuple[Block, ...] = ()
    rejected: tuple[Block, ...] = ()
    weight: float = 1.0
    margin: float = 0.0
    label: float = 1.0
    scores: Mapping[str, float] = field(default_factory=dict)
    group: str | None = None
    branches: Mapping[str, Branch] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)

    def branch(self, name: str) -> Branch | None:
        """The named (prompt, response) combination, or None when this row has no such side."""
        if name in ("chosen", "rejected"):
            response = self.chosen if name == "chosen" else self.rejected
            return Branch(self.prompt, response) if response else None
        return self.branches.get(name)

    @property
    def caption(self) -> str:
        """The prompt's text blocks, joined."""
        return " ".join(str(b.data) for b in self.prompt if b.kind == "text")


@dataclass(frozen=True)
class Branch:
    """A response under a condition: what gets one likelihood."""

    prompt: tuple[Block, ...]
    response: tuple[Block, ...]
