"""Checkpoints: whole or not seen, after damage, kills at every call, and full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
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
from torch import Tensor

from mmpo.checkpoint import NAME, environment, load_latest, save, write_atomic, written_aside
from mmpo.runfolder import clear_leftovers
from tests.reliability.counters import counter

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
    other = next(p for p in path.parent.parent.glob("step-*") if p != path.parent) / path.name
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


@pytest.mark.slow
@pytest.mark.parametrize(("old", "keep"), [(True, 1), (True, 2), (False, 1)])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint_whole(tmp_path: Path, old: bool, keep: int):
    folder = tmp_path / "run"
    names = calls_of_a_save(fresh(folder, old), keep)
    assert {"open", "write", "fsync", "replace", "mkdir", "close"} <= set(names) and len(names) > 30
    torn = [lambda n: 1, lambda n: n // 2, lambda n: n - 1]
    seen, kills, began = set(), 0, time.monotonic()
    for at, name in enumerate(names):
        ways: list[dict[str, Any]] = [{}, {"after": True}, *({"part": p} for p in torn if name == "write")]
        for way in ways:
            killed_save(fresh(folder, old), Fault(at, lambda: os._exit(9), **way), keep)
            kills += 1
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
    what = f"kills at each call of a save{'' if old else ', the first'}"
    counter("T2", what, kills, "old or new whole", time.monotonic() - began)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_full_disk_at_any_call_leaves_the_old_checkpoint_and_nothing_partial(tmp_path: Path, code: int):
    folder = tmp_path / "run"
    names = calls_of_a_save(fresh(folder, True), 1)
    last = max(i for i, name in enumerate(names) if name == "write")

    def strike() -> None:
        raise OSError(code, os.strerror(code))

    assert names[:2] == ["mkdir", "mkdir"]  # the first is the run's folder, which is there already: no error
    began, places = time.monotonic(), [i for i in range(1, last + 1) if names[i] in ("write", "fsync", "mkdir", "replace")]
    for at in places:
        fresh(folder, True)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=os.strerror(code)):
            Fault(at, strike, part=lambda n: n // 2).install(patch)
            put(folder, 20, 1)
        assert holds(folder, 10) and not list(folder.glob(".*"))
        put(folder, 20, 1)
        assert holds(folder, 20)
    counter("T2", f"{errno.errorcode[code]} at each call of a save", len(places), "the old one whole", time.monotonic() - began)


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


def export(folder: Path, words: str) -> None:
    """What a library does that leaves a file of its own when it is killed."""
    with written_aside(folder) as aside:
        (aside / "config.json").write_text(words)
        (aside / "unet").mkdir()
        (aside / "unet" / ".tmp123").write_bytes(b"half")
        if words == "kill":
            os._exit(9)
        if words == "fail":
            raise OSError(errno.ENOSPC, "full")
        (aside / "unet" / ".tmp123").rename(aside / "unet" / "weights")


@pytest.mark.parametrize("first", [None, "", "old"])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, first: str | None):
    """first: what was there before; nothing, an empty folder, or an older export with a stranger's file."""
    target = tmp_path / "run" / "export"
    if first is not None:
        target.mkdir(parents=True)
    if first:
        export(target, first)
        (target / "notes.txt").write_text("mine")
    before = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="full"):
        export(target, "fail")
    child = os.fork()
    if not child:
        export(target, "kill")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    clear_leftovers(tmp_path / "run")
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    export(target, "new")
    found = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert found == {"config.json": "new", "unet/weights": "half"} | ({"notes.txt": "mine"} if first else {})
    assert not list((tmp_path / "run").glob(".*"))
