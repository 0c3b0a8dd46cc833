"""Training the last layers alone: the states below are computed once per pair, and nothing else changes by a bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmpo import reference as references
from mmpo.modalities.text import Adapter, Batch
from mmpo.modalities.text_trunk import layers_of
from mmpo.modality import DrawKey
from mmpo.objective import Objective, Result, make_term, rows_of
from mmpo.pair import Pair
from mmpo.schema import ReferenceConfig
from tests.modalities.tiny_text import adapter, make, make_pairs

OBJECTIVE = Objective([make_term("dpo"), make_term("tdpo2")])
LAYERS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


def draw(ours: Adapter, pairs: list[Pair]) -> Batch:
    return ours.draw(ours.encode(pairs), [DrawKey(0, p.id, 0) for p in pairs], ours.model)


def step(ours: Adapter, reference: Any, pairs: list[Pair]) -> tuple[Result, list[Tensor]]:
    batch = draw(ours, pairs)
    ref = references.score(reference, ours, ours.model, batch, OBJECTIVE.wants_of_reference)
    result = OBJECTIVE(ours.score(ours.model, batch, OBJECTIVE.wants, ref), ref, rows_of(pairs, "cpu"))
    weights = list(references.trainable(ours.model).values())
    return result, list(torch.autograd.grad(result.loss.sum(), weights))


@contextmanager
def counted(ours: Adapter) -> Iterator[list[int]]:
    """Attention calls of every layer; a layer that is passed over makes none."""
    seen = [0] * LAYERS

    def count(i: int) -> None:
        seen[i] += 1

    layers: Any = layers_of(ours.model)
    handles = [layer.self_attn.register_forward_hook(lambda *_, i=i: count(i)) for i, layer in enumerate(layers)]
    yield seen
    for handle in handles:
        handle.remove()


def move(ours: Adapter) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in references.trainable(ours.model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_replayed_states_change_nothing(kind: str, layout: str, checkpoint: Path) -> None:
    """Losses and gradients are those of the whole model to the last bit, and the lower layers run once per pair."""
    ours, pairs = adapter(checkpoint, adapter=kind, layout=layout, train_layers=1), make_pairs(3)
    reference = references.build(ReferenceConfig(kind="start"), ours, ours.model)
    with counted(ours) as seen:
        result, _ = step(ours, reference, pairs)
    assert not result.metrics["rewards/margins"].any()
    once = 1 if kind == "lora" else 0  # a reference of its own runs first
    assert seen[:2] == [once, once], "computed by the reference, and read by the policy"
    move(ours)
    with counted(ours) as seen:
        result, gradients = step(ours, reference, pairs)
    assert seen[:2] == [0, 0] and seen[2] >= 1 and bool(result.metrics["rewards/margins"].all())
    ours._trunk = None
    with counted(ours) as seen:
        whole, wanted = step(ours, reference, pairs)
    assert seen[0] >= 1
    assert torch.equal(result.loss, whole.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def test_a_row_in_other_company_keeps_its_states(checkpoint: Path) -> None:
    """A batch that knows some of its pairs; a pair that comes twice; and margins of exactly 0 in all of them."""
    ours, pairs = adapter(checkpoint, train_layers=2), make_pairs(3)
    reference = references.build(ReferenceConfig(kind="start"), ours, ours.model)
    for rows in (pairs[:1], pairs, [pairs[2], pairs[0], pairs[0]], pairs[1:]):
        assert not step(ours, reference, rows)[0].metrics["rewards/margins"].any()
    known = adapter(checkpoint, train_layers=2)
    assert known._trunk is not None and ours._trunk is not None
    known._trunk.cache = ours._trunk.cache
    move(known)
    with counted(known) as seen:
        found = known.score(known.model, draw(known, pairs[::-1]))
    assert seen[0] == 0, "another run of the same model reads what this one stored"
    known._trunk = None
    for branch, scores in known.score(known.model, draw(known, pairs[::-1])).items():
        assert torch.allclose(found[branch].logp, scores.logp, atol=1e-5)


def test_only_the_last_layers_train(checkpoint: Path) -> None:
    for kind in ("lora", "full"):
        names = list(references.trainable(adapter(checkpoint, adapter=kind, train_layers=1).model))
        assert names and all(".layers.2." in name for name in names)
    with pytest.raises(ValueError, match="fewer than the model's 3 layers, got 3"):
        adapter(checkpoint, train_layers=3)


def test_other_lower_layers_have_states_of_their_own(checkpoint: Path) -> None:
    """A reference of other weights shares the file and no entry."""
    ours, pairs = adapter(checkpoint, train_layers=1), make_pairs(2)
    other = ours.load_reference(str(checkpoint))
    lower: Any = layers_of(other)[0]
    with torch.no_grad():
        lower.mlp.up_proj.weight.mul_(1.5)
    batch = draw(ours, pairs)
    ours.score(ours.model, batch)
    found = ours.score(other, batch)
    ours._trunk = None
    wanted = ours.score(other, batch)
    assert all(torch.equal(found[b].logp, wanted[b].logp) for b in wanted)


def test_checkpointing_recomputes_the_upper_layers_alone(checkpoint: Path) -> None:
    pairs, found = make_pairs(2), []
    for checkpointing in (False, True):
        ours = adapter(checkpoint, adapter="full", train_layers=2, gradient_checkpointing=checkpointing)
        reference = references.build(ReferenceConfig(kind="start"), ours, ours.model)
        step(ours, reference, pairs)
        move(ours)
        with counted(ours) as seen:
            found.append(step(ours, reference, pairs)[1])
        assert seen == ([0, 2, 2] if checkpointing else [0, 1, 1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
