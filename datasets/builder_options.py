"""What the command line says of a builder, checked against its own signature, and the tools it is to be given."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, PositiveInt, ValidationError, create_model

from mmpo import yaml_source
from mmpo.datasets.fingerprints import ROOT, files_of, hub_folder
from mmpo.datasets.tools import Generator, Tools
from mmpo.errors import RecipeError
from mmpo.find import find, model_config, names, nearest, require_allowed
from mmpo.packaged import PREFIX, resolve
from mmpo.problems import problems_of
from mmpo.schema import Section
from mmpo.yaml_source import Mark

ROOM = "datasets.builders"
EMBEDDED = str(ROOT / "assets" / "collages")  # what the vision-language model called "embedded" is
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


def described(builder: str) -> tuple[str, list[tuple[str, str, str]]]:
    """A builder's own words, and name, kind and default of each of its options; "required" where one has none."""
    function = find(ROOM, builder)
    given = inspect.signature(function).parameters.values()
    keywords = [p for p in given if p.kind is p.KEYWORD_ONLY and p.name != "pool"]
    return inspect.getdoc(function) or "", [(p.name, str(p.annotation), _default(p.default)) for p in keywords]


def _default(value: Any) -> str:
    """A default as it is written on the command line; of a long list only how many it has."""
    if value is inspect.Parameter.empty:
        return "required"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"{len(value)} of them"
    plain = _plain(value)
    if isinstance(plain, dict):
        return "{" + ", ".join(f"{key}: {_default(item)}" for key, item in plain.items()) + "}"
    return str(plain) if isinstance(plain, str) else json.dumps(plain)


def check_options(builder: str, options: Mapping[str, Any], choice: ToolChoice) -> None:
    """Asks a builder whether it takes its options, before anything is loaded or read. Raises its ValueError.

    It is given tools and a pool that do nothing; a builder that asks something of them meanwhile is not checked here.
    """
    pool = {"pool": _NotYet()} if "pool" in inspect.signature(find(ROOM, builder)).parameters else {}
    given = {f.name: _NotYet() for f in fields(Tools) if getattr(choice, OPTION_OF.get(f.name, f.name)) is not None}
    with contextlib.suppress(_TooEarly):
        find(ROOM, builder)(Tools(**given), **options, **pool)


class _TooEarly(Exception):
    pass


class _NotYet:
    """Stands where a tool or a pool will be."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise _TooEarly

    def __getattr__(self, name: str) -> Any:
        raise _TooEarly

    __iter__ = __len__ = __getitem__ = __contains__ = __call__


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
    directory, with judge_settings, a name out of mmpo/judges, or "generator" for the generator itself. image_embedder,
    text_embedder: a name out of datasets/embedders. Names may be followed by =PATH, where their weights are. A plugin's
    function, `module:function`, is called with (path, device) and returns the tool; as judge, an object that is both judges.
    plugins: the modules allowed.
    """

    generator: str | None = None
    judge: str | None = None
    image_embedder: str | None = None
    text_embedder: str | None = None
    device: str = "cpu"
    plugins: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    judge_settings: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """What of it a pair may depend on, as JSON."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("device", "plugins") and value not in (None, ())
        }

    def modules(self) -> list[str]:
        """The modules that these tools are code of."""
        named = [("judges", self.judge), *(("datasets.embedders", spec) for spec in (self.image_embedder, self.text_embedder))]
        found = ["mmpo.modalities.vlm_generate"] if self.generator and not _is_plugin(self.generator) else []
        for room, spec in (("", self.generator), *named):
            name, _ = _parts(spec or "")
            if _is_plugin(name):
                found.append(name.partition(":")[0])
            elif room and name in names(room):
                found.append(f"mmpo.{room}.{name}")
            elif room == "judges" and name:
                found.append("mmpo.modalities.vlm_generate")
        return [*found, "mmpo.datasets.judge_tools"] if self.judge else found

    def files(self) -> dict[str, dict[str, str]]:
        """sha256 of every file of the models, and of chat templates given beside them, by tool.

        Nothing for a model of the hub that may be downloaded later on.
        """
        told, judges = _read(self.settings, "--set")[0], _read(self.judge_settings, "--judge-set")[0]
        paths = {
            "generator": _place(self.generator, hub=not told.get("allow_download")), "lora": _lora(told),
            "chat_template": _template(told), "judge_chat_template": _template(judges),
            "judge": None if self.judge == "generator" else _place(self.judge, "judges", not judges.get("allow_download")),
            "judge_lora": _lora(judges),
            "image_embedder": _place(self.image_embedder, "datasets.embedders"),
            "text_embedder": _place(self.text_embedder, "datasets.embedders"),
        }  # fmt: skip
        return {name: files_of(path) for name, path in paths.items() if path is not None}

    def check(self, builder: str, needs: Iterable[str], aspects: Iterable[str] = ()) -> None:
        """Raises RecipeError for needs that are not met, each with the option that meets it, and for what `models` refuses.

        So it does for a plugin whose module was not allowed; nothing of it is imported. aspects: what the builder asks a judge
        about, beside whole answers, which is all that those of mmpo/judges score.
        """
        if wrong := set(needs) - {f.name for f in fields(Tools)}:
            raise RecipeError(f"{builder}: NEEDS names no tool: {', '.join(sorted(wrong))}")
        missing = {
            OPTION_OF.get(need, need).replace("_", "-") for need in needs if not getattr(self, OPTION_OF.get(need, need))
        }
        if missing:
            raise RecipeError([f"{builder}: needs --{option}" for option in sorted(missing)])
        for spec in filter(None, (self.generator, self.judge, self.image_embedder, self.text_embedder)):
            if _is_plugin(spec):
                require_allowed(_parts(spec)[0], self.plugins)
        self.models()
        if aspects and self.judge and _parts(self.judge)[0] in names("judges"):
            asked = ", ".join(sorted(aspects))
            raise RecipeError(
                f"{builder}: --judge {self.judge} scores whole answers, and this builder asks for {asked}; give the directory "
                "of a vision-language model, 'generator', or a plugin"
            )

    def models(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """How generator and judge are loaded.

        Raises RecipeError with every setting that they do not have, and for a judge that is to be a generator that is missing.
        """
        judge = self.judge or ""
        if judge == "generator" and self.generator is None:
            raise RecipeError("--judge generator: there is no --generator")
        is_folder = judge != "generator" and _parts(judge)[0] not in names("judges")
        settings, wrong = _settings("--set", self.settings, "--generator", self.generator)
        of_judge, more = _settings("--judge-set", self.judge_settings, "--judge", judge, is_folder)
        if wrong or more:
            raise RecipeError([*wrong, *more])
        return settings, of_judge

    def make(self) -> Tools:
        """The tools, loaded."""
        settings, of_judge = self.models()
        generator = None if self.generator is None else _generator(self.generator, self.device, settings)
        pairs, points = (None, None) if self.judge is None else _judges(self.judge, generator, self.device, of_judge)
        embedders = {
            kind: None if spec is None else _named("datasets.embedders", spec, self.device)
            for kind, spec in (("image_embedder", self.image_embedder), ("text_embedder", self.text_embedder))
        }
        return Tools(generator=generator, pair_judge=pairs, point_judge=points, **embedders)


def _settings(
    option: str, words: Iterable[str], of: str, spec: str | None, is_folder: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Settings of a model's directory as they are given, and what is wrong with them.

    of: the option that names the directory, `spec`, if it is one.
    """
    given, problems = _read(words, option)
    if not given:
        return {}, problems
    if not spec or not is_folder or _is_plugin(spec):
        return {}, [
            *problems,
            f"{option} {', '.join(given)}: is for {of} DIR, a model's directory (got {of} {spec or 'not at all'})",
        ]
    if "path" in given:
        problems.append(f"{option} path: is what {of} says")
    schema: type[Section] = create_model("settings", __base__=model_config("vlm"), batch_size=(PositiveInt | None, None))
    try:
        schema.model_validate({**given, "path": spec})
    except ValidationError as error:
        problems += problems_of(error, cast(type[Section], schema), {(): Mark(option)})
    return given, problems


def _lora(settings: Mapping[str, Any]) -> Path | None:
    """The adapter's folder, where settings name one."""
    lora = settings.get("lora")
    return _place(lora.get("path")) if isinstance(lora, Mapping) else None


def _place(spec: str | None, room: str = "", hub: bool = False) -> Path | None:
    """The file or folder of a tool's weights; None where it has none of its own, or none is here. hub: look there, too."""
    name, path = _parts(spec or "")
    named = _is_plugin(name) or (room and name in names(room))
    place = path if named else spec
    if not place:
        return None
    found = Path(EMBEDDED if place == "embedded" else resolve(place))
    return hub_folder(place) if hub and not found.exists() else found


def _template(settings: Mapping[str, Any]) -> Path | None:
    """The file of a chat template, where settings name one."""
    path = settings.get("chat_template")
    return Path(path) if isinstance(path, str) else None


def _parts(spec: str) -> tuple[str, str]:
    """NAME and PATH of NAME=PATH; of a NAME alone, or a directory, no PATH."""
    name, _, path = spec.partition("=")
    return name, path


def _is_plugin(spec: str) -> bool:
    """Whether NAME is somebody else's `module:function`; a ":" in PATH, as in sentence=asset:minilm, says nothing."""
    name, _ = _parts(spec)
    return ":" in name and not name.startswith(PREFIX)


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


def _judges(spec: str, generator: Any, device: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """A pair judge and a point judge."""
    from mmpo.datasets.judge_tools import ModelPairs, ModelPoints, judge_pairs, judge_points

    if _is_plugin(spec):
        judge = _named("", spec, device)
        return judge, judge
    if _parts(spec)[0] in names("judges"):
        judge = _named("judges", spec, device)
        return judge_pairs(judge), judge_points(judge)
    model = generator if spec == "generator" else _generator(spec, device, settings)
    return ModelPairs(model), ModelPoints(model)


def _named(room: str, spec: str, device: str) -> Any:
    """What the function NAME of a room, or of a plugin, returns for NAME=PATH."""
    name, path = _parts(spec)
    return find(room, name)(Path(path) if path else None, device)


def as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values, keys of mappings as text."""
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple, set, frozenset)) else value
