"""The seam: what every modality's adapter offers to the core. encode -> draw -> score, and sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from mmpo.pair import Block, Pair
from mmpo.scores import NOTHING, Scores

if TYPE_CHECKING:
    from mmpo.evaluate import Samples
    from mmpo.kernels.token_stats import Head
    from mmpo.reference import Reference


@dataclass(frozen=True)
class DrawKey:
    """Names one draw. All its randomness is a pure function of these three, on every machine and worker count."""

    seed: int
    sample: str
    index: int


@dataclass(frozen=True)
class Step:
    """How far samples are: `done` steps of at most `of`. texts: what has been written so far, by the number of the prompt."""

    done: int
    of: int
    texts: Mapping[int, str]


Watch = Callable[[Step], None]


class Modality(Protocol):
    """An adapter. `model` is the module that trains; everything frozen (VAE, text encoders) stays inside the adapter."""

    PROVIDES: frozenset[str]  # extras of Scores it can compute, beyond logp
    branches: tuple[str, ...]  # the branches it scores in one call
    takes_further: bool  # whether those may be more than chosen and rejected: branches that the data bring, e.g. chosen@crop
    model: nn.Module
    device: torch.device
    embedded_data: Path  # candidates of the modality's own small world, its judge, and whether this is it
    embedded_judge: str
    is_embedded: bool
    starts_from_adapter: bool  # the start of the run already carries a trained adapter
    weights: dict[str, str]  # digests of all that was loaded, by part: a run that goes on has to find the same

    def admit(self, pairs: Sequence[Pair]) -> tuple[list[Pair], Mapping[str, int]]:
        """The pairs it can score within its limits, and how many were left out or changed for their sake, by reason."""

    def plan(self, pairs: Sequence[Pair], batch_size: int, reference: bool, shards: int = 1) -> str:
        """Settle how a step of so many of these pairs is run, where there is a choice; says what it will cost, or nothing.

        reference: whether a step runs the reference model. shards: processes that will share the parameters.
        """

    def encode(self, pairs: Sequence[Pair]) -> list[Any]:
        """Run the frozen encoders: no gradient, cached by content digest, one result per pair."""

    def draw(self, encoded: Sequence[Any], keys: Sequence[DrawKey], model: nn.Module) -> Any:
        """The only place where randomness enters. Returns a batch: all inputs of the model and its targets.

        model: only read by draws that depend on it (inversion); under no_grad.
        """

    def score(
        self, model: nn.Module, batch: Any, wants: frozenset[str] = NOTHING, against: Mapping[str, Scores] | None = None
    ) -> dict[str, Scores]:
        """Likelihood of every branch, by one model call. Pure: the same parameters and batch give the same scores.

        wants: what is asked for beyond logp, of PROVIDES, and "states" where those come from hidden states; a modality may
        give more. against: the reference's scores of this batch, with states, for divergences from it.
        """

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[Block, ...]],
        seeds: Sequence[int],
        watch: Watch | None = None,
        steps: int | None = None,
    ) -> list[Block]:
        """One generation per prompt, each a pure function of the parameters, the prompt and its seed.

        watch: called after every step; what it raises ends the sampling. steps: at most so many, never more than the recipe's.
        """

    def dummy(self) -> list[Pair]:
        """Two tiny valid pairs, for tests, warm-up and compilation."""

    def describe(self, beta: float) -> str:
        """What beta means here in one line, e.g. the coefficient on the mean squared error margin."""

    def save(self, model: nn.Module, folder: Path, merge: bool = False) -> None:
        """Write the trained weights in the format the model's own library loads."""

    def check_export(self, model: nn.Module, folder: Path, merge: bool = False) -> tuple[float, float, float]:
        """Reload an export by that library: largest difference from the policy, from the base, and the output's size."""

    def how_to_load(self, folder: Path, merge: bool = False) -> str:
        """The lines of Python that load an export by that library, printed beneath it."""

    def write_samples(self, folder: Path, prompts: Sequence[tuple[Block, ...]], base: Samples, aligned: Samples) -> None:
        """Files and one picture that a person can look at: base beside aligned.

        A file for each sample is called by its number, from 0 on: the prompt and the seed of a sample are found by it.
        """

    def load_reference(self, path: str) -> nn.Module:
        """Another model of the same architecture, for reference.kind: path."""


class GivesStates(Modality, Protocol):
    """A modality that provides divergences: its scores have states where they are asked for."""

    def head(self, model: nn.Module) -> Head:
        """The layer that makes logits of `Scores.states`."""


@dataclass(frozen=True)
class LogRatios:
    """Where a model finds an answer more likely (> 0) than its base does, in nats.

    total: the difference of what `score` gives of the answer, a mean over draws; what follows adds up or averages to it.
    tokens: start, end (excluded) and value of every scored token, its characters in the answer's text, or -1, -1 for one that
    spells none, such as the end of a turn. regions: (h, w) float64, the parts of the latent, or of the picture, that add up to
    the total. times: place on the noise schedule in [0, 1) and value of every draw, whose mean is the total.
    """

    total: float
    tokens: tuple[tuple[int, int, float], ...] = ()
    regions: np.ndarray | None = None
    times: tuple[tuple[float, float], ...] = ()


class Explains(Modality, Protocol):
    """A modality that tells where in an answer its likelihood has moved."""

    def log_ratios(self, model: nn.Module, base: Reference, prompt: tuple[Block, ...], answer: Block, seed: int) -> LogRatios:
        """The answer under `model` against `base`. Raises ValueError for an answer that has no likelihood."""
