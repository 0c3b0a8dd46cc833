"""One DPO step side by side: TRL's trainer and mmpo's loop on the same pairs, models and tokens.

What `text_step` and `vlm_step` share: contestants of both sides, the gate that has to hold before the clock starts, and
the report. Each of them brings its models, its rows and its cases; `counted_work` is what the gate counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.rounds import machine, measure, ratio
from mmpo import recipe as recipes
from mmpo import reference as references
from mmpo.cache import Cache
from mmpo.launch import build_objective, make_modality, make_optimizer
from mmpo.modalities.quiet import quietly
from mmpo.pair import Pair
from mmpo.progress import Run
from mmpo.reference import Cached, trainable
from mmpo.runlog import RunLog
from mmpo.train import advance, batch_of, draw, forward

PAIRS = 4
# Of no influence on time. A larger one lifts the rounding of sums of 512 log-probabilities, 1e-4 nats, over the tolerance.
BETA = 0.01
TOLERANCE = 1e-5
FLOPS = 1.02  # counted operations over the cost model's
Flops: TypeAlias = Mapping[str, float]  # by contestant


@dataclass(frozen=True)
class Case:
    """P prompt tokens and R answer tokens per side. bars: contestant -> (slower one, smallest ratio of times).

    saved: largest ratio of the bytes that autograd keeps, to TRL's; None where prompts are too short to promise any. encodes:
    contestant -> images that towers run on in one step.
    """

    prompt: int
    answer: int
    bars: dict[str, tuple[str, float]]
    saved: float | None = None
    encodes: dict[str, int] = field(default_factory=dict)


@dataclass
class Contestant:
    """logps: per-token log-probabilities of the first batch's answers, chosen then rejected. loss: of that batch.

    reference: the other model of its steps.
    """

    name: str
    step: Callable[[int], object]
    logps: Callable[[], Tensor]
    loss: Callable[[], Tensor]
    model: nn.Module
    reference: nn.Module


# ---- TRL


def trl_trainer(policy: Any, reference: Any, processing: Any, rows: list[dict[str, Any]], folder: Path) -> Any:
    """DPOTrainer; `prepared` holds the rows' batches, one row each, as its collator makes them."""
    import datasets
    import trl

    args = trl.DPOConfig(
        str(folder / "trl"), beta=BETA, per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, max_length=None, disable_tqdm=True,
    )  # fmt: skip
    with quietly():
        datasets.disable_progress_bars()  # they would be drawn between the lines of the report
        data = datasets.Dataset.from_list(rows)
        trainer = trl.DPOTrainer(policy, ref_model=reference, args=args, train_dataset=data, processing_class=processing)
        trainer.prepared = [dict(trainer.data_collator([row])) for row in trainer.train_dataset]
    trainer.model.train()
    return trainer


def trl_contestants(trainer: Any) -> list[Contestant]:
    """With its reference model, and with that one's sums in the batch."""
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)
    cached = [batch | _sums(trainer, batch) for batch in trainer.prepared]

    def loss(batches: list[dict[str, Tensor]], precomputed: bool, number: int) -> Tensor:
        trainer.precompute_ref_logps = precomputed
        return trainer.compute_loss(trainer.model, dict(batches[number]))

    def step(batches: list[dict[str, Tensor]], precomputed: bool, number: int) -> None:
        loss(batches, precomputed, number).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def logps() -> Tensor:
        with torch.no_grad():
            return _log_probs(trainer.model, trainer.prepared[0])

    kinds: list[tuple[str, list[dict[str, Tensor]], bool]] = [("trl", trainer.prepared, False), ("trl_cached", cached, True)]
    return [
        Contestant(name, partial(step, b, p), logps, partial(loss, b, p, 0), trainer.model, trainer.ref_model)
        for name, b, p in kinds
    ]


def _log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """TRL's per-token log-probabilities of the answers, from its own head."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {k: v for k, v in batch.items() if k != "completion_mask"}
    found = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    return found[batch["completion_mask"][:, 1:].bool()]


def _sums(trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = _log_probs(trainer.ref_model, batch).view(2, -1).sum(1)
    return {"ref_chosen_logps": found[:1], "ref_rejected_logps": found[1:]}


# ---- mmpo


def mmpo_run(
    folder: Path, modality: str, models: tuple[Path, Path], settings: list[str], pairs: list[Pair], cached: bool
) -> Run:
    """A run of a modality over the pairs, one per step, that trains all of its model. models: policy and reference."""
    folder.mkdir()
    file = folder / "recipe.yaml"
    file.write_text(f"modality: {modality}\n")
    own = [f"model.path={models[0]}", "model.adapter=full", "train.batch_size=1", "train.lr=1e-6"]
    own += ["reference.kind=path", f"reference.path={models[1]}", f"objective=[{{loss: dpo, beta: {BETA}}}]"]
    resolved = recipes.load(file, own + settings)
    recipe, accelerator = resolved.recipe, Accelerator(cpu=True)
    adapter = make_modality(recipe, folder, accelerator.device)
    reference: Any = references.build(recipe.reference, adapter, adapter.model)
    if cached:
        reference = Cached(reference, Cache(folder / "reference.sqlite", memory=0), adapter.model, "tokens")
    optimizer = make_optimizer(recipe, adapter.model)
    parts = (recipe, folder, accelerator, adapter, adapter.model, optimizer, reference, build_objective(resolved))
    return Run(*parts, pairs, [], None, [], RunLog(folder / "log.jsonl"))


def fill(run: Run) -> None:
    """One pass over the pairs, which fills the caches."""
    with torch.no_grad():
        for step in range(len(run.pairs)):
            forward(run, step, 0)


def order_of(run: Run) -> list[int]:
    """The rows in mmpo's order of its pairs, whose ids are their numbers: TRL takes them in the same."""
    return [int(batch_of(run, step, 0)[0][0].id) for step in range(len(run.pairs))]


def mmpo_contestant(name: str, run: Run) -> Contestant:
    def step(number: int) -> None:
        run.progress.step = number
        advance(run)

    def logps() -> Tensor:
        with torch.no_grad():
            scores = run.modality.score(run.model, draw(run, *batch_of(run, 0, 0)))
        return torch.cat([scores[b].logp[scores[b].mask] for b in ("chosen", "rejected")])

    with run.reference.active(run.model) as module:  # type: ignore[union-attr]
        pass
    return Contestant(name, step, logps, lambda: forward(run, 0, 0)[0].loss.mean(), run.model, module)


# ---- the gates


def equality(found: Sequence[Contestant]) -> dict[str, dict[str, float]]:
    """Differences from TRL on one pair: of log-probabilities, nats, and of gradients, relative to the largest one."""
    logps, wanted = found[0].logps(), _gradients(found[0])
    scale = max(float(g.abs().max()) for g in wanted.values())
    out = {}
    for other in found[1:]:
        gradients = _gradients(other)
        away = max(float((gradients[name] - g).abs().max()) for name, g in wanted.items())
        out[other.name] = {"logp": float((other.logps() - logps).abs().max()), "gradient": away / scale}
    return out


def _gradients(contestant: Contestant) -> dict[str, Tensor]:
    weights = trainable(contestant.model)
    found = torch.autograd.grad(contestant.loss(), list(weights.values()))
    return dict(zip(weights, found, strict=True))


def broken(case: Case, expected: Flops, equal: dict[str, Any], counted: dict[str, dict[str, int]]) -> list[str]:
    """What keeps the case from being timed, a line each. expected: operations by the cost model of those it is about."""
    out = [f"{n}: {what} differs by {d:.2g}" for n, row in equal.items() for what, d in row.items() if not d <= TOLERANCE]
    for name, flops in expected.items():
        times = counted[name]["flops"] / flops
        if times > FLOPS:
            out.append(f"{name}: {times:.3f} times the operations of the cost model")
        rows = 2 * case.answer * (2 if name == "online" else 1)
        if counted[name]["head_rows"] != rows:
            out.append(f"{name}: {counted[name]['head_rows']} rows meet the head, {rows} are scored")
        share = counted[name]["saved_bytes"] / counted["trl"]["saved_bytes"]
        if case.saved is not None and share > case.saved:
            out.append(f"{name}: keeps {share:.3f} of TRL's bytes for the backward pass")
    for name, images in case.encodes.items():
        if counted[name]["encodes"] != images:
            out.append(f"{name}: {counted[name]['encodes']} images meet a tower, {images} are expected")
    return out


# ---- the report


def results(case: Case, expected: Flops, seconds: dict[str, np.ndarray], counted: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Per contestant medians and counts, its speed relative to TRL and to its bar's rival, and what the counts promise."""
    out: dict[str, Any] = {}
    for name, times in seconds.items():
        cpu, wall = np.median(times, axis=0)
        row: dict[str, Any] = {"cpu_seconds": float(cpu), "wall_seconds": float(wall)} | counted[name]
        bars: dict[str, float | None] = {"trl": None} | dict([case.bars[name]] if name in case.bars else [])
        for rival, bar in bars.items():
            if name == rival:
                continue
            faster = {kind: ratio(seconds[rival][:, i], times[:, i]) for i, kind in enumerate(("cpu", "wall"))}
            entry: dict[str, Any] = faster | {"operations": counted[rival]["flops"] / counted[name]["flops"]}
            if bar is not None:
                entry |= {"bar": bar, "met": faster["cpu"]["low"] >= bar}
            row.setdefault("faster_than", {})[rival] = entry
        row["saved_of_trl"] = counted[name]["saved_bytes"] / counted["trl"]["saved_bytes"]
        if name in expected:
            row["flops_of_model"] = counted[name]["flops"] / expected[name]
        out[name] = row
    return out


def report(case: Case, rows: dict[str, Any]) -> str:
    images = bool(case.encodes)
    lines = [
        f"P={case.prompt} R={case.answer}  {'CPU ms':>8} {'GFLOP':>7} {'MB kept':>8} head rows{' images' * images}"
        "   faster by CPU time (95 %)"
    ]
    for name, row in rows.items():
        line = f"{name:14} {1e3 * row['cpu_seconds']:8.0f} {row['flops'] / 1e9:7.2f} {row['saved_bytes'] / 1e6:8.1f}"
        line += f" {row['head_rows']:9}" + (f" {row['encodes']:6}" if images else "")
        for rival, found in row.get("faster_than", {}).items():
            cpu = found["cpu"]
            line += f"   {cpu['value']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f}) than {rival}"
            line += f", {found['operations']:.2f} by operations"
            if "bar" in found:
                line += f", bar {found['bar']}: {'met' if found['met'] else 'missed'}"
        lines.append(line)
    return "\n".join(lines)


@dataclass(frozen=True)
class Bench:
    """A benchmark of cases. contestants: all of them with the same weights, caches filled, in a folder."""

    title: str
    cases: Sequence[Any]
    contestants: Callable[[Path, Any], list[Contestant]]
    counts: Callable[[Contestant], dict[str, int]]
    expected: Callable[[Any], Flops]


def run_case(bench: Bench, case: Case, rounds: int) -> dict[str, Any]:
    """Gate, then time one case. `broken` in the result: why it was not timed."""
    with tempfile.TemporaryDirectory() as folder:
        found = bench.contestants(Path(folder), case)
        equal, expected = equality(found), bench.expected(case)
        counted = {c.name: bench.counts(c) for c in found}
        out: dict[str, Any] = {"prompt": case.prompt, "answer": case.answer, "equality": equal}
        if reasons := broken(case, expected, equal, counted):
            return out | {"broken": reasons, "counts": counted}
        seconds = measure(found, rounds, PAIRS)
    return out | {"variants": results(case, expected, seconds, counted)}


def main(bench: Bench, arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(description=bench.title)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, at least 7")
    if len(bench.cases) > 1:
        parser.add_argument("--case", type=int, choices=range(len(bench.cases)), help="only this one")
    parser.add_argument("--out", type=Path, help="write the measurements here, as JSON")
    given = parser.parse_args(arguments)
    if given.rounds < 7:
        parser.error(f"--rounds: at least 7 are needed for an interval, got {given.rounds}")
    load, only = os.getloadavg(), getattr(given, "case", None)  # the load before this program adds its own
    versions = machine(torch, transformers, importlib.import_module("trl"), accelerate)
    record: dict[str, Any] = {"rounds": given.rounds, "load_before": load, "machine": versions, "cases": []}
    for case in bench.cases if only is None else [bench.cases[only]]:
        found = run_case(bench, case, given.rounds)
        if "broken" in found:
            print(f"P={case.prompt} R={case.answer}: nothing was timed\n  " + "\n  ".join(found["broken"]), file=sys.stderr)
            return 1
        record["cases"].append(found)
        print(f"differences from TRL: {json.dumps(found['equality'])}\n{report(case, found['variants'])}", flush=True)
    if given.out:
        given.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0
