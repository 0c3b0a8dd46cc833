"""`mmpo doctor`: right about what is there, and for each thing that is broken the command that mends it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import mmpo
from mmpo import cli, doctor
from mmpo.doctor import BROKEN, FINE, NOTE, Check, examine, table


def by_name(checks: list[Check]) -> dict[str, Check]:
    found = {c.name: c for c in checks}
    assert len(found) == len(checks), "two checks of one name"
    return found


def test_this_installation(tmp_path: Path) -> None:
    """The tests run here, so nothing may be broken; every package that mmpo needs has its line."""
    found = by_name(examine(tmp_path))
    assert [c for c in found.values() if c.state == BROKEN] == []
    assert {"torch", "diffusers", "load torchvision", "cpu", "memory", "disk", "shipped model", "network"} <= set(found)
    assert found["torch"].found == metadata.version("torch")
    assert "other recipes about 12 bytes a trained parameter" in found["disk"].found and "train.keep" in found["disk"].found


def test_each_state_has_what_it_needs() -> None:
    """Whatever is broken or missing names a command, and nothing that is fine does."""
    for check in examine():
        assert check.state in (FINE, NOTE, BROKEN) and check.found and bool(check.fix) == (check.state != FINE), check


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Pretends other versions; None: not installed."""
    real = metadata.version

    def version(name: str) -> str:
        found = changed.get(name.replace("-", "_"), real)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return real(name) if callable(found) else str(found)

    monkeypatch.setattr(metadata, "version", version)


Break = Callable[[pytest.MonkeyPatch], None]
BREAKS: dict[str, tuple[Break, str, str, str]] = {
    "missing": (lambda m: versions(m, peft=None), "peft", "missing; expected >=", "pip install 'peft>="),
    "too old": (
        lambda m: versions(m, transformers="4.40.0"),
        "transformers",
        "4.40.0; expected >=5",
        "pip install 'transformers>=",
    ),
    "too new": (lambda m: versions(m, torch="2.99.0"), "torch", "2.99.0; expected", "pip install 'torch<"),
    "not a family": (
        lambda m: versions(m, torch="2.11.0"),
        "load torchvision",
        "built for torch ==",
        "--force-reinstall 'torch",
    ),
    "another build": (
        lambda m: m.setitem(sys.modules, "torchvision", None),
        "load torchvision",
        "Error",
        "--force-reinstall 'torch",
    ),
    "disk": (lambda m: m.setattr(doctor, "DISK", 2**80), "disk", "the default diffusion run needs", "du -sh"),
    "memory": (lambda m: m.setattr(doctor, "MEMORY", 2**80), "memory", "holds up to", "mmpo train"),
    "assets": (
        lambda m: m.setattr(doctor, "ASSETS", ("gone",)),
        "shipped model",
        "lacks gone",
        "pip install --force-reinstall",
    ),
    "read-only": (lambda m: m.setattr("os.access", lambda *a: False), "disk", "cannot be written", "out=DIR"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_told_and_mended(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Exit 1, the broken thing, and its command, for a person and for a program."""
    broken, check, said, fix = BREAKS[name]
    broken(monkeypatch)
    assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (found,) = [c for c in told["checks"] if c["name"] == check]
    assert told["ok"] is False and found["state"] == BROKEN and said in found["found"] and fix in found["fix"], found
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert f"{BROKEN}  {check}" in shown and fix in shown and check in shown.splitlines()[-1]


def test_a_missing_extra_is_a_note(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    versions(monkeypatch, wandb=None)
    found = by_name(examine())["extra track"]
    assert found.state == NOTE and "wandb" in found.found and found.fix == "pip install 'mmpo[track]'"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkout that was never installed the rest is examined all the same."""
    real = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: real(name) if name != "mmpo" else None)
    found = by_name(examine())
    assert found["mmpo"].state == BROKEN and found["mmpo"].fix.startswith("pip install") and found["load torch"].state == FINE


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and bf16 of each; one that does not answer is broken, and not the end of the table."""
    import torch

    def memory(i: int) -> tuple[int, int]:
        if i:
            raise RuntimeError("CUDA error: unknown\nmore")
        return 2**30, 4 * 2**30

    for name, value in {
        "device_count": lambda: 2,
        "get_device_name": lambda i: "Board",
        "mem_get_info": memory,
        "is_bf16_supported": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = by_name(examine())
    assert found["gpu 0"].found == "Board, 1.0 GiB free of 4.0 GiB; no bf16, use train.precision: fp16"
    assert (found["gpu 1"].state, found["gpu 1"].found) == (BROKEN, "CUDA error: unknown")
    assert "torchrun --nproc-per-node=2 -m mmpo train" in found["gpus"].found


def test_a_token_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary1234567890")
    lines = "\n".join(table(examine()))
    assert "HF_TOKEN is set" in lines and "canary" not in lines


def test_json_is_all_that_is_printed_and_the_module_is_light(capsys: Any) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True and told["checks"][0]["found"].endswith(f"mmpo {mmpo.__version__}")
    code = "import sys, mmpo.doctor; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
