"""T7: a number that is not finite never reaches the weights: the step is refused first, and the pairs are named."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mmpo import launch
from mmpo import reference as references
from mmpo.cache import digest_module
from mmpo.errors import RunFailed
from mmpo.progress import Run
from mmpo.runlog import read
from mmpo.scores import Scores
from mmpo.train import advance, order
from tests import tiny_run
from tests.reliability.counters import FULL, counter

LOSSES: tuple[dict[str, Any], ...] = (
    {"loss": "dpo", "beta": 1.0}, {"loss": "ipo", "beta": 0.1}, {"loss": "kto", "beta": 1.0}, {"loss": "hinge", "beta": 1.0},
    {"loss": "simpo", "beta": 1.0}, {"loss": "robust", "beta": 1.0}, {"loss": "exo", "beta": 1.0}, {"loss": "nca", "beta": 1.0},
    {"loss": "sppo", "beta": 1.0}, {"loss": "apo_zero", "beta": 1.0}, {"loss": "dpop", "beta": 1.0},
    {"loss": "cpo", "beta": 1.0},
)  # fmt: skip
REFERENCE_FREE = ("simpo", "cpo")
VALUES = {"nan": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}
PLACES = ("policy", "reference", "media", "gradient")
STEP, LENGTH, ROW = 2, 4, 1  # injected at the third of four steps, into the second pair of its batch


def run_of(folder: Path, **options: Any) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows a process one precision
    return tiny_run.line_run(folder, steps=LENGTH, **options)


def steps(run: Run, count: int) -> str:
    """Takes steps; returns the digest of the weights after them."""
    for _ in range(count):
        advance(run)
    return digest_module(run.model)


def injected(run: Run, place: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the value into one pair at step STEP, on the chosen side."""
    modality: Any = run.modality
    draw, score, score_ref = modality.draw, modality.score, references.score

    def due() -> bool:
        return run.progress.step == STEP

    def poisoned(scores: dict[str, Scores]) -> dict[str, Scores]:
        bad = torch.zeros_like(scores["chosen"].logp)
        bad[ROW] = value
        return scores | {"chosen": dataclasses.replace(scores["chosen"], logp=scores["chosen"].logp + bad)}

    def drawn(*args: Any) -> Any:
        batch = draw(*args)
        if due():
            batch.chosen[ROW, 0] = value
        return batch

    def scored(*args: Any) -> dict[str, Scores]:
        whole = {b: dataclasses.replace(s, mask=torch.ones_like(s.mask)) for b, s in score(*args).items()}
        return poisoned(whole) if place == "policy" and due() and torch.is_grad_enabled() else whole

    def scored_ref(*args: Any) -> Any:
        found = score_ref(*args)
        return poisoned(found) if place == "reference" and due() and found else found

    monkeypatch.setattr(modality, "score", scored)
    if place == "media":
        monkeypatch.setattr(modality, "draw", drawn)
    if place == "reference":
        monkeypatch.setattr(references, "score", scored_ref)
    if place == "gradient":
        for parameter in run.model.parameters():
            parameter.register_hook(lambda g: torch.full_like(g, value) if due() else g)


CASES = [
    (loss, place, value, precision)
    for loss, place, value, precision in itertools.product(LOSSES, PLACES, VALUES, ("fp32", "bf16"))
    if not (place == "reference" and loss["loss"] in REFERENCE_FREE)
]
TAKEN = CASES if FULL else CASES[::5]


def test_a_step_is_refused_before_the_weights_change(tmp_path: Path, capsys: Any) -> None:
    """on_nonfinite: stop. The weights are those that two steps without the injection give."""
    start = time.monotonic()
    for number, (loss, place, value, precision) in enumerate(TAKEN):
        with pytest.MonkeyPatch.context() as patch:
            run = run_of(tmp_path / str(number), loss=loss, precision=precision)
            injected(run, place, VALUES[value], patch)
            before = steps(run, STEP)
            with pytest.raises(RunFailed) as caught:
                advance(run)
        named = [run.pairs[int(i)].id for i in _places(run)]
        case, said = (loss["loss"], place, value, precision), str(caught.value)
        assert digest_module(run.model) == before, case
        assert said.startswith(f"step {STEP + 1}: ") and "the step was not applied" in said, case
        assert (f"pair {named[ROW]} is not" in said) if place != "gradient" else all(n in said for n in named), (case, said)
    counter("T7", "not finite, stop", len(TAKEN), "all refused, weights unchanged", time.monotonic() - start)


def _places(run: Run) -> Any:
    size = run.recipe.train.batch_size
    return order(run.recipe.seed, 0, len(run.pairs))[STEP * size : (STEP + 1) * size]


def test_skipping_continues_and_counts(tmp_path: Path, capsys: Any) -> None:
    """on_nonfinite: skip. One step is skipped and counted, the weights stay, the next step moves them, all is finite."""
    start = time.monotonic()
    for number, (loss, place, value, precision) in enumerate(TAKEN):
        with pytest.MonkeyPatch.context() as patch:
            run = run_of(tmp_path / str(number), loss=loss, precision=precision, on_nonfinite="skip", optimizer="adamw")
            injected(run, place, VALUES[value], patch)
            digests = [steps(run, count) for count in (STEP, 1, 1)]
        case = (loss["loss"], place, value, precision)
        entries = [r for r in read(run.log.path) if r["event"] == "train"]
        assert digests[0] == digests[1] != digests[2], case
        assert run.progress.skipped_steps == 1 and run.progress.step == LENGTH, case
        assert [bool(r.get("skipped")) for r in entries] == [s == STEP for s in range(LENGTH)], case
        assert all(p.isfinite().all() for p in run.model.parameters()), case
    counter("T7", "not finite, skip", len(TAKEN), "all skipped and counted", time.monotonic() - start)


@pytest.mark.parametrize("value", [1e38, -1e38])
def test_a_huge_number_never_spoils_the_weights(value: float, tmp_path: Path, capsys: Any) -> None:
    """A finite number whose square is not: where some loss can live with it the step is taken, and all stays finite."""
    start, refused, number = time.monotonic(), 0, 0
    for loss, place, precision in itertools.product(LOSSES, PLACES, ("fp32", "bf16") if FULL else ("fp32",)):
        if place == "reference" and loss["loss"] in REFERENCE_FREE:
            continue
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            run = run_of(tmp_path / str(number), loss=loss, precision=precision)
            injected(run, place, value, patch)
            before = steps(run, STEP)
            try:
                advance(run)
            except RunFailed as error:
                refused += 1
                assert "the step was not applied" in str(error) and digest_module(run.model) == before
        assert all(p.isfinite().all() for p in run.model.parameters()), (loss["loss"], place, precision)
    result = f"weights stay finite, {refused} refused"
    counter("T7", f"{value:g}", number, result, time.monotonic() - start)
    assert 0 < refused < number


@pytest.mark.parametrize("value", VALUES)
def test_an_infinite_score_is_refused_where_the_loss_saturates(value: str, tmp_path: Path) -> None:
    """hinge and dpo of a margin of +inf are exactly 0, a perfect pair: only the score tells."""
    for loss in ("dpo", "hinge"):
        with pytest.MonkeyPatch.context() as patch:
            run = run_of(tmp_path / loss, loss={"loss": loss, "beta": 1.0})
            injected(run, "policy", VALUES[value], patch)
            steps(run, STEP)
            with pytest.raises(RunFailed, match=r"step 3: the loss of pair \w+ is not finite"):
                advance(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_denoisers_latents(precision: str, tmp_path: Path) -> None:
    """The same of a real pipeline: a latent that is not finite stops the run before its weights change."""
    AcceleratorState._reset_state(reset_partial_state=True)
    tiny_run.make_world(tmp_path)
    resolved = tiny_run.load(tmp_path, tmp_path / "out", f"train.precision={precision}", "train.steps=3", "judge.name=null")
    (tmp_path / "out").mkdir()
    run, _ = launch.build(resolved, tmp_path / "out", launch.build_objective(resolved))
    train_once = run.modality.draw
    for value in VALUES.values():
        before = digest_module(run.model)

        def drawn(*args: Any, value: float = value) -> Any:
            batch = train_once(*args)
            batch.noisy[0, 0, 0, 0] = value
            return batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.modality, "draw", drawn)
            with pytest.raises(RunFailed, match="step 1: the loss of pair"):
                advance(run)
        assert digest_module(run.model) == before
    counter("T7", "latents of a pipeline", len(VALUES), "all refused", 0.0)
