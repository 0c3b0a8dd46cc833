"""After the run: open it again, sample from it, measure it, and write its weights for other programs.

An export is reloaded by the model's own library and compared before it counts: it has to give the trained policy's output,
and must not be the base model over again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmpo import checkpoint
from mmpo import recipe as recipes
from mmpo import reference as references
from mmpo.errors import DataError, RecipeError, RunFailed
from mmpo.evaluate import Samples, evaluate_pairs, trials, win_rate, with_nats
from mmpo.evaluate import sample as sample_and_judge
from mmpo.launch import able, build_objective, make_judge, make_modality, usable
from mmpo.lock import RunLock
from mmpo.pair import text
from mmpo.prepare import prepare
from mmpo.recipe import Resolved
from mmpo.schema import Recipe


def open_run(folder: Path, cache: Path | None = None) -> tuple[Resolved, Any, references.Values]:
    """The recipe and the adapter of a run with its best weights in the model, and the weights of the start beside them.

    cache: folder for what frozen encoders make of new prompts; None: the recipe's own.
    Raises ValueError when the folder holds no run, or one that has not reached its first evaluation.
    """
    if not (folder / "recipe.yaml").exists():
        raise ValueError(f"{folder} holds no run: expected recipe.yaml, which `mmpo train out={folder}` writes")
    if not _has_weights(folder):
        raise ValueError(
            f"{folder}: no weights under best/; the run has not reached its first evaluation, start its command again"
        )
    resolved = recipes.load(folder / "recipe.yaml")
    torch.manual_seed(resolved.recipe.seed)
    kept = resolved.recipe if cache is None else recipes.with_cache(resolved.recipe, cache)
    modality = make_modality(kept, folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    start = references.Values(modality.model)
    trained = checkpoint.read_best(folder)
    with torch.no_grad():
        for name, parameter in references.trainable(modality.model).items():
            parameter.copy_(trained[name])
    return resolved, modality, start


def _has_weights(folder: Path) -> bool:
    return (folder / "recipe.yaml").exists() and (folder / "best" / "policy.safetensors").exists()


def write(modality: Any, model: torch.nn.Module, folder: Path, merge: bool = False) -> None:
    """Write the weights to `folder` once they are proven. Raises RunFailed when they differ from the policy or equal the base.

    Outputs may differ by 1e-3 of their size, or by 8 rounding errors of the coarsest weights, if that is more.
    """
    with checkpoint.written_aside(folder) as aside:
        modality.save(model, aside, merge)
        _prove(modality, model, aside, folder, merge)
        if others := sorted(p.name for p in folder.glob("*.safetensors") if not (aside / p.name).exists()):
            raise RecipeError(
                f"--out {folder}: holds other weights, which would be loaded along: {', '.join(others)}; name another folder"
            )


def _prove(modality: Any, model: torch.nn.Module, written: Path, folder: Path, merge: bool) -> None:
    difference, change, scale = modality.check_export(model, written, merge)
    rounding = max(torch.finfo(p.dtype).eps for p in model.parameters())
    if not difference <= max(1e-3, 8 * rounding) * scale:
        raise RunFailed(
            f"{folder}: reloaded, the export differs from the trained policy by {difference:.3g} "
            f"(outputs are of size {scale:.3g})"
        )
    if change <= 1e-6 * scale:
        raise RunFailed(
            f"{folder}: the export gives the base model's output: the training changed nothing. Is the learning rate too small?"
        )


def export(run: Path, out: Path | None, merge: bool) -> None:
    target = out or run / ("merged" if merge else "export")
    with _writing(run, target):
        _, modality, _ = open_run(run)
        _export(modality, target, merge)


def _writing(run: Path, target: Path) -> contextlib.AbstractContextManager[Any]:
    """The run's lock where `target` lies inside of it: it has one writer. Raises RunBusy while that is another one.

    Not of a folder that `open_run` refuses: the lock's file would make a run of it for the next `mmpo train`.
    """
    inside = target.resolve().is_relative_to(run.resolve()) and _has_weights(run)
    return RunLock(run) if inside else contextlib.nullcontext()


def _export(modality: Any, target: Path, merge: bool) -> None:
    if (target / "recipe.yaml").exists():
        raise RecipeError(f"--out {target}: holds a run; name a folder of its own for the export")
    if target.exists() and not target.is_dir():
        raise RecipeError(f"--out {target}: is a file; an export is a folder")
    write(modality, modality.model, target, merge)
    print(f"{target}: written, reloaded and equal to the trained policy\n{modality.how_to_load(target, merge)}")


def sample(run: Path, prompts: Sequence[str], seed: int, out: Path) -> None:
    """Samples of base and aligned model for the prompts, same seeds, and a sheet of both."""
    with _writing(run, out):
        _sample(run, prompts, seed, out)


def _sample(run: Path, prompts: Sequence[str], seed: int, out: Path) -> None:
    _, modality, start = open_run(run)
    asked = [(text(p),) for p in prompts]
    seeds = [seed + i for i in range(len(prompts))]
    usable(out, "--out")
    with start.active(modality.model) as base:
        before = modality.sample(base, asked, seeds)
    after = modality.sample(modality.model, asked, seeds)
    modality.write_samples(out, asked, Samples.unjudged(before), Samples.unjudged(after))
    print(*sorted(out.glob("sheet.*")))


def reference_of(spec: Recipe, modality: Any, start: references.Values) -> references.Reference | None:
    """What the last round of a finished run was compared with; `start`: the weights it set out from."""
    kind = spec.reference.kind
    if kind == "none" or (spec.train.rounds == 1 and kind in ("path", "adapter_off")):  # none, or not the policy's start
        return references.build(spec.reference, modality, modality.model)
    return start


def evaluate(run: Path) -> None:
    """Measure a finished run again, on its test prompts and held-out pairs; prints what summary.json holds."""
    resolved, modality, start = open_run(run)
    spec, judge = resolved.recipe, make_judge(resolved.recipe, modality, modality.device)
    data = prepare(spec, str(modality.embedded_data), judge)
    build_objective(resolved)
    reference = reference_of(spec, modality, start)
    judge, found = able(judge, spec, data), dict[str, Any]()
    if data.heldout:
        found["pairs"] = evaluate_pairs(modality, modality.model, reference, data.heldout, spec.seed, spec.eval.draws)
    test = trials(data.test or data.select, spec.eval.test_seeds, "test", spec.seed)
    if not data.heldout and not (judge and test):
        raise DataError(f"{run}: no pairs and no prompts were held out; `mmpo eval {run} --data FILE` measures it on others")
    if judge and test:
        with start.active(modality.model) as module:
            base = sample_and_judge(modality, module, judge, test)
        aligned = with_nats(modality, modality.model, reference, test, sample_and_judge(modality, modality.model, judge, test))
        found |= {"base": base.summary(), "aligned": aligned.summary()}
        found["win_rate"] = win_rate(aligned.scores, base.scores, spec.eval.test_seeds)
    print(json.dumps(found, indent=2))
