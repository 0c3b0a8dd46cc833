"""What a run has to prove: held-out pair accuracy, and a judge's opinion of fresh samples, base against aligned.

Two sets of held-out prompts are kept apart: `select` picks the best checkpoint during the run, `test` is looked at once,
at the end, with seeds of its own, and is what the summary reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpo import reference as references
from mmpo.judging import Judge
from mmpo.modality import DrawKey, Modality
from mmpo.objective import accuracy
from mmpo.pair import Block, Pair

BUCKETS = 4


@dataclass(frozen=True)
class Trial:
    """One prompt under several seeds."""

    prompt: tuple[Block, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """Generations of one model for the trials, flat in trial order, and the judge's view of them (n,)."""

    blocks: list[Block]
    scores: np.ndarray
    correct: np.ndarray | None
    diversity: float

    @classmethod
    def unjudged(cls, blocks: list[Block]) -> Samples:
        """Samples that no judge has seen: scores are NaN."""
        return cls(blocks, np.full(len(blocks), np.nan), None, float("nan"))

    def summary(self) -> dict[str, float]:
        out = {"score": float(self.scores.mean()), "diversity": self.diversity}
        return out if self.correct is None else out | {"correct": float(self.correct.mean())}


def trials(prompts: Sequence[tuple[Block, ...]], seeds: int, purpose: str, seed: int) -> list[Trial]:
    """Fixed seeds for each prompt, a function of the run's seed, the purpose and the prompt."""
    return [Trial(p, tuple(_seed(seed, purpose, p, k) for k in range(seeds))) for p in prompts]


def _seed(seed: int, purpose: str, prompt: tuple[Block, ...], k: int) -> int:
    name = f"{seed}\0{purpose}\0{k}\0" + "\0".join(b.digest for b in prompt)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def sample(modality: Modality, model: nn.Module, judge: Judge, trials: Sequence[Trial]) -> Samples:
    """Generate and judge. Base and aligned model get the same seeds, so they are compared sample by sample."""
    prompts = [t.prompt for t in trials for _ in t.seeds]
    blocks = modality.sample(model, prompts, [s for t in trials for s in t.seeds])
    verdict = judge(prompts, [(b,) for b in blocks])
    correct = None if verdict.correct is None else verdict.correct.double().numpy()
    return Samples(blocks, verdict.scores.double().numpy(), correct, _diversity(blocks, trials))


def _diversity(blocks: Sequence[Block], trials: Sequence[Trial]) -> float:
    """Mean root-mean-square distance between the generations of one prompt under different seeds, in [0, 1]."""
    arrays, distances, start = [np.asarray(b.data, np.float32) / 255 for b in blocks], [], 0
    for trial in trials:
        group = arrays[start : start + len(trial.seeds)]
        start += len(trial.seeds)
        distances += [
            float(np.sqrt(np.mean((a - b) ** 2))) for i, a in enumerate(group) for b in group[:i] if a.shape == b.shape
        ]
    return float(np.mean(distances)) if distances else 0.0


def win_rate(aligned: np.ndarray, base: np.ndarray, per_prompt: int, seed: int = 0) -> dict[str, float]:
    """Share of samples the judge scores above the base's sample of the same prompt and seed; ties count half.

    The 95 % interval is a percentile bootstrap over prompts, because seeds of one prompt are not independent.
    """
    wins = ((aligned > base) + 0.5 * (aligned == base)).reshape(-1, per_prompt).mean(1)
    draws = np.random.default_rng(seed).choice(wins, (4000, len(wins))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(wins.mean()), "low": float(low), "high": float(high), "n": int(aligned.size)}


@torch.no_grad()
def evaluate_pairs(
    modality: Any, model: nn.Module, reference: Any, pairs: Sequence[Pair], seed: int, draws: int, batch: int = 32
) -> dict[str, Any]:
    """Implicit accuracy on held-out pairs: is the log-ratio of chosen above that of rejected, averaged over `draws` draws?

    Ties count half, so an untrained policy reads exactly 0.5. Also: the mean margin, the drift of both members' errors
    against the reference (positive = the policy got worse on it: displacement), and accuracy by place on the schedule.
    """
    margins, times = [], []
    drift: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": []}
    for index in range(draws):
        for start in range(0, len(pairs), batch):
            part = list(pairs[start : start + batch])
            drawn = modality.draw(modality.encode(part), [DrawKey(seed, "heldout/" + p.id, index) for p in part], model)
            policy, ref = modality.score(model, drawn), references.score(reference, modality, model, drawn)
            ratio = {b: (policy[b].logp - ref[b].logp if ref else policy[b].logp).sum(-1) for b in ("chosen", "rejected")}
            margins.append(ratio["chosen"] - ratio["rejected"])
            times.append(drawn.time)
            for branch in drift if ref else ():
                drift[branch].append(-ratio[branch][policy[branch].mask.any(-1)])
    margin = torch.cat(margins).view(draws, -1).cpu()
    time = torch.cat(times).view(draws, -1).cpu()
    return {
        "accuracy": float(accuracy(margin.mean(0)).mean()),
        "accuracy_per_draw": float(accuracy(margin).mean()),
        "margin": float(margin.mean()),
        "drift": _drift({b: torch.cat(v).view(draws, -1).mean(0) for b, v in drift.items() if sum(map(len, v))}),
        "by_time": _by_time(margin.flatten(), time.flatten()),
    }


def _drift(pairs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Means over the pairs, and the standard error of the chosen side's, from means of each pair (n,) by branch."""
    out = {branch: float(values.mean()) for branch, values in pairs.items()}
    if "chosen" in pairs and len(pairs["chosen"]) > 1:
        out["chosen_error"] = float(pairs["chosen"].std() / len(pairs["chosen"]) ** 0.5)
    return out


def _by_time(margin: torch.Tensor, time: torch.Tensor) -> list[dict[str, Any]]:
    rows = []
    for b in range(BUCKETS):
        inside = (time >= b / BUCKETS) & (time < (b + 1) / BUCKETS)
        if inside.any():
            part = margin[inside]
            row = {"accuracy": float(accuracy(part).mean()), "margin": float(part.mean()), "n": int(inside.sum())}
            rows.append({"bucket": f"t{b}", "from": b / BUCKETS, "to": (b + 1) / BUCKETS} | row)
    return rows
