"""Every loss, with every slot of its term, on every modality: it works, or it is refused by name before anything is computed.

On text the result is the same in every layout of the batch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmpo.losses
from mmpo import launch, tiers
from mmpo import recipe as recipes
from mmpo import reference as references
from mmpo.find import find
from mmpo.modality import DrawKey
from mmpo.objective import DIVERGENCES, Objective, Result, Rows, make_term, rows_of
from mmpo.pair import Pair, Span
from mmpo.scores import NOTHING, Scores
from tests.modalities import adapters, tiny, tiny_text

NAMES = sorted(m.name for m in pkgutil.iter_modules(mmpo.losses.__path__))
OF_TOKENS, OF_DENOISERS = {"tdpo1", "tdpo2", "wpo"}, {"err_anchor", "mapo"}
OF_ONE_SIDE = {"nll", "err_anchor", "kto", "bco_unpaired", "reward_anchor"}
WITHOUT_LINK = OF_DENOISERS | {"aot", "aot_unpaired", "cpo", "nll", "orpo", "simpo", "slic", "tdpo1", "tdpo2"}
LAYOUTS = ("shared", "packed", "padded")


@dataclass(frozen=True)
class Scored:
    """A batch under a policy that has moved, and under its start."""

    provides: frozenset[str]
    branches: tuple[str, ...]
    policy: dict[str, Scores]
    reference: dict[str, Scores]
    rows: Rows


def score(modality: Any, pairs: list[Pair], wants: frozenset[str]) -> Scored:
    adapters.perturb(modality.model, 0.05)
    batch = modality.draw(modality.encode(pairs), [DrawKey(0, p.id, 0) for p in pairs], modality.model)
    states = frozenset({"states"}) if wants & DIVERGENCES else NOTHING
    reference = references.score(references.AdapterOff(), modality, modality.model, batch, states)
    assert reference is not None
    policy = modality.score(modality.model, batch, wants, reference)
    return Scored(modality.PROVIDES, modality.branches, policy, reference, rows_of(pairs, "cpu"))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    made = adapters.adapter(tiny.make("sd", tmp_path_factory.mktemp("sd")))
    return score(made, adapters.make_pairs(3), frozenset({"err"}))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scored]:
    """By layout. Some characters of the chosen answers count a quarter, all of the rejected ones as usual."""
    folder: Path = tiny_text.make(tmp_path_factory.mktemp("llama"))
    spans = {"chosen": (Span(0, 4, 0.25),), "rejected": ()}
    pairs = [replace(p, spans=spans) for p in tiny_text.make_pairs(3)]
    wants = frozenset({"kl_ref", "log_sum_p2", "weights"})
    return {layout: score(tiny_text.adapter(folder, layout=layout), pairs, wants) for layout in LAYOUTS}


def slots() -> Iterator[dict[str, Any]]:
    for reduce, weights in product(("sum", "mean", "ld"), ("none", "spans")):
        yield {"reduce": reduce, "weights": weights, "link": "reverse_kl"}
    yield {"reduce": "sum", "weights": "none", "link": "jensen_shannon"}


def settle(name: str, slot: dict[str, Any], on: Scored) -> Result | None:
    """The loss, or None where the objective was refused; the refusal names the loss."""
    objective = Objective([make_term(name, **slot)])
    try:
        objective.check(on.provides, on.branches, has_reference=True)
    except ValueError as error:
        assert f"loss {name} " in str(error)
        return None
    return objective(on.policy, on.reference, on.rows)


def refused(name: str, slot: dict[str, Any], foreign: set[str], spans: bool) -> bool:
    unread = slot["link"] != "reverse_kl" and name in WITHOUT_LINK
    single = slot["reduce"] == "ld" and name in OF_ONE_SIDE
    return name in foreign or unread or single or (slot["weights"] == "spans" and not spans)


def gradients(result: Result, on: Scored) -> list[Tensor]:
    leaves = [x for s in on.policy.values() for x in (s.logp, *s.extras.values()) if x.requires_grad]
    found = torch.autograd.grad(result.loss.sum(), leaves, retain_graph=True, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("name", NAMES)
def test_on_denoisers(name: str, diffusion: Scored) -> None:
    for slot in slots():
        result = settle(name, slot, diffusion)
        assert (result is None) == refused(name, slot, OF_TOKENS, spans=False), slot
        if result is not None:
            found = gradients(result, diffusion)
            assert result.loss.shape == (3,) and bool(result.loss.isfinite().all()), slot
            assert any(bool(g.any()) for g in found) and all(bool(g.isfinite().all()) for g in found), slot


@pytest.mark.parametrize("name", NAMES)
def test_on_tokens_in_every_layout(name: str, text: dict[str, Scored]) -> None:
    for slot in slots():
        results = {layout: settle(name, slot, on) for layout, on in text.items()}
        assert {r is None for r in results.values()} == {refused(name, slot, OF_DENOISERS, spans=True)}, slot
        found = {layout: r for layout, r in results.items() if r is not None}
        for result in found.values():
            torch.testing.assert_close(result.loss, found["padded"].loss, rtol=1e-4, atol=3e-4)
        learnt = {layout: gradients(result, text[layout]) for layout, result in found.items()}
        for mine in learnt.values():
            assert any(bool(g.any()) for g in mine)
            for a, b in zip(mine, learnt["padded"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)


def test_spans_change_the_loss_where_they_are_asked_for(text: dict[str, Scored]) -> None:
    plain, weighed = (settle("dpo", {"weights": w}, text["shared"]) for w in ("none", "spans"))
    assert plain is not None and weighed is not None and not torch.allclose(plain.loss, weighed.loss, rtol=1e-6)


@pytest.mark.parametrize("name", recipes.configs())
def test_every_recipe_fits_its_modality(name: str) -> None:
    resolved = recipes.load(name)
    recipe, adapter = resolved.recipe, find("modalities", resolved.recipe.modality)
    objective = launch.build_objective(resolved)
    objective.check(adapter.PROVIDES, launch.branches_of(adapter, objective), recipe.reference.kind != "none")
    tiers.check(recipe.reference.cache, objective, adapter.PROVIDES)


def test_every_loss_has_a_recipe() -> None:
    used = {term.loss for name in recipes.configs() for term in recipes.load(name).recipe.objective}
    assert set(NAMES) - used == set()
