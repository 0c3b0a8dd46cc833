"""From files and the command line to one validated recipe, in which every value knows where it came from.

Precedence: defaults of `mmpo.schema` < `base:` includes < the recipe file < `key=value` and `--set`, the last one winning.
All errors are found before any is raised, each as `file:line:column field: problem (got ..., expected ...)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, create_model

from mmpo import masking, signatures, yaml_source
from mmpo.errors import RecipeError
from mmpo.find import find, nearest, require, require_allowed
from mmpo.masking import masked
from mmpo.problems import COMMAND_LINE, Marks, flow, got, line, nests, problems_of
from mmpo.schema import Recipe, Section, Term, not_in_shards, recipe_class
from mmpo.yaml_source import Keys, Mark

CONFIGS = Path(__file__).parent / "configs"
BETA_DPO = 1000.0  # T of the denoisers' log-likelihood -(T/2) w(t) err: the papers' beta_dpo multiplies (1/2) w(t) err


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
        leaves = _leaves(self.recipe.model_dump(mode="json"))
        return {yaml_source.dotted(keys): _source(self.marks.get(keys)) for keys in leaves}


def load(
    path: str | Path | None = None, overrides: Sequence[str] = (), modality: str | None = None, losses: bool = False
) -> Resolved:
    """The recipe of a file or of a bare name in mmpo's configs; with only a modality, that modality's default recipe.

    overrides: `key=value` strings with dotted keys, list items by number (`objective.0.beta=0.2`), values in YAML.
    losses: check the losses (see `check_objective`), the judge and the format of the data as well, and report their errors
    with all the others.
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
            raise RecipeError(line(layers.marks, ("modality",), said))
        layers.put(("modality",), modality)
    for override in overrides:
        layers.override(override)
    masking.learn(None, layers.data)
    schema: type[Recipe] = Recipe
    named = layers.data.get("modality", "diffusion")
    try:
        schema = recipe_class(named) if isinstance(named, str) else Recipe  # which then says that it has to be text
    except RecipeError as error:
        layers.problems += [line(layers.marks, ("modality",), p) for p in error.problems]
    try:
        recipe = schema.model_validate(layers.data)
        layers.problems += [_unsharded(layers.marks, key, problem) for key, problem in not_in_shards(recipe)]
    except ValidationError as error:
        layers.problems += problems_of(error, schema, layers.marks)
    if losses:
        layers.problems += _objective_problems(layers.data.get("objective", []), layers.marks)
        layers.problems += _judge_problems(layers.data.get("judge"), layers.marks)
        layers.problems += _format_problems(layers.data.get("data"), layers.marks)
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


def _unsharded(marks: Marks, key: str, problem: str) -> str:
    """What does not go with train.fsdp, where it was written; a default, where train.fsdp was."""
    keys = tuple(key.split("."))
    return line(marks, keys, problem) if keys in marks else line(marks, ("train", "fsdp"), f"{key} {problem}")


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
        raise RecipeError([line(marks, (*at, "loss"), p) for p in error.problems]) from None
    problems = []
    if {"beta", "beta_dpo"} <= given.keys():
        problems.append(
            line(marks, (*at, "beta_dpo"), "the same setting as beta, which is beta_dpo / 1000; give one of the two")
        )
    try:
        parameters = schema.model_validate(given).model_dump()
    except ValidationError as error:
        problems += problems_of(error, schema, marks, at, also=tuple(Term.model_fields))
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
        return [line(marks, ("judge", "name"), p) for p in error.problems]
    if known is None:
        return []
    fields: dict[str, Any] = {option: (p.kind, p.default) for option, p in known.items()}
    schema = create_model(f"options of {name}", __base__=Section, **fields)
    try:
        schema.model_validate(given)
    except ValidationError as error:
        return problems_of(error, schema, marks, ("judge", "options"))
    return []


def _format_problems(data: Any, marks: Marks) -> list[str]:
    name = data.get("format") if isinstance(data, dict) else None
    try:
        if isinstance(name, str):
            require_allowed(name) if ":" in name else require("datasets.formats", name)
    except RecipeError as error:
        return [line(marks, ("data", "format"), problem) for problem in error.problems]
    return []


def dump(resolved: Resolved) -> str:
    """The whole recipe as YAML that loads to the same recipe, each leaf with where it came from; secrets are masked."""
    return "\n".join(_block(resolved.recipe.model_dump(mode="json"), (), resolved.marks)) + "\n"


def _block(value: Any, keys: Keys, marks: Marks) -> Iterator[str]:
    for key, item in _entries(value):
        path, item = (*keys, key), masked(key, item)
        head = "-" if isinstance(value, list) else f"{flow(key)}:"
        if not nests(item):
            yield f"{head} {flow(item)}  # {_source(marks.get(path))}"
            continue
        lines = list(_block(item, path, marks))
        if head == "-":
            yield f"- {lines.pop(0)}"
        else:
            yield head
        yield from (f"  {line}" for line in lines)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    return enumerate(value) if isinstance(value, list) else value.items()


def _leaves(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    for key, item in _entries(value):
        yield from _leaves(item, (*keys, key)) if nests(item) else [(*keys, key)]


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
            raise RecipeError(_no_recipe(name))
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
                said = f"wrong value (got {got(base)}, expected a relative path or a recipe's name)"
                raise RecipeError(line(marks, ("base",), said))
            if _is_path(base) and not (path.parent / base).is_file():
                raise RecipeError(line(marks, ("base",), f"no such file (got {base}, looked for {path.parent / base})"))
            if not _is_path(base) and base not in configs():
                raise RecipeError(line(marks, ("base",), _no_recipe(base)))
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


def _no_recipe(name: str) -> str:
    known = configs()
    return f"no recipe '{name}' (a file ends in .yaml; there are: {', '.join(known) or 'none'}){nearest(name, known)}"


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))
