"""Every kind of reference on a tiny model: equal to the policy at the start, to the last bit, and unmoved by training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpo import reference as references
from mmpo.cache import Cache
from mmpo.kernels.token_stats import Head
from mmpo.modalities.diffusion import Adapter, Batch
from mmpo.modalities.families import load
from mmpo.objective import Objective, Result, make_term, rows_of
from mmpo.reference import Cached, Values, trainable
from mmpo.schema import ReferenceConfig
from mmpo.scores import NOTHING, Scores, States
from tests.modalities import tiny
from tests.modalities.adapters import adapter, calls, keys, make_pairs, perturb

# name: adapter, reference.kind
KINDS = {
    "lora start": ("lora", "start"),
    "lora adapter_off": ("lora", "adapter_off"),
    "full start": ("full", "start"),
    "sft start": ("sft", "start"),
    "lora ema": ("lora", "ema"),
    "full ema": ("full", "ema"),
    "full path": ("full", "path"),
}
FIXED = [k for k, (_, kind) in KINDS.items() if kind != "ema"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("sd", tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sft(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter's export, with an alpha that is not its rank."""
    ours, out = adapter(folder, lora={"rank": 2, "alpha": 6}), tmp_path_factory.mktemp("sft")
    ours.save(perturb(ours.model, 0.5), out)
    return out


@pytest.fixture
def opened(folder: Path, sft: Path) -> Any:
    def get(name: str) -> tuple[Adapter, Any]:
        kind, reference = KINDS[name]
        lora = {"rank": 2} if kind != "sft" else {"rank": 2, "alpha": 6, "path": str(sft)}
        ours = adapter(folder, adapter="full" if kind == "full" else "lora", lora=lora)
        config = ReferenceConfig(kind=reference, path=str(folder) if reference == "path" else None)
        return ours, references.build(config, ours, ours.model)

    return get


def draw(ours: Adapter, index: int = 0) -> Batch:
    pairs = make_pairs(2)
    return ours.draw(ours.encode(pairs), keys(pairs, index), ours.model)


def compare(ours: Adapter, reference: Any, batch: Batch) -> Result:
    policy = ours.score(ours.model, batch)
    ref = references.score(reference, ours, ours.model, batch)
    return Objective([make_term("dpo", beta=5.0)])(policy, ref, rows_of(make_pairs(2), "cpu"))


def train_step(ours: Adapter, reference: Any, batch: Batch, size: float = 1e-3) -> None:
    """A step of a given length against the gradient."""
    parameters = list(trainable(ours.model).values())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    compare(ours, reference, batch).loss.mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad *= size / norm
    optimizer.step()
    optimizer.zero_grad()


def logps(scores: dict[str, Scores] | None) -> Tensor:
    assert scores is not None
    return torch.stack([scores[branch].logp for branch in sorted(scores)])


def frozen_state(reference: Any, model: nn.Module) -> dict[str, Tensor]:
    with reference.active(model) as module:
        off = isinstance(reference, references.AdapterOff)
        return {n: v.detach().clone() for n, v in module.state_dict().items() if not (off and "lora_" in n)}


@pytest.mark.parametrize("name", KINDS)
def test_the_start_is_exactly_log_2(name: str, opened: Any) -> None:
    ours, reference = opened(name)
    result = compare(ours, reference, draw(ours))
    assert torch.equal(result.metrics["rewards/margins"], torch.zeros(2))
    assert result.loss.tolist() == [torch.tensor(math.log(2)).item()] * 2


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_reference_is_bit_identical_after_a_step(name: str, opened: Any) -> None:
    ours, reference = opened(name)
    batch = draw(ours)
    state, before = frozen_state(reference, ours.model), logps(references.score(reference, ours, ours.model, batch))
    own = {n: p.detach().clone() for n, p in trainable(ours.model).items()}
    train_step(ours, reference, batch)
    after = frozen_state(reference, ours.model)
    assert state.keys() == after.keys() and all(torch.equal(v, after[n]) for n, v in state.items())
    assert torch.equal(logps(references.score(reference, ours, ours.model, batch)), before)
    assert any(not torch.equal(v, own[n]) for n, v in trainable(ours.model).items()), "the policy has to have moved"
    margins = compare(ours, reference, batch).metrics["rewards/margins"]
    assert bool((margins != 0).all()) and float(margins.sum()) > 0


@pytest.mark.parametrize("name", ["lora start", "full start", "sft start"])
def test_cached_reference(name: str, opened: Any) -> None:
    """The first call computes, the second replays without a model call; both are what recomputation gives, also later."""
    ours, inner = opened(name)
    reference = Cached(inner, Cache(None), ours.model)
    batch = draw(ours)
    module = inner.module if isinstance(inner, references.Frozen) else ours.loaded.denoiser
    with calls(module) as seen:
        first = references.score(reference, ours, ours.model, batch)
        assert seen == [4]
        assert torch.equal(compare(ours, inner, batch).metrics["rewards/margins"], torch.zeros(2))
    train_step(ours, reference, batch)
    with calls(module) as seen:
        replayed = references.score(reference, ours, ours.model, draw(ours))
        assert seen == []
        references.score(reference, ours, ours.model, draw(ours, index=1))
        assert len(seen) == 1, "another draw is another computation"
    recomputed = references.score(inner, ours, ours.model, draw(ours))
    assert torch.equal(logps(first), logps(replayed)) and torch.equal(logps(replayed), logps(recomputed))
    assert replayed is not None and replayed["chosen"].mask.tolist() == [[True], [True]]


@pytest.mark.slow
def test_cached_scores_belong_to_weights_settings_and_precision(folder: Path, tmp_path: Path) -> None:
    """One file shared by runs that differ in one thing each: nothing is replayed for another."""
    other = tiny.make("sd", tmp_path / "v", scheduler=tiny.ddim(prediction_type="v_prediction"))  # the same weights
    cache = Cache(tmp_path / "scores.sqlite")

    def computed(path: Path, autocast: bool = False, **settings: Any) -> bool:
        ours = adapter(path, **settings)
        batch = draw(ours)
        reference = Cached(references.AdapterOff(), cache, ours.model)
        with calls(ours.loaded.denoiser) as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            references.score(reference, ours, ours.model, batch)
        return bool(seen)

    torch.manual_seed(0)  # fresh LoRA weights are part of the reference's digest
    assert computed(folder)
    for settings in ({"path": other}, {"autocast": True}, {"draw": {"weight": "eps"}}, {"dropout": 0.5}):
        torch.manual_seed(0)
        assert computed(**({"path": folder} | settings)), settings
    torch.manual_seed(0)
    assert not computed(folder)


def test_a_moving_reference_is_not_cached(opened: Any) -> None:
    ours, reference = opened("lora ema")
    with pytest.raises(ValueError, match="ema reference changes during training"):
        Cached(reference, Cache(None), ours.model)


def test_a_cast_weight_of_the_policy_is_not_the_references(opened: Any) -> None:
    """Autocast keeps the weights it has cast by parameter, and this reference lends the same parameters other values."""
    ours, _ = opened("lora start")
    reference = Values(ours.model)
    perturb(ours.model)
    batch = draw(ours)
    with torch.autocast("cpu", torch.bfloat16):
        alone = logps(references.score(reference, ours, ours.model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        policy = logps(ours.score(ours.model, batch))
        after = logps(references.score(reference, ours, ours.model, batch))
    assert torch.equal(after, alone) and not torch.equal(after, policy)


class Stated:
    """A modality that gives its states, with a head that trains."""

    def score(self, model: nn.Linear, batch: Any, wants: frozenset[str] = NOTHING, against: Any = None) -> dict[str, Scores]:
        logp = torch.zeros(2, 1)
        states = States(torch.zeros(2, 1, 3), Head(model.weight, model.bias))
        return {"chosen": Scores(logp, logp == 0, states=states if "states" in wants else None)}


def test_a_references_head_stays_its_own() -> None:
    """The policy's values are back in the same parameters when the divergence is computed."""
    model: Any = nn.Linear(3, 5)
    start = model.weight.detach().clone(), model.bias.detach().clone()
    reference: Any = Values(model)
    perturb(model)
    modality: Any = Stated()
    kept = references.score(reference, modality, model, None, frozenset({"states"}))
    assert kept is not None and kept["chosen"].states is not None
    head = kept["chosen"].states.head
    assert torch.equal(head.weight, start[0]) and head.bias is not None and torch.equal(head.bias, start[1])
    assert not head.weight.requires_grad and not torch.equal(model.weight, start[0])
    plain = references.score(reference, modality, model, None)
    assert plain is not None and plain["chosen"].states is None


def test_ema_follows_the_policy(opened: Any) -> None:
    """start + (1 - decay) (policy - start), every second step."""
    ours, _ = opened("lora start")
    start = {n: p.detach().clone() for n, p in trainable(ours.model).items()}
    reference = Values(ours.model, decay=0.75, every=2)
    perturb(ours.model)
    reference.update(ours.model, 1)
    assert all(torch.equal(v, start[n]) for n, v in reference.values.items())
    reference.update(ours.model, 2)
    for n, p in trainable(ours.model).items():
        torch.testing.assert_close(reference.values[n], start[n] + 0.25 * (p.detach() - start[n]))


@pytest.mark.parametrize("name", KINDS)
def test_the_policy_is_back_after_an_error(name: str, opened: Any) -> None:
    """Weights, adapter and gradient flags are as before, also when scoring fails inside the context."""
    ours, reference = opened(name)
    perturb(ours.model, 0.01)
    batch = draw(ours)
    before, flags = logps(ours.score(ours.model, batch)), [p.requires_grad for p in ours.model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), reference.active(ours.model):
        raise RuntimeError("inside")
    assert torch.equal(logps(ours.score(ours.model, batch)), before)
    assert [p.requires_grad for p in ours.model.parameters()] == flags
    assert all(p.grad is None for p in ours.model.parameters())


def test_no_reference_and_impossible_ones(opened: Any, folder: Path) -> None:
    ours, _ = opened("full start")
    assert references.build(ReferenceConfig(kind="none"), ours, ours.model) is None
    assert references.score(None, ours, ours.model, draw(ours)) is None
    with pytest.raises(ValueError, match="adapter_off needs model.adapter: lora"):
        references.build(ReferenceConfig(kind="adapter_off"), ours, ours.model)


# A run that starts from an adapter ---------------------------------------------------------------------------------------


def test_an_adapter_continues_as_it_was_saved(opened: Any, folder: Path, sft: Path) -> None:
    """Start and reference are the SFT model, alpha included, and not the base."""
    ours, reference = opened("sft start")
    batch = draw(ours)
    with torch.no_grad():
        mine = logps(ours.score(ours.model, batch))
        base = logps(references.score(references.AdapterOff(), ours, ours.model, batch))
    plain = load(str(folder))
    plain.pipe.load_lora_weights(str(sft))
    with torch.no_grad():
        by_diffusers = logps(ours.score(plain.pipe.unet, batch))
    torch.testing.assert_close(mine, by_diffusers, rtol=1e-6, atol=1e-4)
    assert not torch.allclose(mine, base, rtol=1e-6, atol=1e-3)
    assert isinstance(reference, Values) and torch.equal(logps(references.score(reference, ours, ours.model, batch)), mine)


def test_an_adapter_of_another_scale_or_rank_is_refused(folder: Path, sft: Path) -> None:
    """The same weights under another alpha are another model: not a silent change."""
    with pytest.raises(ValueError, match=r"trained with alpha 6, this one has alpha 2; set model.lora.alpha"):
        adapter(folder, lora={"rank": 2, "path": str(sft)})
    with pytest.raises(ValueError, match=r"does not fit this adapter \(model.lora.rank"):
        adapter(folder, lora={"rank": 3, "alpha": 6, "path": str(sft)})
    with pytest.raises(ValueError, match="does not fit this adapter"):
        adapter(folder, lora={"rank": 2, "alpha": 6, "targets": ["to_q", "conv1"], "path": str(sft)})
