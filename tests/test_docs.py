"""The documentation says what is there: the methods table, commands, dependencies, links and the file tree."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from mmpo.cli import app, split_words
from mmpo.recipe import load

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def prose(page: Path) -> str:
    """The page without fenced code."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def generator(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_table_is_up_to_date() -> None:
    made = generator("methods").methods()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == made, "run: python docs/methods.py"


def test_options_of_builders_are_up_to_date() -> None:
    made = generator("builders").builders()
    assert (ROOT / "docs" / "builders.md").read_text(encoding="utf-8") == made, "run: python docs/builders.py"
    assert made.count("| `max_new_tokens` | `int` |") == 6


def test_counts_of_reliability_are_up_to_date() -> None:
    made = generator("reliability").page()
    assert (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8") == made, "run: python docs/reliability.py"
    assert made.count("| T") > 40


def test_every_loss_has_its_row_complete() -> None:
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("## Recipes")[0]
    rows = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines() if line.startswith("| [")]
    assert len(rows) == len(list((ROOT / "mmpo" / "losses").glob("*.py")))
    for name, summary, paper, equation, needs, *rest in rows:
        assert summary and needs, name
        assert "https://arxiv.org/abs/" in paper, name
        assert "loss" in equation, name
        assert "tests/" in rest[-1], f"{name} has no test"


def test_dependencies_page_names_exactly_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"Always installed": project["dependencies"]}
    groups |= {f"`mmpo[{extra}]`": requirements for extra, requirements in project["optional-dependencies"].items()}
    sections = re.split(r"^## ", (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(sections) == len(groups)
    for heading, requirements in groups.items():
        (section,) = [s for s in sections if heading in s.split("\n")[0]]
        named = set(re.findall(r"^\| ([\w-]+) \|", section, flags=re.M)) - {"package"}
        wanted = {re.split(r"[<>=;!~ \[]", requirement)[0] for requirement in requirements}
        assert named == wanted


def test_constraints_allow_the_declared_ranges_of_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert {"torch>=2.11,<2.13", "torchaudio>=2.11,<2.12"} <= set(pins)
    assert [p for p in pins if not re.fullmatch(r"torch(vision|audio)?>=[\d.]+,<[\d.]+|[\w.-]+==[\w.]+", p)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M) if anchor and file.is_file() else []
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        if not file.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_are_plain(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "\u2014" not in text and "TODO" not in text
    assert not re.search(r"/home/|/root/|/work/|/tmp/", text)


def commands() -> list[str]:
    """Every complete `mmpo ...` command of the pages: lines of fenced code, and code spans; not the ones with [..] or |."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found |= set(re.findall(r"`(mmpo [^`\n]+)`", text)) | set(re.findall(r"^ *\$? ?(mmpo [^#\n]+)", text, flags=re.M))
    for recipe in (ROOT / "configs").glob("*.yaml"):
        found |= set(
            re.findall(r"^# +(mmpo (?:train|data|config|list) [^#\n]+)", recipe.read_text(encoding="utf-8"), flags=re.M)
        )
    return sorted(c.strip() for c in found if not re.search(r"[\[|<…]|\.\.\.", c))


def parsed(arguments: list[str]) -> Iterator[str]:
    """Parse a command line with the command line's own grammar, without running it; the names of the commands on the way."""
    command: Any = typer.main.get_command(app)
    context = None
    while command is not None:
        context = command.make_context(command.name or "mmpo", arguments, parent=context)
        yield str(command.name)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        _, command, arguments = command.resolve_command(context, rest) if hasattr(command, "commands") else (None, None, [])


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_pages_parse(command: str) -> None:
    assert len(list(parsed(shlex.split(command)[1:]))) > 1


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(("mmpo train", "mmpo config validate "))])
def test_recipes_and_settings_in_the_pages_exist(command: str) -> None:
    words = [word for word in shlex.split(command)[2:] if word not in ("validate", "RECIPE")]
    recipe, settings = split_words(words)
    modality = next((s.partition("=")[2] for s in settings if s.startswith("modality=")), None)
    if recipe or modality:
        load(recipe, [s for s in settings if not s.startswith(("modality=", "rounds="))], modality)


def tree() -> list[str]:
    """The paths of README's file tree: two spaces a level, folders end in a slash, the comment after two spaces."""
    (block,) = re.findall(r"## Files\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition("  ")
        assert comment.strip(), f"README's tree says nothing about {name}"
        folders = [*folders[:depth], name] if name.endswith("/") else folders[:depth]
        paths.append("".join(folders) if name.endswith("/") else "".join([*folders, name]))
    return paths


def test_readme_tree_lists_every_file_of_code() -> None:
    listed = set(tree())
    assert [p for p in listed if not (ROOT / p).exists() and not any(ROOT.glob(p))] == []
    roots = ("mmpo", "modalities", "datasets", "demos", "benchmarks")
    code = {p.relative_to(ROOT).as_posix() for room in roots for p in (ROOT / room).rglob("*.py")}
    single = {p for p in code if not p.startswith("mmpo/losses/")} | {"mmpo/losses/"}
    assert single - listed == set(), "add these to README's tree"
    recipes = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*.yaml")}
    assert not [p for p in recipes if not any(fnmatch(p, line) for line in listed)], "add these to README's tree"
