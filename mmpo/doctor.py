"""What this installation and machine can do, and the command that mends each thing that is broken.

Nothing here trusts what it examines: a package may be missing, of a wrong version, or fail to import, and the others are
still told. torch is imported only while examining, so that `mmpo --help` stays fast.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import mmpo
from mmpo.network import OFFLINE

FINE, NOTE, BROKEN = "ok", "note", "broken"
DISK = 64 * 2**20  # bytes; the folder of `mmpo train --modality diffusion` is 12 MB, one checkpoint more while saving
OTHERS = "other recipes about 12 bytes a trained parameter (AdamW, fp32) for each of train.keep + 1 checkpoints, and the cache"
MEMORY = 2 * 2**30  # bytes; the same run holds 1.4 GiB at most
ASSETS = ("model_index.json", "candidates.parquet")
FAMILY = ("torch", "torchvision", "torchaudio")  # built against one another


@dataclass(frozen=True)
class Check:
    """One line of the table. state: ok, note (works without it) or broken; fix: the command that mends it."""

    name: str
    state: str
    found: str
    fix: str = ""


def examine(folder: Path | None = None) -> list[Check]:
    """All checks. folder: where runs would be written; default: the current one."""
    needs = [Requirement(line) for line in _requires("mmpo")]
    return [
        _python(),
        *_packages(needs),
        *_torch_family(needs),
        *_devices(),
        _memory(),
        _disk(folder or Path.cwd()),
        _shipped(),
        *_extras(needs),
        _network(),
    ]


def table(checks: Iterable[Check]) -> list[str]:
    """The lines to print; each thing to mend has its command below it."""
    rows = list(checks)
    width = max(len(c.name) for c in rows)
    lines = []
    for check in rows:
        lines.append(f"{check.state:<6}  {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<{8 + width}}  mend it: {check.fix}")
    broken = [c.name for c in rows if c.state == BROKEN]
    return [*lines, f"{len(broken)} broken: {', '.join(broken)}" if broken else "nothing is broken"]


def _python() -> Check:
    """pip itself refuses an interpreter that is too old."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}; mmpo {mmpo.__version__}"
    return Check("python", FINE, found)


def _packages(needs: list[Requirement]) -> Iterator[Check]:
    """One check per dependency, and one that the installation itself is known."""
    if not needs:
        yield Check("mmpo", BROKEN, "not installed, so its dependencies are unknown", "pip install --editable .")
    for need in needs:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            version = _version(need.name)
            state = FINE if version and need.specifier.contains(version, prereleases=True) else BROKEN
            expected = "" if state == FINE else f"; expected {need.specifier or 'any version'}"
            yield Check(need.name, state, f"{version or 'missing'}{expected}", "" if state == FINE else _install([need]))


def _torch_family(needs: list[Requirement]) -> Iterator[Check]:
    """Whether torch, torchvision and torchaudio say that they fit, and load together."""
    ours = [n for n in needs if n.name in FAMILY] or [Requirement(n) for n in FAMILY]
    fix = _install(ours).replace("install", "install --upgrade --force-reinstall", 1)
    torch = _version("torch")
    for name in FAMILY:
        wanted = next((r.specifier for r in map(Requirement, _requires(name)) if r.name == "torch"), None)
        try:
            found = f"{importlib.import_module(name).__version__} loads"
        except Exception as error:  # a library of another build fails in ways of its own: OSError, RuntimeError, ...
            yield Check(f"load {name}", BROKEN, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", fix)
            continue
        if torch and wanted is not None and not wanted.contains(torch, prereleases=True):
            yield Check(f"load {name}", BROKEN, f"{found}, but it was built for torch {wanted}, not {torch}", fix)
        else:
            yield Check(f"load {name}", FINE, found)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception:  # told by the check of torch itself
        return
    yield Check("cpu", FINE, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")
    for i in range(torch.cuda.device_count()):
        yield _gpu(torch.cuda, i)
    if (count := torch.cuda.device_count()) > 1:
        all_of_them = f"torchrun --nproc-per-node={count} -m mmpo train ..."
        yield Check("gpus", FINE, f"{all_of_them} trains on all {count}; train.fsdp=true shards the model over them")
    if Path("/proc/driver/nvidia/version").exists() and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for the CPU only"
        advice = "nvidia-smi" if torch.version.cuda else "pip install --force-reinstall torch torchvision torchaudio"
        yield Check("gpu", NOTE, f"an NVIDIA driver is there, but torch ({build}) cannot use it", advice)


def _gpu(cuda: Any, i: int) -> Check:
    try:
        free, total = cuda.mem_get_info(i)
    except RuntimeError as error:
        return Check(f"gpu {i}", BROKEN, str(error).splitlines()[0], "nvidia-smi")
    bf16 = "" if cuda.is_bf16_supported() else "; no bf16, use train.precision: fp16"
    return Check(f"gpu {i}", FINE, f"{cuda.get_device_name(i)}, {_size(free)} free of {_size(total)}{bf16}")


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{_size(total)}; a default run holds up to {_size(MEMORY)}"
    if total >= MEMORY:
        return Check("memory", FINE, found)
    return Check("memory", BROKEN, found, "mmpo train --modality diffusion train.batch_size=4 train.accumulate=4")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    found = f"{_size(free)} free in {folder}; the default diffusion run needs {_size(DISK)}, {OTHERS}"
    if not os.access(folder, os.W_OK):
        return Check("disk", BROKEN, f"{folder} cannot be written", "mmpo train --modality diffusion out=DIR")
    return Check("disk", FINE if free >= DISK else BROKEN, found, "" if free >= DISK else f"du -sh {folder}/runs/*")


def _shipped() -> Check:
    folder = Path(mmpo.__file__).parent / "assets" / "shapes"
    missing = [name for name in ASSETS if not (folder / name).is_file()]
    if missing:
        return Check("shipped model", BROKEN, f"lacks {', '.join(missing)}", "pip install --force-reinstall --no-deps mmpo")
    return Check("shipped model", FINE, "complete; no download is needed for a first run")


def _extras(needs: list[Requirement]) -> Iterator[Check]:
    """What is optional, by the name under which pip installs it."""
    named = metadata.metadata("mmpo").get_all("Provides-Extra") if needs else None
    for extra in named or ():
        wanted = [n for n in needs if n.marker and n.marker.evaluate({"extra": extra}) and not n.marker.evaluate({"extra": ""})]
        missing = [n.name for n in wanted if _version(n.name) is None]
        if missing:
            yield Check(f"extra {extra}", NOTE, f"missing {', '.join(missing)}", f"pip install 'mmpo[{extra}]'")
        else:
            yield Check(f"extra {extra}", FINE, ", ".join(n.name for n in wanted))


def _network() -> Check:
    """Names only: what a token's value is belongs nowhere."""
    offline = [name for name in OFFLINE if os.environ.get(name) == "1"]
    token = "; HF_TOKEN is set" if os.environ.get("HF_TOKEN") else ""
    return Check("network", FINE, f"closed ({', '.join(offline) or 'by the recipe'}); allow_download: true opens it{token}")


def _requires(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _install(needs: Iterable[Requirement]) -> str:
    return "pip install " + " ".join(f"'{n.name}{n.specifier}'" if n.specifier else n.name for n in needs)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
