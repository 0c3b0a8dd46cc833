"""A run's start and end: whose folder it is, what is refused before the first step, and what a finished run answers."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mmpo import admission, cli, drift, finish, launch
from mmpo import recipe as recipes
from mmpo.errors import MissingExtra, RecipeError, RunFailed
from mmpo.objective import Objective, make_term
from mmpo.pair import Span
from mmpo.runlog import read
from mmpo.schema import Recipe
from tests.tiny_run import line_pairs, line_run, load, make_world, settings

SHORT = ("train.steps=2", "train.save_every=1", "train.lr=2e-2", "eval.every=2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world in which one run has finished, without a judge."""
    found = make_world(tmp_path_factory.mktemp("world"))
    launch.run(load(found, found / "run", *SHORT))
    return found


@pytest.mark.slow
def test_a_finished_run_says_so_and_is_left_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, report = (world / "run" / name for name in ("log.jsonl", "report.html"))
    before, stamp = log.read_bytes(), (world / "run" / "checkpoints" / "CURRENT").stat().st_mtime_ns
    report.unlink()  # killed between the summary and the report
    words = settings(world, world / "run", *SHORT)
    assert cli.main(["train", "--modality", "diffusion", *words]) == 0
    assert "is finished: No judge was given" in capsys.readouterr().out and report.is_file()
    assert log.read_bytes() == before and (world / "run" / "checkpoints" / "CURRENT").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_what_a_kill_left_half_written_is_removed(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / "best" / ".policy.safetensors.tmp-1").write_bytes(b"half")
    assert launch.run(load(world, tmp_path / "run", *SHORT)) == 0
    assert not list((tmp_path / "run").rglob(".*.tmp-*"))


@pytest.mark.slow
def test_another_recipe_does_not_continue_a_run_unless_it_is_told_to(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--modality", "diffusion", *settings(world, world / "run", *SHORT, "train.lr=1e-2", "seed=4")]
    kept = (world / "run" / "recipe.yaml").read_bytes()
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "different: seed, train.lr." in said and "--allow-drift seed --allow-drift train.lr" in said
    assert cli.main([*words, "--allow-drift", "seed"]) == 2 and "different: train.lr." in capsys.readouterr().err
    assert (world / "run" / "recipe.yaml").read_bytes() == kept
    assert cli.main([*words, "--allow-drift", "seed", "--allow-drift", "train.lr"]) == 0
    assert yaml.safe_load((world / "run" / "recipe.yaml").read_text())["seed"] == 4
    (world / "run" / "recipe.yaml").write_bytes(kept)


@pytest.mark.slow
def test_a_recipe_that_was_wrong_is_corrected_in_the_same_folder(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss without its reference is refused before a model is loaded, and the folder is not taken."""
    with monkeypatch.context() as patch:
        patch.setattr(launch, "build", lambda *_: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=r"loss \w+ needs ref: set reference.kind"):
            launch.run(load(world, tmp_path / "run", "reference.kind=none"))
    drift.claim_recipe(tmp_path / "run", load(world, tmp_path / "run"))
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["reference"]["kind"] == "start"


@pytest.mark.slow
def test_the_same_recipe_finds_its_own_folder(world: Path) -> None:
    one, same, other = (launch._default_folder(load(world, Path("x"), *more)) for more in ((), ("seed=0",), ("seed=1",)))
    assert one == same != other and one.startswith("runs/diffusion-")


def test_the_verifier_of_a_world_takes_no_options_of_another_judge() -> None:
    spec = recipes.load(None, ["judge.path=x", "judge.options.allow_download=true"], "text").recipe
    modality = SimpleNamespace(embedded_judge="sums", is_embedded=True)
    assert launch.make_judge(spec, modality, torch.device("cpu")) is not None


def test_a_tracker_that_is_not_installed_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"wandb is not installed; .*mmpo\[track\]"):
        launch.require_trackers(["wandb"])


def test_the_self_check_refuses_a_policy_that_is_not_its_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = line_run(tmp_path)
    run.modality.describe = lambda beta: f"beta {beta}"  # type: ignore[method-assign]
    launch.self_check(run)
    assert "every log-ratio exactly 0, loss 0.693147" in capsys.readouterr().out
    with torch.no_grad():
        next(run.model.parameters()).mul_(1 + 1e-5)
    with pytest.raises(RunFailed, match=r"differ before the first step: log-ratio .* on pair \d+, expected exactly 0"):
        launch.self_check(run)
    bad = line_pairs(24)
    bad[3] = line_pairs(4, weight=float("nan"))[3]
    run = line_run(tmp_path / "bad", bad, batch_size=24)
    run.modality.describe = lambda beta: ""  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="the loss of pair 3 is not finite before the first step"):
        launch.self_check(run)
    assert read(run.log.path) == []


@pytest.mark.parametrize("terms", [("simpo",), ("simpo", "dpo"), ("dpo", "simpo")])
def test_losses_without_a_reference_start_with_margins_of_their_own(
    tmp_path: Path, terms: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """In any order: only log-ratios have to be 0, not what a loss that reads no reference calls a reward."""
    run = line_run(tmp_path)
    run.modality.describe = lambda beta: f"beta {beta}"  # type: ignore[method-assign]
    run = replace(run, objective=Objective([make_term(name, beta=1.0) for name in terms]))
    launch.self_check(run)
    told = capsys.readouterr().out
    assert "every log-ratio exactly 0" in told
    assert ("dpo: beta" in told) == ("dpo" in terms) and "simpo: beta" not in told


def test_unpaired_rows_need_an_unpaired_loss() -> None:
    half = [*line_pairs(1), *(p.__class__(p.id, p.prompt, (), p.rejected) for p in line_pairs(2)[1:])]
    with pytest.raises(RecipeError, match="row 1 has no chosen side, which dpo needs; for unpaired rows use loss: kto"):
        admission.check_pairs(Objective([make_term("dpo")]), half)
    admission.check_pairs(Objective([make_term("kto")]), half)


def test_rows_without_spans_are_named_where_spans_weigh() -> None:
    span = Span(0, 2, 0.0)
    (marked,) = line_pairs(1, spans={"chosen": (span,), "rejected": ()})
    half = [marked, line_pairs(2, spans={"chosen": (span,)})[1]]
    masked = Objective([make_term("nll"), make_term("dpo", weights="spans")])
    admission.check_pairs(masked, [marked])
    admission.check_pairs(Objective([make_term("nll", weights="spans"), make_term("dpo")]), half)
    with pytest.raises(RecipeError, match="row 1 has no spans of its rejected side, by which dpo weighs units"):
        admission.check_pairs(masked, half)
    kto = Objective([make_term("kto", weights="spans")])
    admission.check_pairs(kto, [replace(half[1], rejected=())])


@pytest.mark.parametrize(("name", "expected"), [("adamw", "AdamW"), ("adafactor", "Adafactor"), ("sgd", "SGD")])
def test_optimizers_train_what_is_trainable_only(name: str, expected: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    recipe = Recipe.model_validate({"train": {"optimizer": name, "lr": 0.5, "weight_decay": 0.25}})
    (group,) = (made := launch.make_optimizer(recipe, model)).param_groups
    assert type(made).__name__ == expected and (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert {id(p) for p in group["params"]} == {id(p) for p in model[0].parameters()}


def summary(low: float, high: float, **more: Any) -> dict[str, Any]:
    win = {"value": (low + high) / 2, "low": low, "high": high, "n": 24}
    samples = {"base": {"score": 0.5}, "aligned": {"score": 0.625}}
    return {"heldout_pair_accuracy": 0.75, "best_step": 40, "steps": 60, "win_rate": win, **samples, **more}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (summary(0.51, 0.89), "Aligned beats base: win rate 0.70 (95 % interval 0.51 to 0.89, n = 24) on held-out prompts"),
        (summary(0.5, 0.9), "No clear difference between aligned and base: "),
        (summary(0.1, 0.49), "Aligned is worse than base: "),
        (summary(0.1, 0.5), "No clear difference"),
        (summary(0.6, 0.9, heldout_pair_accuracy=None), "no held-out pairs; best step 40 of 60."),
        (
            summary(0.6, 0.9, skipped_steps=3),
            "; 3 of 60 steps skipped as not finite; held-out pairs told apart 0.75; best step",
        ),
        ({"heldout_pair_accuracy": 0.75, "best_step": 40}, "No judge was given, so samples were not compared; held-out pairs"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval_allows(found: dict[str, Any], said: str) -> None:
    assert said in finish.verdict(found)
