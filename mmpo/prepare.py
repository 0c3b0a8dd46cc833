"""From a recipe's data to pairs that train, pairs and prompts that are held out, and an account of every row."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpo.datasets.load import detect, load, load_candidates
from mmpo.datasets.pairing import Candidate, by_prompt, pair_up
from mmpo.errors import DataError
from mmpo.judging import Judge
from mmpo.pair import Block, Pair
from mmpo.schema import Recipe

Prompt = tuple[Block, ...]


@dataclass(frozen=True)
class Prepared:
    """select, test: held-out prompts, disjoint; the first choose the best checkpoint, the second are reported."""

    train: list[Pair]
    heldout: list[Pair]
    train_prompts: list[Prompt]
    select: list[Prompt]
    test: list[Prompt]
    account: dict[str, Any]


def prepare(recipe: Recipe, embedded: str, judge: Judge | None) -> Prepared:
    """Read, judge, pair and split. Raises DataError when nothing is left to train on."""
    path = embedded if recipe.data.path in (None, "embedded") else str(recipe.data.path)
    spec = recipe.data
    dropped: dict[str, int] = {}
    if (spec.format or detect(path)) == "candidates":
        groups, ledger = load_candidates(path, root=spec.root, on_bad=spec.on_bad, limit=spec.limit)
        pairs, dropped = pair_candidates(recipe, [c for group in groups.values() for c in group], judge)
    else:
        pairs, ledger = load(path, format=spec.format, root=spec.root, ties=spec.ties, on_bad=spec.on_bad, limit=spec.limit)
    train = [p for p in pairs if not is_heldout(p.prompt, spec.heldout)]
    heldout = sorted((p for p in pairs if is_heldout(p.prompt, spec.heldout)), key=lambda p: _hash(p.id))
    if not train:
        found = f"{len(pairs)} pairs, data.heldout {spec.heldout}; dropped: {dropped or 'none'}"
        raise DataError(f"{path}: no pairs to train on ({found})\n{ledger}")
    prompts = sorted({p.caption: p.prompt for p in heldout}.items(), key=lambda item: _hash(item[0]))
    middle = min(recipe.eval.prompts, (len(prompts) + 1) // 2)
    account = {"source": path, "rows": str(ledger), "dropped": dropped, "pairs": len(pairs), "heldout": len(heldout)}
    return Prepared(
        train,
        heldout[: recipe.eval.pairs],
        list({p.caption: p.prompt for p in train}.values()),
        [p for _, p in prompts[:middle]],
        [p for _, p in prompts[middle : middle + recipe.eval.test_prompts]],
        account,
    )


def pair_candidates(recipe: Recipe, rows: Sequence[Candidate], judge: Judge | None) -> tuple[list[Pair], dict[str, int]]:
    """Judge the candidates that carry no score and pair them up as the recipe says."""
    spec = recipe.data.pairing
    if spec is None:
        raise DataError("these rows are single candidates: set data.pairing, e.g. pairing: {strategy: best_worst}")
    missing = [i for i, c in enumerate(rows) if c.score is None]
    if missing and judge is None:
        raise DataError(
            f"{len(missing)} of {len(rows)} candidates carry no score, and there is no judge: "
            "set judge.name, see `mmpo list judges`"
        )
    scored = list(rows)
    if missing and judge is not None:
        scores = judge([rows[i].prompt for i in missing], [(rows[i].block,) for i in missing]).scores.tolist()
        for i, score in zip(missing, scores, strict=True):
            scored[i] = dataclasses.replace(rows[i], score=score)
    pairs, dropped = pair_up(
        by_prompt(scored), spec.strategy, margin=spec.margin, max_per_prompt=spec.max_per_prompt, seed=recipe.seed
    )
    if spec.temperature:  # Bradley-Terry
        gaps = [(p.scores["chosen"] - p.scores["rejected"]) / spec.temperature for p in pairs]
        pairs = [dataclasses.replace(p, label=1 / (1 + math.exp(-gap))) for p, gap in zip(pairs, gaps, strict=True)]
    return pairs, dropped


def is_heldout(prompt: Prompt, share: float) -> bool:
    """Whether a prompt is held out: a function of its content, so the split survives new rows and other orders."""
    return int(_hash("\0".join(b.digest for b in prompt))[:12], 16) / 16**12 < share


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
