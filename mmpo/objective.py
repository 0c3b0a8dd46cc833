"""From scores to losses: a list of terms, each `reduce -> link -> loss` over named branches, summed with weights.

    objective:
      - {loss: dpo, beta: 5.0}                        # chosen against rejected
      - {loss: err_anchor, of: chosen, weight: 0.1}   # and the winner's own error must not grow

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
from mmpo.pair import Pair
from mmpo.scores import Losses, Scores, Side

POOLED = "completion"  # a loss with this role reads desirable and undesirable answers alike, as one list
NOTHING: frozenset[str] = frozenset()


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

    needs, reads: what the loss's file declares: extras it cannot do without, and fields of the row that it takes notice of.
    """

    name: str
    loss: Callable[..., Losses]
    roles: tuple[str, ...]
    of: tuple[str, ...]
    weight: float = 1.0
    reduce: str = "sum"
    link: str = "reverse_kl"
    needs: frozenset[str] = NOTHING
    reads: frozenset[str] = NOTHING
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def beta(self) -> float | None:
        """The loss's beta, per nat; None for a loss that has none, or that weighs errors by it (MaPO)."""
        return float(self.options["beta"]) if "beta" in self.options and "err" not in self.needs else None


@dataclass
class Result:
    """loss: (B,) with gradient, before the row weights. metrics: detached (B,) tensors by TRL's names."""

    loss: Tensor
    metrics: dict[str, Tensor]


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
    slots = {k: spec.pop(k) for k in ("weight", "reduce", "link") if k in spec}
    declared = vars(sys.modules[function.__module__])
    needs, reads = declared.get("NEEDS", NOTHING), declared.get("READS", NOTHING)
    return Term(loss, function, roles, branches, needs=needs, reads=reads, options=spec, **slots)


class Objective:
    """A weighted sum of terms. Call it with the policy's and the reference's scores."""

    def __init__(self, terms: Sequence[Term]):
        if not terms:
            raise ValueError("objective: no terms; write e.g. objective: [{loss: dpo, beta: 0.1}]")
        self.terms = tuple(terms)

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

    def __call__(self, policy: Mapping[str, Scores], reference: Mapping[str, Scores] | None, rows: Rows) -> Result:
        total, metrics = torch.zeros_like(rows.weight), {}
        for term in self.terms:
            sides = {b: _side(b, policy[b], reference[b] if reference else None, rows, term) for b in term.of}
            if term.roles == (POOLED,):
                losses = term.loss(_pool(list(sides.values())), **term.options)
                losses = _unpool(losses, list(sides.values()))
                _pooled_rewards(losses, sides, term)
            else:
                losses = term.loss(*(sides[b] for b in term.of), **term.options)
            total = total + term.weight * losses.loss
            if len(self.terms) > 1:
                metrics[f"loss/{term.name}"] = losses.loss.detach()
            _report(metrics, losses, sides)
        return Result(total, metrics)


def _side(name: str, policy: Scores, reference: Scores | None, rows: Rows, term: Term) -> Side:
    """One branch reduced over its units. A pooled loss tells desirable from undesirable by the branch's name and the label."""
    undesirable = term.roles == (POOLED,) and name.startswith("rejected")
    return Side(
        logp=_reduce(policy.logp, policy.mask, term.reduce),
        ref=None if reference is None else _reduce(reference.logp, policy.mask, term.reduce).detach(),
        length=policy.mask.sum(-1).float() if term.reduce == "sum" else torch.ones_like(rows.weight),
        present=policy.mask.any(-1),
        weight=rows.weight,
        margin=rows.margin,
        label=1 - rows.label if undesirable else rows.label,
        score=rows.scores.get(name, torch.full_like(rows.weight, torch.nan)),
        extras={k: v if v.ndim == 1 else _reduce(v, policy.mask, "mean") for k, v in policy.extras.items()},
        link=term.link,
    )


def _reduce(units: Tensor, mask: Tensor, how: str) -> Tensor:
    total = torch.where(mask, units, torch.zeros_like(units)).sum(-1)
    return total if how == "sum" else total / mask.sum(-1).clamp(min=1)


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
    return Losses(each.sum(0) / present.sum(0).clamp(min=1), metrics=metrics)


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
