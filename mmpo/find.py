"""Finds a room's file by its name: no registry, and nothing is imported that was not asked for.

`find("losses", "ipo")` imports `mmpo.losses.ipo` and returns its function `ipo`. Somebody else's code is named
`pkg.module:function` and is imported only after its module was allowed, which only the command line does (`--plugin`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from typing import Any

from mmpo.errors import RecipeError

ROOMS = (
    "losses",
    "judges",
    "diagnostics",
    "modalities",
    "datasets.formats",
    "datasets.builders",
    "datasets.embedders",
)
PLUGINS: set[str] = set()


def names(room: str) -> list[str]:
    """The names a room offers, sorted, without importing any of its files.

    A modality is a file with a `<name>_config` beside it; the room's other files are parts they share.
    """
    if room not in ROOMS:
        raise RecipeError(f"no room '{room}' (rooms: {', '.join(ROOMS)}){nearest(room, ROOMS)}")
    spec = importlib.util.find_spec(f"mmpo.{room}")
    files = {m.name for m in pkgutil.iter_modules(spec.submodule_search_locations if spec else None)}
    offered = {f for f in files if f"{f}_config" in files} if room == "modalities" else files
    return sorted(f for f in offered if not f.startswith("_"))


def find(room: str, name: str) -> Any:
    """The object a recipe means by `name`: `<name>` of `mmpo.<room>.<name>`, or a modality's class `Adapter`.

    Raises RecipeError (a ValueError) for an unknown name, with the nearest names and the full list.
    """
    if ":" in name:
        return _plugin(name)
    require(room, name)
    module = importlib.import_module(f"mmpo.{room}.{name}")
    return getattr(module, "Adapter" if room == "modalities" else name)


def require(room: str, name: str) -> None:
    """Raises RecipeError, as `find` does, for a name that a room does not offer; imports nothing."""
    offered = names(room)
    if name not in offered:
        raise RecipeError(f"no '{name}' in {room} (there are: {', '.join(offered) or 'none'}){nearest(name, offered)}")


def model_config(modality: str) -> Any:
    """The pydantic class of a modality's `model:` section, from its torch-free `<name>_config` file."""
    return _of_config(modality, "ModelConfig")


def answers(modality: str) -> Any:
    """The kind of a modality's answers ("text", "image", "video", "audio"), from the same file."""
    return _of_config(modality, "ANSWERS")


def prompts(modality: str) -> Any:
    """The kinds of blocks that a modality's prompts may hold, from the same file."""
    return _of_config(modality, "PROMPTS")


def draws(modality: str) -> bool:
    """Whether anything of a recipe's `draw:` is read, from the same file; a plugin's that does not say so reads it."""
    try:
        return bool(_of_config(modality, "DRAWS"))
    except RecipeError:
        return True


def _of_config(modality: str, attribute: str) -> Any:
    if ":" in modality:
        return _plugin(f"{modality.partition(':')[0]}:{attribute}")
    offered = names("modalities")
    if modality not in offered:
        raise RecipeError(f"no modality '{modality}' (there are: {', '.join(offered)}){nearest(modality, offered)}")
    return getattr(importlib.import_module(f"mmpo.modalities.{modality}_config"), attribute)


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing when no choice is close. Capitals do not count."""
    known, word = list(choices), word.lower()
    swapped = [c for c in known if sorted(c.lower()) == sorted(word)]  # rl for lr: to difflib they share but one letter
    spelt = {c.lower(): c for c in known}
    close = [word] if word in spelt else difflib.get_close_matches(word, spelt, n=2, cutoff=0.6)
    told = [spelt[c] for c in close] or swapped
    return f"; did you mean {' or '.join(map(repr, told))}?" if told else ""


def require_allowed(name: str, also: Iterable[str] = ()) -> None:
    """Raises RecipeError, as `find` does, for `module:function` of a module that was not allowed; imports nothing.

    also: further modules that are allowed.
    """
    module = name.partition(":")[0]
    if module not in {*PLUGINS, *also}:
        raise RecipeError(
            f"'{name}' is code outside mmpo, and a recipe alone never imports code: allow it with --plugin {module}"
        )


def _plugin(name: str) -> Any:
    require_allowed(name)
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        raise RecipeError(f"the plugin {module} has no '{attribute}'")
    return found
