"""Settings that a recipe gives and that nothing reads, because another setting turns them off: said, never silent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmpo import find
from mmpo.recipe import Resolved
from mmpo.schema import Recipe
from mmpo.yaml_source import Keys


def _is(key: str, *values: Any) -> tuple[str, Callable[[Recipe], bool]]:
    """The condition that a setting has one of these values, in words and as a test."""
    return f"{key}: {' or '.join(map(str, values))}", lambda recipe: _value(recipe, tuple(key.split("."))) in values


_ROUNDS = ("train.rounds above 1", lambda recipe: recipe.train.rounds > 1)
_NAMED = ("judge.name", lambda recipe: recipe.judge.name is not None or set(recipe.judge.options) == {"allow_download"})

# A setting, or a section of them, and what has to be so for it to be read.
_READ: tuple[tuple[str, tuple[str, Callable[[Recipe], bool]]], ...] = (
    ("draw", ("modalities that draw timesteps and noise", lambda recipe: find.draws(recipe.modality))),
    ("draw.logit_mean", _is("draw.timesteps", "logit_normal")),
    ("draw.logit_std", _is("draw.timesteps", "logit_normal")),
    ("draw.min_snr_gamma", _is("draw.weight", "min_snr")),
    ("draw.inversion_steps", _is("draw.mode", "inversion", "renoise")),
    ("draw.inversion_eta", _is("draw.mode", "inversion")),
    ("draw.inversion_model", _is("draw.mode", "inversion", "renoise")),
    ("reference.ema_decay", _is("reference.kind", "ema")),
    ("reference.ema_every", _is("reference.kind", "ema")),
    ("reference.cache", _is("reference.kind", "start", "adapter_off", "path", "ema")),
    ("judge.path", _NAMED),
    ("judge.options", _NAMED),
    ("train.betas", _is("train.optimizer", "adamw")),
    ("train.eps", _is("train.optimizer", "adamw")),
    ("train.nonfinite_budget", _is("train.on_nonfinite", "skip")),
    ("data.bad_budget", _is("data.on_bad", "skip", "quarantine")),
    ("train.round_prompts", _ROUNDS),
    ("train.round_candidates", _ROUNDS),
    ("train.round_keeps_data", _ROUNDS),
)


def notes(resolved: Resolved) -> list[str]:
    """A line for each setting that was written, differs from its default and is not read. The first reason counts."""
    recipe, told = resolved.recipe, dict[Keys, str]()
    plain, default = recipe.model_dump(mode="json"), type(recipe)().model_dump(mode="json")
    for name, (condition, holds) in _READ:
        keys = tuple(name.split("."))
        if _at(plain, keys) == _at(default, keys) or holds(recipe):
            continue
        for leaf in _leaves(_at(plain, keys), keys) if len(keys) == 1 else [keys]:
            marks = [mark for k, mark in resolved.marks.items() if k[: len(leaf)] == leaf]
            if marks and _at(plain, leaf) != _at(default, leaf):
                told.setdefault(leaf, f"{marks[-1]} {'.'.join(map(str, leaf))}: not read; it goes with {condition}")
    return list(told.values())


def _leaves(section: dict[str, Any], keys: Keys) -> Iterator[Keys]:
    yield from ((*keys, key) for key in section)


def _value(recipe: Recipe, keys: Keys) -> Any:
    found: Any = recipe
    for key in keys:
        found = getattr(found, str(key), None)
    return found


def _at(plain: Any, keys: Iterable[str | int]) -> Any:
    for key in keys:
        plain = plain[key]
    return plain
