"""What a modality returns (Scores), what a loss reads (Side) and what it returns (Losses)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmpo.links import ALPHA, apply

if TYPE_CHECKING:
    from mmpo.kernels.token_stats import Head

NOTHING: frozenset[str] = frozenset()


@dataclass
class States:
    """What exact divergences between two models are computed from.

    hidden: (B, U, D) final hidden states, after the last norm, each the one that predicts its unit. head: what makes logits
    of them.
    """

    hidden: Tensor
    head: Head


@dataclass
class Scores:
    """Likelihoods of one branch under one model.

    logp: (B, U) fp32 nats, additive over units. For denoisers a surrogate: -(T/2) w(t) err, T = 1000.
    mask: (B, U) bool, the units that count; an all-false row is a side this pair does not have.
    extras: further (B, U) or (B,) tensors a loss may ask for by name in its NEEDS, e.g. `err`, the mean squared
        error of a denoiser in its native target; or `kl_ref` = KL(ref || policy), `kl_policy` = KL(policy || ref) and
        `entropy`, in nats per token, with gradient.
    weights: (B, U) fp32, >= 0, what the row's spans say each unit counts; None where every unit counts 1.
    states: only where they were asked for.
    """

    logp: Tensor
    mask: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    states: States | None = None


@dataclass
class Side:
    """One branch, reduced over its units: what a loss reads. All tensors (B,) fp32 on the model's device.

    logp: log-likelihood under the policy, with gradient. ref: under the reference, detached; None without a reference.
    length: number of units counted, each by its weight. present: false where the pair has no such side.
    weight, margin, label: the row's own (see `Pair`); for an unpaired loss `label` is the probability that this side is
    desirable. score: a judge's score of this side, NaN where there is none. extras: what the loss NEEDS of `Scores.extras`,
    reduced as logp is: sums over units unless the term says otherwise; divided by `units` they are means.
    """

    logp: Tensor
    ref: Tensor | None
    length: Tensor
    present: Tensor
    weight: Tensor
    margin: Tensor
    label: Tensor
    score: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    link: str = "reverse_kl"
    link_alpha: float = ALPHA

    @property
    def reference(self) -> Tensor:
        """log ref(y|x), (B,) nats. Raises ValueError where there is no reference."""
        if self.ref is None:
            raise ValueError("this loss compares with a reference, but the reference is 'none': set reference.kind, e.g. start")
        return self.ref

    @property
    def log_ratio(self) -> Tensor:
        """log pi(y|x) - log ref(y|x), (B,) nats."""
        return self.logp - self.reference

    @property
    def ratio(self) -> Tensor:
        """The log-ratio through the objective's link (the identity for reverse KL), (B,)."""
        return apply(self.link, self.log_ratio, self.link_alpha)

    @property
    def units(self) -> Tensor:
        """What means divide by: the length, or 1 where nothing is counted, (B,)."""
        return torch.where(self.length > 0, self.length, 1)

    @property
    def mean_ratio(self) -> Tensor:
        """The ratio per counted unit, (B,)."""
        return self.ratio / self.units

    @property
    def mean_logp(self) -> Tensor:
        """log-likelihood per counted unit, (B,)."""
        return self.logp / self.units


@dataclass
class Losses:
    """Per-pair results of one loss. loss: (B,), with gradient; rewards: detached (B,), for the log (TRL's names).

    state: what a loss with a STATE wants to remember once the step is taken, scalars by name.
    """

    loss: Tensor
    chosen_reward: Tensor | None = None
    rejected_reward: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def side(logp: Tensor, ref: Tensor | None = None, length: Tensor | None = None, **row: Tensor) -> Side:
    """A Side from bare numbers, with neutral defaults for everything else: for tests and for use as a library."""
    one = torch.ones_like(logp.detach())
    defaults = {"weight": one, "margin": 0 * one, "label": one, "score": torch.nan * one}
    extras = {k: v for k, v in row.items() if k not in defaults}
    given = {k: row.get(k, v) for k, v in defaults.items()}
    count = one if length is None else length
    return Side(logp, ref, count, one.bool(), extras=extras, **given)  # type: ignore[arg-type]  # link stays a string
