"""What a run has to prove: held-out pair accuracy, and a judge's opinion of fresh samples, base against aligned.

Two sets of held-out prompts are kept apart: `select` picks the best checkpoint during the run, `test` is looked at once,
at the end, with seeds of its own, and is what the summary reports.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpo import measures
from mmpo import reference as references
from mmpo.intervals import unanimous
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
    """Generations of one model for the trials, flat in trial order, and the judge's view of them (n,).

    nats: by name, (n,), what `measures.against_reference` says of them under the aligned model; empty where nothing does.
    rates: by name, (n,), 1 where it is true and NaN where it could not be: the judge's own, and `blind_correct`.
    """

    blocks: list[Block]
    scores: np.ndarray
    correct: np.ndarray | None
    diversity: float
    nats: Mapping[str, np.ndarray] = field(default_factory=dict)
    rates: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def unjudged(cls, blocks: list[Block]) -> Samples:
        """Samples that no judge has seen: scores are NaN."""
        return cls(blocks, np.full(len(blocks), np.nan), None, float("nan"))

    def summary(self) -> dict[str, float]:
        """Means over the samples, of what was measured: score, diversity, characters of texts, KL, share that is right."""
        out = {"score": float(self.scores.mean())}
        if self.diversity == self.diversity:  # measured, so not NaN
            out["diversity"] = self.diversity
        if lengths := [len(b.data) for b in self.blocks if b.kind == "text"]:
            out["length"] = float(np.mean(lengths))
        if "kl" in self.nats:
            out["kl"] = float(self.nats["kl"].mean())
        out |= {name: float(np.nanmean(values)) for name, values in self.rates.items()}
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
    seeds = [s for t in trials for s in t.seeds]
    blocks = modality.sample(model, prompts, seeds)
    verdict = judge(prompts, [(b,) for b in blocks])
    correct = None if verdict.correct is None else verdict.correct.double().numpy()
    rates = {name: values.double().numpy() for name, values in verdict.rates.items()}
    rates |= _blind(modality, model, judge, prompts, seeds)
    return Samples(blocks, verdict.scores.double().numpy(), correct, _diversity(blocks, trials), rates=rates)


def _blind(
    modality: Modality, model: nn.Module, judge: Judge, prompts: Sequence[tuple[Block, ...]], seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """How many answers are right all the same when the prompt's images are hidden, under the same seeds.

    Nothing where the modality hides none (it has no `blinded`), no prompt has an image, or the judge does not know the truth.
    """
    hide = getattr(modality, "blinded", lambda prompt: None)
    hidden = [(i, blinded) for i, prompt in enumerate(prompts) if (blinded := hide(prompt)) is not None]
    if not hidden:
        return {}
    blocks = modality.sample(model, [blinded for _, blinded in hidden], [seeds[i] for i, _ in hidden])
    correct = judge([prompts[i] for i, _ in hidden], [(b,) for b in blocks]).correct
    if correct is None:
        return {}
    found = np.full(len(prompts), np.nan)
    found[[i for i, _ in hidden]] = correct.double().numpy()
    return {"blind_correct": found}


def with_nats(
    modality: Modality, model: nn.Module, reference: Any, trials: Sequence[Trial], samples: Samples, own: bool = True
) -> Samples:
    """The samples with what `model` thinks of them. own: whether it sampled them, or their divergence means nothing."""
    prompts = [t.prompt for t in trials for _ in t.seeds]
    found = measures.against_reference(modality, model, reference, prompts, samples.blocks)
    return replace(samples, nats={name: values for name, values in found.items() if own or name != "kl"})


def _diversity(blocks: Sequence[Block], trials: Sequence[Trial]) -> float:
    """Mean distance between the generations of one prompt under different seeds, in [0, 1]; NaN where each has but one."""
    distances, start = [], 0
    for trial in trials:
        group = blocks[start : start + len(trial.seeds)]
        start += len(trial.seeds)
        distances += [DISTANCES[a.kind](a, b) for i, a in enumerate(group) for b in group[:i]]
    told = [d for d in distances if d is not None]
    return float(np.mean(told)) if told else float("nan")


def _pixels_apart(a: Block, b: Block) -> float | None:
    """Root-mean-square distance of two pictures of one size."""
    first, second = (np.asarray(x.data, np.float32) / 255 for x in (a, b))
    return float(np.sqrt(np.mean((first - second) ** 2))) if first.shape == second.shape else None


def _words_apart(a: Block, b: Block) -> float:
    """Share of the words of two texts that are not matched, in order, by the other's."""
    return 1 - difflib.SequenceMatcher(None, str(a.data).split(), str(b.data).split(), autojunk=False).ratio()


DISTANCES: dict[str, Callable[[Block, Block], float | None]] = {"image": _pixels_apart, "text": _words_apart}


def win_rate(aligned: np.ndarray, base: np.ndarray, per_prompt: int, seed: int = 0) -> dict[str, float]:
    """Share of samples the judge scores above the base's sample of the same prompt and seed; ties count half.

    The 95 % interval is a percentile bootstrap over prompts, because seeds of one prompt are not independent; where all
    prompts agree, and a bootstrap has no width, it is `intervals.unanimous`.
    """
    wins = ((aligned > base) + 0.5 * (aligned == base)).reshape(-1, per_prompt).mean(1)
    draws = np.random.default_rng(seed).choice(wins, (4000, len(wins))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    if wins.min() == wins.max():
        low, high = unanimous(float(wins[0]), len(wins))
    return {"value": float(wins.mean()), "low": float(low), "high": float(high), "n": int(aligned.size)}


@torch.no_grad()
def evaluate_pairs(
    modality: Any,
    model: nn.Module,
    reference: Any,
    pairs: Sequence[Pair],
    seed: int,
    draws: int,
    batch: int = 32,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Implicit accuracy on held-out pairs: is the log-ratio of chosen above that of rejected, averaged over `draws` draws?

    Ties count half, so an untrained policy reads exactly 0.5. Also: the mean margin, what `measures.summarise` tells of the
    pairs, and accuracy by place on the schedule where the draws have one. pause: called before each batch; what it raises
    ends the measurement.
    """
    rows: list[list[dict[str, torch.Tensor]]] = [[] for _ in range(draws)]
    wants = measures.CONFIDENCE & modality.PROVIDES
    for index in range(draws):
        for start in range(0, len(pairs), batch):
            pause()
            part = list(pairs[start : start + batch])
            drawn = modality.draw(modality.encode(part), [DrawKey(seed, "heldout/" + p.id, index) for p in part], model)
            ref = references.score(reference, modality, model, drawn)
            found = measures.of_batch(modality.score(model, drawn, wants), ref)
            rows[index].append(found | ({"time": drawn.time} if hasattr(drawn, "time") else {}))
    whole = {name: torch.stack([torch.cat([r[name] for r in draw]) for draw in rows]).cpu() for name in rows[0][0]}
    margin = whole["ratio_chosen"].nan_to_num() - whole["ratio_rejected"].nan_to_num()
    return {
        "accuracy": float(accuracy(margin.mean(0)).mean()),
        "accuracy_per_draw": float(accuracy(margin).mean()),
        "margin": float(margin.mean()),
        "by_time": _by_time(margin.flatten(), whole["time"].flatten()) if "time" in whole else [],
        **measures.summarise(whole, reference is not None),
    }


def _by_time(margin: torch.Tensor, time: torch.Tensor) -> list[dict[str, Any]]:
    rows = []
    for b in range(BUCKETS):
        inside = (time >= b / BUCKETS) & (time < (b + 1) / BUCKETS)
        if inside.any():
            part = margin[inside]
            row = {"accuracy": float(accuracy(part).mean()), "margin": float(part.mean()), "n": int(inside.sum())}
            rows.append({"bucket": f"t{b}", "from": b / BUCKETS, "to": (b + 1) / BUCKETS} | row)
    return rows
