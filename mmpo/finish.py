"""The end of a run: the best weights against the base on prompts nobody has looked at, samples, summary, export, report."""

from __future__ import annotations

import json
from typing import Any

from mmpo import checkpoint, evaluate
from mmpo.diagnosis import diagnose
from mmpo.evaluate import Samples
from mmpo.masking import masked
from mmpo.pair import Pair
from mmpo.prepare import Prepared
from mmpo.progress import Run, record
from mmpo.reference import trainable
from mmpo.report import write_report
from mmpo.runlog import read
from mmpo.saving import load_best


def finish(run: Run, data: Prepared, seconds: float) -> None:
    """Put the best weights in, compare with the base on the test prompts, and write samples, summary, export, report."""
    from mmpo.export import write as write_export  # which opens runs by this module

    # Both models run without autocast from here on, as they will after their export.
    run.model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    load_best(run)
    test = evaluate.trials(data.test or data.select, run.recipe.eval.test_seeds, "test", run.recipe.seed)
    spec = run.recipe.eval
    found = (
        evaluate.evaluate_pairs(run.modality, run.model, first_reference(run), run.heldout, run.recipe.seed, spec.draws)
        if run.heldout
        else {}
    )
    summary: dict[str, Any] = {
        "modality": run.recipe.modality,
        "judge": run.recipe.judge.name or (run.modality.embedded_judge if run.judge else None),
        "heldout_pair_accuracy": found.get("accuracy"),
        "by_timestep": found.get("by_time", []),
        "pairs": {"train": len(run.pairs), "heldout": len(run.heldout)},
        "steps": run.progress.step,
        "best_step": run.progress.best_step,
        "seed": run.recipe.seed,
        "data": data.account,
        "command": f"mmpo train {run.folder / 'recipe.yaml'}",
        "skipped_steps": run.progress.skipped_steps,
        "parameters": {"trainable": sum(p.numel() for p in trainable(run.model).values())},
    }
    if run.judge and test:
        with base_weights(run) as module:
            base = evaluate.sample(run.modality, module, run.judge, test)
        aligned = evaluate.sample(run.modality, run.model, run.judge, test)
        reference = first_reference(run)
        base = evaluate.with_nats(run.modality, run.model, reference, test, base, own=False)
        aligned = evaluate.with_nats(run.modality, run.model, reference, test, aligned)
        summary["prompts"] = [Pair("", t.prompt).caption for t in test for _ in t.seeds]
        summary["seeds"] = [seed for t in test for seed in t.seeds]
        summary |= {"base": base.summary(), "aligned": aligned.summary()}
        summary["win_rate"] = evaluate.win_rate(aligned.scores, base.scores, run.recipe.eval.test_seeds)
        write_samples(run, test, base, aligned)
    summary["flags"] = [f.as_dict() for f in diagnose(read(run.log.path))]
    summary["verdict"] = verdict(summary)
    summary["seconds"] = round(seconds, 1)
    record(run, {"event": "end", "step": run.progress.step, "best_step": run.progress.best_step})
    write_export(run.modality, run.model, run.folder / "export")
    checkpoint.write_atomic(run.folder / "summary.json", (json.dumps(masked(None, summary), indent=2) + "\n").encode())
    page = write_report(run.folder)
    made = {"report": page, "export": run.folder / "export", "summary": run.folder / "summary.json"}
    print("\n".join(["", summary["verdict"], *(f"  {name:<8} {path}" for name, path in made.items())]))


def first_reference(run: Run) -> Any:
    """The reference as it was at the start: a moving average, or a later round's, has followed the policy since."""
    moved = run.recipe.reference.kind == "ema" or run.recipe.train.rounds > 1
    return run.start if moved and run.reference is not None else run.reference


def base_weights(run: Run) -> Any:
    """The model as it was before the run, for the comparison."""
    keeper = run.start or run.reference
    assert keeper is not None
    return keeper.active(run.model)


def write_samples(run: Run, test: list[evaluate.Trial], base: Samples, aligned: Samples) -> None:
    """samples/: one file per generation, and a contact sheet of base above aligned on the same prompts and seeds."""
    prompts = [t.prompt for t in test for _ in t.seeds]
    run.modality.write_samples(run.folder / "samples", prompts, base, aligned)


def verdict(summary: dict[str, Any]) -> str:
    """One plain sentence about what the run did."""
    accuracy = summary["heldout_pair_accuracy"]
    told = f"held-out pairs told apart {accuracy:.2f}" if accuracy is not None else "no held-out pairs"
    if skipped := summary.get("skipped_steps"):
        told = f"{skipped} of {summary['steps']} steps skipped as not finite; {told}"
    if "win_rate" not in summary:
        why = "No prompts were held out" if summary.get("judge") else "No judge was given"
        return f"{why}, so samples were not compared; {told} at step {summary['best_step']}."
    win, base, aligned = summary["win_rate"], summary["base"], summary["aligned"]
    interval = f"{win['value']:.2f} (95 % interval {win['low']:.2f} to {win['high']:.2f}, n = {win['n']})"
    if win["low"] > 0.5:
        start = "Aligned beats base"
    elif win["high"] < 0.5:
        start = "Aligned is worse than base"
    else:
        start = "No clear difference between aligned and base"
    exact = f", correct {base['correct']:.2f} to {aligned['correct']:.2f}" if "correct" in base else ""
    scores = f"score {base['score']:.3f} to {aligned['score']:.3f}{exact}"
    best = f"best step {summary['best_step']} of {summary['steps']}"
    return f"{start}: win rate {interval} on held-out prompts; {scores}; {told}; {best}."
