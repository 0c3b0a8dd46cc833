"""What a finished run prefers on other pairs: implicit rewards and likelihoods, row by row (`mmpo eval RUN --data FILE`).

    implicit reward     log policy(y|x) - log reference(y|x), nats; beta would scale it and cannot change an order
    likelihood          log policy(y|x) or log reference(y|x), in all and per unit: what a model preferred without being asked

A pair is told apart where the chosen side has more; equal sides are ties, counted on their own and as half.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mmpo import reference as references
from mmpo.checkpoint import write_atomic
from mmpo.errors import DataError
from mmpo.measures import SIDES
from mmpo.modality import DrawKey, Modality
from mmpo.pair import Pair

Numbers = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Opinions:
    """Of n pairs: by side, log-likelihoods in nats under the policy and the reference, means over draws, and units, (n,) each.

    reference is empty where the run has none.
    """

    ids: tuple[str, ...]
    policy: Numbers
    reference: Numbers
    units: Numbers

    @property
    def margins(self) -> dict[str, np.ndarray]:
        """Chosen minus rejected, (n,) nats, by what is compared; `per unit` divides each side by its own units."""
        told: dict[str, Callable[[str], np.ndarray]] = {}
        if self.reference:
            told["implicit reward"] = lambda side: self.policy[side] - self.reference[side]
        for name, logp in (("policy", self.policy), ("reference", self.reference)):
            if logp:
                told[f"{name} likelihood"] = lambda side, logp=logp: logp[side]  # type: ignore[misc]
                told[f"{name} likelihood per unit"] = lambda side, logp=logp: logp[side] / self.units[side]  # type: ignore[misc]
        return {name: of("chosen") - of("rejected") for name, of in told.items()}

    def summary(self) -> dict[str, dict[str, float]]:
        """By what is compared: accuracy (ties half), right, ties and wrong out of n, and the mean margin in nats."""
        return {name: _counts(margin) for name, margin in self.margins.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object per pair: its id and all numbers."""
        columns = {
            f"{name}_{side}": values[side]
            for name, values in (("policy", self.policy), ("reference", self.reference), ("units", self.units))
            for side in values
        }
        return [{"id": name, **{k: float(v[i]) for k, v in columns.items()}} for i, name in enumerate(self.ids)]


def _counts(margin: np.ndarray) -> dict[str, float]:
    right, ties = int((margin > 0).sum()), int((margin == 0).sum())
    counts = {"right": right, "ties": ties, "wrong": len(margin) - right - ties}
    return {"accuracy": (right + ties / 2) / len(margin), **counts, "n": len(margin), "margin": float(margin.mean())}


@torch.no_grad()
def opinions(
    modality: Modality,
    model: nn.Module,
    reference: references.Reference | None,
    pairs: Sequence[Pair],
    seed: int = 0,
    draws: int = 1,
    batch: int = 8,
) -> Opinions:
    """Score both sides of pairs under policy and reference. Raises DataError for a pair without one of its sides."""
    if lacking := [p.id for p in pairs if not (p.chosen and p.rejected)]:
        raise DataError(f"pair {lacking[0]} has one side only: an order needs two ({len(lacking)} such rows)")
    parts: dict[str, list[np.ndarray]] = {}
    for start in tqdm(range(0, len(pairs), batch), desc="score pairs", unit="batch", disable=None):
        part = pairs[start : start + batch]
        for name, values in _batch(modality, model, reference, part, seed, draws).items():
            parts.setdefault(name, []).append(values)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    by_side = {n: {s: whole[f"{n}/{s}"] for s in SIDES if f"{n}/{s}" in whole} for n in ("policy", "reference", "units")}
    return Opinions(tuple(p.id for p in pairs), **by_side)


def _batch(
    modality: Any, model: nn.Module, reference: Any, pairs: Sequence[Pair], seed: int, draws: int
) -> dict[str, np.ndarray]:
    encoded, found = modality.encode(pairs), []
    for index in range(draws):
        drawn = modality.draw(encoded, [DrawKey(seed, "heldout/" + p.id, index) for p in pairs], model)
        scores = {"reference": references.score(reference, modality, model, drawn), "policy": modality.score(model, drawn)}
        sums = {
            f"{name}/{side}": torch.where(told[side].mask, told[side].logp, 0.0).double().sum(-1)
            for name, told in scores.items()
            if told
            for side in SIDES
        }
        units = {f"units/{side}": scores["policy"][side].mask.double().sum(-1) for side in SIDES}
        found.append(sums | units)
    return {name: torch.stack([f[name] for f in found]).mean(0).cpu().numpy() for name in found[0]}


def evaluate(
    run: Path, data: Path, format: str | None = None, limit: int | None = None, on_bad: str = "refuse", out: Path | None = None
) -> dict[str, Any]:
    """Measure a finished run on a file of pairs: what `mmpo eval RUN --data FILE` prints.

    Pairs of one side and those beyond the model's limits are left out and counted. out: a JSONL file of every pair's numbers.
    """
    from mmpo.datasets.load import load
    from mmpo.export import open_run, reference_of

    resolved, modality, start = open_run(run)
    spec = resolved.recipe
    read, ledger = load(data, format=format, limit=limit, on_bad=on_bad, modality=spec.modality)  # type: ignore[arg-type]
    whole = [p for p in read if p.chosen and p.rejected]
    pairs, left_out = modality.admit(whole)
    if not pairs:
        raise DataError(f"{data}: no pairs of two answers within the model's limits")
    reference = reference_of(spec, modality, start)
    found = opinions(modality, modality.model, reference, pairs, spec.seed, spec.eval.draws)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, "".join(json.dumps(row) + "\n" for row in found.rows()).encode())
    account = {"pairs": len(pairs), "one side only": len(read) - len(whole), **left_out, **ledger.counts()}
    return {"data": str(data), "account": account, "told apart by": found.summary()}
