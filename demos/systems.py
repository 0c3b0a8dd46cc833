"""What is compared: a run's base and aligned model, models of other directories, or samples that somebody made already.

A source only says what there is. Models are opened from it in a process of their own (`mmpo.demos.worker`); this file and
whoever shows a source import no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpo import find
from mmpo import recipe as recipes
from mmpo.demos.pool import Pool, open_pool
from mmpo.errors import DataError, RecipeError
from mmpo.pair import Kind
from mmpo.recipe import Resolved

MOST = 4  # systems side by side
ASSET = "asset:"
FORM = "NAME=MODALITY:PATH[:ADAPTER]"
PEFT, DIFFUSERS = "adapter_config.json", "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Model:
    """A model of the command line. path: directory, hub id or asset:NAME. adapter: directory of a LoRA, or None."""

    name: str
    modality: str
    path: str
    adapter: str | None = None


@dataclass(frozen=True)
class Source:
    """title: for people. kind: of the answers. systems: their names, in the order of the page; of all answers of a prompt.

    steps: what a sample takes at most, and of what; None where nothing is generated. pictures: whether a prompt may have some.
    run, models, pool: one of the three.
    """

    title: str
    kind: Kind
    systems: tuple[str, ...]
    steps: tuple[int, str] | None = None
    run: Path | None = None
    models: tuple[Model, ...] = ()
    pool: Pool | None = field(default=None, compare=False)
    pictures: bool = False


def open_source(run: Path | None = None, models: Sequence[str] = (), samples: Path | None = None) -> Source:
    """The source that a command line names: a run's folder, models (`parse`), or a folder of samples (`open_pool`).

    Raises RecipeError where it names none or several, and for what cannot be used; DataError for samples.
    """
    given = [name for name, value in (("RUN", run), ("--model", models), ("--samples", samples)) if value]
    if len(given) != 1:
        raise RecipeError(f"expected one of RUN, --model and --samples, received {' and '.join(given) or 'none'}")
    if run is not None:
        return of_run(run)
    return of_samples(samples) if samples is not None else of_models([parse(words) for words in models])


def of_run(folder: Path) -> Source:
    """Base and aligned model of a run that has reached its first evaluation."""
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} holds no run: expected recipe.yaml, which `mmpo train out={folder}` writes")
    if not (folder / "best" / "policy.safetensors").is_file():
        raise RecipeError(f"{folder}: no weights under best/; the run has not reached its first evaluation")
    recipe = recipes.load(folder / "recipe.yaml").recipe
    kind = find.answers(recipe.modality)
    pictures = "image" in find.prompts(recipe.modality)
    return Source(folder.resolve().name, kind, ("base", "aligned"), recipe.model.steps, folder.resolve(), pictures=pictures)


def of_models(models: Sequence[Model]) -> Source:
    """Models whose answers are of one kind, each under a name of its own."""
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise RecipeError(f"--model: names have to differ, received {', '.join(names)}")
    if len(models) > MOST:
        raise RecipeError(f"--model: at most {MOST} side by side, received {len(models)}")
    kinds = {find.answers(model.modality) for model in models}
    if len(kinds) > 1:
        raise RecipeError(f"--model: answers of one kind can be compared, these are {' and '.join(sorted(kinds))}")
    steps = [recipe_of(model).recipe.model.steps for model in models]
    most = max(number for number, _ in steps)
    pictures = all("image" in find.prompts(model.modality) for model in models)
    limit = (most, steps[0][1])
    return Source(" and ".join(names), kinds.pop(), tuple(names), limit, models=tuple(models), pictures=pictures)


def of_samples(folder: Path) -> Source:
    """Samples that are there already, of two to MOST systems and of one kind."""
    pool = open_pool(folder)
    kinds, systems = sorted({entry.kind for entry in pool.entries}), pool.systems
    if len(kinds) > 1:
        raise DataError(f"{folder}: samples of one kind can be compared side by side, these are {' and '.join(kinds)}")
    if not 2 <= len(systems) <= MOST:
        raise DataError(f"{folder}: expected 2 to {MOST} named systems, found {len(systems)}")
    return Source(pool.title, kinds[0], tuple(systems), pool=pool)


def parse(words: str) -> Model:
    """A model from NAME=MODALITY:PATH[:ADAPTER]; a path that exists may have colons itself. Raises RecipeError."""
    name, equals, rest = words.partition("=")
    modality, colon, place = rest.partition(":")
    if not (equals and colon and name.strip() and place):
        raise RecipeError(f"--model {words}: expected {FORM}, e.g. tuned=text:models/base:runs/a/export")
    find.answers(modality)  # a misspelt one is told as such
    if Path(place).exists():
        return Model(name.strip(), modality, str(Path(place).resolve()))
    start = len(ASSET) if place.startswith(ASSET) else 0
    path, colon, adapter = place[start:].partition(":")
    path = place[:start] + path
    if colon and not Path(adapter).is_dir():
        raise RecipeError(f"--model {words}: {adapter or 'nothing'} is no directory; expected that of a LoRA adapter")
    local = Path(path).is_dir()
    if not local and (Path(path).is_absolute() or path.startswith(".")):
        raise RecipeError(f"--model {words}: {path} is no directory; expected one, a hub id, or {ASSET}NAME")
    return Model(
        name.strip(), modality, str(Path(path).resolve()) if local else path, str(Path(adapter).resolve()) if colon else None
    )


def recipe_of(model: Model) -> Resolved:
    """The recipe that opens a model: its own weights alone, or under its adapter. Raises RecipeError."""
    settings = [f"model.path={json.dumps(model.path)}"]
    if model.adapter is None:
        settings.append("model.adapter=full")
    else:
        shape = {"path": model.adapter} | lora_shape(Path(model.adapter))
        settings += ["model.adapter=lora", *(f"model.lora.{name}={json.dumps(value)}" for name, value in shape.items())]
    return recipes.load(None, settings, model.modality)


def lora_shape(folder: Path) -> dict[str, Any]:
    """Rank, alpha and layers of an adapter as its files say, of peft's or diffusers' layout. Raises RecipeError."""
    try:
        if (folder / PEFT).is_file():
            told = json.loads((folder / PEFT).read_text(encoding="utf-8"))
            found = {"rank": told.get("r"), "alpha": told.get("lora_alpha"), "targets": told.get("target_modules")}
        elif (folder / DIFFUSERS).is_file():
            found = _of_diffusers(folder / DIFFUSERS)
        else:
            raise RecipeError(f"{folder}: expected a LoRA adapter, with {PEFT} or {DIFFUSERS}")
    except RecipeError:
        raise
    except Exception as error:  # a file of somebody else's: no JSON, no safetensors, JSON of something else
        raise RecipeError(f"{folder}: its files are no LoRA adapter ({error})") from error
    if not isinstance(found["targets"], list):  # one expression of whole names: what the modality would choose anyway
        found.pop("targets")
    return {name: value for name, value in found.items() if value is not None}


def _of_diffusers(file: Path) -> dict[str, Any]:
    """What the file's own metadata says, else the rank of its first matrix."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as weights:
        told = json.loads((weights.metadata() or {}).get("lora_adapter_metadata", "{}"))
        named = {key.rpartition(".")[2]: value for key, value in told.items()}
        down = next((key for key in weights.keys() if "lora_A" in key or "lora.down" in key), None)  # noqa: SIM118
        rank = named.get("r") or (weights.get_slice(down).get_shape()[0] if down else None)
    return {"rank": rank, "alpha": named.get("lora_alpha"), "targets": named.get("target_modules")}
