"""Checkpoints that are whole and verified, or not seen at all, whatever moment the process was killed at.

A checkpoint is a directory `step-000120.<digest>/` with one safetensors file per group of tensors, `state.json`, and
`MANIFEST.json`, written last, that lists the size and sha256 of every file; the digest in the name is the manifest's own.
It is built under a temporary name beside its final one, fsynced, renamed, read back, and only then named by `CURRENT`;
older ones are pruned after that. Nothing is pickled. The promises hold on local file systems; network file systems that
do not honour fsync, rename and flock void them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, distributed

NAME = re.compile(r"step-(\d{6,})\.([0-9a-f]{12})")
GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PACKAGES = ("mmpo", "torch", "numpy", "safetensors", "accelerate", "transformers", "diffusers", "peft")


@dataclass(frozen=True)
class Checkpoint:
    """One verified checkpoint, tensors on the CPU.

    skipped: (name, reason) of every damaged checkpoint that was passed over to reach this one.
    environment: where it was written (see `environment`); bit-identical continuation is promised only when it is equal.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]
    path: Path
    skipped: list[tuple[str, str]]
    environment: dict[str, str | int]


class RunBusy(ValueError):
    """Another live process is writing to the same run folder."""


# Bytes


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors in safetensors format; views and tied tensors are stored in full, each under its own name."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return safetensors.torch.save(plain)


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """The tensors of `to_bytes`, on the CPU; ValueError when the bytes are not safetensors."""
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`, durably: after a crash it holds the old bytes or the new ones, never a mixture.

    On an error (disk full) the old file is untouched and no partial file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        _write(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:  # one call writes at most 2 GiB
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Save


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], *, keep: int) -> Path:
    """Write, verify and commit a checkpoint, then delete all but the `keep` newest; returns its directory.

    tensors: groups (policy, optimizer, ema, rng, ...) of tensors by name. meta: anything JSON holds; its keys come back as
    strings, its tuples as lists, its floats exactly, also NaN and infinities. The caller holds the folder's `RunLock`:
    leftovers of killed writers are cleared first.

    Errors: ValueError for a bad argument or a meta that JSON cannot hold; OSError (disk full, read-only) with the older
    checkpoints intact and nothing partial under a final name.
    """
    _check_arguments(step, tensors, keep)
    state = _json({"step": step, "meta": meta})
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    temporary = folder / f".step-{step:06d}.tmp-{os.getpid()}"
    try:
        final = _commit(temporary, _build(temporary, step, tensors, state))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        error.add_note(f"the checkpoint of step {step} was not written; those in {folder} are as they were, resume from them")
        raise
    write_atomic(folder / "CURRENT", f"{final.name}\n".encode())
    for old in _ordered(folder)[keep:]:
        _remove(old)
    return final


def _check_arguments(step: int, tensors: Mapping[str, object], keep: int) -> None:
    if step < 0 or keep < 1:
        raise ValueError(f"checkpoint: expected step >= 0 and keep >= 1, got step={step}, keep={keep}")
    for group in tensors:
        if not GROUP.fullmatch(group):
            raise ValueError(f"checkpoint: tensor group {group!r} becomes a file name; use letters, digits, _ and - only")


def _json(value: Any) -> bytes:
    try:  # infinities stay as they are, beyond the standard: only `_load` reads this
        return json.dumps(value, indent=1, sort_keys=True).encode()
    except TypeError as error:
        raise ValueError(f"checkpoint: JSON cannot hold the meta ({error}); tensors go into a tensor group") from error


def _build(temporary: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: bytes) -> str:
    """Write all files, the manifest last; returns the final name. One group at a time is held in memory as bytes."""
    temporary.mkdir()
    files = {"state.json": _entry(temporary / "state.json", state)}
    for group, values in tensors.items():
        files[f"{group}.safetensors"] = _entry(temporary / f"{group}.safetensors", to_bytes(values))
    manifest = _json({"step": step, "files": files, "environment": environment()})
    _write(temporary / "MANIFEST.json", manifest)
    _sync_folder(temporary)
    return f"step-{step:06d}.{hashlib.sha256(manifest).hexdigest()[:12]}"


def _entry(path: Path, data: bytes) -> dict[str, str | int]:
    _write(path, data)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _commit(temporary: Path, name: str) -> Path:
    """Give the finished directory its final name and read it back from there."""
    final = temporary.with_name(name)
    if final.exists() and not _damage(final):  # the same step, replayed: the one that is there may be the only good one
        shutil.rmtree(temporary)
        return final
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    _sync_folder(final.parent)
    if damage := _damage(final):
        raise OSError(f"{final}: just written, but it reads back differently ({damage}); this disk cannot be trusted")
    return final


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with it, None when every byte is as written."""
    try:
        for _ in _verified(checkpoint):
            pass
    except ValueError as error:
        return str(error)
    return None


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its final name first, so that no half-deleted one is ever seen."""
    gone = checkpoint.with_name(f".{checkpoint.name}.tmp-{os.getpid()}")
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written under a folder. Only the holder of the run's lock may."""
    for path in sorted(folder.rglob(".*.tmp-*")):  # a folder comes before what is in it
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def environment() -> dict[str, str | int]:
    """What bit-exactness depends on besides the code and data: package versions, CPU threads, processes, devices."""
    versions = {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__}  # with its build: +cpu, +cu130
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    counts = {"threads": torch.get_num_threads(), "processes": processes}
    return {**versions, **counts, "machine": os.uname().machine, "devices": ", ".join(gpus) or "cpu"}


def changes(written: Mapping[str, str | int]) -> list[str]:
    """How this environment differs from the one a checkpoint was written in: ["threads 1, now 2", ...]."""
    here = environment()
    return [f"{k} {written.get(k, 'unknown')}, now {v}" for k, v in here.items() if written.get(k) != v]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# Load


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose every byte matches its manifest, or None when the folder has none at all.

    What `CURRENT` names comes first, then the others by step. Damaged ones are passed over with one warning and listed in
    `Checkpoint.skipped`. ValueError when there are checkpoints but none is whole: starting over would lose the run silently.
    """
    skipped: list[tuple[str, str]] = []
    for path in _ordered(folder):
        try:
            step, tensors, meta, where = _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.append((path.name, str(error)))
            continue
        if skipped:
            warnings.warn(f"{folder}: resuming from {path.name}; damaged and not used: {_list(skipped)}", stacklevel=2)
        return Checkpoint(step, tensors, meta, path, skipped, where)
    if skipped:
        raise ValueError(
            f"{folder}: every checkpoint is damaged: {_list(skipped)}. Restore one from a copy, "
            f"or move the folder away to start the run again from step 0"
        )
    return None


def _list(skipped: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in skipped)


def _ordered(folder: Path) -> list[Path]:
    """Checkpoints, best first: the committed one, then older ones from the newest on, then any beyond the committed step.

    The last are what a run that had to fall back left ahead of itself. A name that `CURRENT` holds is listed even when
    nothing is there, so that a lost checkpoint is reported.
    """
    steps = {path: int(match[1]) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))}
    pointer = folder / "CURRENT"
    if not pointer.exists():
        return sorted(steps, key=lambda p: (steps[p], p.name), reverse=True)
    named = NAME.fullmatch(pointer.read_bytes().decode(errors="replace").strip())
    if not named:
        return [pointer, *sorted(steps, key=lambda p: (steps[p], p.name), reverse=True)]
    current, at = folder / named[0], int(named[1])
    steps[current] = at
    return sorted(steps, key=lambda p: (p == current, steps[p] <= at, steps[p], p.name), reverse=True)


def _load(path: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any], dict[str, str | int]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, data in _verified(path):
        if name == "MANIFEST.json":
            manifest = json.loads(data)
        elif name == "state.json":
            state = json.loads(data)
        else:
            tensors[name.removesuffix(".safetensors")] = from_bytes(data)
    return state["step"], tensors, state["meta"], manifest["environment"]


def _verified(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file of a checkpoint, the manifest first; ValueError at the first that is not as written."""
    match = NAME.fullmatch(path.name)
    if not match:
        raise ValueError("does not name a checkpoint")
    data = _read(path / "MANIFEST.json")
    if hashlib.sha256(data).hexdigest()[:12] != match[2]:
        raise ValueError("MANIFEST.json does not match the digest in the directory's name")
    manifest = json.loads(data)
    if manifest["step"] != int(match[1]):
        raise ValueError(f"the directory's name says step {int(match[1])}, its manifest {manifest['step']}")
    yield "MANIFEST.json", data
    for name, entry in manifest["files"].items():
        data = _read(path / name)
        if len(data) != entry["size"]:
            raise ValueError(f"{name} has {len(data)} bytes, expected {entry['size']}")
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{name} does not match its sha256")
        yield name, data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


# Optimizer and random state


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors "<parameter>.<key>" and JSON: parameter names, shapes, settings, scalar state.

    names: every parameter's name, e.g. `{p: n for n, p in model.named_parameters()}`; ValueError for one that has none.
    Works on any optimizer whose state is tensors and JSON scalars per parameter, wrapped by accelerate or not.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        tensors |= {f"group {i}.{k}": v for k, v in settings.items() if isinstance(v, Tensor)}
        shapes = {_name(p, names): list(p.shape) for p in group["params"]}
        groups.append({"shapes": shapes, "settings": {k: v for k, v in settings.items() if not isinstance(v, Tensor)}})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{names[parameter]}.{key}"] = value
                else:
                    scalars.setdefault(names[parameter], {})[key] = value
    return tensors, {"groups": groups, "scalars": scalars}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Restore what `pack_optimizer` returned: the next step is bit-identical to the one the packed optimizer would take.

    ValueError names the first parameter that is missing, not expected, in another group or of another shape.
    """
    _check_parameters(optimizer, names, meta)
    owned = _by_owner(tensors)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [{**owned.get(names[p], {}), **meta["scalars"].get(names[p], {})} for p in parameters]
    groups = optimizer.state_dict()["param_groups"]
    for i, (group, packed) in enumerate(zip(groups, meta["groups"], strict=True)):
        settings = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in packed["settings"].items()}
        group.update(settings | owned.get(f"group {i}", {}))
    optimizer.load_state_dict({"state": {i: s for i, s in enumerate(state) if s}, "param_groups": groups})
    for parameter, values in zip(parameters, state, strict=True):
        for key, value in values.items():  # torch casts state to the parameter's dtype, and garbles strings
            if not isinstance(value, Tensor):
                optimizer.state[parameter][key] = value
            elif optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(parameter.device)


def _name(parameter: Tensor, names: Mapping[Tensor, str]) -> str:
    if parameter not in names:
        raise ValueError(f"optimizer: a parameter of shape {tuple(parameter.shape)} has no name; pass the whole model's names")
    return names[parameter]


def _by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Own copies, because optimizers update their state in place and two of them may be restored from one checkpoint."""
    owned: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        owned.setdefault(owner, {})[key] = value.clone()
    return owned


def _check_parameters(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], meta: Mapping[str, Any]) -> None:
    saved = {n: (i, shape) for i, group in enumerate(meta["groups"]) for n, shape in group["shapes"].items()}
    here = {_name(p, names): (i, list(p.shape)) for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for name in [*here, *saved]:
        if name not in saved:
            raise ValueError(f"optimizer: parameter {name} is not in the checkpoint; resume with the model it was saved from")
        if name not in here:
            raise ValueError(f"optimizer: the checkpoint has parameter {name}, this model does not train it")
        if here[name] != saved[name]:
            raise ValueError(
                f"optimizer: parameter {name}: the checkpoint has group {saved[name][0]}, shape {saved[name][1]}; "
                f"this model has group {here[name][0]}, shape {here[name][1]}"
            )
    if len(meta["groups"]) != len(optimizer.param_groups):
        raise ValueError(f"optimizer: the checkpoint has {len(meta['groups'])} groups, expected {len(optimizer.param_groups)}")


def rng_state() -> dict[str, Tensor]:
    """The global generators of python, numpy, torch and every initialised CUDA device, as tensors."""
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise ValueError(f"numpy's global generator is {state['bit_generator']}, expected MT19937: mmpo cannot save it")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python.words": torch.tensor([version, *words]),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.tensor([state["state"]["pos"], state["has_gauss"], *state["state"]["key"].tolist()]),
        "numpy.gauss": torch.tensor([state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        **{f"cuda.{i}": device for i, device in enumerate(cuda)},
    }


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Set the generators to what `rng_state` returned; warns when the checkpoint's CUDA devices are not all here."""
    version, *words = tensors["python.words"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python.gauss"].tolist()), None)))
    position, has_gauss, *keys = tensors["numpy.words"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, tensors["numpy.gauss"].item()))
    torch.set_rng_state(tensors["torch"])
    saved, here = sum(k.startswith("cuda.") for k in tensors), torch.cuda.device_count()
    if saved > here:
        warnings.warn(f"the checkpoint has {saved} CUDA generators, this machine {here}: not a bit-identical run", stacklevel=2)
    for i in range(min(saved, here)):
        torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


# Lock


class RunLock:
    """The right to write to a run folder, held from construction until `release` or the end of this process.

    A kernel lock (flock) on `run.lock`: when the holder dies, however it dies, the lock is free. Inside the file: the
    holder's pid, host and start of the lock. RunBusy when another holder is alive. Forked children do not share it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 1000, 0).decode(errors="replace")
            self._close()
            raise RunBusy(f"{folder} is being written by another process: {holder or 'just started'}. Stop it first") from error
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()} since {started}".encode(), 0)
        os.register_at_fork(after_in_child=self._close)  # a surviving data loader worker must not hold a dead run's lock

    def release(self) -> None:
        """Let others write."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
