"""A signal in the middle of an evaluation: it is left at once, what the step made is saved, and a resumed run makes it up."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmpo import checkpoint, measures
from mmpo.evaluate import trials
from mmpo.interruption import Interrupted
from mmpo.judging import JudgeResult
from mmpo.pair import Block, text
from mmpo.progress import Run
from mmpo.reference import unwrap
from mmpo.runlog import read
from mmpo.saving import resume
from mmpo.train import train
from tests import tiny_run
from tests.tiny_run import line_pairs, line_run, weight


class Chooser(tiny_run.Line):
    """A line that also answers: a number of the seed and the weights."""

    def draw(self, encoded: Any, keys: Any, model: Any) -> Any:
        return super().draw(encoded, [replace(key, sample=key.sample.rpartition("/")[2]) for key in keys], model)

    def sample(self, model: Any, prompts: Any, seeds: Any) -> list[Block]:
        return [text(str(seed % 7 + float(weight_of(model).sum()))) for seed in seeds]


def weight_of(model: Any) -> torch.Tensor:
    return next(unwrap(model).parameters()).detach()


def judged_run(folder: Path, judge: Any) -> Run:
    """Six steps, evaluated after each second one on held-out pairs and judged samples, random numbers drawn on the way."""
    run = line_run(folder, optimizer="adamw")
    torch.manual_seed(0)
    run.recipe.eval.every = 2
    modality: Any = Chooser()
    run.modality, run.heldout, run.judge = modality, line_pairs(40)[24:], judge
    run.select = trials([(text("p"),)], run.recipe.eval.seeds, "select", 0)
    return run


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("place", ["judge", "pairs"])
def test_a_signal_breaks_an_evaluation_off_and_the_resumed_run_makes_it_up(
    tmp_path: Path, at: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a judge that takes a minute, or between two batches of pairs, of the first, the second and the last evaluation."""

    def judge(prompts: Any, answers: Any, slow: bool = False) -> JudgeResult:
        torch.rand(3)
        if slow:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return JudgeResult(torch.tensor([float(str(a[0].data)) for a in answers], dtype=torch.float64))

    whole = judged_run(tmp_path / "whole", judge)
    train(whole, 6)
    calls, run = [0], judged_run(tmp_path / "run", judge)

    def strikes(*given: Any) -> Any:
        calls[0] += 1
        if place == "judge":
            return judge(given[0], given[1], calls[0] == at)
        if calls[0] == (at - 1) * run.recipe.eval.draws + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(*given)

    measured, began = measures.of_batch, time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(run, "judge", strikes) if place == "judge" else patch.setattr(measures, "of_batch", strikes)
        with pytest.raises(Interrupted, match=f"SIGTERM: saved at step {2 * at};"):
            train(run, 6)
    assert time.monotonic() - began < 10 and [r["step"] for r in read(run.log.path) if r["event"] == "eval"] == [
        2 * n for n in range(1, at)
    ]
    again = judged_run(tmp_path / "run", judge)
    assert resume(again) and again.progress.due
    train(again, 6)
    assert torch.equal(weight(again), weight(whole)) and again.log.path.read_bytes() == whole.log.path.read_bytes()
    best = [folder / "best" / "policy.safetensors" for folder in (tmp_path / "run", tmp_path / "whole")]
    assert load_file(best[0])["weight"].equal(load_file(best[1])["weight"])
    found = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    expected = checkpoint.load_latest(tmp_path / "whole" / "checkpoints")
    assert found and expected and not found.meta["progress"]["due"]
    assert torch.equal(found.tensors["rng"]["torch"], expected.tensors["rng"]["torch"])
