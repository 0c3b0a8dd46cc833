"""From files and the command line to one validated recipe, in which every value knows where it came from.

Precedence: defaults of `mmpo.schema` < `base:` includes < the recipe file < `key=value` and `--set`, the last one winning.
All errors are found before any is raised, each as `file:line:column field: problem (got ..., expected ...)`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, create_model

from mmpo import masking, signatures, yaml_source
from mmpo.errors import RecipeError
from mmpo.find import find, nearest
from mmpo.masking import masked
from mmpo.schema import Recipe, Section, Term, not_in_shards, recipe_class, section_at
from mmpo.yaml_source import Keys, Mark

Marks = dict[Keys, Mark]

CONFIGS = Path(__file__).parent / "configs"
COMMAND_LINE = "command line"
BETA_DPO = 1000.0  # T of the denoisers' log-likelihood -(T/2) w(t) err: the papers' beta_dpo multiplies (1/2) w(t) err

_BARE = re.compile(r"[A-Za-z_][\w./@-]*")


@dataclass(frozen=True)
class Resolved:
    """A validated recipe. marks: where each key path was set; what is missing there is a default.

    allow_drift: keys that may differ from those of the checkpoint that a run resumes from.
    """

    recipe: Recipe
    marks: Marks = field(default_factory=dict)
    allow_drift: tuple[str, ...] = ()

    @property
    def provenance(self) -> dict[str, str]:
        """Where each leaf came from, e.g. {"train.lr": "diffusion.yaml:12", "seed": "command line", "out": "default"}."""
        return {_dotted(keys): _source(self.marks.get(keys)) for keys in _leaves(self.recipe.model_dump(mode="json"))}


def load(
    path: str | Path | None = None, overrides: Sequence[str] = (), modality: str | None = None, losses: bool = False
) -> Resolved:
    """The recipe of a file or of a bare name in mmpo's configs; with only a modality, that modality's default recipe.

    overrides: `key=value` strings with dotted keys, list items by number (`objective.0.beta=0.2`), values in YAML.
    losses: check the objective's losses (see `check_objective`) and the judge as well, and report their errors with all the
    others.
    Raises RecipeError.
    """
    name = modality if path is None else str(path)
    if name is None:
        raise RecipeError("nothing to load: give a recipe (a file, or a name from `mmpo list configs`) or --modality")
    if path is None:
        recipe_class(name)  # a misspelt modality is told as such, not as a recipe that is not there
    layers = _Layers()
    layers.read(name, Path())
    if modality is not None:
        own = layers.data.get("modality", modality)
        if own != modality:
            said = f"recipe {name} is of modality {own} (got --modality {modality}, expected {own}, or none)"
            raise RecipeError(_line(layers.marks, ("modality",), said))
        layers.put(("modality",), modality)
    for override in overrides:
        layers.override(override)
    masking.learn(None, layers.data)
    schema: type[Recipe] = Recipe
    try:
        schema = recipe_class(str(layers.data.get("modality", "diffusion")))
    except RecipeError as error:
        layers.problems += [_line(layers.marks, ("modality",), p) for p in error.problems]
    try:
        recipe = schema.model_validate(layers.data)
        layers.problems += [_line(layers.marks, tuple(key.split(".")), p) for key, p in not_in_shards(recipe)]
    except ValidationError as error:
        layers.problems += problems_of(error, schema, layers.marks)
    if losses:
        layers.problems += _objective_problems(layers.data.get("objective", []), layers.marks)
        layers.problems += _judge_problems(layers.data.get("judge"), layers.marks)
    if layers.problems:
        raise RecipeError(layers.problems)
    return Resolved(recipe, layers.marks)


def with_cache(recipe: Recipe, cache: Path) -> Recipe:
    """The recipe with another folder for encoded media."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": str(cache)})})


def configs() -> list[str]:
    """The names of the recipes that mmpo ships."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def check_objective(resolved: Resolved) -> None:
    """Checks every term's loss and parameters against the loss's own signature. Imports the losses, hence torch."""
    problems = _objective_problems(resolved.recipe.objective, resolved.marks)
    if problems:
        raise RecipeError(problems)


def _objective_problems(terms: Any, marks: Marks) -> list[str]:
    """What is wrong with the losses of terms, given or raw; what is wrong with the terms themselves is the schema's."""
    problems: list[str] = []
    for i, term in enumerate(terms if isinstance(terms, list) else []):
        try:
            loss_parameters(Term.model_validate(term), marks, ("objective", i))
        except RecipeError as error:
            problems += error.problems
        except ValidationError:
            continue
    return problems


def loss_parameters(term: Term, marks: Marks | None = None, at: Keys = ()) -> dict[str, Any]:
    """The keyword arguments of a term's loss, validated, defaults filled in; beta_dpo becomes beta = beta_dpo / 1000.

    marks, at: where the term stands, for messages. Raises RecipeError.
    """
    marks, given = marks or {}, dict(term.model_extra or {})
    try:
        schema = _loss_schema(find("losses", term.loss))
    except RecipeError as error:
        raise RecipeError([_line(marks, (*at, "loss"), p) for p in error.problems]) from None
    problems = []
    if {"beta", "beta_dpo"} <= given.keys():
        problems.append(
            _line(marks, (*at, "beta_dpo"), "the same setting as beta, which is beta_dpo / 1000; give one of the two")
        )
    try:
        parameters = schema.model_validate(given).model_dump()
    except ValidationError as error:
        problems += problems_of(error, schema, marks, at)
    if problems:
        raise RecipeError(problems)
    beta_dpo = parameters.pop("beta_dpo", None)
    return parameters if beta_dpo is None else parameters | {"beta": beta_dpo / BETA_DPO}


def _loss_schema(loss: Any) -> type[Section]:
    given = inspect.signature(loss, eval_str=True).parameters.values()
    keywords = [p for p in given if p.kind is p.KEYWORD_ONLY and p.name != "state"]  # which the objective keeps
    fields: dict[str, Any] = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in keywords}
    if "beta" in fields:
        kind, default = fields["beta"]
        fields["beta"] = (Annotated[kind, Field(gt=0)], default)
        fields["beta_dpo"] = (Annotated[float, Field(gt=0)] | None, None)
    return create_model(loss.__name__, __base__=Section, **fields)


def _judge_problems(judge: Any, marks: Marks) -> list[str]:
    """What is wrong with a judge's name and options, by the signature in its file, which imports nothing."""
    judge = judge if isinstance(judge, dict) else {}
    name, given = judge.get("name"), judge.get("options", {})
    if not isinstance(name, str) or not isinstance(given, dict):
        return []  # the modality's own judge, or a problem that the schema tells
    try:
        known = signatures.options("judges", name, without=frozenset({"path", "device"}))
    except RecipeError as error:
        return [_line(marks, ("judge", "name"), p) for p in error.problems]
    if known is None:
        return []
    fields: dict[str, Any] = {option: (p.kind, p.default) for option, p in known.items()}
    schema = create_model(f"options of {name}", __base__=Section, **fields)
    try:
        schema.model_validate(given)
    except ValidationError as error:
        return problems_of(error, schema, marks, ("judge", "options"))
    return []


def dump(resolved: Resolved) -> str:
    """The whole recipe as YAML that loads to the same recipe, each leaf with where it came from; secrets are masked."""
    return "\n".join(_block(resolved.recipe.model_dump(mode="json"), (), resolved.marks)) + "\n"


def _block(value: Any, keys: Keys, marks: Marks) -> Iterator[str]:
    for key, item in _entries(value):
        path, item = (*keys, key), masked(key, item)
        head = "-" if isinstance(value, list) else f"{_flow(key)}:"
        if not _nests(item):
            yield f"{head} {_flow(item)}  # {_source(marks.get(path))}"
            continue
        lines = list(_block(item, path, marks))
        if head == "-":
            yield f"- {lines.pop(0)}"
        else:
            yield head
        yield from (f"  {line}" for line in lines)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    return enumerate(value) if isinstance(value, list) else value.items()


def _nests(value: Any) -> bool:
    """Whether a value is written over several lines: a mapping, or a list that is not only scalars."""
    return bool(value) and (
        isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
    )


def _leaves(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    for key, item in _entries(value):
        yield from _leaves(item, (*keys, key)) if _nests(item) else [(*keys, key)]


def _flow(value: Any) -> str:
    """A leaf in YAML's one-line form; text is left bare only where YAML 1.1 and 1.2 agree that it is text."""
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str) and not (_BARE.fullmatch(value) and value == yaml_source.scalar(value) == yaml.safe_load(value)):
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**31).strip()
    return yaml.safe_dump(value).splitlines()[0]  # 1.0e-05: a float to YAML 1.1 as well


def _source(mark: Mark | None) -> str:
    if mark is None:
        return "default"
    return f"{Path(mark.file).name}:{mark.line}" if mark.line else mark.file


class _Layers:
    """Recipes merged in order of precedence: mappings key by key, everything else as a whole."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.marks: Marks = {}
        self.problems: list[str] = []

    def read(self, name: str, folder: Path, including: tuple[Path, ...] = ()) -> None:
        """Merges a file over what is there, its `base:` files first. name: relative to `folder`, or bare, in CONFIGS."""
        path = folder / name if _is_path(name) else CONFIGS / f"{name}.yaml"
        if not _is_path(name) and not path.is_file():
            known = configs()
            raise RecipeError(
                f"no recipe '{name}' (a file ends in .yaml; there are: {', '.join(known) or 'none'}){nearest(name, known)}"
            )
        if path.resolve() in including:
            raise RecipeError(f"{path}: base includes itself: {' -> '.join(p.name for p in (*including, path))}")
        shown = str(path) if _is_path(name) else path.name
        data, marks = yaml_source.load(path, shown, self.problems)
        if not isinstance(data, dict | None):
            raise RecipeError(f"{marks[()]}: a recipe is a mapping of settings (got {type(data).__name__})")
        data = data or {}
        bases = data.pop("base", [])
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, str) or Path(base).is_absolute():
                raise RecipeError(
                    _line(marks, ("base",), f"wrong value (got {base!r}, expected a relative path or a recipe's name)")
                )
            self.read(base, path.parent, (*including, path.resolve()))
        self.merge(self.data, data, marks)

    def merge(self, old: dict[str, Any], new: dict[str, Any], marks: Marks, at: Keys = ()) -> None:
        for key, value in new.items():
            keys = (*at, key)
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                self.marks[keys] = marks[keys]
                self.merge(old[key], value, marks, keys)
            else:
                old[key] = value
                self._mark(keys, {k: m for k, m in marks.items() if k[: len(keys)] == keys})

    def override(self, text: str) -> None:
        """Sets one `key.key=value` of the command line."""
        key, equals, value = text.partition("=")
        if not (key and equals):
            self.problems.append(f"command line: not a setting (got {masked(None, text)!r}, expected key=value)")
            return
        try:
            self.put(
                key.split("."), yaml_source.parse(value, key)[0] if value[:1] in tuple("[{\"'") else yaml_source.scalar(value)
            )
        except RecipeError as error:
            self.problems += [f"command line {p}" for p in error.problems]

    def put(self, names: Sequence[str], value: Any) -> None:
        """Sets one value by its key path, making the sections on the way; a number names an item of a list."""
        if not all(names):
            raise RecipeError(f"{'.'.join(names)}: a name is empty (expected key=value, or section.key=value)")
        node: Any = self.data
        keys: Keys = ()
        for i, name in enumerate(names):
            key = int(name) if isinstance(node, list) and name.isdecimal() else name
            keys, below = (*keys, key), dict(_entries(node))
            if isinstance(node, list) and key not in below:
                raise RecipeError(f"{'.'.join(names)}: no such item (got {key}, expected a number below {len(below)})")
            if i == len(names) - 1:
                node[key] = value
            elif not isinstance(below.get(key), dict | list):
                default = self._default(keys) if names[i + 1].isdecimal() and key not in below else None
                node[key] = default if isinstance(default, list) else {}
                self._mark(keys, {keys: Mark(COMMAND_LINE)})
            node = node[key]
        inner = _leaves(value, keys) if isinstance(value, dict | list) else ()
        self._mark(keys, dict.fromkeys([keys, *inner], Mark(COMMAND_LINE)))

    def _default(self, keys: Keys) -> Any:
        """The default of a key path, as plain data; None where there is none."""
        try:
            found: Any = recipe_class(str(self.data.get("modality", "diffusion")))().model_dump(mode="json")
            for key in keys:
                found = found[key]
        except (RecipeError, KeyError, IndexError, TypeError):
            return None
        return found

    def _mark(self, keys: Keys, marks: Marks) -> None:
        self.marks = {k: m for k, m in self.marks.items() if k[: len(keys)] != keys} | marks


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _line(marks: Marks, keys: Keys, problem: str) -> str:
    """`place field: problem`; the place of a key that was not written is that of the nearest section that was.

    Of a section, it is the command line where that set one of the keys that the problem names: it came last.
    """
    below = (k for k, mark in marks.items() if mark.file == COMMAND_LINE and k[: len(keys)] == keys and len(k) > len(keys))
    named = next((k for k in below if re.search(rf"\b{re.escape(str(k[-1]))}\b", problem)), None)
    above = (keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in marks)
    place = marks[named] if named is not None else next((marks[k] for k in above), "default")
    return f"{place} {_dotted(keys)}: {problem}"


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))


def problems_of(error: ValidationError, schema: type[Section], marks: Marks, at: Keys = ()) -> list[str]:
    """pydantic's errors in this project's form."""
    return [_line(marks, (*at, *e["loc"]), _problem(e, schema)) for e in error.errors(include_url=False)]


def _problem(error: Any, schema: type[Section]) -> str:
    *section, key = error["loc"]
    message, given = error["msg"], error["input"]
    got = f"a {type(given).__name__}" if _nests(given) else _flow(masked(key, given))
    if error["type"] == "missing":
        return "missing, and it has no default"
    if error["type"] == "extra_forbidden":
        known = list(getattr(section_at(schema, section), "model_fields", ()))
        expected = f"one of {', '.join(known)}" if known else "none: it takes none"
        return f"unknown key (got {key!r}, expected {expected}){nearest(str(key), known)}"
    if error["type"] == "value_error":
        problem = str(error["ctx"]["error"])
        return problem if "(got" in problem else f"{problem} (got {got})"
    if not message.startswith("Input should be "):
        return f"{message[0].lower()}{message[1:]} (got {got})"
    expected = message.removeprefix("Input should be ").partition(", unable")[0]
    expected = "a mapping of settings" if error["type"] == "model_type" else expected
    advice = "; to make it text, quote it" if error["type"] == "string_type" and isinstance(given, int | float) else ""
    choices = re.findall("'(.*?)'", expected)
    return f"wrong value (got {got}, expected {expected}){nearest(str(given), choices)}{advice}"
