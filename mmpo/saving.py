"""A run into a checkpoint and out of it again: its weights, optimizer, averages, generators and place in the log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmpo import checkpoint, sharding
from mmpo import reference as references
from mmpo.errors import RunFailed
from mmpo.progress import Progress, Run, say
from mmpo.reference import Cached, Values, trainable, unwrap
from mmpo.state import pack_optimizer, restore_rng, rng_state, unpack_optimizer


def policy_tensors(run: Run) -> dict[str, Tensor]:
    """The trained weights, whole, for the first process, which writes; every process has to call."""
    return sharding.collect(trainable(unwrap(run.model)), keep=run.accelerator.is_main_process)


def load_best(run: Run) -> None:
    """Put the best weights so far into the model; nothing happens when there was no evaluation but the base's yet."""
    if run.progress.best_step:
        put(run.model, checkpoint.read_best(run.folder))


@torch.no_grad()
def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in trainable(unwrap(model)).items():
        parameter.copy_(sharding.part(values[name], parameter))


def save(run: Run) -> None:
    """Write a checkpoint (see `mmpo.checkpoint`): trained weights, optimizer, averages, generators, log position, progress."""
    names: dict[Tensor, str] = {p: n for n, p in trainable(unwrap(run.model)).items()}
    optimizer, groups = pack_optimizer(run.optimizer, names)
    kept = {"optimizer": optimizer} | {n: v.values for n, v in (("ema", run.ema), ("reference", _moving(run))) if v is not None}
    tensors = {n: sharding.collect(values, keep=run.accelerator.is_main_process) for n, values in kept.items()}
    tensors |= {"policy": policy_tensors(run), "rng": rng_state()}
    if run.objective.states:
        tensors["objective"] = run.objective.states
    offset = run.log.offset()
    log = {"log_offset": offset, "log_sha256": run.log.digest(offset)}
    meta = {"progress": vars(run.progress), "optimizer": groups, **log}
    if run.accelerator.scaler is not None:
        meta["scaler"] = run.accelerator.scaler.state_dict()
    if run.accelerator.is_main_process:
        checkpoint.save(run.folder / "checkpoints", run.progress.step, tensors, meta, keep=run.recipe.train.keep)


def resume(run: Run) -> bool:
    """Continue from the newest whole checkpoint, if there is one; the log is cut back to it.

    Where the checkpoint was written under other packages, threads, processes or devices, it says that the bits will differ.
    """
    found = checkpoint.load_latest(run.folder / "checkpoints")
    if found is None and (run.folder / "best" / "policy.safetensors").exists():  # step 0 is saved first, so no kill leaves that
        raise RunFailed(
            f"{run.folder}: has the best weights of a run and no checkpoint to go on from; a run begun anew would replace "
            "them. Put its checkpoints/ back, or use another out="
        )
    run.accelerator.wait_for_everyone()  # all have seen the same checkpoints before the first process writes another
    if run.accelerator.is_main_process:
        _wind_back(run, found.meta if found else {"log_offset": 0})
    if found is None:
        return False
    run.progress = Progress(**found.meta["progress"])
    put(run.model, found.tensors["policy"])
    run.objective.adopt(found.tensors.get("objective", {}))
    if run.progress.round > 1:  # its values follow; never the first round's, whose scores may be cached
        run.reference = references.anew(run.recipe.reference, run.model)
    names: dict[Tensor, str] = {p: n for n, p in trainable(unwrap(run.model)).items()}
    unpack_optimizer(run.optimizer, names, found.tensors["optimizer"], found.meta["optimizer"])
    for name, values in (("ema", run.ema), ("reference", _moving(run))):
        if values is not None:
            values.load(run.model, found.tensors[name])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(found.meta["scaler"])
    restore_rng(found.tensors["rng"])
    say(run, f"resumed at step {run.progress.step} from {found.path.name}")
    if changed := checkpoint.changes(found.environment):
        say(run, f"  not bit-identical to a run without a break: {', '.join(changed)}")
    return True


def _wind_back(run: Run, meta: dict[str, Any]) -> None:
    """Cut the log back to what a checkpoint had seen, and say what that drops. Older checkpoints have no digest of it."""
    torn = ", the last one torn" if run.log.torn() else ""
    if dropped := run.log.truncate(meta["log_offset"], meta.get("log_sha256")):
        say(run, f"{run.log.path.name}: {dropped} line{'s' * (dropped > 1)} after the checkpoint dropped{torn}")


def _moving(run: Run) -> Values | None:
    inner = run.reference.inner if isinstance(run.reference, Cached) else run.reference
    return inner if isinstance(inner, Values) else None
