"""The loop: order, learning rate, stopping, refused steps, averages, and what it logs."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpo import checkpoint, launch
from mmpo import train as loop
from mmpo.cache import Cache
from mmpo.errors import RunFailed
from mmpo.interruption import Interrupted
from mmpo.objective import Objective, make_term
from mmpo.progress import Run, record
from mmpo.reference import Cached, Values, anew, unwrap
from mmpo.reference import build as build_reference
from mmpo.runlog import read
from mmpo.saving import resume
from mmpo.schema import Recipe, ReferenceConfig, TrainConfig
from mmpo.scores import Losses
from mmpo.state import pack_optimizer, unpack_optimizer
from mmpo.train import batch_of, evaluate_now, learning_rate, optimize, order, train
from tests.tiny_run import line_pairs, line_run, weight

ROOT = Path(__file__).resolve().parent.parent


# ---- order


@given(st.integers(0, 2**32 - 1), st.integers(0, 100), st.integers(1, 300))
def test_order_is_a_permutation_and_a_pure_function(seed: int, epoch: int, size: int) -> None:
    first = order(seed, epoch, size)
    np.random.random()  # plays no part
    assert sorted(first) == list(range(size)) and (order(seed, epoch, size) == first).all()


def test_order_differs_between_seeds_and_epochs() -> None:
    orders = {tuple(order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_any_position_is_reached_without_the_ones_before(tmp_path: Path) -> None:
    run = line_run(tmp_path, line_pairs(7))
    walked = [key for step in range(50) for key in batch_of(run, step, 0)[1]]
    assert batch_of(run, 31, 0)[1] == walked[31 * 4 : 32 * 4]
    assert len(batch_of(run, 10**12, 0)[1]) == 4  # hours if it had to be walked to
    for epoch in range(len(walked) // 7):
        part = walked[7 * epoch : 7 * epoch + 7]
        assert {k.sample for k in part} == {str(i) for i in range(7)} and {k.index for k in part} == {epoch}


def test_draws_per_pair_come_round_again(tmp_path: Path) -> None:
    run = line_run(tmp_path, line_pairs(4), draws_per_pair=3)
    assert [batch_of(run, step, 0)[1][0].index for step in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_learning_rate(schedule: Any, expected: list[float]) -> None:
    spec = TrainConfig(steps=6, warmup=2, lr=2.0, schedule=schedule)
    assert [learning_rate(spec, step) for step in range(6)] == pytest.approx([2 * e for e in expected], abs=1e-12)


def test_adafactor_moves_by_the_learning_rate_whatever_the_weight_is() -> None:
    """torch's own scales the step by the weight's size, which makes the published learning rates tens of times smaller."""
    model = torch.nn.Linear(4, 3, bias=False)
    torch.nn.init.constant_(model.weight, 0.01)
    recipe = Recipe(train=TrainConfig(optimizer="adafactor", lr=1e-3, weight_decay=0.0))
    optimizer = launch.make_optimizer(recipe, model)
    model.weight.grad = torch.full((3, 4), 5.0)
    optimizer.step()
    torch.testing.assert_close(model.weight, torch.full((3, 4), 0.01 - 1e-3))
    names: dict[torch.Tensor, str] = {model.weight: "weight"}
    tensors, meta = pack_optimizer(optimizer, names)
    again = launch.make_optimizer(recipe, model)
    unpack_optimizer(again, names, tensors, json.loads(json.dumps(meta)))
    after = []
    for each in (optimizer, again):
        model.weight.data.fill_(0.01)
        model.weight.grad = torch.arange(12.0).view(3, 4)
        each.step()
        after.append(model.weight.detach().clone())
    assert torch.equal(*after)


# ---- stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_is_saved(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = line_run(tmp_path / "whole", optimizer="adamw")
    train(whole, 6)
    run, before = line_run(tmp_path / "run", optimizer="adamw"), signal.getsignal(number)

    def strike(run: Run, entry: dict[str, Any]) -> None:
        record(run, entry)
        if entry["step"] == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", strike)
        with pytest.raises(Interrupted, match=f"{number.name}: saved at step 3") as caught:
            train(run, 6)
    assert caught.value.number == number and signal.getsignal(number) is before
    again = line_run(tmp_path / "run", optimizer="adamw")
    assert resume(again) and again.progress.step == 3
    train(again, 6)
    assert torch.equal(weight(again), weight(whole)) and again.log.path.read_bytes() == whole.log.path.read_bytes()


def test_a_signal_during_the_last_save_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = line_run(tmp_path), loop.save

    def save(run: Run) -> None:
        real(run)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "save", save)
    with pytest.raises(Interrupted, match="SIGTERM: saved at step 6"):
        train(run, 6)


def test_resuming_elsewhere_says_in_one_line_that_the_bits_may_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(line_run(tmp_path), 2)  # the last step is saved
    capsys.readouterr()
    assert resume(line_run(tmp_path)) and capsys.readouterr().out.count("\n") == 1  # nothing changed: nothing said
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert resume(line_run(tmp_path))
    finally:
        torch.set_num_threads(threads)
    _, said, *rest = capsys.readouterr().out.splitlines()
    assert said == f"  not bit-identical to a run without a break: threads {threads}, now {threads + 1}" and not rest


def test_what_a_resumed_log_drops_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it was all written before the first checkpoint. A log that was edited before that is refused."""
    run = line_run(tmp_path)
    run.log.append({"event": "start"})
    assert not resume(line_run(tmp_path))
    assert "log.0.jsonl: 1 line after the checkpoint dropped\n" in capsys.readouterr().out
    train(run := line_run(tmp_path), 2)
    run.log.append({"event": "end"})
    with run.log.path.open("ab") as file:
        file.write(b'{"ev')
    whole = run.log.path.read_bytes()
    run.log.path.write_bytes(whole.replace(b"0.", b"1.", 1))
    with pytest.raises(ValueError, match="are not those that the checkpoint has seen"):
        resume(line_run(tmp_path))
    run.log.path.write_bytes(whole)
    assert resume(line_run(tmp_path))
    assert "log.0.jsonl: 2 lines after the checkpoint dropped, the last one torn\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["start", "ema", "none"])
def test_a_later_rounds_reference_comes_back(tmp_path: Path, kind: str) -> None:
    """Also where scores of the first round's reference are cached: they are not replayed for the second one's."""
    run, again = (_of_reference(tmp_path, kind) for _ in range(2))
    train(run, 3)
    run.reference, run.progress.round = anew(run.recipe.reference, run.model), 2
    train(run, 5)
    assert resume(again) and type(again.reference) is type(run.reference)
    if kind != "none":
        assert isinstance(run.reference, Values) and isinstance(again.reference, Values)
        assert torch.equal(again.reference.values["weight"], run.reference.values["weight"])
        assert again.reference.decay == (0.5 if kind == "ema" else None)
        assert torch.equal(weight(again), again.reference.values["weight"]) is False


def _of_reference(folder: Path, kind: str) -> Run:
    run = line_run(folder, loss={"loss": "simpo"} if kind == "none" else None)
    run.recipe = run.recipe.model_copy(update={"reference": ReferenceConfig(kind=kind, ema_decay=0.5, cache=kind == "start")})  # type: ignore[arg-type]
    run.reference = build_reference(run.recipe.reference, run.modality, unwrap(run.model))
    if kind == "start":  # as a run that started from a trained adapter keeps it
        run.reference = Cached(Values(run.model), Cache(folder / "scores.sqlite"), run.model)
    return run


# ---- steps that must not happen


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_pair(tmp_path: Path) -> None:
    pairs = line_pairs(8)
    pairs[5] = line_pairs(6, weight=float("inf"))[5]
    run = line_run(tmp_path, pairs, batch_size=8)
    before = weight(run)
    with pytest.raises(
        RunFailed, match=r"step 1: the loss of pair 5 is not finite \(its scores or its weight are not\); the step was not"
    ):
        train(run, 6)
    assert torch.equal(weight(run), before) and run.progress.step == 0 and read(run.log.path) == []


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    run = line_run(tmp_path)
    next(run.model.parameters()).register_hook(lambda g: g * float("nan"))
    before = weight(run)
    four = ", ".join([r"\d+"] * 4)
    said = rf"the gradient of pairs {four} is not finite \(of the terms dpo\); the step was not applied"
    with pytest.raises(RunFailed, match=said):
        train(run, 6)
    assert torch.equal(weight(run), before)


def test_the_first_term_that_is_not_finite_is_named_and_all_pairs_up_to_five(tmp_path: Path) -> None:
    run = line_run(tmp_path, line_pairs(8), batch_size=8)
    terms = [make_term("dpo", beta=1.0), make_term("nll"), make_term("ipo", beta=1.0)]
    broken = replace(terms[1], loss=lambda chosen: Losses(chosen.logp * float("inf")))
    run.objective = Objective([terms[0], broken, terms[2]])
    with pytest.raises(RunFailed, match=r"of pair \d, \d, \d, \d, \d and 3 more is not finite \(first in the term nll\)"):
        train(run, 1)


def test_skipping_ends_with_the_budget_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default a hundredth of the steps, but always one."""
    for number, (budget, allowed) in enumerate(((None, 1), (0.5, 3), (0.0, 1))):
        pairs = line_pairs(8, weight=float("nan"))
        run = line_run(tmp_path / str(number), pairs, on_nonfinite="skip", nonfinite_budget=budget)
        said = rf"step {allowed + 1}: .*{allowed + 1} steps were refused so far, train.nonfinite_budget allows {allowed} of 6\."
        with pytest.raises(RunFailed, match=said):
            train(run, 6)
        assert run.progress.step == allowed


def test_skipped_steps_are_counted_and_change_nothing(tmp_path: Path) -> None:
    pairs = line_pairs(8)
    pairs[5] = line_pairs(6, weight=float("nan"))[5]
    run = line_run(tmp_path, pairs, on_nonfinite="skip", nonfinite_budget=0.5, optimizer="adamw")
    weights = [weight(run)]
    for step in range(1, 7):
        train(run, step)
        weights.append(weight(run))
    bad = ["5" in [p.id for p in batch_of(run, step, 0)[0]] for step in range(6)]
    assert [torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)] == bad
    assert run.progress.skipped_steps == sum(bad) == 3
    assert [r.get("skipped", 0) for r in read(run.log.path) if r["event"] == "train"] == bad


def test_a_loss_remembers_the_steps_that_were_taken_and_no_others(tmp_path: Path) -> None:
    """BCO's count of rewards: two of each row. It is saved, comes back, and a look before the first step is no step."""
    bco, pairs = {"loss": "bco", "beta": 1.0}, line_pairs(8)
    pairs[5] = line_pairs(6, weight=float("nan"))[5]
    skipping = line_run(tmp_path / "a", pairs, bco, on_nonfinite="skip", nonfinite_budget=0.5, accumulate=2)
    loop.forward(skipping, 0, 0)
    assert skipping.objective.states["0.bco.count"].item() == 0
    train(skipping, 3)
    assert skipping.progress.skipped_steps == 3 and skipping.objective.states["0.bco.count"].item() == 0
    whole, parts = (line_run(tmp_path / name, None, bco) for name in ("b", "c"))
    train(whole, 6)
    train(parts, 3)
    again = line_run(tmp_path / "c", None, bco)
    assert resume(again) and again.objective.states["0.bco.count"].item() == 3 * 2 * 4
    train(again, 6)
    assert torch.equal(weight(again), weight(whole)) and whole.objective.states["0.bco.delta"] != 0
    assert {k: v.item() for k, v in again.objective.states.items()} == {k: v.item() for k, v in whole.objective.states.items()}


def test_a_gradient_that_is_refused_leaves_no_memory(tmp_path: Path) -> None:
    run = line_run(tmp_path, None, {"loss": "bco"}, on_nonfinite="skip")
    train(run, 1)
    before = run.objective.states
    hook = next(run.model.parameters()).register_hook(lambda g: g * float("nan"))
    train(run, 2)
    assert run.progress.skipped_steps == 1 and run.objective.states == before
    hook.remove()
    train(run, 3)
    assert run.objective.states["0.bco.count"].item() == 2 * before["0.bco.count"].item()


def test_clip(tmp_path: Path) -> None:
    free, clipped = line_run(tmp_path / "a", clip=1e6), line_run(tmp_path / "b", clip=0.01)
    start = weight(free)
    norms = [optimize(run)["grad_norm"] for run in (free, clipped)]
    assert norms[0] == norms[1] > 0.01  # the norm that is logged is the one before clipping
    assert (weight(clipped) - start).norm() == pytest.approx(0.01, rel=1e-4)  # lr 1
    assert (weight(free) - start).norm() == pytest.approx(norms[0], rel=1e-4)


# ---- averages and precision


def test_moving_average_has_its_closed_form(tmp_path: Path) -> None:
    run = line_run(tmp_path, ema=0.8)
    run.ema = Values(run.model, 0.8)
    expected = weight(run)
    for step in range(1, 6):
        train(run, step)
        expected = 0.8 * expected + 0.2 * weight(run)
    torch.testing.assert_close(run.ema.values["weight"], expected)
    kept = checkpoint.from_bytes((tmp_path / "best" / "policy.safetensors").read_bytes())["weight"]
    assert torch.equal(kept, run.ema.values["weight"]) and not torch.equal(kept, weight(run))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_keeps_weights_and_losses_in_fp32(tmp_path: Path, precision: str) -> None:
    run = line_run(tmp_path, precision=precision)
    train(run, 4)
    losses = [r["loss"] for r in read(run.log.path) if r["event"] == "train"]
    assert weight(run).dtype == torch.float32 and losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert all(math.isfinite(x) for x in losses) and losses[-1] != losses[0]


# ---- the log


def test_metrics_have_the_names_of_trl_and_no_clock(tmp_path: Path) -> None:
    run = line_run(tmp_path)
    train(run, 2)
    names = set(read(run.log.path)[0])
    expected = {"event", "step", "loss", "lr", "grad_norm"}
    expected |= {f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")}
    expected |= {f"{kind}/{side}" for kind in ("logps", "displacement") for side in ("chosen", "rejected")}
    assert names == expected | {f"t{b}/{n}" for b in range(4) for n in ("accuracies", "margins")}
    again = line_run(tmp_path / "again")
    train(again, 2)
    assert again.log.path.read_bytes() == run.log.path.read_bytes()


def test_without_anything_to_measure_the_last_weights_are_the_best(tmp_path: Path) -> None:
    run = line_run(tmp_path)
    evaluate_now(run)
    assert not (tmp_path / "best").exists()  # the base is never the best: an export has to differ from it
    train(run, 2)
    kept = checkpoint.from_bytes((tmp_path / "best" / "policy.safetensors").read_bytes())
    assert torch.equal(kept["weight"], weight(run)) and run.progress.best_step == 2
