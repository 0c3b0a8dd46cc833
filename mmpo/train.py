"""The one training loop, for every modality, loss and reference.

    order -> encode -> draw -> score policy, score reference -> objective -> backward -> step -> log, evaluate, checkpoint

Everything random is a function of (seed, pair, draw index), the order of (seed, epoch), the learning rate of the step:
there is no hidden state, so a killed run that is started again with the same command ends with the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmpo import checkpoint, evaluate, memory, nonfinite, sharding
from mmpo import reference as references
from mmpo.diagnosis import diagnose
from mmpo.errors import RunFailed
from mmpo.interruption import BrokenOff, Interrupted, requests
from mmpo.modality import DrawKey
from mmpo.objective import Result, rows_of
from mmpo.pair import Pair
from mmpo.progress import Run, record, say
from mmpo.reference import Values, trainable, unwrap
from mmpo.runlog import read
from mmpo.saving import policy_tensors, save
from mmpo.state import restore_rng, rng_state


def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of one epoch: a pure function, the same for any number of devices or workers."""
    digest = hashlib.sha256(f"order\0{seed}\0{epoch}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:8], "big"))).permutation(size)


def batch_of(run: Run, step: int, micro: int) -> tuple[list[Pair], list[DrawKey]]:
    """The pairs of one forward pass on this device, with the keys of their draws."""
    spec, world = run.recipe.train, run.accelerator.num_processes
    size, accumulate = split(run)
    first = ((step * accumulate + micro) * world + run.accelerator.process_index) * size
    pairs, keys = [], []
    for position in range(first, first + size):
        epoch, place = divmod(position, len(run.pairs))
        pair = run.pairs[int(_order(run.recipe.seed, epoch, len(run.pairs))[place])]
        index = epoch if spec.draws_per_pair is None else epoch % spec.draws_per_pair
        pairs.append(pair)
        keys.append(DrawKey(run.recipe.seed, pair.id, index))
    return pairs, keys


def split(run: Run) -> tuple[int, int]:
    """Pairs per forward pass, and forward passes per step: the recipe's, or halved and doubled after memory ran out."""
    spec, times = run.recipe.train, 2**run.progress.halvings
    return spec.batch_size // times, spec.accumulate * times


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    key = (seed, epoch, size)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = order(*key)
    return _ORDERS[key]


def learning_rate(spec: Any, step: int) -> float:
    """Linear warm-up, then constant, or down to 0 linearly or by a cosine at the last step. A function of the step alone."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return spec.lr * shape[spec.schedule]


def forward(run: Run, step: int, micro: int) -> tuple[Result, Any, list[Pair]]:
    """Draw one batch and score it under both models. Raises RunFailed naming the pairs whose loss is not finite.

    The reference comes first: divergences of the policy are taken from its states, and no graph waits in memory meanwhile.
    """
    pairs, keys = batch_of(run, step, micro)
    batch = draw(run, pairs, keys)
    with run.accelerator.autocast():
        ref = references.score(run.reference, run.modality, run.model, batch, run.objective.wants_of_reference)
    with run.accelerator.autocast():  # a context of its own, as one keeps the weights it has cast
        policy = run.modality.score(run.model, batch, run.objective.wants, ref)
    rows = rows_of(pairs, batch.device)
    result = run.objective(policy, ref, rows)
    result.loss = _nan_where_broken(result.loss * rows.weight, policy, ref)
    _displacement(result, policy, ref)
    return result, batch, pairs


def draw(run: Run, pairs: list[Pair], keys: list[DrawKey]) -> Any:
    """Encode and draw. Inversion by the reference, where the recipe asks for it, sees the reference's module."""
    by_reference = run.recipe.draw.mode in ("inversion", "renoise") and run.recipe.draw.inversion_model == "reference"
    context = run.reference.active(run.model) if by_reference and run.reference else contextlib.nullcontext(run.model)
    with context as module:
        return run.modality.draw(run.modality.encode(pairs), keys, module)


def train(run: Run, until: int) -> None:
    """Run the loop from `run.progress.step` to step `until`. Raises Interrupted, all saved, after SIGINT or SIGTERM."""
    bar = tqdm(total=until, initial=run.progress.step, desc="train", unit="step", disable=not run.accelerator.is_main_process)
    with requests() as run.request, bar:
        if run.progress.due:
            _conclude(run, until, time.monotonic())
        while run.progress.step < until:
            start = time.monotonic()
            metrics = advance(run)
            run.progress.due = run.progress.step % run.recipe.eval.every == 0 or run.progress.step == until
            bar.update()
            bar.set_postfix({k: f"{metrics[m]:.3g}" for k, m in _SHOWN.items() if m in metrics})
            _conclude(run, until, start)
        if number := _any_process(run, run.request.number):  # it came during the last save
            raise Interrupted(number, run.progress.step)


def _conclude(run: Run, until: int, start: float) -> None:
    """After a step that began at `start`: its evaluation and checkpoint, where they are due. Raises Interrupted on request."""
    _evaluate_due(run)
    run.progress.seconds += time.monotonic() - start
    number = _any_process(run, run.request.number)
    if run.progress.step % run.recipe.train.save_every == 0 or run.progress.step == until or number:
        save(run)
    if number:
        raise Interrupted(number, run.progress.step)


def _evaluate_due(run: Run) -> None:
    """Evaluate, unless there is a request to stop: then the step is saved at once, and a resumed run makes it up."""
    if not run.progress.due:
        return
    generators = rng_state()
    try:
        _pause(run)
        evaluate_now(run)
        run.progress.due = False
    except BrokenOff:
        restore_rng(generators)  # as the step left them


def _pause(run: Run) -> None:
    """Raises BrokenOff, in all processes, when one of them was asked to stop."""
    if _any_process(run, run.request.number):
        raise BrokenOff


def _breakable(run: Run) -> contextlib.AbstractContextManager[None]:
    """What only computes: a signal breaks it off in the middle, but where other processes would wait for this one."""
    _pause(run)
    return run.request.breakable() if run.accelerator.num_processes == 1 else contextlib.nullcontext()


_SHOWN = {"loss": "loss", "acc": "rewards/accuracies", "margin": "rewards/margins"}


def advance(run: Run) -> dict[str, float]:
    """One step: learning rate, optimizer, averages, log."""
    spec, state = run.recipe.train, run.progress
    lr = learning_rate(spec, state.step % spec.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    metrics = optimize(run)
    state.step += 1
    _averages(run)
    record(run, {"event": "train", "step": state.step, **metrics, "lr": lr})
    run.accelerator.log(metrics, step=state.step)
    return metrics


def _any_process(run: Run, value: int) -> int:
    """The largest of the processes' values: what one of them has seen, all act on, or the others would wait for it."""
    if run.accelerator.num_processes == 1:
        return value
    return int(run.accelerator.gather(torch.tensor([value], device=run.accelerator.device)).max())


def optimize(run: Run) -> dict[str, float]:
    """One optimizer step over `accumulate` forward passes. A step with a loss or gradient that is not finite is refused."""
    remembered = run.objective.states
    collected, pairs, broken = _gradients(run)
    if broken:
        run.objective.adopt(remembered)
        return nonfinite.refused(run, broken)
    norm = run.accelerator.clip_grad_norm_(trainable(unwrap(run.model)).values(), run.recipe.train.clip)
    norm = sharding.whole(norm)
    if not torch.isfinite(norm) and run.accelerator.scaler is None:  # with fp16 the scaler itself skips such a step
        run.objective.adopt(remembered)
        terms = ", ".join(term.name for term in run.objective.terms)
        return nonfinite.refused(run, f"the gradient of pairs {nonfinite.named(pairs)} is not finite (of the terms {terms})")
    run.optimizer.step()
    return _merge(run, collected) | {"grad_norm": float(norm)}


def _gradients(run: Run) -> tuple[list[dict[str, Tensor]], list[Pair], str]:
    """Backward of one step: means and pairs of its passes, and what is not finite. Memory that runs out may halve the batch."""
    remembered = run.objective.states
    try:
        return _passes(run)
    except (RuntimeError, MemoryError) as error:
        said = memory.exhausted(error)
        if said is None:
            raise
        _halve(run, said, error)
    run.objective.adopt(remembered)
    return _gradients(run)  # outside of the handler, whose traceback keeps the failed pass's tensors alive


def _passes(run: Run) -> tuple[list[dict[str, Tensor]], list[Pair], str]:
    collected, seen, (_, accumulate) = [], [], split(run)
    run.optimizer.zero_grad(set_to_none=True)
    for micro in range(accumulate):
        result, batch, pairs = forward(run, run.progress.step, micro)
        bad = ~result.loss.isfinite()
        if _any_process(run, int(bad.sum())):
            return [], [], nonfinite.broken(result, bad, pairs)
        run.objective.adopt(result.states)
        with _sync(run, last=micro == accumulate - 1):
            run.accelerator.backward(result.loss.mean() / accumulate)
        collected.append(_means(result, batch))
        seen += pairs
    return collected, seen, ""


def _halve(run: Run, said: str, error: BaseException) -> None:
    """Half the pairs per pass and twice the passes, where the recipe asks for it and it is the same step; else RunFailed."""
    size, accumulate = split(run)
    halved = f"train.batch_size={size // 2} train.accumulate={2 * accumulate}"
    by_batch = next((term.name for term in run.objective.terms if term.over_batch), None)
    if run.recipe.train.on_oom == "halve" and size % 2 == 0 and run.accelerator.num_processes == 1 and not by_batch:
        run.progress.halvings += 1
        say(run, f"out of memory in step {run.progress.step + 1}: from here on {halved}, the same effective batch")
        return
    same = "the same step" if not by_batch else f"nearly the same step: loss {by_batch} reads statistics of the batch"
    lower = f"lower the batch ({halved}: {same}), or " if size > 1 else ""
    raise RunFailed(
        f"out of memory in step {run.progress.step + 1}: {size} pairs per pass, {said} ({memory.in_use()}). To go on, "
        f"{lower}set model.gradient_checkpointing=true, train.precision=bf16, model.adapter=lora, or on several processes "
        "train.fsdp=true; train.on_oom=halve lowers the batch by itself, on one process. Nothing that was saved is lost"
    ) from error


def _sync(run: Run, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients travel between devices once per optimizer step, with its last forward pass.

    Those of shards travel with each pass: a process that kept them for later would have to keep them whole.
    """
    return contextlib.nullcontext() if last or sharding.sharded(run.model) else run.accelerator.no_sync(run.model)


def _nan_where_broken(loss: Tensor, policy: Any, ref: Any) -> Tensor:
    """NaN for each pair one of whose scores is not finite: a saturated loss would call an infinite one perfect.

    And only for these, although by way of batch statistics (KTO) one of them spoils the loss of every pair.
    """
    sides = [*policy.values(), *(ref or {}).values()]
    whole = torch.stack([(s.logp.isfinite() | ~s.mask).all(-1) for s in sides]).all(0)
    return torch.where(whole, torch.where(whole.all(), loss, loss.detach().nan_to_num()), torch.nan)


def _displacement(result: Result, policy: Any, ref: Any) -> None:
    """How far each branch fell below the reference, in nats: a positive `displacement/chosen` is likelihood displacement."""
    if ref is not None:
        for branch, s in policy.items():
            result.metrics[f"displacement/{branch}"] = torch.where(s.mask, ref[branch].logp - s.logp, 0.0).detach().sum(-1)


def _means(result: Result, batch: Any) -> dict[str, Tensor]:
    """Batch means, and accuracy and margin by place on the schedule, as (sum, count) so that batches can be merged."""
    out = {"loss": result.loss.detach()} | result.metrics
    means = {
        k: torch.stack([v.double().sum(), torch.tensor(float(v.numel()), dtype=torch.float64, device=v.device)])
        for k, v in out.items()
    }
    if "rewards/margins" in out and hasattr(batch, "time"):
        bucket = (batch.time * evaluate.BUCKETS).long().clamp(max=evaluate.BUCKETS - 1)
        for b in range(evaluate.BUCKETS):
            inside = (bucket == b).double()
            for name in ("accuracies", "margins"):
                means[f"t{b}/{name}"] = torch.stack([(out[f"rewards/{name}"] * inside).sum(), inside.sum()])
    return means


def _merge(run: Run, collected: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over the forward passes of a step and over the processes, with one transfer from the device for all of them."""
    names = list(collected[0])
    total = torch.stack([torch.stack([c[n] for n in names]) for c in collected]).sum(0)
    total = run.accelerator.reduce(total, "sum").cpu()
    return {n: float(s / c) for n, (s, c) in zip(names, total, strict=True) if c > 0}


def _averages(run: Run) -> None:
    for values in (run.ema, run.reference):
        if isinstance(values, Values):
            values.update(run.model, run.progress.step)


@contextlib.contextmanager
def averaged(run: Run) -> Iterator[nn.Module]:
    """The module to evaluate and export: the moving average where the recipe keeps one."""
    with run.ema.active(run.model) if run.ema else contextlib.nullcontext(run.model) as module:
        yield module


def evaluate_now(run: Run) -> None:
    """Held-out pair accuracy and the judge's score of fresh samples; keeps the best weights so far under best/."""
    state = run.progress
    with averaged(run) as module:
        found: dict[str, Any] = {"event": "eval", "step": state.step} | _on_pairs(run, module) | _on_samples(run, module)
        record(run, found)
        run.accelerator.log({k: v for k, v in found.items() if isinstance(v, float)}, step=state.step)
        metric = found.get("eval/judge", found.get("eval/pair_accuracy", -math.inf))
        if state.step == 0:
            state.base_metric = metric
        elif metric > state.best_metric or metric == -math.inf:  # nothing to measure by: the last weights are kept
            state.best_step, state.best_metric = state.step, metric
            best = policy_tensors(run)
            if run.accelerator.is_main_process:
                checkpoint.write_best(run.folder, best)
    say(run, _line(found))
    for flag in diagnose(read(run.log.path)) if run.accelerator.is_main_process else ():
        say(run, f"  ! {flag.name}: {flag.text}. Try: {flag.advice}.")


def _on_pairs(run: Run, module: nn.Module) -> dict[str, Any]:
    if not run.heldout:
        return {}
    spec = run.recipe
    given: dict[str, Any] = {"seed": spec.seed, "draws": spec.eval.draws, "pause": lambda: _pause(run)}
    with run.accelerator.autocast():  # a reference of its own is no part of the model that accelerate has wrapped
        found = evaluate.evaluate_pairs(run.modality, module, run.reference, run.heldout, **given)
        if run.shifted:
            shifted = evaluate.evaluate_pairs(run.modality, module, run.reference, run.shifted, **given)
            found["shifted_accuracy"] = shifted["accuracy"]
    out = {"eval/pair_accuracy": found.pop("accuracy")}
    for name in ("drift", "fell"):
        out |= {f"eval/{name}_{key}": value for key, value in found.pop(name).items()}
    return out | {f"eval/{name}": value for name, value in found.items() if value is not None and name != "accuracy_per_draw"}


def _on_samples(run: Run, module: nn.Module) -> dict[str, Any]:
    if not (run.judge and run.select):
        return {}
    state = run.progress
    with _breakable(run):
        samples = evaluate.sample(run.modality, module, run.judge, run.select)
    _pause(run)
    with run.accelerator.autocast():
        samples = evaluate.with_nats(run.modality, module, run.reference, run.select, samples)
    state.base_scores = state.base_scores or samples.scores.tolist()
    wins = evaluate.win_rate(samples.scores, np.array(state.base_scores), run.recipe.eval.seeds)
    summary = samples.summary()
    scores = {"eval/judge": summary.pop("score")} | {f"eval/{k}": v for k, v in summary.items()}
    return scores | {"eval/win_rate": wins["value"], "eval/win_low": wins["low"], "eval/win_high": wins["high"]}


def _line(record: dict[str, Any]) -> str:
    names = {
        "eval/judge": "judge",
        "eval/correct": "correct",
        "eval/wrong_image": "wrong image",
        "eval/blind_correct": "blind",
        "eval/win_rate": "wins over base",
        "eval/pair_accuracy": "pair accuracy",
        "eval/shifted_accuracy": "shifted pairs",
        "eval/kl": "KL",
    }
    return f"  step {record['step']:>5}  " + "  ".join(f"{label} {record[k]:.3f}" for k, label in names.items() if k in record)
