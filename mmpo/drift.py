"""A run goes on only with what it was started from: its recipe, the base weights and the data, or what a person allows.

`inputs.json` in the run's folder holds the digests of everything that training reads besides the recipe, and each
difference that a person allowed, so that a result never hides what it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpo import __version__, checkpoint, runfolder, yaml_source
from mmpo import recipe as recipes
from mmpo.errors import RecipeError
from mmpo.masking import masked
from mmpo.recipe import Resolved

Differences = dict[str, tuple[Any, Any]]


def claim_recipe(folder: Path, resolved: Resolved) -> None:
    """Write the resolved recipe; RecipeError, naming the settings, for a folder whose run was started from another one.

    Before its first checkpoint there is nothing to lose: a recipe that turned out wrong is corrected in the same folder.
    One that could not be read back, as its defaults make it larger than a recipe may be, is refused here and not on resume.
    """
    written = recipes.dump(resolved)
    yaml_source.parse(written, f"{folder / 'recipe.yaml'}, with all defaults")
    path, mine = folder / "recipe.yaml", masked(None, resolved.recipe.model_dump(mode="json"))
    if path.exists() and runfolder.begun(folder):
        known = runfolder.read_yaml(path, "put it back, or remove it and allow that it is missing: --allow-drift recipe.yaml")
        found = {k: v for k, v in differences(known, mine).items() if k != "out"}
        _settle(folder, "another recipe", found, resolved.allow_drift)
    elif runfolder.begun(folder):
        _settle(folder, "a recipe that is missing", {"recipe.yaml": (None, "as given")}, resolved.allow_drift)
    checkpoint.write_atomic(path, written.encode())


def claim_inputs(folder: Path, digests: Mapping[str, str], allow_drift: Sequence[str]) -> None:
    """Record what a run trains from, e.g. {"weights.denoiser": sha256}; RecipeError for a run started from something else.

    The version of mmpo is held to as well, by the name "mmpo"; runs that began before it was recorded do not have it.
    """
    now, known = {"mmpo": __version__, **digests}, _read(folder)["digests"]
    if runfolder.begun(folder):
        _settle(folder, "other inputs", differences({"mmpo": __version__, **known}, now), allow_drift)
    _write(folder, {**_read(folder), "digests": now})


def differences(old: Any, new: Any, at: str = "") -> Differences:
    """Dotted keys under which two trees of settings differ, with both values; a missing key is the same as null."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return {k: v for key in keys for k, v in differences(old.get(key), new.get(key), f"{at}.{key}".lstrip(".")).items()}
    return {} if old == new else {at: (old, new)}


def _settle(folder: Path, what: str, found: Differences, allow_drift: Sequence[str]) -> None:
    """Refuse differences that are not allowed, note those that are."""
    refused = [key for key in found if key not in allow_drift]
    if refused:
        raise RecipeError(
            f"{folder} holds a run of {what}; different: {', '.join(refused)}. "
            f"Use another out=, or continue it all the same with {' '.join('--allow-drift ' + k for k in refused)}"
        )
    if found:
        known = _read(folder)
        known["drift"] += [{"key": key, "was": was, "now": now} for key, (was, now) in found.items()]
        _write(folder, known)
        print(f"{folder} goes on with {what}, as allowed: {', '.join(found)}; noted in inputs.json")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "inputs.json"
    if not path.exists():
        return {"digests": {}, "drift": []}
    advice = "put it back, or remove it and allow the differences that it cannot tell"
    return runfolder.read_json(path, {"digests": dict, "drift": list}, advice)


def _write(folder: Path, known: dict[str, Any]) -> None:
    checkpoint.write_atomic(folder / "inputs.json", (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())
