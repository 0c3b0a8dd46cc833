"""Wheel and source archive carry everything, and an installed wheel works away from the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {
    ".git",
    ".venv",
    "build",
    "dist",
    "runs",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
}

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built from a copy, so that the checkout gets no build/ folder and stale files cannot slip in."""
    work = tmp_path_factory.mktemp("build")

    def ignored(_: str, names: list[str]) -> set[str]:
        return {n for n in names if n in SKIPPED or n.endswith(".egg-info")}

    shutil.copytree(ROOT, work / "mmpo", symlinks=True, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", cwd=work / "mmpo")
    return work / "dist"


def wanted() -> set[str]:
    """Every file of the package by its installed name: code, recipes, assets, templates."""
    names = set()
    for folder in ("mmpo", "modalities", "datasets", "configs", "demos"):
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and "__pycache__" not in parts:
                names.add("/".join(parts if parts[0] == "mmpo" else ("mmpo", *parts)))
    return names


def test_wheel_carries_everything(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wanted() - names == set()
    assert "mmpo/report.html.j2" in names and "mmpo/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert {n.split("/")[0] for n in names} == {"mmpo", f"{wheel.name.split('-py3')[0]}.dist-info"}, (
        "a top-level package leaked"
    )
    assert wheel.stat().st_size < 12 * 2**20


def test_source_archive_carries_everything(archives: Path) -> None:
    (sdist,) = archives.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {"/".join(n.split("/")[1:]) for n in archive.getnames()}
    rooms = {f"mmpo/{room}/": f"{room}/" for room in ("modalities", "datasets", "configs", "demos")}
    for name in wanted():
        prefix = next((p for p in rooms if name.startswith(p)), "")
        assert (rooms[prefix] + name.removeprefix(prefix) if prefix else name) in names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_installed_wheel_works_elsewhere(archives: Path, tmp_path: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--system-site-packages", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    link_site_packages(python, tmp_path)
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=tmp_path)
    where = run(python, "-c", "import mmpo; print(mmpo.__file__)", cwd=tmp_path)
    assert str(environment) in where
    mmpo = environment / "bin" / "mmpo"
    assert "train" in run(mmpo, "--help", cwd=tmp_path)
    assert "dpo" in run(mmpo, "list", "losses", cwd=tmp_path).split()
    found = (
        "from mmpo.find import find, names; print([find('modalities', n).embedded_data.exists() for n in names('modalities')])"
    )
    assert "False" not in run(python, "-c", found, cwd=tmp_path)  # what each default trains on


def link_site_packages(python: Path, cwd: Path) -> None:
    """Let the fresh environment see what these tests run with, even when that is a virtual environment itself."""
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=cwd).strip())
    outer = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=cwd)
    (site / "outer.pth").write_text(outer)
