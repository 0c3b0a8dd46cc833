"""What the command line says of a builder, checked against its own signature, and the tools it is to be given."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model

from mmpo import yaml_source
from mmpo.datasets.tools import Generator, Tools
from mmpo.errors import RecipeError
from mmpo.find import find, names, nearest
from mmpo.packaged import PREFIX
from mmpo.schema import Section

ROOM = "datasets.builders"
OPTION_OF = {"generator": "generator", "pair_judge": "judge", "point_judge": "judge"}  # and the embedders as they are called


def module_of(builder: str) -> Any:
    """The module of a builder. Raises RecipeError, with the nearest name, when there is none."""
    return importlib.import_module(find(ROOM, builder).__module__)


def schema_of(builder: str) -> type[BaseModel]:
    """A builder's keyword-only arguments as a pydantic class; `pool` is not one of them."""
    given = inspect.signature(find(ROOM, builder), eval_str=True).parameters.values()
    keywords = [p for p in given if p.kind is p.KEYWORD_ONLY and p.name != "pool"]
    options: dict[str, Any] = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in keywords}
    return create_model(builder, __base__=Section, **options)


def options_of(builder: str, words: Iterable[str]) -> dict[str, Any]:
    """A builder's options from `key=value` words, values in YAML; what is not given has its default.

    Raises RecipeError with all problems: no `=`, an unknown key (with the nearest one), a wrong value.
    """
    schema, (given, problems) = schema_of(builder), _read(words, builder)
    try:
        found = schema.model_validate(given)
    except ValidationError as error:
        problems += [_problem(builder, e, schema) for e in error.errors(include_url=False)]
    if problems:
        raise RecipeError(problems)
    return {name: getattr(found, name) for name in schema.model_fields}


def _read(words: Iterable[str], what: str) -> tuple[dict[str, Any], list[str]]:
    """`key=value` words as values, and what is wrong with the others."""
    given, problems = {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            problems.append(f"{what}: not an option (got {word!r}, expected key=value)")
            continue
        structured = value[:1] in tuple("[{\"'")
        given[key] = yaml_source.parse(value, key)[0] if structured else yaml_source.scalar(value)
    return given, problems


def _problem(builder: str, error: Any, schema: type[BaseModel]) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = list(schema.model_fields)
        return f"{builder} {key}: unknown option (there are: {', '.join(known)}){nearest(key, known)}"
    if error["type"] == "missing":
        return f"{builder} {key}: missing, and it has no default"
    return f"{builder} {key}: {error['msg'][0].lower()}{error['msg'][1:]} (got {error['input']!r})"


@dataclass(frozen=True)
class ToolChoice:
    """Which tools a builder is given, in words that another process can make them from.

    generator: a directory of a vision-language model; settings: `key=value` words of its section in a recipe. judge: such a
    directory, a name out of mmpo/judges, or "generator" for the generator itself. image_embedder, text_embedder: a name out of
    datasets/embedders. Names may be followed by =PATH, where their weights are. A plugin's function, `module:function`, is
    called with (path, device) and returns the tool; as judge, an object that is both judges. plugins: the modules allowed.
    """

    generator: str | None = None
    judge: str | None = None
    image_embedder: str | None = None
    text_embedder: str | None = None
    device: str = "cpu"
    plugins: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """What of it a pair may depend on, as JSON."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("device", "plugins") and value not in (None, ())
        }

    def check(self, builder: str, needs: Iterable[str], aspects: Iterable[str] = ()) -> None:
        """Raises RecipeError for needs that are not met, each with the option that meets it.

        aspects: what the builder asks a judge about, beside whole answers, which is all that those of mmpo/judges score.
        """
        if wrong := set(needs) - {f.name for f in fields(Tools)}:
            raise RecipeError(f"{builder}: NEEDS names no tool: {', '.join(sorted(wrong))}")
        missing = {
            OPTION_OF.get(need, need).replace("_", "-") for need in needs if not getattr(self, OPTION_OF.get(need, need))
        }
        if missing:
            raise RecipeError([f"{builder}: needs --{option}" for option in sorted(missing)])
        if aspects and self.judge and not _is_plugin(self.judge) and self.judge.partition("=")[0] in names("judges"):
            asked = ", ".join(sorted(aspects))
            raise RecipeError(
                f"{builder}: --judge {self.judge} scores whole answers, and this builder asks for {asked}; give the directory "
                "of a vision-language model, 'generator', or a plugin"
            )

    def make(self) -> Tools:
        """The tools, loaded."""
        settings, problems = _read(self.settings, "--set")
        if problems:
            raise RecipeError(problems)
        generator = None if self.generator is None else _generator(self.generator, self.device, settings)
        pairs, points = (None, None) if self.judge is None else _judges(self.judge, generator, self.device)
        embedders = {
            kind: None if spec is None else _named("datasets.embedders", spec, self.device)
            for kind, spec in (("image_embedder", self.image_embedder), ("text_embedder", self.text_embedder))
        }
        return Tools(generator=generator, pair_judge=pairs, point_judge=points, **embedders)


def _is_plugin(spec: str) -> bool:
    return ":" in spec and not spec.startswith(PREFIX)


def _generator(spec: str, device: str, settings: Mapping[str, Any] | None = None) -> Any:
    if _is_plugin(spec):
        made = _named("", spec, device)
        if lacks := _lacking(made):
            raise RecipeError(
                f"--generator {spec}: what it returns does not take {', '.join(lacks)}; mmpo.datasets.tools.Generator says "
                "what a generator is called with"
            )
        return made
    return importlib.import_module("mmpo.modalities.vlm_generate").generator(spec, device, **(settings or {}))


def _lacking(made: Any) -> list[str]:
    """The keywords of a generator that a plugin's object does not take."""
    taken = inspect.signature(made).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return []
    wanted = inspect.signature(Generator.__call__).parameters.values()
    return [p.name for p in wanted if p.kind is p.KEYWORD_ONLY and p.name not in {t.name for t in taken}]


def _judges(spec: str, generator: Any, device: str) -> tuple[Any, Any]:
    """A pair judge and a point judge."""
    from mmpo.datasets.judge_tools import ModelPairs, ModelPoints, judge_pairs, judge_points

    if _is_plugin(spec):
        judge = _named("", spec, device)
        return judge, judge
    if spec.partition("=")[0] in names("judges"):
        judge = _named("judges", spec, device)
        return judge_pairs(judge), judge_points(judge)
    if spec == "generator" and generator is None:
        raise RecipeError("--judge generator: there is no --generator")
    model = generator if spec == "generator" else _generator(spec, device)
    return ModelPairs(model), ModelPoints(model)


def _named(room: str, spec: str, device: str) -> Any:
    """What the function NAME of a room, or of a plugin, returns for NAME=PATH."""
    name, _, path = spec.partition("=")
    return find(room, name)(Path(path) if path else None, device)


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values, keys of mappings as text."""
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple, set, frozenset)) else value
