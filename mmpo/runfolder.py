"""A run's folder: whose it is, what killed processes left in it, and its files, read back with a word for each damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmpo import yaml_source
from mmpo.errors import RecipeError
from mmpo.lock import RunLock

SHOWN = 5  # names in a message
TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-\d+")  # of `checkpoint.write_atomic` and its like; the digits are a process
CHECKPOINT = re.compile(r"step-\d{6,}(\.[0-9a-f]{12})?|CURRENT")
WRITTEN = {  # by place in the folder: what is written there, each under a temporary name first
    "": re.compile(r"(recipe|inputs|ledger|data_manifest|summary)\.(yaml|json)|quarantine\w*\.jsonl|export|merged"),
    "best": re.compile(r"policy\.safetensors"),
    "checkpoints": CHECKPOINT,
    **dict.fromkeys(("samples", "samples/base", "samples/aligned", "samples/pictures"), re.compile(r"[\w-]+\.\w+")),
}
FIRST = frozenset({"run.lock", "cache"})  # of a run that was killed before its recipe was written; a cache may be prepared


def claim(folder: Path) -> RunLock:
    """The lock of a run's folder, or of one to be. Raises RecipeError where it holds other things, which a run would replace.

    A run is known by its lock beside a recipe or checkpoints. Its lock is the first file of it, so that a folder with nothing
    else is taken over; without a lock, which people remove and copies leave out, it is known by what it has saved.
    """
    found = sorted(folder.iterdir())
    others = [path.name for path in found if path.name not in FIRST and not is_leftover(path.name, WRITTEN[""])]
    locked = (folder / "run.lock").exists() and any((folder / name).exists() for name in ("recipe.yaml", "checkpoints"))
    if others and not locked and not _has_saved(folder):
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise RecipeError(
            f"out={folder}: holds other things and no run ({', '.join(others[:SHOWN])}{more}); a run would write among them "
            f"and replace those of its names. Name a folder that is new or empty, e.g. out={folder / 'run'}"
        )
    return RunLock(folder)


def _has_saved(folder: Path) -> bool:
    saved = any(CHECKPOINT.fullmatch(path.name) for path in folder.glob("checkpoints/*"))
    return saved or (folder / "best" / "policy.safetensors").exists()


def begun(folder: Path) -> bool:
    """Whether there is something of a run to lose: a checkpoint, its best weights, or its summary."""
    return _has_saved(folder) or (folder / "summary.json").exists()


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in a run's folder. Only the holder of the run's lock may.

    Nothing but what mmpo itself names so, at the places where it does; of a link the link alone, and none is followed.
    """
    for place, names in WRITTEN.items():
        inside = folder / place
        linked = any(path.is_symlink() for path in (inside, *inside.parents) if path.is_relative_to(folder) and path != folder)
        if inside.is_dir() and not linked:
            remove_leftovers(inside.iterdir(), names)


def remove_leftovers(paths: Iterable[Path], names: re.Pattern[str]) -> None:
    """Remove those of the paths that are temporary names of `names`."""
    for path in sorted(paths):
        if not is_leftover(path.name, names):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_leftover(name: str, names: re.Pattern[str]) -> bool:
    found = TEMPORARY.fullmatch(name)
    return found is not None and names.fullmatch(found["name"]) is not None


# Its files


def read_json(path: Path, holds: Mapping[str, type], advice: str) -> dict[str, Any]:
    """The object in a JSON file. holds: what it must have. Raises RecipeError with file, damage and `advice`."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: damaged ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path}: damaged (expected an object, found {type(found).__name__}); {advice}")
    for key, kind in holds.items():
        if not isinstance(found.get(key), kind):
            has = f"{key} is {type(found[key]).__name__}" if key in found else f"it has no {key}"
            raise RecipeError(f"{path}: damaged (expected {key} as {kind.__name__}, but {has}); {advice}")
    return found


def read_yaml(path: Path, advice: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError with file, damage and `advice`."""
    try:
        found = yaml_source.load(path, str(path))[0]
    except RecipeError as error:
        raise RecipeError(f"{path}: damaged ({error}); {advice}") from error
    if not isinstance(found, dict) or not found:
        kind = "nothing" if not found else type(found).__name__
        raise RecipeError(f"{path}: damaged (expected a mapping of settings, found {kind}); {advice}")
    return found


def of_sample(told: Any, stem: str) -> Any:
    """What a summary says of the sample in a file: by its stem, or in a list by the number that the stem is; None for none.

    Not by its place among the files there are: people delete some, and sorted as text 1000 comes before 101.
    """
    if isinstance(told, Mapping):
        return told.get(stem)
    place = number_of(stem)
    return None if place is None or place >= len(told) else told[place]


def number_of(stem: str) -> int | None:
    """The number that a file is called by."""
    return int(stem) if stem.isascii() and stem.isdigit() else None
