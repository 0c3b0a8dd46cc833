"""From a recipe to a finished run: build everything, check it, train, and write what a person wants to see."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, distributed
from tqdm import tqdm

from mmpo import admission, ches, drift, evaluate, memory, packaged, runfolder, sharding, tiers, unread
from mmpo import recipe as recipes
from mmpo import reference as references
from mmpo.cache import Cache, digest_module
from mmpo.errors import MissingExtra, RecipeError, RunFailed
from mmpo.find import find
from mmpo.finish import finish
from mmpo.judging import Judge
from mmpo.masking import masked
from mmpo.objective import SLOTS, Objective, Result, make_term
from mmpo.pair import Pair
from mmpo.prepare import Prepared, keep_account, prepare, refusal_accounted
from mmpo.progress import Run, record, say
from mmpo.recipe import Resolved
from mmpo.reference import Cached, Values, trainable, unwrap
from mmpo.report import write_report
from mmpo.rounds import fresh_pairs
from mmpo.runlog import RunLog
from mmpo.saving import policy_tensors, put, resume, save
from mmpo.schema import Recipe
from mmpo.train import evaluate_now, forward, train


def run(resolved: Resolved) -> int:
    """Train as a recipe says, in its run folder. The same command continues a run that was interrupted. Returns 0."""
    recipe = resolved.recipe
    require_trackers(recipe.track)
    folder = Path(recipe.out or _default_folder(resolved))
    usable(folder, "out")
    main = int(os.environ.get("RANK", "0")) == 0  # the other processes of a launch work for the first, which writes
    with _full_disk(folder), memory.explained(_SMALLER), runfolder.claim(folder) if main else contextlib.nullcontext():
        if main:
            runfolder.clear_leftovers(folder)
            drift.claim_recipe(folder, resolved)
        if (folder / "summary.json").exists():
            told = runfolder.read_json(folder / "summary.json", {"verdict": str}, "remove it, and the command writes it again")
            print(f"{folder} is finished: {told['verdict']}\nFor another run give it another folder: out=DIR")
            if main and not (folder / "report.html").exists():  # killed between the two
                write_report(folder)
            return 0
        started = time.monotonic()
        objective = build_objective(resolved)
        adapter = find("modalities", recipe.modality)
        tiers.check(recipe.reference.cache, objective, adapter.PROVIDES)
        objective.check(adapter.PROVIDES, branches_of(adapter, objective), recipe.reference.kind != "none")
        set_seed(recipe.seed)  # python, numpy and torch
        current = build(resolved, folder, objective)
        if not resume(current[0]):
            _begin(*current, unread.notes(resolved))
        earlier = current[0].progress.seconds
        _rounds(*current)
        leave_group(current[0])
        if main:
            finish(*current, seconds=earlier + time.monotonic() - started)
        current[0].accelerator.end_training()
    return 0


def leave_group(run: Run) -> None:
    """The processes part: no collective call may come after this.

    The DDP wrapper holds the process group, whose threads must be joined while the interpreter still lives: a group that is
    torn down by the interpreter's exit aborts some processes, and torchrun then kills the first while it writes the report.
    Shards hold it as well: they are given up, and the first process goes on with whole modules, loaded anew.
    """
    policy, started = policy_tensors(run) if sharding.sharded(run.model) else None, run.start is not None
    run.model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    run.accelerator.free_memory()
    if policy is not None:
        vars(run).update(dict.fromkeys(("modality", "model", "optimizer", "reference", "ema", "start")))
        gc.collect()
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    if policy:
        _make_whole(run, policy, started)


def _make_whole(run: Run, policy: dict[str, Tensor], started: bool) -> None:
    """The modules of a run as one process loads them, with the trained weights: what the comparison and the export take.

    started: whether the run keeps the weights of its start beside the reference.
    """
    recipe = run.recipe
    set_seed(recipe.seed)
    run.modality = make_modality(recipe, run.folder, run.accelerator.device)
    run.model = run.modality.model
    run.modality.plan(run.pairs, recipe.train.batch_size, False)
    run.reference = references.build(recipe.reference, run.modality, run.model)
    run.start = Values(run.model) if started else None
    put(run.model, policy)


_SMALLER = (
    "It was not in a training step, so a smaller batch changes nothing: a smaller eval.prompts or eval.pairs, "
    "model.dtype=bf16 or a smaller model do. What was saved is as it was, and the command goes on from there"
)


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """A disk that takes no more stops the run and costs nothing: this says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        raise RunFailed(
            f"{error}. The run stopped, and what it had saved is as it was: make room, or the disk writable, and repeat the "
            f"command, which goes on from the newest checkpoint in {folder / 'checkpoints'}"
        ) from error


def require_trackers(names: Sequence[str]) -> None:
    """Raises MissingExtra for the first tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name, "track")


def build_objective(resolved: Resolved) -> Objective:
    recipes.check_objective(resolved)
    terms = []
    for term in resolved.recipe.objective:
        options = recipes.loss_parameters(term)
        slots = {name: getattr(term, name) for name in SLOTS}
        terms.append(make_term(term.loss, term.of, **{k: v for k, v in slots.items() if v is not None}, **options))
    return Objective(terms)


def build(resolved: Resolved, folder: Path, objective: Objective) -> tuple[Run, Prepared]:
    """Load the model, the judge and the data, and put the trainable module on its devices."""
    recipe = resolved.recipe
    accelerator = make_accelerator(recipe, folder)
    modality = make_modality(recipe, folder, accelerator.device)
    modality.branches = branches_of(modality, objective)
    judge = make_judge(recipe, modality, accelerator.device)
    with refusal_accounted(folder) if accelerator.is_main_process else contextlib.nullcontext():
        data = admission.admitted(prepare(recipe, str(modality.embedded_data), judge), modality)
    judge = able(judge, recipe, data)
    runs_reference = recipe.reference.kind != "none" and not recipe.reference.cache
    shards = accelerator.num_processes if recipe.train.fsdp else 1
    planned = modality.plan(data.train, recipe.train.batch_size, runs_reference, shards)
    admission.check_pairs(objective, data.train)
    reference: Any = references.build(recipe.reference, modality, modality.model)
    if accelerator.is_main_process:
        keep_account(folder, data, resolved.allow_drift)
        for name, count in data.account["limits"].items():
            tqdm.write(f"{count} {name}")
        if planned:
            tqdm.write(planned)
        drift.claim_inputs(folder, inputs_of(recipe, modality, reference), resolved.allow_drift)
    _encode(modality, data.train + data.heldout + data.shifted)
    data = admission.undisplaced(recipe, data, modality)
    if reference is not None and recipe.reference.cache:
        file = _cache_file(recipe, folder, "reference")
        reference = Cached(reference, Cache(file), modality.model, recipe.reference.cache)
    if not trainable(modality.model):
        raise RunFailed("the model has no trainable parameter: set model.adapter: full, or lora targets that exist in it")
    if shards > 1:
        over, dtype = sharding.mesh(accelerator.device), torch.bfloat16 if recipe.train.precision == "bf16" else None
        sharding.shard(modality.model, over, dtype)
        references.shard(reference, modality.model, over, dtype)
    ema = Values(modality.model, recipe.train.ema) if recipe.train.ema else None
    kind, own_adapter = recipe.reference.kind, modality.starts_from_adapter
    is_start = recipe.train.rounds == 1 and (kind == "start" or (kind == "adapter_off" and not own_adapter))
    start = None if is_start else Values(modality.model)
    model, optimizer = sharding.prepared(accelerator, modality.model, make_optimizer(recipe, modality.model))
    select = evaluate.trials(data.select, recipe.eval.seeds, "select", recipe.seed)
    parts = (recipe, folder, accelerator, modality, model, optimizer, reference, objective)
    return Run(*parts, data.train, data.heldout, judge, select, RunLog(folder / "log.jsonl"), ema, start, data.shifted), data


def branches_of(modality: Any, objective: Objective) -> tuple[str, ...]:
    """The modality's own branches and, where it takes them, those named response@condition that the objective reads besides."""
    further = [b for b in objective.branches if "@" in b and b not in modality.branches] if modality.takes_further else []
    return (*modality.branches, *further)


def inputs_of(recipe: Recipe, modality: Any, reference: Any) -> dict[str, str]:
    """Digests of all that training reads besides the recipe: what `mmpo.drift` holds a resumed run to."""
    weights = dict(modality.weights)
    if recipe.reference.kind == "path":
        weights["reference"] = digest_module(reference.module)
    given = {"path": recipe.judge.path, **recipe.judge.options}  # a judge's weights, a head, a list of words
    files = {n: Path(v) for n, v in given.items() if isinstance(v, str) and v and Path(v).exists()}
    weights |= {f"judge.{n}": packaged.digest(path) for n, path in files.items()}
    return {f"weights.{name}": digest for name, digest in weights.items()}


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.train.precision]
    accelerator = Accelerator(mixed_precision=precision, log_with=list(recipe.track) or None, project_dir=str(folder))
    if recipe.track:
        accelerator.init_trackers("mmpo", {"recipe": json.dumps(masked(None, recipe.model_dump(mode="json")))})
    return accelerator


def make_modality(recipe: Recipe, folder: Path, device: torch.device) -> Any:
    cache = Cache(_cache_file(recipe, folder, "encoded"))
    return find("modalities", recipe.modality)(recipe.model, recipe.draw, cache, device, recipe.data.prompt_dropout)


def make_judge(recipe: Recipe, modality: Any, device: torch.device) -> Judge | None:
    """The recipe's judge; on the embedded world, its exact verifier; otherwise none, and pair accuracy decides alone."""
    if recipe.judge.name is not None:
        return find("judges", recipe.judge.name)(path=recipe.judge.path, device=str(device), **recipe.judge.options)
    return find("judges", modality.embedded_judge)(device=str(device)) if modality.is_embedded else None


def able(judge: Judge | None, recipe: Recipe, data: Prepared) -> Judge | None:
    """The judge, or None where it is the embedded world's verifier and the held-out prompts are of another world.

    A judge that the recipe names is kept, and fails where it cannot judge; so is one that later rounds need.
    """
    if judge is None or recipe.judge.name or recipe.train.rounds > 1 or recipe.data.path is None:
        return judge
    try:
        for pair in data.heldout:
            judge([pair.prompt], [pair.chosen or pair.rejected])
    except ValueError as error:
        told = str(error) if len(str(error)) <= 200 else f"{str(error)[:199]}\N{HORIZONTAL ELLIPSIS}"
        why = f"samples are not judged: {told}\n  the model's own judge knows its own world; judge.name sets another"
        tqdm.write(why, file=sys.stderr)
        return None
    return judge


def usable(folder: Path, name: str) -> None:
    """Make a folder. Raises RecipeError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{name}={folder}: cannot be a folder ({error.strerror}: {error.filename})") from error


def make_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
    spec, parameters = recipe.train, list(trainable(model).values())
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
    if spec.optimizer == "adafactor":  # torch's own scales lr by each parameter's size, which the published recipes turn off
        from transformers.optimization import Adafactor

        fixed = {"scale_parameter": False, "relative_step": False}
        return Adafactor(parameters, lr=spec.lr, weight_decay=spec.weight_decay, **fixed)
    return torch.optim.SGD(parameters, lr=spec.lr, weight_decay=spec.weight_decay)


def _cache_file(recipe: Recipe, folder: Path, name: str) -> Path:
    base = Path(recipe.data.cache) if recipe.data.cache else folder / "cache"
    usable(base, "data.cache")
    return base / f"{name}.sqlite"


def _encode(modality: Any, pairs: list[Pair], chunk: int = 64) -> None:
    """Fill the cache of the frozen encoders before the first step, where a person can see how long it takes."""
    for start in tqdm(range(0, len(pairs), chunk), desc="encode", unit="batch"):
        modality.encode(pairs[start : start + chunk])


# ---- start


def _default_folder(resolved: Resolved) -> str:
    """A folder named by the recipe's content: the same command finds its own run again."""
    content = json.dumps(resolved.recipe.model_dump(mode="json"), sort_keys=True)
    return f"runs/{resolved.recipe.modality}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _begin(run: Run, data: Prepared, unread: Sequence[str] = ()) -> None:
    """The start of a fresh run: what it is about, the self-check, and the base's own evaluation."""
    count = sum(p.numel() for p in trainable(run.model).values())
    whole = sum(p.numel() for p in run.model.parameters())
    sizes = f"{len(run.pairs)} pairs to train on, {len(run.heldout)} held out; {count:,} of {whole:,} parameters train"
    say(run, f"{run.recipe.modality}: {sizes}")
    if run.recipe.train.fsdp:
        say(run, f"  {sharding.told(unwrap(run.model), run.accelerator.num_processes)}")
    for line in (*unread, *run.objective.unread(run.pairs)):
        say(run, f"  note: {line}")
    betas = [term.beta for term in run.objective.terms if term.beta is not None]
    entry = {
        "event": "start",
        "pairs": len(run.pairs),
        "heldout": len(run.heldout),
        "trainable": count,
        "account": data.account,
    }
    if "hidden_sum" in run.modality.PROVIDES and run.heldout:  # of the start: what training is likely to displace
        told = ches.score(run.modality, run.model, run.heldout)
        entry |= {name: float(values.nanmean()) for name, values in told.items()}
    record(run, entry | {"beta": max(betas, default=None)})
    self_check(run)
    evaluate_now(run)
    save(run)


def self_check(run: Run) -> None:
    """Before the first step: with the reference at the start, every log-ratio is exactly 0, and so is every margin of DPO.

    Anything else means that policy and reference are not the same function at the start (dropout, precision, a wrong
    reference), and the run is refused. Prints what beta means and the loss, which is log 2 for DPO.
    """
    with torch.no_grad():
        result, _, pairs = forward(run, 0, 0)
        if _ratios(result).any() and isinstance(run.reference, Cached):
            # another run had these rows in other batches, which moves their last bits
            result, _, pairs = forward(replace(run, reference=run.reference.inner), 0, 0)
        ratios = _ratios(result)
    for term in run.objective.terms:
        if term.beta is not None and "ref" in term.needs:
            say(run, f"  {term.name}: {run.modality.describe(term.beta)}")
    same = run.recipe.reference.kind in ("start", "adapter_off", "ema") and not (
        run.recipe.reference.kind == "adapter_off" and run.modality.starts_from_adapter
    )
    if same and not bool((ratios == 0).all()):
        worst = int(ratios.argmax())
        raise RunFailed(
            f"policy and reference differ before the first step: log-ratio {float(ratios[worst]):.3g} on pair "
            f"{pairs[worst].id}, expected exactly 0. Look for dropout, a changed precision, or an adapter that the reference "
            "lacks"
        )
    if not bool(result.loss.isfinite().all()):
        raise RunFailed(
            f"the loss of pair {pairs[int((~result.loss.isfinite()).nonzero()[0])].id} is not finite before the first step"
        )
    checked = "every log-ratio exactly 0, " if len(ratios) and same else ""
    parts = {k.removeprefix("loss/"): float(v.mean()) for k, v in result.metrics.items() if k.startswith("loss/")}
    told = f" ({', '.join(f'{name} {value:.6f}' for name, value in parts.items())})" if parts else ""
    say(run, f"  self-check: {checked}loss {float(result.loss.mean()):.6f}{told} before the first step")


def _ratios(result: Result) -> Tensor:
    """The largest log-ratio of policy and reference over each pair's branches, in nats; empty without a reference."""
    found = [v.abs() for name, v in result.metrics.items() if name.startswith("displacement/")]
    return torch.stack(found).amax(0) if found else torch.empty(0)


def _rounds(run: Run, data: Prepared) -> None:
    """Round 1 trains on the given pairs; later ones on pairs of the policy's own samples, against the policy as it was."""
    for number in range(run.progress.round, run.recipe.train.rounds + 1):
        if number > 1:
            fresh_pairs(run, data, number)
        train(run, until=run.recipe.train.steps * number)
