"""On-policy rounds: sample the policy, judge its samples, pair them up, and train on them against the policy as it was.

A round starts from the best weights so far; they are also its reference, and the optimizer starts afresh.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from tqdm import tqdm

from mmpo import reference as references
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.load import load_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.errors import RecipeError, RunFailed
from mmpo.prepare import Prepared, Prompt, pair_candidates
from mmpo.progress import Run, say
from mmpo.saving import load_best, save
from mmpo.sharding import sharded


def fresh_pairs(run: Run, data: Prepared, number: int) -> None:
    """Set `run` up for round `number`: best weights, new reference, and pairs of its own samples (kept in rounds/)."""
    if run.judge is None:
        raise RecipeError("train.rounds > 1 needs a judge to score new samples: set judge.name, see `mmpo list judges`")
    path = run.folder / "rounds" / f"{number}.parquet"
    if run.progress.round < number:
        run.accelerator.wait_for_everyone()  # until the best weights are written
        load_best(run)
        _start_over(run)
        if (run.accelerator.is_main_process or sharded(run.model)) and not path.exists():  # shards need every process
            rows = _sample(run, data.train_prompts, number)
            if run.accelerator.is_main_process:
                path.parent.mkdir(exist_ok=True)
                write_candidates(rows, path)
        run.accelerator.wait_for_everyone()
        run.progress.round = number
        save(run)
    groups, _ = load_candidates(path)
    own, dropped = pair_candidates(run.recipe, [c for g in groups.values() for c in g], run.judge)
    own, limits = run.modality.admit(own)
    if not own:
        raise RunFailed(
            f"round {number}: the judge told no two of the policy's own samples apart (dropped: {dropped}); "
            "raise train.round_candidates or train.round_prompts, or lower data.pairing.margin"
        )
    known = {pair.id for pair in own}
    given = run.modality.admit(data.train)[0] if run.recipe.train.round_keeps_data else []
    run.pairs = own + [pair for pair in given if pair.id not in known]
    kept = f" and {len(run.pairs) - len(own)} of the data's" if given else ""
    say(run, f"round {number}: {len(own)} pairs of the policy's own samples{kept}; dropped: {dropped | dict(limits) or 'none'}")


def _start_over(run: Run) -> None:
    """Reference, moving average and optimizer as at the start of a run, from the weights the policy has now."""
    run.reference = references.anew(run.recipe.reference, run.model)
    if run.recipe.train.ema:
        run.ema = references.Values(run.model, run.recipe.train.ema)
    run.optimizer.state.clear()


def _sample(run: Run, prompts: list[Prompt], number: int) -> list[Candidate]:
    """`round_candidates` samples of each of `round_prompts` training prompts, with seeds of their own for each round."""
    spec, rows = run.recipe.train, []
    chosen = sorted(prompts, key=lambda p: _seed(run.recipe.seed, number, p, -1))[: spec.round_prompts]
    jobs = [(p, _seed(run.recipe.seed, number, p, k)) for p in chosen for k in range(spec.round_candidates)]
    for start in tqdm(range(0, len(jobs), 64), desc=f"round {number}: sample", unit="batch"):
        part = jobs[start : start + 64]
        blocks = run.modality.sample(references.unwrap(run.model), [p for p, _ in part], [s for _, s in part])
        rows += [Candidate(p, b, seed=s) for (p, s), b in zip(part, blocks, strict=True)]
    verdict = run.judge([c.prompt for c in rows], [(c.block,) for c in rows])  # type: ignore[misc]
    return [dataclasses.replace(c, score=s) for c, s in zip(rows, verdict.scores.tolist(), strict=True)]


def _seed(*parts: Any) -> int:
    name = "\0".join("".join(b.digest for b in p) if isinstance(p, tuple) else str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
