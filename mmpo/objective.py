"""From scores to losses: a list of terms, each `reduce -> link -> loss` over named branches, summed with weights.

    objective:
      - {loss: dpo, beta: 5.0}                        # chosen against rejected
      - {loss: err_anchor, of: chosen, weight: 0.1}   # and the winner's own error must not grow

`reduce` makes one number of a branch's units: their sum, their mean, or LD-DPO's sum (arXiv 2409.06411), in which units
beyond the length of the shorter side count `ld_alpha`. With `weights: spans` each unit counts what the row's spans say
(Mask-DPO, arXiv 2503.02846). Both apply to policy and reference and to every extra that the loss needs.

What a loss needs (a reference, an extra of the modality) is checked against what is provided before anything loads.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmpo.find import find
from mmpo.links import ALPHA
from mmpo.pair import Pair
from mmpo.scores import NOTHING, Losses, Scores, Side

SLOTS = ("weight", "reduce", "ld_alpha", "weights", "link", "link_alpha")
POOLED = "completion"  # a loss with this role reads desirable and undesirable answers alike, as one list
DIVERGENCES = frozenset({"kl_ref", "kl_policy"})  # extras that only the hidden states of both models can give


@dataclass(frozen=True)
class Rows:
    """What the data says about each pair of a batch; tensors (B,)."""

    weight: Tensor
    margin: Tensor
    label: Tensor
    scores: Mapping[str, Tensor]  # judge scores by branch, NaN where not scored


def rows_of(pairs: Sequence[Pair], device: torch.device | str) -> Rows:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    scored = dict.fromkeys(branch for p in pairs for branch in p.scores)
    return Rows(
        column([p.weight for p in pairs]),
        column([p.margin for p in pairs]),
        column([p.label for p in pairs]),
        {branch: column([p.scores.get(branch, torch.nan) for p in pairs]) for branch in scored},
    )


@dataclass(frozen=True)
class Term:
    """One loss over branches. `of` names the branch that each of the loss's roles reads.

    needs, reads: what the loss's file declares: extras it cannot do without, and what it takes notice of, fields of the row
    and the link. over_batch: it reads statistics of the batch. state: what it remembers from step to step, and the values that
    it starts from.
    """

    name: str
    loss: Callable[..., Losses]
    roles: tuple[str, ...]
    of: tuple[str, ...]
    weight: float = 1.0
    reduce: str = "sum"
    ld_alpha: float = 0.5
    weights: str = "none"
    link: str = "reverse_kl"
    link_alpha: float = ALPHA
    needs: frozenset[str] = NOTHING
    reads: frozenset[str] = NOTHING
    over_batch: bool = False
    state: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def beta(self) -> float | None:
        """The loss's beta, per nat; None for a loss that has none, or that weighs errors by it (MaPO)."""
        return float(self.options["beta"]) if "beta" in self.options and "err" not in self.needs else None


@dataclass
class Result:
    """loss: (B,) with gradient, before the row weights. metrics: detached (B,) tensors by TRL's names.

    states: what the losses that remember want to remember, for `Objective.adopt` when the step is taken.
    terms: detached (B,) losses by term, before their weights.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    states: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


def make_term(loss: str, of: Sequence[str] | None = None, **spec: Any) -> Term:
    """A Term from a recipe's line. Raises ValueError when `of` does not fit the loss's roles."""
    function = find("losses", loss)
    roles = tuple(n for n, p in inspect.signature(function).parameters.items() if p.kind is not p.KEYWORD_ONLY)
    default = ("chosen", "rejected") if roles == (POOLED,) else roles
    branches = tuple(of) if of else default
    if roles != (POOLED,) and len(branches) != len(roles):
        raise ValueError(
            f"objective: loss {loss} reads {', '.join(roles)}; of: names {len(branches)} branches, {list(branches)}"
        )
    slots = {k: spec.pop(k) for k in SLOTS if k in spec}
    declared = vars(sys.modules[function.__module__])
    needs, reads, state = (declared.get(name, empty) for name, empty in (("NEEDS", NOTHING), ("READS", NOTHING), ("STATE", {})))
    over_batch = declared.get("BATCH_STATISTICS", False)
    return Term(
        loss, function, roles, branches, needs=needs, reads=reads, over_batch=over_batch, state=state, options=spec, **slots
    )


class Objective:
    """A weighted sum of terms. Call it with the policy's and the reference's scores."""

    def __init__(self, terms: Sequence[Term]):
        if not terms:
            raise ValueError("objective: no terms; write e.g. objective: [{loss: dpo, beta: 0.1}]")
        self.terms = tuple(terms)
        self.states = {
            f"{i}.{term.name}.{key}": torch.tensor(value) for i, term in enumerate(terms) for key, value in term.state.items()
        }

    @property
    def wants(self) -> frozenset[str]:
        """What the policy's scores have to hold beyond logp (`Modality.score`)."""
        weighted = {"weights"} if any(term.weights == "spans" for term in self.terms) else NOTHING
        return frozenset().union(weighted, *(term.needs for term in self.terms)) - {"ref"}

    @property
    def wants_of_reference(self) -> frozenset[str]:
        """The same of the reference's: the states that a divergence is computed from, or nothing."""
        return frozenset({"states"}) if self.wants & DIVERGENCES else NOTHING

    def adopt(self, states: Mapping[str, Tensor]) -> None:
        """Remember: the states of a result whose step is taken, those of a checkpoint, or earlier ones for a step refused."""
        self.states = self.states | {name: value.detach() for name, value in states.items()}

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(branch for term in self.terms for branch in term.of))

    @property
    def needs_pairs(self) -> bool:
        """True when some loss reads a side by name, which an unpaired row may lack; pooled losses take what there is."""
        return any(term.roles != (POOLED,) for term in self.terms)

    def unread(self, pairs: Sequence[Pair]) -> list[str]:
        """What the rows say and no loss listens to, one line per field: a setting that is ignored is never silent."""
        reads = {name for term in self.terms for name in term.reads}
        set_in = {"label": sum(p.label != 1 for p in pairs), "margin": sum(p.margin != 0 for p in pairs)}
        losses = ", ".join(term.name for term in self.terms)
        return [
            f"{count} of {len(pairs)} rows have a {name} of their own, which no loss reads ({losses})"
            for name, count in set_in.items()
            if count and name not in reads
        ]

    def check(self, provides: frozenset[str], branches: Sequence[str], has_reference: bool) -> None:
        """Raise ValueError, naming the term, when the modality or the reference lacks something a loss needs."""
        have = provides | ({"ref"} if has_reference else frozenset())
        for term in self.terms:
            _check_slots(term, provides)
            if missing := term.needs - have:
                hint = (
                    "set reference.kind, e.g. start"
                    if "ref" in missing
                    else f"this modality provides {sorted(provides) or 'nothing more'}"
                )
                raise ValueError(f"objective: loss {term.name} needs {', '.join(sorted(missing))}: {hint}")
            if unknown := set(term.of) - set(branches):
                raise ValueError(
                    f"objective: loss {term.name} reads branch {sorted(unknown)[0]!r}; this modality has {', '.join(branches)}"
                )

    def _label(self, term: Term) -> str:
        """The term's name; with its branches where another term has the same loss (Re-Align)."""
        return term.name if [t.name for t in self.terms].count(term.name) == 1 else f"{term.name}/{'/'.join(term.of)}"

    def __call__(self, policy: Mapping[str, Scores], reference: Mapping[str, Scores] | None, rows: Rows) -> Result:
        total, metrics, states = torch.zeros_like(rows.weight), dict[str, Tensor](), dict[str, Tensor]()
        own_losses: dict[str, Tensor] = {}
        for i, term in enumerate(self.terms):
            counts = _counts(policy, term)
            sides = {b: _side(b, policy[b], reference[b] if reference else None, counts[b], rows, term) for b in term.of}
            own = {key: self.states[f"{i}.{term.name}.{key}"].to(total.device) for key in term.state}
            options = {**term.options, "state": own} if own else term.options
            if term.roles == (POOLED,):
                losses = term.loss(_pool(list(sides.values())), **options)
                losses = _unpool(losses, list(sides.values()))
                _pooled_rewards(losses, sides, term)
            else:
                losses = term.loss(*(sides[b] for b in term.of), **options)
            states |= {f"{i}.{term.name}.{key}": value for key, value in losses.state.items()}
            total = total + term.weight * losses.loss
            own_losses[self._label(term)] = losses.loss.detach()
            _report(metrics, losses, sides)
        if len(self.terms) > 1:
            metrics |= {f"loss/{label}": value for label, value in own_losses.items()}
        return Result(total, metrics, states, own_losses)


def _check_slots(term: Term, provides: frozenset[str]) -> None:
    """A slot that a loss would not listen to, or that the modality cannot fill, is refused rather than ignored."""
    if term.link != "reverse_kl" and "link" not in term.reads:
        raise ValueError(f"objective: loss {term.name} reads no link: leave out link: {term.link}")
    if term.reduce == "ld" and (len(term.of) != 2 or term.roles == (POOLED,)):
        raise ValueError(f"objective: reduce: ld compares the lengths of two sides; loss {term.name} reads no pair")
    if term.weights == "spans" and "weights" not in provides:
        raise ValueError(f"objective: loss {term.name} weighs units by spans of text, which this modality's scores do not have")


def _counts(policy: Mapping[str, Scores], term: Term) -> dict[str, Tensor | None]:
    """What each unit of the term's branches counts, (B, U) fp32; None where every unit counts 1."""
    counts = {b: policy[b].weights if term.weights == "spans" else None for b in term.of}
    if term.reduce == "ld":
        shorter = torch.stack([policy[b].mask.sum(-1, keepdim=True) for b in term.of]).amin(0)
        for b, given in counts.items():
            tail = torch.where(policy[b].mask.cumsum(-1) > shorter, term.ld_alpha, 1.0)
            counts[b] = tail if given is None else tail * given
    return counts


def _side(name: str, policy: Scores, reference: Scores | None, counts: Tensor | None, rows: Rows, term: Term) -> Side:
    """One branch reduced over its units. A pooled loss tells desirable from undesirable by the branch's name and the label."""
    undesirable = term.roles == (POOLED,) and name.startswith("rejected")
    mask = policy.mask if counts is None else policy.mask & (counts > 0)
    length = mask.sum(-1).float() if counts is None else torch.where(mask, counts, 0.0).sum(-1)

    def reduced(units: Tensor) -> Tensor:
        return _reduce(units, mask, counts, length, term.reduce)

    return Side(
        logp=reduced(policy.logp),
        ref=None if reference is None else reduced(reference.logp).detach(),
        length=torch.ones_like(rows.weight) if term.reduce == "mean" else length,
        present=mask.any(-1),
        weight=rows.weight,
        margin=rows.margin,
        label=1 - rows.label if undesirable else rows.label,
        score=rows.scores.get(name, torch.full_like(rows.weight, torch.nan)),
        extras={k: v if v.ndim == 1 else reduced(v) for k, v in policy.extras.items() if v.ndim == 1 or k in term.needs},
        link=term.link,
        link_alpha=term.link_alpha,
    )


def _reduce(units: Tensor, mask: Tensor, counts: Tensor | None, length: Tensor, how: str) -> Tensor:
    kept = torch.where(mask, units, torch.zeros_like(units))
    total = (kept if counts is None else kept * counts).sum(-1)
    return total / torch.where(length > 0, length, 1) if how == "mean" else total


def _pool(sides: list[Side]) -> Side:
    """The sides as one list of (sides * B,) rows."""
    first = sides[0]
    names = [f.name for f in fields(Side) if isinstance(getattr(first, f.name), Tensor)]
    pooled: dict[str, Any] = {name: torch.cat([getattr(s, name) for s in sides]) for name in names}
    return replace(first, **pooled, extras={k: torch.cat([s.extras[k] for s in sides]) for k in first.extras})


def _unpool(losses: Losses, sides: list[Side]) -> Losses:
    """Back to one loss per row: the mean over the sides the row has."""
    present = torch.stack([s.present for s in sides]).float()
    each = losses.loss.view(len(sides), -1) * present
    metrics = {k: v.view(len(sides), -1).mean(0) for k, v in losses.metrics.items()}
    return Losses(each.sum(0) / present.sum(0).clamp(min=1), metrics=metrics, state=losses.state)


def _pooled_rewards(losses: Losses, sides: Mapping[str, Side], term: Term) -> None:
    """TRL's reward metrics of an unpaired loss, which reads its sides without telling which is which."""
    if {"chosen", "rejected"} <= set(sides) and sides["chosen"].ref is not None:
        beta = float(term.options.get("beta", 1.0))
        losses.chosen_reward = beta * sides["chosen"].log_ratio.detach()
        losses.rejected_reward = beta * sides["rejected"].log_ratio.detach()


def _report(metrics: dict[str, Tensor], losses: Losses, sides: Mapping[str, Side]) -> None:
    metrics.update(losses.metrics)
    if losses.chosen_reward is not None and losses.rejected_reward is not None and "rewards/margins" not in metrics:
        margin = losses.chosen_reward - losses.rejected_reward
        metrics["rewards/chosen"], metrics["rewards/rejected"] = losses.chosen_reward, losses.rejected_reward
        metrics["rewards/margins"] = margin
        metrics["rewards/accuracies"] = accuracy(margin)
    for name, side in sides.items():
        metrics[f"logps/{name}"] = side.logp.detach()


def accuracy(margin: Tensor) -> Tensor:
    """1 where the margin is positive, half where it is exactly 0: an untrained policy reads 0.5, not 0."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()
