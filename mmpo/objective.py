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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpo.find import find
from mmpo.pair import Pair
from mmpo.scores import Losses, Scores, Side

POOLED = "completion"  # a loss with this role reads desirable and undesirable answers alike, as one list


@dataclass(frozen=True)
class Rows:
    """What the data says about each pair of a batch; tensors (B,)."""

    ids: tuple[str, ...]
    weight: Tensor
    margin: Tensor
    label: Tensor
    scores: Mapping[str, Tensor]  # judge scores by branch, 0 where not scored


def rows_of(pairs: Sequence[Pair], device: torch.device | str) -> Rows:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    scored = dict.fromkeys(branch for p in pairs for branch in p.scores)
    return Rows(
        tuple(p.id for p in pairs),
        column([p.weight for p in pairs]),
        column([p.margin for p in pairs]),
        column([p.label for p in pairs]),
        {branch: column([p.scores.get(branch, 0.0) for p in pairs]) for branch in scored},
    )


@dataclass(frozen=True)
class Term:
    """One loss over branches. `of` names the branch that each of the loss's roles reads."""

    name: str
    loss: Callable[..., Losses]
    roles: tuple[str, ...]
    of: tuple[str, ...]
    weight: float = 1.0
    reduce: str = "sum"
    link: str = "reverse_kl"
    needs: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)


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
    return Term(loss, function, roles, branches, needs=sys.modules[function.__module__].NEEDS, options=spec, **slots)


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
        """True when some loss reads two sides of one row at once, so that unpaired rows cannot train it."""
        return any(term.roles != (POOLED,) for term in self.terms)

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
    """One branch reduced over its units. Desirable and undesirable are told apart by the branch's name."""
    present = policy.mask.any(-1)
    good = 0.0 if name.startswith("rejected") else 1.0
    label = torch.full_like(rows.label, good) if term.roles == (POOLED,) else rows.label
    return Side(
        logp=_reduce(policy.logp, policy.mask, term.reduce),
        ref=None if reference is None else _reduce(reference.logp, policy.mask, term.reduce).detach(),
        length=policy.mask.sum(-1).float() if term.reduce == "sum" else torch.ones_like(rows.weight),
        present=present,
        weight=rows.weight,
        margin=rows.margin,
        label=label,
        score=rows.scores.get(name, torch.zeros_like(rows.weight)),
        extras={k: _reduce(v, policy.mask, "mean") for k, v in policy.extras.items()},
        link=term.link,
    )


def _reduce(units: Tensor, mask: Tensor, how: str) -> Tensor:
    total = torch.where(mask, units, torch.zeros_like(units)).sum(-1)
    return total if how == "sum" else total / mask.sum(-1).clamp(min=1)


def _pool(sides: list[Side]) -> Side:
    def cat(pick: Callable[[Side], Tensor]) -> Tensor:
        return torch.cat([pick(s) for s in sides])

    return Side(
        logp=cat(lambda s: s.logp),
        ref=None if sides[0].ref is None else cat(lambda s: s.ref),  # type: ignore[arg-type, return-value]
        length=cat(lambda s: s.length),
        present=cat(lambda s: s.present),
        weight=cat(lambda s: s.weight),
        margin=cat(lambda s: s.margin),
        label=cat(lambda s: s.label),
        score=cat(lambda s: s.score),
        extras={k: torch.cat([s.extras[k] for s in sides]) for k in sides[0].extras},
        link=sides[0].link,
    )


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
