"""T10: memory that runs out stops the run with numbers, or halves the batch where asked, without another result."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpo import launch, memory, train
from mmpo import reference as references
from mmpo.cache import digest_module
from mmpo.errors import RunFailed
from mmpo.progress import Run
from mmpo.runlog import read
from mmpo.saving import resume
from tests import tiny_run
from tests.reliability.counters import counter
from tests.tiny_run import line_run

SAID = "CUDA out of memory. Tried to allocate 20.00 GiB."
ERRORS: tuple[BaseException, ...] = (
    torch.OutOfMemoryError(SAID),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
)


def failing(function: Callable[..., Any], when: Callable[..., bool], error: BaseException) -> Callable[..., Any]:
    def called(*args: Any, **named: Any) -> Any:
        if when(*args):
            raise error
        return function(*args, **named)

    return called


def steps(run: Run, count: int) -> torch.Tensor:
    for _ in range(count):
        train.advance(run)
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("phase", ["encode", "draw", "score", "reference", "backward"])
def test_a_step_stops_with_the_numbers(
    tmp_path: Path, phase: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = line_run(tmp_path)
    steps(run, 1)
    before = digest_module(run.model)
    modality: Any = run.modality
    places = {"reference": (references, "score"), "backward": (run.accelerator, "backward")}
    place, name = places.get(phase, (modality, phase))
    monkeypatch.setattr(place, name, failing(getattr(place, name), lambda *_: True, error))
    with pytest.raises(RunFailed) as raised:
        train.advance(run)
    told = str(raised.value)
    assert "out of memory in step 2: 4 pairs per pass" in told and "GiB" in told
    assert "train.batch_size=2 train.accumulate=2" in told and "train.on_oom=halve" in told
    assert digest_module(run.model) == before and run.progress.step == 1
    counter("T10", "errors in the phases of a step", 1, "stopped with numbers, weights unchanged", 0.0)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_halving_takes_the_same_steps(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room for so many pairs per pass: from its first failure on, smaller passes over the same pairs."""
    began = time.monotonic()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, small = line_run(tmp_path / "a"), line_run(tmp_path / "b", on_oom="halve")
    modality: Any = small.modality
    short = failing(modality.score, lambda _, batch, *more: len(batch.chosen) > room, ERRORS[0])
    monkeypatch.setattr(modality, "score", short)
    assert torch.allclose(steps(whole, 6), steps(small, 6), rtol=0, atol=1e-6)
    mine, theirs = ([r["loss"] for r in read(r.log.path) if "loss" in r] for r in (whole, small))
    assert mine == pytest.approx(theirs, abs=1e-6) and len(mine) == 6
    assert train.split(small) == ((2, 2) if room > 1 else (1, 4))
    counter("T10", "steps with room for a part of the batch", 6, "halved, same losses to 1e-6", time.monotonic() - began)


def test_halving_is_refused_where_it_is_not_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = line_run(tmp_path, loss={"loss": "kto", "beta": 1.0}, on_oom="halve")
    monkeypatch.setattr(run.modality, "score", failing(run.modality.score, lambda *_: True, ERRORS[0]))
    with pytest.raises(RunFailed, match="nearly the same step: loss kto reads statistics of the batch"):
        train.advance(run)


def test_one_pair_is_not_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = line_run(tmp_path, on_oom="halve", batch_size=1)
    monkeypatch.setattr(run.modality, "score", failing(run.modality.score, lambda *_: True, ERRORS[0]))
    with pytest.raises(RunFailed, match="1 pairs per pass") as raised:
        train.advance(run)
    assert "train.batch_size" not in str(raised.value)


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = line_run(tmp_path, on_oom="halve")
    monkeypatch.setattr(run.modality, "score", failing(run.modality.score, lambda *_: True, RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.advance(run)


def test_what_the_allocator_itself_says_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.exhausted(raised.value)


@pytest.mark.slow
def test_a_halved_run_is_taken_up_halved(tmp_path: Path) -> None:
    world = tiny_run.make_world(tmp_path)
    words = ("train.steps=2", "train.save_every=1", "eval.every=2", "train.on_oom=halve")
    run, _ = launch.build(
        resolved := tiny_run.load(world, tmp_path / "run", *words), tmp_path / "run", launch.build_objective(resolved)
    )
    run.progress.halvings = 1
    train.train(run, until=1)
    again, _ = launch.build(resolved, tmp_path / "run", launch.build_objective(resolved))
    assert resume(again) and again.progress.halvings == 1 and train.split(again) == (2, 2)


def test_evaluation_says_what_makes_it_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tiny_run.make_world(tmp_path)
    monkeypatch.setattr(launch, "evaluate_now", failing(launch.evaluate_now, lambda *_: True, ERRORS[0]))
    with pytest.raises(RunFailed, match=r"out of memory: CUDA out of memory.*not in a training step.*eval\.prompts"):
        launch.run(tiny_run.load(world, tmp_path / "run", "train.steps=1"))
