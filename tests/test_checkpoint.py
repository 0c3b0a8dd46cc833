"""Checkpoints: whole or not seen, after damage, kills at every call, and full disks; resumed training is bit-identical."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmpo.checkpoint import (
    NAME,
    RunBusy,
    RunLock,
    environment,
    load_latest,
    pack_optimizer,
    restore_rng,
    rng_state,
    save,
    unpack_optimizer,
    write_atomic,
)

GROUPS = ("policy", "optimizer")
CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir", "close")


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that reached the kernel, so these tests need fsync's calls, not its waiting."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def content(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {group: {"a.weight": torch.rand(5, 3, generator=generator), "step": torch.tensor(step)} for group in GROUPS}


def put(folder: Path, step: int, keep: int = 3) -> Path:
    return save(folder, step, content(step), {"step": step, "cursor": [step, 0.1]}, keep=keep)


def holds(folder: Path, *steps: int) -> int:
    """The folder's newest checkpoint is one of `steps`, bit for bit; returns which."""
    checkpoint = load_latest(folder)
    assert checkpoint is not None and checkpoint.step in steps
    expected = content(checkpoint.step)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[g][n], t) for g, values in expected.items() for n, t in values.items())
    assert checkpoint.meta == {"step": checkpoint.step, "cursor": [checkpoint.step, 0.1]}
    return checkpoint.step


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# Saving and loading


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path):
    assert load_latest(tmp_path) is None and load_latest(tmp_path / "absent") is None


def test_layout_pruning_and_manifest(tmp_path: Path):
    for step in (10, 20, 30):
        path = put(tmp_path, step, keep=2)
    assert re.fullmatch(r"step-000030\.[0-9a-f]{12}", path.name)
    assert [name.split(".")[0] for name in files(tmp_path)] == ["CURRENT", "step-000020", "step-000030"]
    assert (tmp_path / "CURRENT").read_text() == path.name + "\n"
    assert files(path) == sorted(["MANIFEST.json", "state.json", *(f"{g}.safetensors" for g in GROUPS)])
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["environment"] == environment() and manifest["environment"]["torch"] == torch.__version__
    assert {n: e["size"] for n, e in manifest["files"].items()} == {
        p.name: p.stat().st_size for p in path.iterdir() if p.name != "MANIFEST.json"
    }
    assert holds(tmp_path, 30) == 30


def test_dtypes_views_ties_and_empty_groups_survive(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    values = {
        "base": base,
        "view": base[1],
        "transposed": base.t(),
        "tied": base,
        "bf16": base.bfloat16(),
        "none": torch.zeros(0, 2),
    }
    save(tmp_path, 0, {"policy": values, "ema": {}}, {}, keep=1)
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.tensors["ema"] == {}
    assert all(
        torch.equal(checkpoint.tensors["policy"][n], t) and checkpoint.tensors["policy"][n].dtype == t.dtype
        for n, t in values.items()
    )


def test_floats_of_the_meta_come_back_exactly(tmp_path: Path):
    floats = [float("-inf"), float("inf"), 0.1, -0.0, 5e-324, 1.7976931348623157e308]
    save(tmp_path, 0, {}, {"floats": floats, "nan": float("nan")}, keep=1)
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and list(map(repr, checkpoint.meta["floats"])) == list(map(repr, floats))
    assert np.isnan(checkpoint.meta["nan"])


def test_saving_the_same_step_again_keeps_one_whole_checkpoint(tmp_path: Path):
    first = put(tmp_path, 10)
    assert put(tmp_path, 10) == first
    (first / "policy.safetensors").write_bytes(b"")
    assert put(tmp_path, 10) == first and holds(tmp_path, 10)
    assert len(files(tmp_path)) == 2


def test_a_run_that_fell_back_prunes_what_it_left_ahead(tmp_path: Path):
    put(tmp_path, 10)
    (put(tmp_path, 30) / "state.json").write_bytes(b"{}")
    with pytest.warns(UserWarning, match="step-000030.*state.json has 2 bytes"):
        assert holds(tmp_path, 10)
    put(tmp_path, 20, keep=2)
    assert [name[:11] for name in files(tmp_path)] == ["CURRENT", "step-000010", "step-000020"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, {}, {}, 1), "step >= 0"),
        ((1, {}, {}, 0), "keep >= 1"),
        ((1, {"../x": {}}, {}, 1), "'../x'"),
        ((1, {}, {"x": torch.ones(1)}, 1), "JSON cannot hold"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path, arguments: tuple, message: str):
    step, tensors, meta, keep = arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        save(tmp_path / "run", step, tensors, meta, keep=keep)
    assert not (tmp_path / "run").exists()


# Damage


def damages(path: Path) -> Iterator[Callable[[], object]]:
    """Every way to damage one file: delete, empty, truncate, extend, flip a bit, exchange for another step's."""
    data = path.read_bytes()
    other = next(p for p in path.parent.parent.glob("step-000010*")) / path.name
    yield path.unlink
    yield partial(path.write_bytes, other.read_bytes())
    yield partial(path.write_bytes, data + b"\0")
    for length in sorted({0, 1, 7, 8, len(data) // 4, len(data) // 2, len(data) - 8, len(data) - 1}):
        yield partial(path.write_bytes, data[:length])
    for i in range(20):
        at = (i * len(data)) // 20
        yield partial(path.write_bytes, data[:at] + bytes([data[at] ^ (1 << i % 8)]) + data[at + 1 :])


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", *(f"{g}.safetensors" for g in GROUPS)])
def test_no_damaged_file_is_ever_loaded(tmp_path: Path, name: str):
    put(tmp_path, 10)
    path = put(tmp_path, 20) / name
    whole = path.read_bytes()
    for harm in damages(path):
        harm()
        with pytest.warns(UserWarning, match=f"resuming from step-000010.*{path.parent.name}.*{name}") as caught:
            assert holds(tmp_path, 10) == 10
        assert len(caught) == 1 and "\n" not in str(caught[0].message)
        path.write_bytes(whole)
        assert holds(tmp_path, 20) == 20


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(tmp_path, 10)
    before = files(tmp_path)

    def interrupt(fd: int, data: memoryview) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        put(tmp_path, 20)
    assert files(tmp_path) == before and "step 20 was not written" in caught.value.__notes__[0]


@pytest.mark.parametrize("text", [b"", b"step-000030.0123456789ab\n", b"../../etc", b"\xff\x00", b"step-000020", None])
def test_a_damaged_pointer_costs_nothing(tmp_path: Path, text: bytes | None):
    put(tmp_path, 10)
    put(tmp_path, 20)
    if text is None:
        (tmp_path / "CURRENT").unlink()
        assert holds(tmp_path, 20)
        return
    (tmp_path / "CURRENT").write_bytes(text)
    with pytest.warns(UserWarning, match="damaged and not used"):
        assert holds(tmp_path, 20)


def test_renamed_and_lost_checkpoints_are_not_believed(tmp_path: Path):
    put(tmp_path, 10)
    newest = put(tmp_path, 20)
    moved = newest.rename(newest.with_name(newest.name.replace("20.", "30.")))
    with pytest.warns(UserWarning) as caught:
        checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 10 and len(caught) == 1
    assert checkpoint.skipped == [(newest.name, "MANIFEST.json cannot be read: No such file or directory")]
    shutil.rmtree(checkpoint.path)
    with pytest.raises(ValueError, match=f"{moved.name}.*name says step 30, its manifest 20"):
        load_latest(tmp_path)


def test_when_nothing_is_whole_the_run_is_not_restarted_silently(tmp_path: Path):
    for step in (10, 20):
        (put(tmp_path, step) / "policy.safetensors").unlink()
    with pytest.raises(ValueError, match="every checkpoint is damaged.*step-000020.*step-000010.*move the folder away"):
        load_latest(tmp_path)
    for path in tmp_path.glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        load_latest(tmp_path)


# Kills and full disks


class Fault:
    """Counts system calls and strikes at the n-th: `part` of a write's bytes are written first (None: not even called)."""

    def __init__(self, at: int, strike: Callable[[], object], part: Callable[[int], int] | None = None, after: bool = False):
        self.at, self.strike, self.part, self.after = at, strike, part, after
        self.names: list[str] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 != self.at:
                return real(*args, **kwargs)
            if name == "write" and self.part:
                real(args[0], args[1][: self.part(len(args[1]))])
            elif self.after:
                with suppress(OSError):
                    real(*args, **kwargs)
            return self.strike()

        return call


def calls_of_a_save(folder: Path, keep: int) -> list[str]:
    fault = Fault(-1, lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        fault.install(patch)
        put(folder, 20, keep)
    return fault.names


def fresh(folder: Path, old: bool) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old:
        put(folder, 10)
    return folder


def killed_save(folder: Path, fault: Fault, keep: int) -> None:
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            fault.install(patch)
            put(folder, 20, keep)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(("old", "keep"), [(True, 1), (True, 2), (False, 1)])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint_whole(tmp_path: Path, old: bool, keep: int):
    folder = tmp_path / "run"
    names = calls_of_a_save(fresh(folder, old), keep)
    assert {"open", "write", "fsync", "replace", "mkdir", "close"} <= set(names) and len(names) > 30
    torn = [lambda n: 1, lambda n: n // 2, lambda n: n - 1]
    seen = set()
    for at, name in enumerate(names):
        ways: list[dict[str, Any]] = [{}, {"after": True}, *({"part": p} for p in torn if name == "write")]
        for way in ways:
            killed_save(fresh(folder, old), Fault(at, lambda: os._exit(9), **way), keep)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if old or load_latest(folder):
                    seen.add(holds(folder, 10, 20))
                for path in folder.glob("step-*"):
                    assert NAME.fullmatch(path.name) and len(files(path)) == len(GROUPS) + 2
                put(folder, 20, keep)
                assert holds(folder, 20)
            assert not list(folder.glob(".*")) and len(list(folder.glob("step-*"))) == (2 if old and keep == 2 else 1)
    assert seen == ({10, 20} if old else {20})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_full_disk_at_any_call_leaves_the_old_checkpoint_and_nothing_partial(tmp_path: Path, code: int):
    folder = tmp_path / "run"
    names = calls_of_a_save(fresh(folder, True), 1)
    last = max(i for i, name in enumerate(names) if name == "write")

    def strike() -> None:
        raise OSError(code, os.strerror(code))

    assert names[:2] == ["mkdir", "mkdir"]  # the first is the run's folder, which is there already: no error
    for at in [i for i in range(1, last + 1) if names[i] in ("write", "fsync", "mkdir", "replace")]:
        fresh(folder, True)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=os.strerror(code)):
            Fault(at, strike, part=lambda n: n // 2).install(patch)
            put(folder, 20, 1)
        assert holds(folder, 10) and not list(folder.glob(".*"))
        put(folder, 20, 1)
        assert holds(folder, 20)


def test_write_atomic_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "recipe.yaml"
    write_atomic(path, b"old")
    write_atomic(path, b"new" * 100_000)
    assert path.read_bytes() == b"new" * 100_000

    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"new" * 100_000 and files(tmp_path) == ["recipe.yaml"]


# Optimizer and random state


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def names_of(model: nn.Module) -> dict[Tensor, str]:
    return {p: n for n, p in model.named_parameters()}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, amsgrad=True
    )


def tensor_lr(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def averaged(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Rprop(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: int) -> list[float]:
    """Draws from all three global generators, so that restoring any of them wrongly changes the result."""
    losses = []
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 6) + random.gauss(0, 1) + np.random.standard_normal()
        loss = (model(x.to(dtype)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(4)


def start(build: Callable[[nn.Module], Any], dtype: torch.dtype, wrap: bool) -> tuple[nn.Module, Any, Any]:
    model = network(dtype)
    optimizer = build(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step) if build is not tensor_lr else _Constant()
    return model, Accelerator(cpu=True).prepare_optimizer(optimizer) if wrap else optimizer, schedule


class _Constant:
    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [adamw, momentum, tensor_lr, averaged])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, build: Callable, dtype: torch.dtype, wrap: bool):
    seed_all()
    model, optimizer, schedule = start(build, dtype, wrap)
    train(model, optimizer, schedule, 10)
    state, meta = pack_optimizer(optimizer, names_of(model))
    tensors = {"policy": dict(model.state_dict()), "optimizer": state, "rng": rng_state()}
    save(tmp_path, 10, tensors, {"optimizer": meta, "schedule": schedule.state_dict()}, keep=1)
    losses = train(model, optimizer, schedule, 10)

    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None
    for _ in range(2):  # the second resume must not see what the first one did to the checkpoint's tensors
        resumed, its_optimizer, its_schedule = start(build, dtype, wrap)
        torch.randn(3), random.random(), np.random.random()
        resumed.load_state_dict(checkpoint.tensors["policy"])
        its_schedule.load_state_dict(checkpoint.meta["schedule"])
        unpack_optimizer(its_optimizer, names_of(resumed), checkpoint.tensors["optimizer"], checkpoint.meta["optimizer"])
        restore_rng(checkpoint.tensors["rng"])
        assert train(resumed, its_optimizer, its_schedule, 10) == losses
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_full_precision_state_of_half_precision_weights_keeps_its_bits():
    model = network(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.rand(p.shape),
            "exp_avg_sq": torch.rand(p.shape),
            "kind": "x",
        }
    tensors, meta = pack_optimizer(optimizer, names_of(model))
    other = network(torch.bfloat16)
    restored = torch.optim.AdamW(other.parameters())
    unpack_optimizer(restored, names_of(other), tensors, json.loads(json.dumps(meta)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert restored.state[q]["kind"] == "x"
        assert torch.equal(optimizer.state[p]["exp_avg"], restored.state[q]["exp_avg"])


def test_unpack_names_the_first_parameter_that_does_not_fit():
    model = network()
    optimizer = momentum(model)
    train(model, optimizer, _Constant(), 1)
    tensors, meta = pack_optimizer(optimizer, names_of(model))

    def resume(other: nn.Module, parameters: Any = None) -> None:
        its = torch.optim.SGD(parameters or other.parameters(), lr=1e-2, momentum=0.9)
        unpack_optimizer(its, names_of(other), tensors, meta)

    deeper = network()
    deeper.add_module("4", nn.Linear(1, 1))
    with pytest.raises(ValueError, match="parameter 4.weight is not in the checkpoint"):
        resume(deeper)
    shallow = network()
    with pytest.raises(ValueError, match="the checkpoint has parameter 3.weight"):
        resume(shallow, list(shallow.parameters())[:2])
    wide = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
    with pytest.raises(ValueError, match=r"parameter 0.weight.*shape \[16, 6\].*shape \[16, 7\]"):
        resume(wide)
    split = network()
    with pytest.raises(ValueError, match=r"parameter 3.weight: the checkpoint has group 0.*has group 1"):
        resume(split, [{"params": list(split.parameters())[:2]}, {"params": list(split.parameters())[2:]}])
    with pytest.raises(ValueError, match=r"shape \(16, 6\) has no name"):
        pack_optimizer(optimizer, {})


def test_generators_continue_where_they_were(monkeypatch: pytest.MonkeyPatch):
    seed_all()
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(1)  # each keeps a spare normal draw
    state = rng_state()

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random(), *torch.randn(3).tolist()]

    expected = draw()
    assert draw() != expected
    restore_rng(state)
    assert draw() == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.warns(UserWarning, match="has 1 CUDA generators, this machine 0: not a bit-identical run"):
        restore_rng({**state, "cuda.0": state["torch"]})


# Lock


def in_child(action: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
        except RunBusy:
            os._exit(3)
        os._exit(0)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path):
    with RunLock(tmp_path / "run") as lock:
        with pytest.raises(RunBusy, match=rf"run is being written.*pid {os.getpid()} on {os.uname().nodename} since 20\d\d-"):
            RunLock(tmp_path / "run")
        assert isinstance(lock, RunLock)
        assert exit_code(in_child(lambda: RunLock(tmp_path / "run"))) == 3
    assert exit_code(in_child(lambda: RunLock(tmp_path / "run"))) == 0


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_lock_of_a_killed_process_is_free_even_while_its_workers_live(tmp_path: Path):
    def hold_and_wait() -> None:
        lock = RunLock(tmp_path)
        worker = in_child(lambda: time.sleep(20))
        (tmp_path / "worker").write_text(str(worker))
        time.sleep(20)
        lock.release()

    holder = in_child(hold_and_wait)
    worker = tmp_path / "worker"
    wait_for(lambda: worker.exists() and worker.read_text())
    with pytest.raises(RunBusy, match=f"pid {holder} on"):
        RunLock(tmp_path)
    os.kill(holder, signal.SIGKILL)
    exit_code(holder)
    os.kill(int(worker.read_text()), 0)  # the worker is alive
    with RunLock(tmp_path):
        os.kill(int(worker.read_text()), signal.SIGKILL)
