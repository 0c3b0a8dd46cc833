"""What a setting means, also where it is a parameter of a loss or one of another modality's model."""

from __future__ import annotations

import json
from collections import defaultdict

from mmpo import schema, signatures
from mmpo.errors import RecipeError
from mmpo.find import names


def explain(key: str = "", modality: str = "diffusion") -> str:
    """As `mmpo.schema.explain`. Raises RecipeError for a key that there is not, naming the modalities that have it."""
    try:
        return schema.explain(key, modality)
    except RecipeError as error:
        section, *path = (k for k in key.split(".") if k and not k.isdecimal())
        if section == "objective" and len(path) == 1 and (told := _of_losses(path[0])):
            return f"objective.{path[0]}: {told}"
        if section == "model" and (others := [name for name in names("modalities") if _has(key, name)]):
            raise RecipeError(f"{error}; it is a setting of --modality {' or '.join(others)}") from None
        raise


def _has(key: str, modality: str) -> bool:
    try:
        return bool(schema.explain(key, modality))
    except RecipeError:
        return False


def _of_losses(name: str) -> str | None:
    """The losses that have a parameter, by its default; None where none has."""
    given: defaultdict[str, list[str]] = defaultdict(list)
    for loss in names("losses"):
        parameter = (signatures.options("losses", loss) or {}).get("beta" if name == "beta_dpo" else name)
        if parameter is not None and name != "state":
            given["no default" if parameter.default is ... else f"default {json.dumps(parameter.default)}"].append(loss)
    if not given:
        return None
    if name == "beta_dpo":
        return f"another way to give beta, which is beta_dpo / 1000, to {', '.join(sorted(sum(given.values(), [])))}"
    told = "; ".join(f"{default} of {', '.join(losses)}" for default, losses in sorted(given.items()))
    return f"a parameter of losses: {told}\n    mmpo/losses/NAME.py says what it means to each"
