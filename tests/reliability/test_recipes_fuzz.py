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
from tests.test_recipe import BOMB, keys, mistyped

COUNT = 2000 if FULL else 300
LINE = re.compile(r"(?P<file>[^:]+):(?P<line>\d+):(?P<column>\d+) (?P<field>[\w.@/-]+): (?P<problem>.+)")
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


# ---- by hand: @ stands before what the message has to point at

NUMBER, POSITIVE = "valid number", "greater than 0"
MISTAKES = [
    ("train: {@lr: fast}", "train.lr", NUMBER),
    ("train: {@lr: 1e-4x}", "train.lr", NUMBER),
    ("train:\n  @lr: 1,5", "train.lr", NUMBER),
    ("train: {@lr: '1 e-4'}", "train.lr", NUMBER),
    ("train: {@lr: no}", "train.lr", NUMBER),
    ("train: {@lr: yes}", "train.lr", NUMBER),
    ("train: {@lr: true}", "train.lr", "boolean"),
    ("train: {@lr: -1e-4}", "train.lr", POSITIVE),
    ("train: {@lr: 0}", "train.lr", POSITIVE),
    ("train: {@lr: .nan}", "train.lr", "finite"),
    ("train: {@lr: .inf}", "train.lr", "finite"),
    ("train: {@lr: -.INF}", "train.lr", ""),
    ("train: {@lr: 1e999}", "train.lr", "finite"),
    ("train: {@lr: NaN}", "train.lr", ""),
    ("train: {@lr: [1e-4]}", "train.lr", NUMBER),
    ("train: {@lr: {a: 1}}", "train.lr", NUMBER),
    ("train: {@lr: null}", "train.lr", NUMBER),
    ("train: {@lr: }", "train.lr", NUMBER),
    ("train:\n  @lr: 2020-01-01", "train.lr", NUMBER),
    ("train: {@steps: 1.5}", "train.steps", "integer"),
    ("train: {@steps: -3}", "train.steps", "1"),
    ("train: {@steps: 0}", "train.steps", "1"),
    ("train: {@steps: 1:30}", "train.steps", "integer"),
    ("train: {@steps: 0b11}", "train.steps", "integer"),
    ("train: {@steps: two}", "train.steps", "integer"),
    ("train: {@steps: 1e400}", "train.steps", "finite"),
    ("train: {@batch_size: true}", "train.batch_size", "boolean"),
    ("train: {@warmup: -1}", "train.warmup", "0"),
    ("train: {@betas: 0.9}", "train.betas", "tuple"),
    ("train: {@betas: [0.9]}", "train.betas.1", "missing"),
    ("train: {betas: [0.9, @2]}", "train.betas.1", "less than or equal to 1"),
    ("train: {betas: [@-1, 0.9]}", "train.betas.0", "greater than or equal to 0"),
    ("train: {betas: [0.9, @x]}", "train.betas.1", NUMBER),
    ("train: {@ema: 1}", "train.ema", "less than 1"),
    ("train: {@ema: 0}", "train.ema", POSITIVE),
    ("train: {@clip: 0}", "train.clip", POSITIVE),
    ("train: {@precision: fp8}", "train.precision", "'fp32', 'bf16' or 'fp16'"),
    ("train: {@precision: 16}", "train.precision", ""),
    ("train: {@schedule: cosin}", "train.schedule", "did you mean 'cosine'"),
    ("train: {@optimizer: AdamW}", "train.optimizer", "'adamw'"),
    ("train: {@on_nonfinite: ignore}", "train.on_nonfinite", "'stop' or 'skip'"),
    ("train: {@fsdp: maybe}", "train.fsdp", "boolean"),
    ("train: {@lrr: 1}", "train.lrr", "did you mean 'lr'"),
    ("train: {@stpes: 1}", "train.stpes", "did you mean 'steps'"),
    ("train: {@Batch_size: 1}", "train.Batch_size", "did you mean 'batch_size'"),
    ("train: {@batchsize: 1}", "train.batchsize", "did you mean 'batch_size'"),
    ("train: {@learning_rate: 1}", "train.learning_rate", "unknown key"),
    ("@trian: {lr: 1}", "trian", "did you mean 'train'"),
    ("@train: 3", "train", "mapping"),
    ("@train: [lr, 1]", "train", "mapping"),
    ("@train:", "train", "mapping"),
    ("@train: lr=1", "train", "mapping"),
    ("train: {lr: 1, @lr: 2}", "train.lr", "duplicate key (first on line 1)"),
    ("train:\n  lr: 1\n@train:\n  steps: 2", "train", "duplicate key (first on line 1)"),
    ("seed: 1\n'@seed': 2", "seed", "duplicate key"),
    ("@seed: -1", "seed", "0"),
    ("@seed: 4294967296", "seed", "4294967296"),
    ("@seed: 1.5", "seed", "integer"),
    ("@seed: '12a'", "seed", "integer"),
    ("@seed: true", "seed", "boolean"),
    ("@modality: difusion", "modality", "did you mean 'diffusion'"),
    ("@modality: 3", "modality", "no modality"),
    ("@modality: os.system", "modality", "no modality"),
    ("@modality: os:system", "modality", "never imports code"),
    ("@out: 3", "out", "quote it"),
    ("@out: [a]", "out", "string"),
    ("@out: true", "out", ""),
    ("data: {@path: 2024}", "data.path", "quote it"),
    ("data: {@heldout: 1}", "data.heldout", "less than 1"),
    ("data: {@heldout: -0.1}", "data.heldout", "0"),
    ("data: {@on_bad: drop}", "data.on_bad", "'refuse'"),
    ("data: {pairing: {@strategy: best_wrost}}", "data.pairing.strategy", "did you mean 'best_worst'"),
    ("data: {pairing: {@margin: -1}}", "data.pairing.margin", "0"),
    ("data: {pairing: {@temperature: 0}}", "data.pairing.temperature", POSITIVE),
    ("data: {@pairing: all}", "data.pairing", "mapping"),
    ("data: {@prompt_dropout: 2}", "data.prompt_dropout", "1"),
    ("data: {@limit: 0}", "data.limit", "1"),
    ("draw: {@mode: inverse}", "draw.mode", "'shared'"),
    ("@draw: {t_min: 0.9, t_max: 0.1}", "draw", "t_min must not exceed t_max"),
    ("draw: {@t_max: 1.1}", "draw.t_max", "1"),
    ("draw: {@logit_std: 0}", "draw.logit_std", POSITIVE),
    ("@reference: {kind: path}", "reference", "path goes with kind"),
    ("@reference: {path: x}", "reference", "path goes with kind"),
    ("reference: {@kind: none_}", "reference.kind", "did you mean 'none'"),
    ("reference: {@ema_decay: 1}", "reference.ema_decay", "less than 1"),
    ("judge: {@name: 3}", "judge.name", "quote it"),
    ("judge: {@options: [1]}", "judge.options", ""),
    ("@judge: shapes", "judge", "mapping"),
    ("model: {@guidance: -1}", "model.guidance", "0"),
    ("model: {lora: {@rank: 0}}", "model.lora.rank", "1"),
    ("model: {lora: {@targets: to_q}}", "model.lora.targets", "list"),
    ("model: {@trust_remote_code: true}", "model.trust_remote_code", "unknown key"),
    ("model: {@adapter: Lora}", "model.adapter", "did you mean 'lora'"),
    ("@track: wandb", "track", "list"),
    ("track: [@mlflow]", "track.0", "'tensorboard'"),
    ("eval: {@every: 0}", "eval.every", "1"),
    ("@objective: {loss: dpo}", "objective", "list"),
    ("@objective: []", "objective", "1 item"),
    ("objective: [@{}]", "objective.0.loss", "missing"),
    ("objective: [@dpo]", "objective.0", "mapping"),
    ("objective: [{@loss: dppo}]", "objective.0.loss", "did you mean 'dpo'"),
    ("objective: [{@loss: os.system}]", "objective.0.loss", "no 'os.system'"),
    ("objective: [{@loss: 'os:system'}]", "objective.0.loss", "never imports code"),
    ("objective: [{loss: dpo, @beta: -1}]", "objective.0.beta", POSITIVE),
    ("objective: [{loss: dpo, @beta: .nan}]", "objective.0.beta", "finite"),
    ("objective: [{loss: dpo, @beta: big}]", "objective.0.beta", NUMBER),
    ("objective: [{loss: dpo, @betta: 1}]", "objective.0.betta", "did you mean 'beta'"),
    ("objective: [{loss: dpo, @beta_dpo: -5}]", "objective.0.beta_dpo", POSITIVE),
    ("objective: [{loss: dpo, beta: 1, @beta_dpo: 5}]", "objective.0.beta_dpo", "the same setting"),
    ("objective: [{loss: dpo}, {loss: nll, @beta: 1}]", "objective.1.beta", "unknown key"),
    ("objective: [{loss: dpo, @reduce: total}]", "objective.0.reduce", "'sum', 'mean' or 'ld'"),
    ("objective: [{loss: dpo, @link: kl}]", "objective.0.link", "'reverse_kl'"),
    ("objective: [{loss: dpo, @weight: heavy}]", "objective.0.weight", NUMBER),
]
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
    assert len(MISTAKES) >= 100
    missed = []
    for marked, field, said in MISTAKES:
        before, _, after = marked.partition("@")
        line, column = before.count("\n") + 1, len(before.rpartition("\n")[2].rstrip("'")) + 1
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
