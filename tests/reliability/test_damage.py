"""T3: whatever happens to a file of the newest checkpoint, it is noticed, and the run ends with the same bits all the same."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from accelerate.utils import set_seed

from mmpo import launch
from mmpo.checkpoint import _damage
from mmpo.errors import RunFailed
from mmpo.progress import Run
from mmpo.saving import load_best, resume
from mmpo.train import train
from tests.killed_runs import JUDGE, content, differences, fork, outcome, ready, run_server, stop_at
from tests.reliability.counters import FULL, counter
from tests.test_checkpoint import damages
from tests.tiny_run import line_run, load, make_world

WORDS = (JUDGE, "train.steps=12", "train.save_every=3", "eval.every=6")


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is killed here, so that nobody has to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "CURRENT").read_text().strip()


def result(run: Path) -> dict[str, bytes]:
    """The log, and the tensors of the newest checkpoint."""
    return {p.name: content(p) for p in (run / "log.0.jsonl", *newest(run).glob("*.safetensors"))}


def seeded(folder: Path) -> Run:
    set_seed(0)
    return line_run(folder, optimizer="adamw", save_every=2, keep=2)


@pytest.mark.slow
def test_every_damage_is_noticed_and_costs_no_bit(tmp_path: Path) -> None:
    """Of a one-layer run with checkpoints of steps 2 and 4, cut off there and taken up again after each damage."""
    began, done, half = time.monotonic(), 0, tmp_path / "half"
    train(seeded(tmp_path / "whole"), 6)
    train(seeded(half), 4)
    expected, trial = result(tmp_path / "whole"), tmp_path / "trial"
    names = sorted(p.name for p in newest(half).iterdir())
    assert names == ["MANIFEST.json", "optimizer.safetensors", "policy.safetensors", "rng.safetensors", "state.json"]
    for name in names:
        whole = (newest(half) / name).read_bytes()
        for number in range(len(list(damages(newest(half) / name)))):
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(half, trial)
            damaged = newest(trial)
            list(damages(damaged / name))[number]()
            if (damaged / name).exists() and (damaged / name).read_bytes() == whole:
                continue  # two steps had the same file, so that exchanging it changed nothing
            again = seeded(trial)
            with pytest.warns(UserWarning, match=f"resuming from step-000002.*{damaged.name}.*{name}"):
                assert resume(again) and again.progress.step == 2
            train(again, 6)
            assert result(trial) == expected, (name, number)
            assert [_damage(path) for path in (trial / "checkpoints").glob("step-*")] == [None, None]
            done += 1
    counter("T3", f"damages of {len(names)} files, resumed", done, "all noticed, 0 results differ", time.monotonic() - began)
    assert done >= 150


def test_damaged_best_weights_are_never_used(tmp_path: Path) -> None:
    """They stand beside the checkpoints, so no manifest vouches for them; a digest inside does."""
    began, done = time.monotonic(), 0
    run = line_run(tmp_path)
    train(run, 2)
    best = tmp_path / "best" / "policy.safetensors"
    whole = best.read_bytes()
    (tmp_path / "copies" / "step-a").mkdir(parents=True)
    (tmp_path / "copies" / "step-b").mkdir()
    copy, other = tmp_path / "copies" / "step-a" / best.name, tmp_path / "copies" / "step-b" / best.name
    for file in (copy, other):
        file.write_bytes(whole if file is copy else b"another run's")
    load_best(run)
    for number in range(len(list(damages(copy)))):
        copy.write_bytes(whole)
        list(damages(copy))[number]()
        if copy.exists():
            best.write_bytes(copy.read_bytes())
        else:
            best.unlink()
        with pytest.raises(RunFailed, match="best weights cannot be used"):
            load_best(run)
        done += 1
    counter("T3", "damages of the best weights", done, "all noticed", time.monotonic() - began)


# ---- a whole run


def serve(world: str, each: int) -> None:
    """A run that is left alone, one that stops half-way, and copies of it that are damaged and run to their end."""
    ready()
    base = Path(world)
    assert fork(lambda: launch.run(load(base, base / "whole", *WORDS)), base / "said.txt") == 0
    assert fork(lambda: _stopped(base), base / "said.txt") == 0
    names, done = sorted(p.name for p in newest(base / "half").iterdir()), 0
    for name in names:
        count = len(list(damages(newest(base / "half") / name)))
        for number in sorted({i * count // each for i in range(min(each, count))}):
            run = base / f"damaged-{done}"
            shutil.copytree(base / "half", run)
            damaged = newest(run) / name
            list(damages(damaged))[number]()
            if damaged.exists() and damaged.read_bytes() == (newest(base / "half") / name).read_bytes():
                shutil.rmtree(run)
                continue  # two steps had the same file, so that exchanging it changed nothing
            assert fork(lambda r=run: launch.run(load(base, r, *WORDS)), base / f"{run.name}.txt") == 0  # type: ignore[misc]
            assert "resumed at step 3 " in (base / f"{run.name}.txt").read_text()
            done += 1
    print(json.dumps([done]))


def _stopped(base: Path) -> int:
    stop_at(6)
    return launch.run(load(base, base / "half", *WORDS))


@pytest.mark.slow
def test_a_diffusion_run_survives_damage(tmp_path: Path) -> None:
    began, world = time.monotonic(), make_world(tmp_path)
    (done,) = run_server("reliability.test_damage", f"serve({str(world)!r}, {31 if FULL else 1})")
    assert isinstance(done, int) and done >= 5
    expected = outcome(world / "whole")
    wrong = {n: found for n in range(done) if (found := differences(world / f"damaged-{n}", expected))}
    counter("T3", "damages of a diffusion run's files", done, f"{len(wrong)} outcomes differ", time.monotonic() - began)
    assert not wrong
