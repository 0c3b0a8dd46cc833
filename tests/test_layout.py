"""Policies of the house as tests: the layout that works everywhere, the direction of dependencies, and names.

The arrangement and what happens without it: docs/architecture.md, "Layout".
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modalities", "datasets", "configs", "demos")
CORE = sorted((ROOT / "mmpo").glob("*.py"))
INNER = ("losses", "judges", "diagnostics")
NAMESPACES = (*INNER, "kernels")  # folders of mmpo/; of these the core may import the kernels
CODE = [*CORE, *(p for room in (*(f"mmpo/{room}" for room in NAMESPACES), *ROOMS) for p in sorted((ROOT / room).rglob("*.py")))]

# Core files that may name a room's modules when they are imported; everything else asks `mmpo.find`.
# These two read and pair any dataset, and know no modality.
ROOM_IMPORTS_ALLOWED = {"prepare.py": "mmpo.datasets.", "rounds.py": "mmpo.datasets."}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager", "handler", "tools"}
MEANT = {"datasets/tools.py"}  # not a box of odds and ends: it says what the Tools are that builders are given


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


LONGEST = 60  # lines of a function's body; the words for its parameters come on top


def test_functions_are_short() -> None:
    for path in CODE:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0].lineno
                length = (node.end_lineno or 0) - start + 1
                assert length <= LONGEST, f"{path.relative_to(ROOT)}: the body of {node.name} has {length} lines"


@pytest.mark.slow
def test_bare_datasets_is_hugging_face() -> None:
    code = "import datasets; print(datasets.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site-packages" in out.stdout


def test_rooms_have_no_init() -> None:
    rooms = [ROOT / room for room in (*ROOMS, *(f"mmpo/{room}" for room in NAMESPACES))]
    assert [p for room in rooms for p in room.rglob("__init__.py")] == []
    assert not (ROOT / "__init__.py").exists() and not (ROOT / "conftest.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_folder_of_code_is_packaged() -> None:
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(toml["tool"]["setuptools"]["packages"])
    folders = {file.parent.relative_to(ROOT).parts for file in CODE}
    on_disk = {".".join(parts if parts[0] == "mmpo" else ("mmpo", *parts)) for parts in folders}
    assert on_disk - listed == set(), "add these to [tool.setuptools] packages in pyproject.toml"
    mapped = toml["tool"]["setuptools"]["package-dir"]
    assert mapped == {f"mmpo.{room}": room for room in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_links_lead_to_the_rooms_and_are_relative(room: str) -> None:
    link = ROOT / "mmpo" / room
    assert link.is_symlink() and os.readlink(link) == f"../{room}"
    assert link.resolve() == ROOT / room


@pytest.mark.parametrize("room", [*NAMESPACES, *ROOMS])
def test_rooms_are_importable_as_namespaces(room: str) -> None:
    module = importlib.import_module(f"mmpo.{room}")
    assert module.__file__ is None
    assert ROOT / "mmpo" / room in [Path(p) for p in module.__path__]


def test_no_vague_file_names() -> None:
    tests = [p for p in (ROOT / "tests").rglob("*.py") if not p.name.startswith("test_")]
    found = [p.relative_to(ROOT).as_posix() for p in [*CODE, *tests] if p.stem in VAGUE or p.stem.startswith("base_")]
    assert set(found) == MEANT


def test_test_files_have_distinct_names() -> None:
    """pytest imports them by their bare name, because tests/ holds no packages."""
    counts = Counter(p.name for p in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, n in counts.items() if n > 1] == []


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    """Modules that executing these statements imports; bodies of functions run later and do not count."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            yield from imported([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_core_knows_no_room(path: Path) -> None:
    names = set(imported(parsed(path).body))
    rooms = tuple(f"mmpo.{room}." for room in ("modalities", "datasets", "demos", *INNER))
    allowed = ROOM_IMPORTS_ALLOWED.get(path.name)
    found = {n for n in names if n.startswith(rooms) and not (allowed and n.startswith(allowed))}
    assert found == set(), "ask mmpo.find for it, inside the function that needs it"


@pytest.mark.parametrize("path", [p for p in CODE if p.name != "find.py"], ids=lambda p: p.stem)
def test_nobody_asks_which_modality_it_is(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any("modality" in (getattr(s, "id", ""), getattr(s, "attr", "")) for s in sides)
            texts = any(isinstance(n, ast.Constant) and isinstance(n.value, str) for s in sides for n in ast.walk(s))
            assert not (named and texts), f"{path.name}:{node.lineno}: let the modality's adapter decide this"


def test_imports_are_absolute() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in CODE
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


# Files that may open media, each its own kind; everything else asks `mmpo.media`, which has the limits.
DOORS = {"media.py": {"PIL.Image.open"}, "decode_child.py": {"av", "decord", "soundfile"}}
READERS = {
    "av", "decord", "soundfile", "cv2", "imageio", "librosa", "skvideo", "moviepy", "torchcodec", "audioread", "wave",
    "PIL.Image.open", "torchvision.io", "torchaudio.load", "scipy.io.wavfile", "skimage.io", "matplotlib.image",
    "matplotlib.pyplot.imread", "diffusers.utils.load_image", "diffusers.utils.load_video", "transformers.image_utils",
}  # fmt: skip


def used(tree: ast.AST) -> Iterator[str]:
    """Every dotted name of the file, in full: as imported, as an attribute of something imported, or imported by its text."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                full = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
                known[alias.asname or alias.name] = full
                yield full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            yield ".".join([known.get(first, first), *rest])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.stem)
def test_media_are_opened_at_one_door(path: Path) -> None:
    names = set(used(parsed(path)))
    found = {reader for reader in READERS if any(name == reader or name.startswith(f"{reader}.") for name in names)}
    assert found - DOORS.get(path.name, set()) == set(), "open it through mmpo.media"


@pytest.mark.parametrize(
    "code",
    [
        "from PIL import Image\nImage.open(x)", "import PIL.Image as P\nP.open(x)", "from PIL.Image import open as o",
        "import av", "from decord import VideoReader", "import importlib\nimportlib.import_module('soundfile')",
        "import torchaudio as t\nt.load(x)", "from torchvision.io import read_image", "def f():\n    import cv2",
    ],
)  # fmt: skip
def test_a_second_door_would_be_seen(code: str) -> None:
    names = set(used(ast.parse(code)))
    assert any(name == reader or name.startswith(f"{reader}.") for name in names for reader in READERS)
