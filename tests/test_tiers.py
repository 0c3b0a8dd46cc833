"""The tiers of the reference cache: the bits of the online reference, without its forward pass, and nothing a loss lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpo import reference as references
from mmpo import tiers
from mmpo.cache import Cache, key
from mmpo.kernels.token_stats import Head
from mmpo.modality import DrawKey
from mmpo.objective import Objective, make_term, rows_of
from mmpo.pair import Pair
from mmpo.reference import AdapterOff, Cached, Frozen, Values
from mmpo.schema import ReferenceConfig
from mmpo.scores import NOTHING, Scores, States

TEXT = frozenset({"kl_ref", "kl_policy", "entropy", "weights"})
Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
ROWS: Rows = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), ([2, 2], []), ([3, 1, 4, 1, 5], [9, 2, 6])]


class Bigrams(nn.Module):
    """A language model of two layers that counts its forward passes; `adapter` is what peft would call one."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head, self.adapter = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False), nn.Parameter(torch.zeros(6))
        self.forwards, self.on = 0, True

    def forward(self, ids: Tensor) -> Tensor:
        self.forwards += 1
        hidden = self.embed(ids).tanh()
        return hidden + self.adapter if self.on else hidden

    def disable_adapter(self) -> Any:
        import contextlib

        @contextlib.contextmanager
        def off() -> Any:
            self.on = False
            yield
            self.on = True

        return off()


@dataclass
class Batch:
    rows: Rows
    keys: tuple[bytes, ...]
    device: torch.device = torch.device("cpu")


def batch_of(rows: Rows) -> Batch:
    return Batch(rows, tuple(key(str(row)) for row in rows))


class Tokens:
    """A modality as small as can be: a token is predicted by the one before it, the first by token 0."""

    def head(self, model: Any) -> Head:
        return Head(model.head.weight)

    def score(
        self, model: Any, batch: Batch, wants: frozenset[str] = NOTHING, against: Mapping[str, Scores] | None = None
    ) -> dict[str, Scores]:
        width = max(1, *(len(side) for row in batch.rows for side in row))
        padded = torch.tensor([[[0, *side] + [0] * (width - len(side)) for side in row] for row in batch.rows])
        lengths = torch.tensor([[len(side) for side in row] for row in batch.rows])
        hidden = model(padded[..., :-1])
        logp = model.head(hidden).log_softmax(-1).gather(-1, padded[..., 1:, None]).squeeze(-1)
        found = {}
        for i, branch in enumerate(("chosen", "rejected")):
            most = max(1, int(lengths[:, i].max()))  # as wide as its longest row
            mask = torch.arange(most) < lengths[:, i, None]
            states = States(hidden[:, i, :most], self.head(model)) if "states" in wants else None
            found[branch] = Scores(torch.where(mask, logp[:, i, :most], 0.0), mask, states=states)
        return found


def cached(tier: str, path: Path | None = None, seed: int = 0) -> tuple[Cached, Bigrams, Bigrams]:
    """The reference, its module, and a policy beside it."""
    module, policy = Bigrams(seed), Bigrams(seed + 1)
    return Cached(Frozen(module), Cache(path), policy, tier), module, policy


def online(module: Bigrams, rows: Rows, wants: frozenset[str] = NOTHING) -> dict[str, Scores]:
    with torch.no_grad():
        return Tokens().score(module, batch_of(rows), wants)


def losses(policy: Bigrams, ref: Any, rows: Rows, **term: Any) -> Tensor:
    pairs = [Pair(str(i), ()) for i in range(len(rows))]
    return Objective([make_term(**term)])(Tokens().score(policy, batch_of(rows)), ref, rows_of(pairs, "cpu")).loss


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_a_second_epoch_and_a_second_run_need_no_forward_pass(tier: str, tmp_path: Path) -> None:
    reference, module, policy = cached(tier, tmp_path / "c")
    halves = [batch_of(ROWS[:2]), batch_of(ROWS[2:])]
    first = [references.score(reference, Tokens(), policy, half) for half in halves]  # type: ignore[arg-type]
    assert module.forwards == 2
    second = [references.score(reference, Tokens(), policy, half) for half in halves]  # type: ignore[arg-type]
    assert module.forwards == 2
    again, module, policy = cached(tier, tmp_path / "c")
    third = [references.score(again, Tokens(), policy, half) for half in halves]  # type: ignore[arg-type]
    assert module.forwards == 0
    for replayed in (first, second, third):
        for half, scores in zip(halves, replayed, strict=True):
            assert scores is not None
            want = online(module, half.rows, frozenset({"states"}))
            for branch, s in scores.items():
                if tier == "sums":
                    assert torch.equal(s.logp.sum(-1), want[branch].logp.sum(-1))
                    continue
                assert torch.equal(s.logp, want[branch].logp) and torch.equal(s.mask, want[branch].mask)
                if tier == "states":
                    states = want[branch].states
                    assert s.states is not None and states is not None
                    assert torch.equal(s.states.hidden[s.mask], states.hidden[s.mask])
                    assert torch.equal(s.states.head.weight, module.head.weight)


@pytest.mark.parametrize("tier", tiers.TIERS)
@pytest.mark.parametrize(
    "term", [{"loss": "dpo"}, {"loss": "dpo", "reduce": "mean"}, {"loss": "ipo"}, {"loss": "dpo", "reduce": "ld"}], ids=str
)
def test_a_loss_has_the_bits_of_the_online_reference(tier: str, term: dict[str, Any]) -> None:
    objective = Objective([make_term(**term)])
    reference, module, policy = cached(tier)
    if tier == "sums" and term.get("reduce") == "ld":
        with pytest.raises(ValueError, match="sums is too little: loss dpo discounts single units"):
            tiers.check(tier, objective, TEXT)
        return
    tiers.check(tier, objective, TEXT)
    want = losses(policy, online(module, ROWS), ROWS, **term)
    for _ in range(2):
        ref = references.score(reference, Tokens(), policy, batch_of(ROWS))  # type: ignore[arg-type]
        assert torch.equal(losses(policy, ref, ROWS, **term), want)


def test_what_is_stored_first_stays() -> None:
    """A batch that finds some of its rows computes the others with them, and replaces none."""
    reference, module, policy = cached("tokens")
    first = references.score(reference, Tokens(), policy, batch_of(ROWS[:1]))  # type: ignore[arg-type]
    stored = reference.cache.get_many(list(reference.cache._recent))
    with torch.no_grad():
        module.embed.weight.add_(1)  # stands for the last bits that another batch moves; the identity was taken before
    mixed = references.score(reference, Tokens(), policy, batch_of(ROWS))  # type: ignore[arg-type]
    assert first is not None and mixed is not None and module.forwards == 2
    assert torch.equal(mixed["chosen"].logp[0, :3], first["chosen"].logp[0])
    assert torch.equal(mixed["chosen"].logp[3], online(module, ROWS)["chosen"].logp[3])
    again = reference.cache.get_many(list(reference.cache._recent)[:1])
    assert len(reference.cache._recent) == len(ROWS) and stored[0] is not None and again[0] is not None


def test_tiers_share_a_file_and_no_entry(tmp_path: Path) -> None:
    for tier in tiers.TIERS:
        reference, module, policy = cached(tier, tmp_path / "c")
        references.score(reference, Tokens(), policy, batch_of(ROWS))  # type: ignore[arg-type]
        assert module.forwards == 1
    other, module, policy = cached("states", tmp_path / "c", seed=5)
    references.score(other, Tokens(), policy, batch_of(ROWS))  # type: ignore[arg-type]
    assert module.forwards == 1, "other weights are another reference"


@pytest.mark.parametrize("kind", ["adapter_off", "values"])
def test_the_head_is_the_references_own(kind: str) -> None:
    """Also where reference and policy share the module, and the policy has moved since."""
    policy = Bigrams()
    inner = AdapterOff() if kind == "adapter_off" else Values(policy)
    reference, head = Cached(inner, Cache(None), policy, "states"), policy.head.weight.detach().clone()
    references.score(reference, Tokens(), policy, batch_of(ROWS))  # type: ignore[arg-type]
    with torch.no_grad():
        moved = policy.adapter if kind == "adapter_off" else policy.head.weight
        moved.add_(0.5)
    seen = policy.forwards
    ref = references.score(reference, Tokens(), policy, batch_of(ROWS))  # type: ignore[arg-type]
    assert policy.forwards == seen and ref is not None and ref["chosen"].states is not None
    assert torch.equal(ref["chosen"].states.head.weight, head) and not ref["chosen"].states.head.weight.requires_grad


def test_bf16_states_are_replayed_as_they_are() -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    scores = {"chosen": Scores(torch.zeros(2, 3), torch.ones(2, 3).bool(), states=States(hidden, Head(torch.eye(4))))}
    (found,) = tiers.unpack(tiers.pack(scores, "states"), "states", torch.device("cpu"), Head(torch.eye(4))).values()
    assert found.states is not None and found.states.hidden.dtype == torch.bfloat16 and torch.equal(found.states.hidden, hidden)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_any_mask_survives(masks: list[list[bool]]) -> None:
    """Units that do not count may stand anywhere; the first that does carries the sum."""
    mask = torch.tensor(masks)
    logp = torch.where(mask, -torch.arange(1.0, 1 + mask.numel()).view_as(mask), 0.0)
    width = max(1, *(max((i + 1 for i, m in enumerate(row) if m), default=0) for row in masks), 0)
    for tier in ("sums", "tokens"):
        found = tiers.unpack(tiers.pack({"chosen": Scores(logp, mask)}, tier), tier, torch.device("cpu"))["chosen"]
        assert found.logp.shape == found.mask.shape == (len(masks), width)
        assert torch.equal(found.logp.sum(-1), logp.sum(-1)) and torch.equal(found.mask.any(-1), mask.any(-1))
        assert not bool((found.mask & ~mask[:, :width]).any()), "a unit that does not count never does"


def test_what_a_tier_lacks_is_refused_before_anything_loads() -> None:
    exact = Objective([make_term("dpo"), make_term("tdpo1")])
    for tier in ("sums", "tokens"):
        with pytest.raises(ValueError, match=f"reference.cache: {tier} is too little: loss tdpo1 needs kl_ref.*states"):
            tiers.check(tier, exact, TEXT)
    tiers.check("states", exact, TEXT)
    tiers.check(None, exact, TEXT)
    with pytest.raises(ValueError, match="sums is too little: loss dpo weighs single units.*tokens"):
        tiers.check("sums", Objective([make_term("dpo", weights="spans")]), TEXT)
    with pytest.raises(ValueError, match="states: this modality has no hidden states"):
        tiers.check("states", Objective([make_term("dpo")]), frozenset({"err"}))
    with pytest.raises(ValueError, match="tokens does not store states"):
        reference, _, policy = cached("tokens")
        references.score(reference, Tokens(), policy, batch_of(ROWS), frozenset({"states"}))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind, adapter_kind", [("start", "full"), ("adapter_off", "lora")])
def test_exact_divergences_of_a_language_model_without_a_reference_pass(kind: Any, adapter_kind: str, tmp_path: Path) -> None:
    """TDPO on a real model: loss and gradients are those of the online reference, in a second epoch and in a second run."""
    from tests.modalities.tiny_text import adapter, make, make_pairs

    ours, pairs = adapter(make(tmp_path / "model"), adapter=adapter_kind), make_pairs(3)
    objective = Objective([make_term("tdpo2"), make_term("tdpo1", weight=0.5)])
    tiers.check("states", objective, ours.PROVIDES)
    inner = references.build(ReferenceConfig(kind=kind), ours, ours.model)
    assert inner is not None
    cache = Cache(tmp_path / "c")
    first = Cached(inner, cache, ours.model, "states")
    batch = ours.draw(ours.encode(pairs), [DrawKey(0, p.id, 0) for p in pairs], ours.model)
    references.score(first, ours, ours.model, batch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in references.trainable(ours.model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def step(reference: Any) -> tuple[Tensor, list[Tensor], int]:
        calls = []
        module = inner.module if isinstance(inner, Frozen) else ours.model
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        ref = references.score(reference, ours, ours.model, batch, objective.wants_of_reference)
        handle.remove()
        loss = objective(ours.score(ours.model, batch, objective.wants, ref), ref, rows_of(pairs, "cpu")).loss
        return loss.detach(), list(torch.autograd.grad(loss.sum(), list(references.trainable(ours.model).values()))), len(calls)

    want, gradients, calls = step(inner)
    assert calls == 1
    again = Cached(inner, cache, ours.model, "states")
    for reference in (first, again):
        loss, found, calls = step(reference)
        assert calls == 0 and torch.equal(loss, want)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
