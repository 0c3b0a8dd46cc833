"""What every modality owes (`mmpo.modality.Modality`), checked on each one that the room offers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpo.find import find, names
from mmpo.modality import DrawKey, GivesStates, Modality
from mmpo.objective import DIVERGENCES
from mmpo.pair import Pair
from mmpo.reference import AdapterOff
from mmpo.scores import Scores
from tests import vlm_families
from tests.modalities import tiny, tiny_text, tiny_vlm
from tests.modalities.adapters import adapter, perturb


def diffusion(folder: Path) -> Any:
    return adapter(tiny.make("sd", folder), sample_steps=2)


def text(folder: Path) -> Any:
    return tiny_text.adapter(tiny_text.make(folder), sample={"max_new_tokens": 12})


def vlm(folder: Path) -> Any:
    return tiny_vlm.adapter(vlm_families.make("llava", folder), sample={"max_new_tokens": 12})


TINY: dict[str, Callable[[Path], Any]] = {"diffusion": diffusion, "text": text, "vlm": vlm}
RANDOM = {"diffusion"}  # whose draws differ from one index to the next
FEATURES = [n for n, v in vars(Modality).items() if inspect.isfunction(v) and not n.startswith("_")]


@pytest.fixture(scope="module", params=names("modalities"))
def modality(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An adapter on a tiny model whose policy has moved away from the start."""
    assert request.param in TINY, f"add a tiny model of {request.param} to TINY"
    made = TINY[request.param](tmp_path_factory.mktemp(request.param))
    assert type(made) is find("modalities", request.param)
    perturb(made.model, 0.3)
    return made


def keys(pairs: list[Pair], index: int = 0) -> list[DrawKey]:
    return [DrawKey(0, p.id, index) for p in pairs]


@torch.no_grad()
def score(modality: Any, pairs: list[Pair], index: int = 0) -> dict[str, Scores]:
    """All that the modality provides, against the model without its adapter."""
    batch = modality.draw(modality.encode(pairs), keys(pairs, index), modality.model)
    with AdapterOff().active(modality.model) as reference:
        against = modality.score(reference, batch, frozenset({"states"}))
    return modality.score(modality.model, batch, modality.PROVIDES, against)


def test_it_has_the_whole_interface(modality: Any) -> None:
    annotated = set(Modality.__annotations__)
    states = {"head": GivesStates} if modality.PROVIDES & DIVERGENCES else {}
    features = dict.fromkeys(FEATURES, Modality) | states
    assert not [n for n in (*features, *annotated) if not hasattr(modality, n)]
    for name, protocol in features.items():
        wanted, own = (inspect.signature(getattr(c, name)).parameters for c in (protocol, type(modality)))
        assert list(own) == list(wanted), name
    assert isinstance(modality.PROVIDES, frozenset) and {"chosen", "rejected"} <= set(modality.branches)


def test_pairs_within_its_limits_are_admitted(modality: Any) -> None:
    pairs = modality.dummy()
    kept, counts = modality.admit(pairs)
    assert list(kept) == pairs and not counts


def test_dummies_are_valid_pairs(modality: Any) -> None:
    pairs = modality.dummy()
    assert len(pairs) == 2 and len({p.id for p in pairs}) == 2 and all(p.chosen and p.rejected for p in pairs)
    assert all(a.chosen[0].digest == b.chosen[0].digest for a, b in zip(pairs, modality.dummy(), strict=True))


def test_scores_have_their_shapes_types_and_extras(modality: Any) -> None:
    scores = score(modality, modality.dummy())
    assert set(scores) == set(modality.branches)
    for branch in scores.values():
        assert branch.logp.shape == branch.mask.shape and branch.logp.shape[0] == 2
        assert branch.logp.dtype == torch.float32 and branch.mask.dtype == torch.bool
        assert branch.logp.isfinite().all() and branch.mask.any(-1).all()
        assert set(branch.extras) == modality.PROVIDES - {"weights"}  # which come with the pairs that have spans
        assert all(v.shape[0] == 2 and v.dtype == torch.float32 and v.isfinite().all() for v in branch.extras.values())


def test_score_is_deterministic(modality: Any) -> None:
    pairs = modality.dummy()
    batch = modality.draw(modality.encode(pairs), keys(pairs), modality.model)
    with torch.no_grad():
        first, second = (modality.score(modality.model, batch) for _ in range(2))
    assert all(torch.equal(first[b].logp, second[b].logp) for b in first)
    assert all(torch.equal(first[b].logp, s.logp) for b, s in score(modality, pairs).items())
    again = torch.equal(first["chosen"].logp, score(modality, pairs, index=1)["chosen"].logp)
    assert again == (type(modality).__module__.rpartition(".")[2] not in RANDOM)


def test_pairs_do_not_see_each_other(modality: Any) -> None:
    """Permuting the pairs permutes the scores, and alone a pair has the score it has in company."""
    pairs = modality.dummy()
    scores, flipped, alone = score(modality, pairs), score(modality, pairs[::-1]), score(modality, pairs[:1])
    for branch, s in scores.items():
        torch.testing.assert_close(flipped[branch].logp, s.logp.flip(0), rtol=1e-5, atol=1e-3)
        units = alone[branch].logp.shape[1]  # in company a row is as wide as the widest
        torch.testing.assert_close(alone[branch].logp, s.logp[:1, :units], rtol=1e-5, atol=1e-3)
        assert not s.mask[:1, units:].any()


def test_swapped_sides_swap_their_scores(modality: Any) -> None:
    pairs = modality.dummy()
    swapped = score(modality, [Pair(p.id, p.prompt, p.rejected, p.chosen) for p in pairs])
    for a, b in (("chosen", "rejected"), ("rejected", "chosen")):
        torch.testing.assert_close(swapped[a].logp, score(modality, pairs)[b].logp, rtol=1e-5, atol=1e-3)


def test_only_trainable_parameters_get_gradient_and_all_of_them_do(modality: Any) -> None:
    pairs = modality.dummy()
    batch = modality.draw(modality.encode(pairs), keys(pairs), modality.model)
    try:
        sum(s.logp.sum() for s in modality.score(modality.model, batch).values()).backward()
        for name, parameter in modality.model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
    finally:
        modality.model.zero_grad(set_to_none=True)


def test_samples_depend_on_weights_prompt_and_seed_alone(modality: Any) -> None:
    pairs = modality.dummy()
    prompt, other = pairs[0].prompt, ()
    one, two, elsewhere = modality.sample(modality.model, [prompt, prompt, other], [3, 4, 3])
    (alone,) = modality.sample(modality.model, [prompt], [3])
    again = modality.sample(modality.model, [other, prompt], [3, 3])[1]
    # one level of 8 bits: the order of fp32 additions depends on the batch's size
    for same in (alone, again):
        assert int(_distance(one.data, same.data).max()) <= 1
    assert _distance(one.data, two.data).max() > 1 and _distance(one.data, elsewhere.data).max() > 0
    assert one.kind == pairs[0].chosen[0].kind


def _distance(a: Any, b: Any) -> np.ndarray:
    """Of two pictures by pixel, in levels of 8 bits; of two texts 0 or all the way."""
    if isinstance(a, str):
        return np.array([255 * (a != b)])
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


@pytest.mark.parametrize("merge", [False, True])
def test_exports_are_the_policy_and_not_the_base(merge: bool, modality: Any, tmp_path: Path) -> None:
    modality.save(modality.model, tmp_path, merge)
    from_policy, from_base, size = modality.check_export(modality.model, tmp_path, merge)
    assert from_policy <= 1e-5 * size < from_base
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_describe_is_one_line(modality: Any) -> None:
    line = modality.describe(0.5)
    assert "0.5" in line and "\n" not in line


def test_scores_move_with_the_weights(modality: Any) -> None:
    """The gradient of a score is its finite difference along a random direction."""
    pairs = modality.dummy()
    batch = modality.draw(modality.encode(pairs), keys(pairs), modality.model)
    parameters = [p for p in modality.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator) for p in parameters]

    def value() -> Tensor:
        return modality.score(modality.model, batch)["chosen"].logp.sum()

    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(value(), parameters), direction, strict=True))
    step, ends = 2e-3, []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(sign * step * d)
            ends.append(value())
    assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float(slope), rel=0.05)
