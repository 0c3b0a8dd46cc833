"""From a recipe's data to pairs that train, pairs and prompts that are held out, and an account of every row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpo.datasets.formats.candidates import candidates
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, load
from mmpo.datasets.pairing import Candidate, pair_up
from mmpo.evaluate import Judge
from mmpo.errors import DataError
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
    spec, ledger = recipe.data, Ledger()
    if (spec.format or detect(path)) == "candidates":
        rows = list(candidates(path, root=spec.root, ledger=ledger, on_bad=spec.on_bad))
        pairs, dropped = build(recipe, rows[: spec.limit], judge)
    else:
        pairs, ledger = load(path, format=spec.format, root=spec.root, ties=spec.ties, on_bad=spec.on_bad, limit=spec.limit)
        dropped = {}
    train = [p for p in pairs if not is_heldout(p.prompt, spec.heldout)]
    heldout = [p for p in pairs if is_heldout(p.prompt, spec.heldout)]
    if not train:
        raise DataError(f"{path}: no pairs to train on ({len(pairs)} pairs, data.heldout {spec.heldout}; dropped: {dropped or 'none'})\n{ledger}")
    prompts = sorted({p.caption: p.prompt for p in heldout}.items(), key=lambda item: _hash(item[0]))
    middle = min(recipe.eval.prompts, (len(prompts) + 1) // 2)
    account = {"source": path, "rows": ledger.as_dict(), "dropped": dropped, "pairs": len(pairs)}
    return Prepared(
        train,
        heldout,
        list({p.caption: p.prompt for p in train}.values()),
        [p for _, p in prompts[:middle]],
        [p for _, p in prompts[middle : middle + recipe.eval.test_prompts]],
        account,
    )


def build(recipe: Recipe, rows: Sequence[Candidate], judge: Judge | None) -> tuple[list[Pair], dict[str, int]]:
    """Judge the candidates that carry no score and pair them up as the recipe says."""
    spec = recipe.data.pairing
    if spec is None:
        raise DataError("these rows are single candidates: set data.pairing, e.g. pairing: {strategy: best_worst}")
    missing = [i for i, c in enumerate(rows) if c.score is None]
    if missing and judge is None:
        raise DataError(f"{len(missing)} of {len(rows)} candidates carry no score and there is no judge: set judge.name, see `mmpo list judges`")
    scored = list(rows)
    if missing and judge is not None:
        scores = judge([rows[i].prompt for i in missing], [(rows[i].block,) for i in missing]).scores.tolist()
        for i, score in zip(missing, scores, strict=True):
            scored[i] = Candidate(rows[i].prompt, rows[i].block, score, rows[i].seed)
    return pair_up(scored, spec.strategy, margin=spec.margin, max_per_prompt=spec.max_per_prompt, seed=recipe.seed)


def is_heldout(prompt: Prompt, share: float) -> bool:
    """Whether a prompt is held out: a function of its content, so the split survives new rows and other orders."""
    return int(_hash("\0".join(b.digest for b in prompt))[:12], 16) / 16**12 < share


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
