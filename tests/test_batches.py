"""One batch, however it is cut: accumulated, over two processes, or by torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpo import checkpoint, launch
from mmpo.runlog import read
from mmpo.train import train
from tests.tiny_run import line_pairs, line_run, make_world, weight
from tests.tiny_run import settings as tiny_settings
from tests.two_processes import ROOT, in_two_processes


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    whole, parts = line_run(tmp_path / "a", batch_size=8), line_run(tmp_path / "b", batch_size=2, accumulate=4)
    train(whole, 6)
    train(parts, 6)
    assert not torch.equal(weight(whole), weight(line_run(tmp_path / "c")))
    torch.testing.assert_close(weight(parts), weight(whole), rtol=0, atol=1e-6)
    for one, other in zip(read(whole.log.path), read(parts.log.path), strict=True):
        assert {k: v for k, v in one.items() if k[:2] not in ("t0", "t1", "t2", "t3")} == pytest.approx(
            {k: v for k, v in other.items() if k[:2] not in ("t0", "t1", "t2", "t3")}, abs=1e-6
        )


def both_ranks(folder: Path, case: str) -> list[dict[str, Any]]:
    """What `worker` prints in each of two processes, as JSON."""
    code = f"from tests.test_batches import worker; worker({str(folder)!r}, {case!r})"
    return [json.loads(said.splitlines()[-1]) for _, said in in_two_processes(code)]


def worker(folder: str, case: str) -> None:
    """One process of two; a batch of 4 each."""
    torch.set_num_threads(1)
    pairs = line_pairs(24)
    if case == "skip":
        pairs[3] = line_pairs(4, weight=float("nan"))[3]
    found = {}
    for loss in OVER_BATCH if case == "statistics" else [{"loss": "dpo", "beta": 1.0}]:
        run = line_run(
            Path(folder),
            pairs,
            loss,
            batch_size=4,
            on_nonfinite="skip",
            nonfinite_budget=1.0,
            lr=0.5 if case == "statistics" else 0.05,
        )
        assert run.accelerator.num_processes == 2
        train(run, 6)
        found[loss["loss"]] = weight(run).tolist()
    launch.leave_group(run)
    print(json.dumps({"weight": weight(run).tolist(), "skipped": run.progress.skipped_steps, "by_loss": found}))


OVER_BATCH: list[dict[str, Any]] = [
    {"loss": name, "beta": 1.0} for name in ("aot", "aot_unpaired", "bco", "bco_unpaired", "kto")
]


@pytest.mark.slow
def test_statistics_of_a_batch_are_those_of_all_processes(tmp_path: Path) -> None:
    """Losses that see the whole batch: two processes of 4 rows end where one of 8 does, and not where two batches of 4 do."""
    first, second = both_ranks(tmp_path, "statistics")
    assert first == second
    for loss in OVER_BATCH:
        one, apart = (
            line_run(tmp_path / str(n), line_pairs(24), loss, batch_size=8 // n, accumulate=n, lr=0.5) for n in (1, 2)
        )
        train(one, 6)
        train(apart, 6)
        torch.testing.assert_close(torch.tensor(first["by_loss"][loss["loss"]]), weight(one), rtol=0, atol=1e-5)
        assert not torch.allclose(weight(apart), weight(one), rtol=0, atol=1e-4), loss


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "skip"])
def test_two_processes_equal_one_of_twice_the_batch(tmp_path: Path, case: str) -> None:
    """Also when only one of them meets a loss that is not finite: both skip the step, none waits for the other."""
    pairs = line_pairs(24)
    if case == "skip":
        pairs[3] = line_pairs(4, weight=float("nan"))[3]
    (tmp_path / "two").mkdir()
    first, second = both_ranks(tmp_path / "two", case)
    one = line_run(tmp_path / "one", pairs, batch_size=8, on_nonfinite="skip", nonfinite_budget=1.0)
    train(one, 6)
    assert first == second and first["skipped"] == one.progress.skipped_steps == (2 if case == "skip" else 0)
    torch.testing.assert_close(torch.tensor(first["weight"]), weight(one), rtol=0, atol=1e-6)
    assert read(tmp_path / "two" / "log.1.jsonl") == []  # only the first process logs
    mine, theirs = read(one.log.path), read(tmp_path / "two" / "log.0.jsonl")
    assert [r["loss"] for r in mine if "loss" in r] == pytest.approx([r["loss"] for r in theirs if "loss" in r], abs=1e-6)


@pytest.mark.slow
def test_torchrun_with_two_processes_equals_one_of_twice_the_batch(tmp_path: Path) -> None:
    """The command line on a tiny Stable Diffusion: the same weights and losses, also by going on from a checkpoint."""
    world = make_world(tmp_path)

    def start(name: str, processes: int, *more: str) -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        words = ["train.steps=3", "train.save_every=2", "train.optimizer=sgd", "train.lr=0.1", "eval.every=2"]
        words = [*tiny_settings(world, world / name, *words, f"train.batch_size={8 // processes}"), *more]
        command = [sys.executable, *launcher, "-m", "mmpo", "train", "--modality", "diffusion", *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def trained(name: str) -> dict[str, torch.Tensor]:
        found = checkpoint.load_latest(world / name / "checkpoints")
        assert found is not None and found.step == 3
        return found.tensors["policy"]

    def back_to_step_2(name: str) -> None:
        pointer = world / name / "checkpoints" / "CURRENT"
        shutil.rmtree(pointer.with_name(pointer.read_text().strip()))
        pointer.unlink()
        (world / name / "summary.json").unlink()

    said = start("one", 1), start("two", 2)
    assert [text.count("self-check") for text in said] == [1, 1]  # one process speaks for both
    one, two = trained("one"), trained("two")
    moved = [float(v.abs().max()) for n, v in one.items() if "lora_B" in n]  # from 0
    assert min(moved) > 0 and max(moved) > 1e-3
    assert max(float((two[n] - v).abs().max()) for n, v in one.items()) < 1e-5
    losses = [[r["loss"] for r in read(world / name / "log.jsonl") if "loss" in r] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(set(losses[0])) == 3  # of terms of hundreds of nats
    back_to_step_2("two")
    assert start("two", 2).count("resumed at step 2") == 1
    assert all(torch.equal(v, two[n]) for n, v in trained("two").items())
    back_to_step_2("two")
    said_after = start("two", 1, "--allow-drift", "train.batch_size")
    assert "not bit-identical to a run without a break: processes 2, now 1" in said_after
    assert max(float((v - one[n]).abs().max()) for n, v in trained("two").items()) < 1e-5
