"""Checkpoints that are whole and verified, or not seen at all, whatever moment the process was killed at.

A checkpoint is a directory `step-000120.<digest>/` with one safetensors file per group of tensors, `state.json`, and
`MANIFEST.json`, written last, that lists the size and BLAKE3 of every file; the digest in the name is the manifest's own.
It is built under a temporary name beside its final one, fsynced, renamed, read back, and only then named by `CURRENT`;
older ones are pruned after that. Nothing is pickled. The promises hold on local file systems; network file systems that
do not honour fsync, rename and flock void them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor, distributed

from mmpo import runfolder
from mmpo.errors import RunFailed

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


# Bytes


def to_bytes(tensors: Mapping[str, Tensor], *, sealed: bool = False) -> bytes:
    """The tensors in safetensors format; views and tied tensors are stored in full, each under its own name.

    sealed: with a digest of the content inside, for a file that no manifest vouches for; `from_bytes` checks it.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return safetensors.torch.save(plain, {"blake3": digest_tensors(plain)} if sealed else None)


def from_bytes(data: bytes, *, sealed: bool = False) -> dict[str, Tensor]:
    """The tensors of `to_bytes`, on the CPU; ValueError when the bytes are not safetensors, or not what was sealed."""
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    if sealed:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if header.get("__metadata__", {}).get("blake3") != digest_tensors(tensors):
            raise ValueError("the tensors do not match the digest that was written with them")
    return tensors


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE3, in hex, of names, dtypes, shapes and bytes, in the order of the names."""
    h = blake3()
    for name, tensor in sorted(tensors.items()):
        h.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


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


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, for libraries that write many files; they are there when the block has ended, durably.

    All at once where `folder` is new or empty, else one by one beside what is there. After an error nothing has changed.
    """
    aside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
        for path in files:
            _sync(path)
        if folder.exists() and any(folder.iterdir()):
            for path in files:
                place = folder / path.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
                _sync_folder(place.parent)
        else:
            os.replace(aside, folder)
            _sync_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(folder.parent)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:  # one call writes at most 2 GiB
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    except OSError as error:
        error.filename = str(path)  # a descriptor has no name
        raise
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    _sync(folder, os.O_DIRECTORY)


def _sync(path: Path, more: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | more)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_best(run: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace best/policy.safetensors of a run's folder, sealed."""
    (run / "best").mkdir(exist_ok=True)
    write_atomic(run / "best" / "policy.safetensors", to_bytes(tensors, sealed=True))


def read_best(run: Path) -> dict[str, Tensor]:
    """The best weights of a run so far. Raises RunFailed when they are not there, or not as they were written."""
    path = run / "best" / "policy.safetensors"
    try:
        return from_bytes(path.read_bytes(), sealed=True)
    except (OSError, ValueError) as error:
        raise RunFailed(
            f"{path}: the best weights cannot be used ({error}). Put them back from a copy; the newest ones are "
            f"policy.safetensors of the newest checkpoint under {run / 'checkpoints'}"
        ) from error


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
    runfolder.remove_leftovers(folder.iterdir(), runfolder.CHECKPOINT)
    temporary = folder / f".step-{step:06d}.tmp-{os.getpid()}"
    try:
        final = _commit(temporary, _build(temporary, step, tensors, state))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        error.add_note(f"the checkpoint of step {step} was not written; those in {folder} are as they were, resume from them")
        raise
    write_atomic(folder / "CURRENT", f"{final.name}\n".encode())
    ordered = _ordered(folder)
    twins = [p for p in ordered if p.stem == final.stem and p != final]  # of the same step, from before a fall-back
    for old in [*twins, *[p for p in ordered if p not in twins][keep:]]:
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
    return f"step-{step:06d}.{blake3(manifest).hexdigest()[:12]}"


def _entry(path: Path, data: bytes) -> dict[str, str | int]:
    _write(path, data)
    return {"size": len(data), "blake3": blake3(data).hexdigest()}


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
    if blake3(data).hexdigest()[:12] != match[2]:
        raise ValueError("MANIFEST.json does not match the digest in the directory's name")
    manifest = json.loads(data)
    if manifest["step"] != int(match[1]):
        raise ValueError(f"the directory's name says step {int(match[1])}, its manifest {manifest['step']}")
    yield "MANIFEST.json", data
    for name, entry in manifest["files"].items():
        data = _read(path / name)
        if len(data) != entry["size"]:
            raise ValueError(f"{name} has {len(data)} bytes, expected {entry['size']}")
        if blake3(data).hexdigest() != entry["blake3"]:
            raise ValueError(f"{name} does not match its BLAKE3")
        yield name, data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
