"""T6: every wrong recipe ends with exit 2 and says what is wrong, where, all at once; and none of them runs anything."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmpo import cli, recipe
from mmpo.errors import SHOWN, RecipeError
from mmpo.schema import recipe_class, section_at
from tests.reliability.counters import FULL, counter
from tests.reliability.mistakes import MISTAKES
from tests.test_recipe import BOMB, keys, mistyped

COUNT = 2000 if FULL else 300
LINE = re.compile(r'(?P<file>[^:]+):(?P<line>\d+):(?P<column>\d+) (?P<field>[\w.@/<=:"\\[ -]+?): (?P<problem>.+)')
Wrong = tuple[tuple[str, ...], str, str]  # keys, the value as it is written, what the message says


def validate(path: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `mmpo config validate`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["config", "validate", str(path), *words])
    return code, out.getvalue(), err.getvalue().removeprefix("mmpo: ")  # which stands before a single line


# ---- what can be wrong with each setting, by its JSON Schema


def wrong_values(schema: dict[str, Any]) -> list[str]:
    """Values in YAML that a setting must not take."""
    options = schema.get("anyOf", [schema])
    types = {"enum" if "enum" in o else o.get("type", "section") for o in options}
    found = [] if types & {"array"} else ["[1, 2]"]
    found += [] if types & {"string", "enum"} else ["fast"]
    found += [] if types & {"object", "section"} else ["{a: 1}"]
    found += [] if "null" in types else ["null", ""]
    found += [] if types & {"number", "integer"} else ["3", "1.5"] if "boolean" not in types else ["3"]
    if types & {"number", "integer"}:
        found += ["true", ".nan", ".inf", "-.inf", "'a'", "no"]
    found += ["1.5"] if "integer" in types and "number" not in types else []
    found += ["nonsense"] if "enum" in types else []
    for option in options:
        if option.get("minimum", option.get("exclusiveMinimum", -1)) >= 0:
            found += ["-1", "-1e-4"]
        found += ["0", "0.0"] if option.get("minimum") == 1 or option.get("exclusiveMinimum") == 0 else []
        found += ["99999999999"] if "maximum" in option or "exclusiveMaximum" in option else []
    return found


def catalogue() -> list[Wrong]:
    """Every setting of a diffusion recipe with each wrong value, and every name misspelt."""
    schema, found = recipe_class("diffusion"), []
    for path in keys(schema):
        parent = section_at(schema, path[:-1])
        assert parent is not None
        leaf = parent.model_json_schema()["properties"][path[-1]]
        found += [(path, value, "") for value in wrong_values(leaf) if path != ("modality",)]
        names = {w for w in mistyped(path[-1]) if w not in parent.model_fields and len(w) > 2}
        found += [((*path[:-1], name), "1", "unknown key") for name in sorted(names)]
    return found


CATALOGUE = catalogue()


def written(wrong: list[Wrong], twice: bool) -> tuple[str, dict[str, str]]:
    """A recipe with these mistakes, and what each message has to start with, by place; `twice`: the last key again."""
    lines = ["# a recipe", "seed: 3"]
    places: dict[str, str] = {}
    open_sections: tuple[str, ...] = ()
    for path, value, said in sorted(wrong):
        common = next((i for i, (a, b) in enumerate(zip(open_sections, path, strict=False)) if a != b), len(open_sections))
        common = min(common, len(path) - 1)
        for depth in range(common, len(path) - 1):
            lines.append("  " * depth + path[depth] + ":")
        open_sections = path[:-1]
        for again in range(1 + (twice and path == max(wrong)[0])):
            lines.append("  " * (len(path) - 1) + f"{path[-1]}: {value}")
            places[f"{len(lines)}:{2 * (len(path) - 1) + 1} {'.'.join(path)}"] = "duplicate key" if again else said
    return "\n".join(lines) + "\n", places


def apart(wrong: list[Wrong]) -> list[Wrong]:
    """Without mistakes inside a section that is itself one."""
    return [w for w in wrong if not any(w[0] != o[0] and w[0][: len(o[0])] == o[0] for o in wrong)]


SEEN = {"recipes": 0, "mistakes": 0}


@settings(max_examples=COUNT, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.lists(st.sampled_from(CATALOGUE), min_size=1, max_size=8, unique_by=lambda w: w[0]), st.booleans())
def fuzz(folder: Path, wrong: list[Wrong], twice: bool) -> None:
    wrong = apart(wrong)
    assume(wrong)
    text, places = written(wrong, twice)
    path = folder / "r.yaml"
    path.write_text(text)
    code, out, err = validate(path)
    lines = err.splitlines()
    assert code == 2 and out == "" and "Traceback" not in err, text + err
    assert all(LINE.fullmatch(line) for line in lines), text + err
    for place, said in places.items():
        begins = re.compile(re.escape(f"{path}:{place}") + "[:.]")
        assert any(begins.match(line) and said in line for line in lines), (place, text, err)
    assert len(lines) >= len(places)
    SEEN["recipes"] += 1
    SEEN["mistakes"] += len(places)


@pytest.mark.slow
def test_generated_recipes(tmp_path: Path) -> None:
    """Each mistake of a file has its own line with its file, line, column and field."""
    start = time.monotonic()
    fuzz(tmp_path)
    assert SEEN["recipes"] >= COUNT * 0.9 and len(CATALOGUE) > 700
    counter("T6", f"generated recipes, {SEEN['mistakes']} mistakes", SEEN["recipes"], "all told", time.monotonic() - start)


# ---- by hand

UNREADABLE = {  # a place, but no field: there are none yet
    "bomb": (BOMB, "too many values"),
    "deep": ("a: " + "[" * 5000, "nested too deeply"),
    "deep block": ("\n".join("  " * i + "a:" for i in range(400)), "nested too deeply"),
    "python tag": ("a: !!python/object/apply:os.system [touch marker]", "tags are not allowed"),
    "new tag": ("!!python/object/new:os.system [touch marker]", "tags are not allowed"),
    "module tag": ("a: !!python/module:evil", "tags are not allowed"),
    "unclosed": ("train: {lr: 1", "expected"),
    "tab": ("train:\n\tlr: 1", "cannot start"),
    "two documents": ("seed: 1\n---\nseed: 2", "document"),
    "list key": ("? [a]\n: 1", "a key must be a name"),
    "a list": ("- seed: 1", "a recipe is a mapping"),
    "text": ("seed", "a recipe is a mapping"),
}


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMPO_DEBUG", raising=False)


@pytest.mark.slow
def test_mistakes_by_hand(tmp_path: Path) -> None:
    start, path = time.monotonic(), tmp_path / "r.yaml"
    assert len(MISTAKES) >= 300 and len({text for text, _, _ in MISTAKES}) == len(MISTAKES)
    missed = []
    for marked, field, said in MISTAKES:
        before, _, after = marked.partition("@")
        line, column = before.count("\n") + 1, len(before.rpartition("\n")[2].rstrip("'\"")) + 1
        path.write_text(before + after + "\n")
        code, out, err = validate(path)
        told = [m for m in map(LINE.fullmatch, err.splitlines()) if m]
        right = [m for m in told if (m["line"], m["column"], m["field"]) == (str(line), str(column), field)]
        clean = (code, out) == (2, "") and "Traceback" not in err and len(told) == len(err.splitlines())
        if not (clean and any(said in m["problem"] for m in right)):
            missed.append((marked, err))
    assert missed == []
    counter("T6", "mistakes by hand", len(MISTAKES), "all told", time.monotonic() - start)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_have_a_place(name: str, tmp_path: Path) -> None:
    text, said = UNREADABLE[name]
    (tmp_path / "r.yaml").write_text(text)
    start = time.process_time()
    code, _, err = validate(tmp_path / "r.yaml")
    assert code == 2 and said in err and re.match(rf"{re.escape(str(tmp_path))}/r.yaml:\d+:\d+: ", err), err
    assert time.process_time() - start < 1 and len(err) < 1000


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(10**12)
    code, _, err = validate(tmp_path / "r.yaml")
    assert code == 2 and err.startswith(f"{tmp_path}/r.yaml: the file is too large"), err


@pytest.mark.parametrize(
    ("text", "at", "value"),
    [
        ("train: {lr: 1e-4}", "train.lr", 1e-4),
        ("train: {lr: 1E-4}", "train.lr", 1e-4),
        ("train: {lr: '1e-4'}", "train.lr", 1e-4),
        ("train: {lr: .5}", "train.lr", 0.5),
        ("train: {steps: 1e3}", "train.steps", 1000),
        ("train: {steps: 0x10}", "train.steps", 16),
        ("out: no", "out", "no"),
        ("out: on", "out", "on"),
        ("out: 1:30", "out", "1:30"),
        ("data: {path: y}", "data.path", "y"),
        ("data: {path: '2024'}", "data.path", "2024"),
        ("out: ~", "out", None),
        ("train: {fsdp: true}", "train.fsdp", True),
    ],
)
def test_what_is_right_stays_right(text: str, at: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    found: Any = recipe.load(tmp_path / "r.yaml").recipe
    for name in at.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_recipe_never_imports_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a recipe names something, a module of that name beside it stays unread."""
    (tmp_path / "evil.py").write_text("open('marker', 'w').close()\nclass ModelConfig: ...\ndef evil(*a, **k): ...\n")
    (tmp_path / "evil_config.py").write_text("open('marker', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("mmpo.find.PLUGINS", set())
    for name in ("evil", "evil:evil", "evil.evil", "mmpo.losses.evil", "../evil", "tests.evil:evil", "evil:ModelConfig"):
        for text in (
            f"modality: '{name}'",
            f"objective: [{{loss: '{name}'}}]",
            f"base: '{name}'",
            f"plugins: ['{name}']",
            f"judge: {{name: '{name}'}}\nseed: -1",
            f"data: {{format: '{name}'}}\nseed: -1",
        ):
            (tmp_path / "r.yaml").write_text(text + "\n")
            assert validate(tmp_path / "r.yaml")[0] == 2, text
            assert not (tmp_path / "marker").exists() and not {"evil", "evil_config"} & set(sys.modules), text


def test_many_problems_are_counted(tmp_path: Path) -> None:
    """The first fifty are shown, and how many more there are."""
    (tmp_path / "r.yaml").write_text("".join(f"key{i}: 1\n" for i in range(SHOWN + 7)))
    code, _, err = validate(tmp_path / "r.yaml")
    assert code == 2 and len(err.splitlines()) == SHOWN + 1 and err.splitlines()[-1] == "and 7 more problems"
    with pytest.raises(RecipeError) as caught:
        recipe.load(tmp_path / "r.yaml")
    assert len(caught.value.problems) == SHOWN + 7


def test_duplicates_do_not_hide_what_else_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "r.yaml").write_text("base: base.yaml\ntrain: {lr: x, lr: 1}\nsed: 3\n")
    code, _, err = validate(tmp_path / "r.yaml")
    places = [LINE.fullmatch(line) for line in err.splitlines()]
    assert code == 2 and sorted(m["field"] for m in places if m) == ["sed", "seed", "train.lr", "train.lr"]
