"""Optimizer and generators: a run that goes on from packed state is bit-identical to one that never stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmpo.checkpoint import load_latest, save
from mmpo.state import pack_optimizer, restore_rng, rng_state, unpack_optimizer


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def names_of(model: nn.Module) -> dict[Tensor, str]:
    return {p: n for n, p in model.named_parameters()}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, amsgrad=True
    )


def tensor_lr(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def averaged(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Rprop(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: int) -> list[float]:
    """Draws from all three global generators, so that restoring any of them wrongly changes the result."""
    losses = []
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 6) + random.gauss(0, 1) + np.random.standard_normal()
        loss = (model(x.to(dtype)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def seed_all() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(4)


def start(build: Callable[[nn.Module], Any], dtype: torch.dtype, wrap: bool) -> tuple[nn.Module, Any, Any]:
    model = network(dtype)
    optimizer = build(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step) if build is not tensor_lr else _Constant()
    return model, Accelerator(cpu=True).prepare_optimizer(optimizer) if wrap else optimizer, schedule


class _Constant:
    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [adamw, momentum, tensor_lr, averaged])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, build: Callable, dtype: torch.dtype, wrap: bool):
    seed_all()
    model, optimizer, schedule = start(build, dtype, wrap)
    train(model, optimizer, schedule, 10)
    state, meta = pack_optimizer(optimizer, names_of(model))
    tensors = {"policy": dict(model.state_dict()), "optimizer": state, "rng": rng_state()}
    save(tmp_path, 10, tensors, {"optimizer": meta, "schedule": schedule.state_dict()}, keep=1)
    losses = train(model, optimizer, schedule, 10)

    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None
    for _ in range(2):  # the second resume must not see what the first one did to the checkpoint's tensors
        resumed, its_optimizer, its_schedule = start(build, dtype, wrap)
        torch.randn(3), random.random(), np.random.random()
        resumed.load_state_dict(checkpoint.tensors["policy"])
        its_schedule.load_state_dict(checkpoint.meta["schedule"])
        unpack_optimizer(its_optimizer, names_of(resumed), checkpoint.tensors["optimizer"], checkpoint.meta["optimizer"])
        restore_rng(checkpoint.tensors["rng"])
        assert train(resumed, its_optimizer, its_schedule, 10) == losses
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_full_precision_state_of_half_precision_weights_keeps_its_bits():
    model = network(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.rand(p.shape),
            "exp_avg_sq": torch.rand(p.shape),
            "kind": "x",
        }
    tensors, meta = pack_optimizer(optimizer, names_of(model))
    other = network(torch.bfloat16)
    restored = torch.optim.AdamW(other.parameters())
    unpack_optimizer(restored, names_of(other), tensors, json.loads(json.dumps(meta)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert restored.state[q]["kind"] == "x"
        assert torch.equal(optimizer.state[p]["exp_avg"], restored.state[q]["exp_avg"])


def test_unpack_names_the_first_parameter_that_does_not_fit():
    model = network()
    optimizer = momentum(model)
    train(model, optimizer, _Constant(), 1)
    tensors, meta = pack_optimizer(optimizer, names_of(model))

    def resume(other: nn.Module, parameters: Any = None) -> None:
        its = torch.optim.SGD(parameters or other.parameters(), lr=1e-2, momentum=0.9)
        unpack_optimizer(its, names_of(other), tensors, meta)

    deeper = network()
    deeper.add_module("4", nn.Linear(1, 1))
    with pytest.raises(ValueError, match="parameter 4.weight is not in the checkpoint"):
        resume(deeper)
    shallow = network()
    with pytest.raises(ValueError, match="the checkpoint has parameter 3.weight"):
        resume(shallow, list(shallow.parameters())[:2])
    wide = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
    with pytest.raises(ValueError, match=r"parameter 0.weight.*shape \[16, 6\].*shape \[16, 7\]"):
        resume(wide)
    split = network()
    with pytest.raises(ValueError, match=r"parameter 3.weight: the checkpoint has group 0.*has group 1"):
        resume(split, [{"params": list(split.parameters())[:2]}, {"params": list(split.parameters())[2:]}])
    with pytest.raises(ValueError, match=r"shape \(16, 6\) has no name"):
        pack_optimizer(optimizer, {})


def test_generators_continue_where_they_were(monkeypatch: pytest.MonkeyPatch):
    seed_all()
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(1)  # each keeps a spare normal draw
    state = rng_state()

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random(), *torch.randn(3).tolist()]

    expected = draw()
    assert draw() != expected
    restore_rng(state)
    assert draw() == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.warns(UserWarning, match="has 1 CUDA generators, this machine 0: not a bit-identical run"):
        restore_rng({**state, "cuda.0": state["torch"]})
