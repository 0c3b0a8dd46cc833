"""Recipes: YAML 1.2 read safely, layers in their order, all errors at once and in place, and a dump that loads again."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from mmpo import find, masking, yaml_source
from mmpo import recipe as recipes
from mmpo.errors import RecipeError
from mmpo.find import names
from mmpo.recipe import Resolved, dump, load, loss_parameters
from mmpo.schema import Recipe, Term, recipe_class, section_at
from mmpo.unread import notes
from mmpo.yaml_source import MAX_BYTES, Mark, parse


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def problems(*args: Any, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(*args, **options)
    return caught.value.problems


# ---- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1e4", 1e4), ("1E+4", 1e4), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("0x1F", 31), ("0o17", 15),
        ("017", 17),
        ("no", "no"), ("on", "on"), ("off", "off"), ("yes", "yes"), ("y", "y"), ("true", True), ("False", False),
        ("tRue", "tRue"),
        ("null", None), ("~", None), ("", None), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"), ("<<", "<<"), ("٣", "٣"), ("1" * 500, float("1" * 500)),
    ],
)  # fmt: skip
def test_scalars_are_yaml_1_2(text: str, value: Any) -> None:
    found = yaml_source.scalar(text)
    assert found == value and type(found) is type(value)


def test_quoted_scalars_stay_text_and_everything_has_its_place() -> None:
    data, marks = parse("a: '1'\nb:\n  - {c: 2}\n  - x\n", "f.yaml")
    assert data == {"a": "1", "b": [{"c": 2}, "x"]}
    assert marks["b", 0, "c"] == Mark("f.yaml", 3, 6)
    assert marks["b", 1] == Mark("f.yaml", 4, 5)
    assert str(marks["a",]) == "f.yaml:1:1"


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("a: 1\nb: 2\na: 3\nb: 4\n", "f.yaml")
    assert caught.value.problems == [
        "f.yaml:3:1 a: duplicate key (first on line 1)",
        "f.yaml:4:1 b: duplicate key (first on line 2)",
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
HOSTILE = {
    "bomb": (BOMB, "too many values"),
    "itself": ("&a [*a]", "nested too deeply"),
    "itself in a mapping": ("&a {b: *a}", "nested too deeply"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep block": ("\n".join(" " * i + "a:" for i in range(500)), "nested too deeply"),
    "wide": ("[" + "1," * 100_000 + "]", "too many values"),
    "long number": ("a: " + "1" * (MAX_BYTES - 3), None),
    "long text": ("a: " + "x" * (MAX_BYTES - 3), None),
    "long prose": ("a: " + "x " * (MAX_BYTES // 2 - 2), None),
    "comments": ("# " + "x" * (MAX_BYTES - 2), None),
    "python object": ("a: !!python/object/apply:os.system [ls]", "tags are not allowed"),
    "local tag": ("a: !x 1", "tags are not allowed"),
    "str tag": ("!!str 5", "tags are not allowed"),
    "two documents": ("a: 1\n---\nb: 2\n", "document"),
    "unknown alias": ("a: *nothing", "alias"),
    "unclosed": ("a: [1, 2", "expected"),
    "tab": ("a:\n\tb: 1", "cannot start any token"),
    "control character": ("a: \x00", "special characters"),
    "key is a list": ("? [1, 2]\n: 3", "a key must be a name"),
    "long key": ("x" * 900_000 + ": 1", "f.yaml"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_ends_soon_and_never_crashes(name: str) -> None:
    text, problem = HOSTILE[name]
    start = time.process_time()
    if problem is None:
        parse(text, "f.yaml")
    else:
        with pytest.raises(RecipeError, match=re.escape(problem)) as caught:
            parse(text, "f.yaml")
        assert str(caught.value).startswith("f.yaml") and len(str(caught.value)) < 1000
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("raw", "problem"),
    [(b"a: \xff", "not UTF-8"), (b"#" * 1_000_001, "too large"), ("a: 1".encode("utf-16"), "not UTF-8")],
)
def test_hostile_files(tmp_path: Path, raw: bytes, problem: str) -> None:
    (tmp_path / "f.yaml").write_bytes(raw)
    assert problem in problems(tmp_path / "f.yaml")[0]
    assert "cannot be read" in problems(tmp_path / "missing.yaml")[0]
    assert "cannot be read" in problems(f"{tmp_path}/")[0]


@given(st.text(max_size=200))
def test_any_text_is_data_or_a_recipe_error(text: str) -> None:
    with contextlib.suppress(RecipeError):
        parse(text, "f.yaml")


# ---- layers


def test_precedence_and_provenance(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml", "train: {lr: 1, warmup: 1, steps: 1, keep: 1}\ntrack: [wandb, trackio]\n")
    write(tmp_path, "second.yaml", "base: first.yaml\ntrain:\n  warmup: 2\n  steps: 2\n  keep: 2\n")
    path = write(tmp_path, "top.yaml", "base: [second.yaml]\ntrain:\n  steps: 3\n  keep: 3\ntrack: [tensorboard]\n")
    resolved = load(path, ["train.keep=4", "data.pairing.strategy=all"])
    train = resolved.recipe.train
    assert (train.lr, train.warmup, train.steps, train.keep, train.batch_size) == (1.0, 2, 3, 4, 16)
    assert resolved.recipe.track == ["tensorboard"]  # a list is replaced as a whole
    assert resolved.recipe.data.pairing is not None and resolved.recipe.data.pairing.strategy == "all"
    found = resolved.provenance
    assert found["train.lr"] == "first.yaml:1" and found["train.warmup"] == "second.yaml:3"
    assert found["train.steps"] == "top.yaml:3" and found["train.keep"] == "command line" and found["seed"] == "default"


def test_a_bare_name_and_a_modality_load_shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path)
    write(tmp_path, "diffusion.yaml", "seed: 3\n")
    write(tmp_path, "long.yaml", "base: diffusion\ntrain: {steps: 9}\n")
    assert load("long").recipe.seed == load(modality="diffusion").recipe.seed == 3
    assert recipes.configs() == ["diffusion", "long"]
    assert load("long").provenance["seed"] == "diffusion.yaml:1"
    assert "did you mean 'long'" in problems("lnog")[0]
    assert "nothing to load" in problems()[0]


@pytest.mark.parametrize(
    ("base", "problem"), [("top.yaml", "includes itself"), ("/etc/x.yaml", "relative path"), ("3", "relative path")]
)
def test_bad_bases(tmp_path: Path, base: str, problem: str) -> None:
    assert problem in problems(write(tmp_path, "top.yaml", f"base: {base}\n"))[0]


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_recipe_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, "r.yaml", text)).recipe == recipe_class("diffusion")()


def test_overrides_reach_into_lists_and_parse_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "objective: [{loss: dpo}, {loss: nll}]\n")
    recipe = load(path, ["objective.1.weight=1e-1", "track=[wandb]", "out=no", "train.ema=", 'judge.name="7"']).recipe
    assert recipe.objective[1].weight == 0.1 and recipe.track == ["wandb"] and recipe.out == "no"
    assert recipe.train.ema is None and recipe.judge.name == "7"
    assert load(path, ["judge.options.3=x"]).recipe.judge.options == {"3": "x"}
    assert problems(path, ["objective.2.weight=1", "nonsense", "track=[a"])[0].startswith(
        "command line objective.2.weight: no such item (got 2"
    )


# ---- errors


def test_all_errors_come_at_once_each_in_its_place(tmp_path: Path) -> None:
    text = """modality: diffusion
train:
  lr: fast
  stpes: 3
  batch_size: true
draw: {mode: shred, t_min: 0.9, t_max: 0.1}
reference: {kind: path}
objective: [{weight: 1}]
judge: {name: 3}
eval: 7
model: {lora: {rnk: 3}, guidance: .nan}
"""
    path = write(tmp_path, "r.yaml", text)
    found = problems(path, ["sed=1"])
    modes = "'shared', 'independent', 'inversion' or 'renoise'"
    known = "got 'rnk', expected one of rank, alpha, targets, path"
    expected = [
        f"{path}:3:3 train.lr: wrong value (got fast, expected a valid number)",
        f"{path}:5:3 train.batch_size: a boolean is no value of this field (got true)",
        f"{path}:6:8 draw.mode: wrong value (got shred, expected {modes}); did you mean 'shared'?",
        f"{path}:7:1 reference: path goes with kind: path, and only with it (got kind: path, path: None)",
        f"{path}:8:13 objective.0.loss: missing, and it has no default",
        f"{path}:9:9 judge.name: wrong value (got 3, expected a valid string); to make it text, quote it",
        f"{path}:10:1 eval: wrong value (got 7, expected a mapping of settings)",
        f"{path}:11:16 model.lora.rnk: unknown key ({known}); did you mean 'rank'?",
        f"{path}:11:25 model.guidance: wrong value (got .nan, expected a finite number)",
    ]
    assert set(expected) <= set(found) and len(found) == len(expected) + 2
    assert any(re.fullmatch(rf"{re.escape(path)}:4:3 train.stpes: unknown key .*did you mean 'steps'\?", p) for p in found)
    assert any(re.fullmatch(r"command line sed: unknown key .*did you mean 'seed'\?", p) for p in found)


def keys(schema: type[BaseModel], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every setting, sections included."""
    below = [(name, section_at(schema, [name])) for name in schema.model_fields if name != "objective"]
    return [k for name, part in below for k in ((*at, name), *(keys(part, (*at, name)) if part else ()))]


def mistyped(word: str) -> Iterator[str]:
    """A letter left out, doubled, exchanged with its neighbour, or added."""
    middle = len(word) // 2
    yield word[:middle] + word[middle + 1 :]
    yield word[: middle + 1] + word[middle:]
    yield word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :] if middle else word + "_"
    yield word + "s"


def test_every_mistyped_key_is_told_with_its_place_and_the_nearest_name(tmp_path: Path) -> None:
    """Over 300 recipes, each with one key misspelt in one of four ways, alone on its line."""
    tried = 0
    for path in keys(recipe_class("diffusion")):
        *sections, name = path
        parent = section_at(recipe_class("diffusion"), sections)
        for wrong in {w for w in mistyped(name) if parent is not None and w not in parent.model_fields and len(w) > 1}:
            lines = [f"{'  ' * i}{word}:" for i, word in enumerate([*sections, wrong])]
            (found,) = problems(write(tmp_path, "r.yaml", "# a comment\n" + "\n".join(lines) + " 1\n"))
            place = f"{tmp_path / 'r.yaml'}:{len(path) + 1}:{2 * len(sections) + 1} {'.'.join([*sections, wrong])}: unknown key"
            assert found.startswith(place) and f"'{name}'" in found.partition("; did you mean ")[2], found
            tried += 1
    assert tried > 300


def test_an_unknown_modality_does_not_hide_other_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "modality: difusion\nseed: -1\n")
    first, second = problems(path)
    assert first.startswith(f"{path}:1:1 modality: no modality 'difusion'") and "'diffusion'" in first
    assert second == f"{path}:2:1 seed: wrong value (got -1, expected greater than or equal to 0)"


def test_times_must_be_ordered(tmp_path: Path) -> None:
    assert "t_min must not exceed t_max" in problems(write(tmp_path, "r.yaml", "draw: {t_min: 0.9, t_max: 0.1}\n"))[0]


# ---- losses


def test_loss_parameters_come_from_the_signature() -> None:
    assert loss_parameters(Term(loss="dpo")) == {"beta": 0.1, "label_smoothing": 0.0}
    assert loss_parameters(Term(loss="dpo", beta="0.5"))["beta"] == 0.5  # type: ignore[call-arg]
    assert loss_parameters(Term(loss="dpo", beta_dpo=2000)) == {"beta": 2.0, "label_smoothing": 0.0}  # type: ignore[call-arg]


def test_errors_of_losses_are_in_the_same_list(tmp_path: Path) -> None:
    terms = [
        "{loss: dpo, betta: 1}",
        "{loss: dppo}",
        "{loss: dpo, beta: 0}",
        "{loss: dpo, beta: 1, beta_dpo: 1}",
        "{loss: nll, beta: 1}",
    ]
    path = write(tmp_path, "r.yaml", "sed: 1\nobjective:\n" + "".join(f"  - {t}\n" for t in terms))
    found = problems(path, losses=True)
    assert len(found) == 6 and found[0].startswith(f"{path}:1:1 sed")
    assert found[1].startswith(f"{path}:3:17 objective.0.betta: unknown key") and "did you mean 'beta'" in found[1]
    assert found[2].startswith(f"{path}:4:6 objective.1.loss: no 'dppo' in losses")
    assert found[3] == f"{path}:5:17 objective.2.beta: wrong value (got 0, expected greater than 0)"
    assert found[4].startswith(f"{path}:6:26 objective.3.beta_dpo: the same setting as beta")
    assert found[5].startswith(f"{path}:7:17 objective.4.beta: unknown key")
    with pytest.raises(RecipeError, match="objective.0.betta"):
        recipes.check_objective(load(write(tmp_path, "s.yaml", "objective: [{loss: dpo, betta: 1}]\n")))


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("modell.path=3", "command line modell: unknown key"),
        ("reference.path=/x", "command line reference: path goes with kind: path"),
        ("train..lr=1", "command line train..lr: a name is empty (expected key=value, or section.key=value)"),
        (".lr=1", "command line .lr: a name is empty"),
        ("train.betas.2=0.95", "command line train.betas.2: no such item (got 2, expected a number below 2)"),
        ("train.betas.1=no", 'command line train.betas.1: wrong value (got "no", expected a valid number)'),
        ("draw.t_min=0.9", "command line draw: t_min must not exceed t_max"),
        ("draw.mode=independent", "FILE:2:1 draw: t_min must not exceed t_max"),
    ],
)
def test_settings_of_the_command_line_are_told_as_such(tmp_path: Path, word: str, problem: str) -> None:
    t_min = 0.9 if word.startswith("draw.mode") else 0.1
    path = write(tmp_path, "r.yaml", f"train: {{lr: 1}}\ndraw: {{t_max: 0.5, t_min: {t_min}}}\n")
    (found,) = problems(path, [word])
    assert found.startswith(problem.replace("FILE", path)), found


def test_an_index_reaches_into_a_list_that_is_a_default() -> None:
    found = load("diffusion", ["train.betas.1=0.95"])
    assert found.recipe.train.betas == (0.9, 0.95) and found.provenance["train.betas"] == "command line"


@pytest.mark.parametrize(
    ("modality", "words", "named"),
    [
        ("text", ["draw.mode=independent", "draw.t_max=0.5"], ["draw.mode", "draw.t_max"]),
        ("text", ["draw.inversion_eta=0.5"], ["draw.inversion_eta"]),
        ("diffusion", ["draw.inversion_eta=0.5", "draw.mode=renoise", "draw.inversion_steps=3"], ["draw.inversion_eta"]),
        ("diffusion", ["draw.mode=inversion", "draw.inversion_eta=0.5"], []),
        ("text", ["reference.ema_decay=0.5"], ["reference.ema_decay"]),
        ("text", ["reference={kind: ema, ema_decay: 0.5}"], []),
        ("text", ["train.betas=[0.1, 0.2]", "train.optimizer=sgd"], ["train.betas"]),
        ("text", ["train.betas.1=0.2", "train.optimizer=sgd"], ["train.betas"]),
        ("text", ["train.betas=[0.1, 0.2]"], []),
        ("text", ["train.round_prompts=3"], ["train.round_prompts"]),
        ("text", ["judge.options={x: 1}"], ["judge.options"]),
        ("text", ["train.nonfinite_budget=0.5"], ["train.nonfinite_budget"]),
        ("text", ["train.nonfinite_budget=0.5", "train.on_nonfinite=skip"], []),
        ("text", ["data.bad_budget=0.5", "data.on_bad=refuse"], ["data.bad_budget"]),
        ("text", ["data.bad_budget=0.5", "data.on_bad=skip"], []),
        ("text", ["judge.options.allow_download=true"], []),
        ("text", ["reference={kind: none, cache: sums}"], ["reference.cache"]),
    ],
)
def test_settings_that_nothing_reads_are_told(modality: str, words: list[str], named: list[str]) -> None:
    found = notes(load(modality, words))
    assert [line.split(":")[0] for line in found] == [f"command line {name}" for name in named], found
    assert all(": not read; it goes with " in line for line in found)


def test_a_dumped_recipe_repeats_no_default_as_unread(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", dump(load("text", ["train.round_prompts=3"])))
    (found,) = notes(load(path))
    assert re.match(r".*r.yaml:\d+:\d+ train.round_prompts: not read", found)


def test_a_recipe_of_another_modality_is_told_as_such() -> None:
    (found,) = problems("text", [], "diffusion")
    assert re.fullmatch(r"text\w*.yaml:\d+:1 modality: recipe text is of modality text \(got --modality diffusion, .*", found)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["judge.name=sentimnt"], "judge.name: no 'sentimnt' in judges .*; did you mean 'sentiment'"),
        (
            ["judge.name=sentiment", "judge.options.nope=1"],
            "judge.options.nope: unknown key .got 'nope', expected none: it takes",
        ),
        (["judge.name=hpsv2", "judge.options.batchsize=1"], "judge.options.batchsize: unknown key .*did you mean 'batch_size'"),
        (
            ["judge.name=hpsv2", "judge.options.batch_size=many"],
            "judge.options.batch_size: wrong value .got many, expected a val",
        ),
        (["judge.name=hpsv2", "judge.options.path=x"], "judge.options.path: unknown key"),
        (["judge.name=nobody:judge"], "judge.name: .* allow it with --plugin nobody"),
        (["judge.name=tests.tiny_run:brightness", "judge.options.x=1"], "judge.options.x: unknown key"),
    ],
)
def test_judges_that_cannot_work_are_told(words: list[str], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "PLUGINS", {"tests.tiny_run"})
    (found,) = problems("diffusion", words, losses=True)
    assert re.match(f"command line {problem}", found), found


def test_judges_that_can_work_are_not_imported() -> None:
    code = (
        "import sys\nfrom mmpo import recipe, signatures\n"
        "assert recipe._judge_problems({'name': 'aesthetic', 'options': {'head': 'x', 'batch_size': 2}}, {}) == []\n"
        "assert all(signatures.options('judges', name) is not None for name in recipe.signatures.find.names('judges'))\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_loss_has_parameters_that_a_recipe_can_give() -> None:
    from mmpo.find import names

    for name in names("losses"):
        assert all(isinstance(v, float | int | str | bool | None) for v in loss_parameters(Term(loss=name)).values()), name


# ---- dump


@pytest.mark.parametrize(
    ("term", "problem"),
    [
        ("{loss: dpo, ld_alpha: 0.5}", "ld_alpha goes with reduce: ld, and only with it (got reduce: sum)"),
        ("{loss: dpo, link: forward_kl, link_alpha: 0.5}", "link_alpha goes with link: alpha_divergence, and only with it"),
        ("{loss: dpo, link: alpha_divergence, link_alpha: 1.0}", "link_alpha"),
        ("{loss: bco, state: 1}", "unknown key (got 'state'"),
    ],
)
def test_slots_that_contradict_each_other_are_refused(term: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(None, [f"objective=[{term}]"], "diffusion", losses=True)
    assert problem in str(caught.value)


def test_dump_loads_to_the_same_recipe_and_masks_secrets(tmp_path: Path) -> None:
    text = "objective: [{loss: dpo, beta_dpo: 2000, of: [chosen, rejected]}]\nout: 'no'\ntrain: {lr: 1e-5}\n"
    text += "judge: {options: {a: [1, {b: [2]}], c: {}}}\n"
    resolved = load(write(tmp_path, "r.yaml", text), ["seed=3"])
    written = dump(resolved)
    assert load(write(tmp_path, "again.yaml", written)).recipe == resolved.recipe
    assert yaml.safe_load(written) == resolved.recipe.model_dump(mode="json")  # YAML 1.1 readers see the same
    assert (
        "lr: 1.0e-05  # r.yaml:3\n" in written
        and "seed: 3  # command line\n" in written
        and "    beta_dpo: 2000  # r.yaml:1\n" in written
    )
    options = ["judge.options.api_key=canary1", "judge.options.x=hf_canary2canary2", "judge.options.hf_token=canary3"]
    options += ["judge.options.secrets={a: canary6}", "judge.options.y=[hf_canary7canary7, [sk-canary8canary8]]"]
    assert "canary" not in dump(load(write(tmp_path, "r.yaml", text), options))
    assert "canary" not in "\n".join(
        problems(write(tmp_path, "r.yaml", "train: {password: canary4, lr: hf_canary5canary5}\n"), ["hf_canary9canary9"])
    )


NAMES = st.text(max_size=8).map("x".__add__).filter(lambda name: not masking.NAME.search(name))  # those are masked
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abcdn", min_size=1, max_size=4), VALUES, max_size=4))
@pytest.mark.slow
def test_any_options_survive_a_dump(options: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({"judge": {"options": options}})
    data, _ = parse(dump(Resolved(recipe)), "f.yaml")
    assert data["judge"]["options"] == options


# ---- schema


def kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)


def sections(schema: type[BaseModel]) -> list[type[BaseModel]]:
    below = [section_at(schema, [name]) for name in schema.model_fields]
    return [schema, *(s for b in below if b for s in sections(b))]


@pytest.mark.parametrize("modality", names("modalities"))
def test_no_setting_of_words_is_called_like_a_secret(modality: str) -> None:
    """Its value would be masked in recipe.yaml, and the run could not go on."""
    for section in sections(recipe_class(modality)):
        for name, field in section.model_fields.items():
            if masking.masked(name, "words") == masking.MASK:
                assert set(kinds(field.annotation)) <= {int, float, bool, NoneType}, name


def test_every_setting_is_described_and_no_section_takes_unknown_keys() -> None:
    found = sections(recipe_class("diffusion"))
    assert len(found) >= 11
    for section in found:
        assert all(field.description for field in section.model_fields.values()), section
        assert section.model_config["extra"] == ("allow" if section is Term else "forbid")


@pytest.mark.parametrize("name", recipes.configs())
def test_shipped_recipes_are_valid(name: str) -> None:
    found = load(name, losses=True)
    assert found.recipe.objective and notes(found) == []


# From the authors' launchers: kappa (beta_dpo / 2, or beta where there is no half), pairs a step, on how many devices,
# learning rate, steps, warm-up, optimizer.
PUBLISHED = {
    "diffusion_dpo_sd15": (2500, 2048, 8, 2.048e-5, 2000, 500, "adamw"),
    "diffusion_kto_sd15": (1000, 8, 4, 1e-7, 20_000, 200, "adamw"),
    "inpo_sdxl": (2500, 1024, 8, 1.024e-5, 400, 200, "adafactor"),
    "smpo_sdxl": (2500, 1024, 8, 1.024e-5, 200, 100, "adafactor"),
    "mapo_sdxl": (None, 16, 1, 1e-5, 2000, 0, "adamw"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name: str) -> None:
    recipe = load(name).recipe
    kappa, batch, devices, *rest = PUBLISHED[name]
    spec = recipe.train
    (term,) = recipe.objective
    assert kappa is None or loss_parameters(term)["beta"] * 500 == kappa
    assert spec.batch_size * spec.accumulate * devices == batch
    assert [spec.lr, spec.steps, spec.warmup, spec.optimizer] == rest
    assert (spec.precision, spec.schedule, spec.clip) == ("fp16", "constant", 1)
    assert (spec.weight_decay, spec.betas, spec.eps) == (1e-2, (0.9, 0.999), 1e-8)
    assert recipe.data.prompt_dropout == (0 if name == "mapo_sdxl" else 0.2)
