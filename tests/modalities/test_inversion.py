"""Inversion of whole batches against one row at a time: plain loops, no masks, diffusers' own grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as D
import pytest
import torch
from torch import Tensor

from mmpo.modalities.diffusion import Adapter, Batch
from mmpo.modality import DrawKey
from tests.modalities import tiny
from tests.modalities.adapters import adapter, keys, make_pairs, stream

TARGETS = ["epsilon", "v_prediction", "flow"]
STEPS = 5
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[str, Path] = {}

    def get(target: str) -> Path:
        if target not in made:
            parts = {} if target == "flow" else {"scheduler": tiny.ddim(prediction_type=target)}
            made[target] = tiny.make("sd3" if target == "flow" else "sd", tmp_path_factory.mktemp(target), **parts)
        return made[target]

    return get


def opened(folder: Path, mode: str = "inversion", **draw: Any) -> Adapter:
    return adapter(folder, draw={"mode": mode, "inversion_steps": STEPS, "inversion_eta": 0.0} | draw)


def drawn(ours: Adapter, count: int = 4, index: int = 0) -> Batch:
    pairs = make_pairs(count)
    return ours.draw(ours.encode(pairs), keys(pairs, index), ours.model)


def grid(folder: Path, target: str) -> tuple[list[Any], list[float], list[float]]:
    """Times, a and s of the inversion's levels, ascending, from diffusers' schedulers."""
    if target == "flow":
        flow = D.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        flow.set_timesteps(STEPS)
        sigmas = flow.sigmas[:-1].flip(0).tolist()
        return sigmas, [1 - s for s in sigmas], sigmas
    vp = D.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    vp.set_timesteps(STEPS)
    times = vp.timesteps.flip(0).tolist()
    abar = vp.alphas_cumprod.double()
    return times, [math.sqrt(abar[t]) for t in times], [math.sqrt(1 - abar[t]) for t in times]


def move(target: str, x: Tensor, output: Tensor, here: tuple[float, float], there: tuple[float, float]) -> Tensor:
    """One deterministic step between two levels, from (a, s) to (a, s)."""
    (a, s), (a_next, s_next) = here, there
    if target == "flow":
        return x + (s_next - s) * output
    if target == "epsilon":
        return a_next * (x - s * output) / a + s_next * output
    return a_next * (a * x - s * output) + s_next * (s * x + a * output)


@torch.no_grad()
def by_hand(ours: Adapter, folder: Path, target: str, pair: int, branch: str, mode: str, eta: float) -> Any:
    """The time, x_t and implied noise of one row."""
    pairs = make_pairs(pair + 1)
    encoded = ours.encode(pairs)[pair]
    key = keys(pairs)[pair]
    condition = {k: v[None] for k, v in encoded.condition.items()}
    times, signal, noise = grid(folder, target)
    goal = int(STEPS * float(torch.rand((), generator=stream(key, "time/"))))
    jitter = stream(key, "eta/" + branch)

    def predict(x: Tensor, time: Any) -> Tensor:
        return ours.loaded.denoise(ours.model, x, torch.tensor([time]), condition)

    clean = encoded.latents[branch][None]
    x, here, time = clean, (1.0, 0.0), 0
    for i in range(goal + 1):
        there = (signal[i], noise[i])
        output = predict(x, time)
        if mode == "renoise":
            output = (output + predict(move(target, x, output, here, there), times[i])) / 2
        x = move(target, x, output, here, there)
        if i > 0:  # the DDPM posterior's standard deviation; for VP its textbook form
            (a, s), (a_next, s_next) = here, there
            spread = s / s_next * math.sqrt(s_next**2 - (a_next * s / a) ** 2)
            if target != "flow":
                textbook = math.sqrt((1 - a**2) / (1 - a_next**2) * (1 - a_next**2 / a**2))
                assert spread == pytest.approx(textbook, rel=1e-6)
            x = x + eta * spread * torch.randn(x.shape[1:], generator=jitter)
        here, time = there, times[i]
    return times[goal], x, (x - here[0] * clean) / here[1]


@pytest.mark.parametrize(
    ("target", "mode", "eta"),
    [
        *((target, "inversion", eta) for target in TARGETS for eta in (0.0, 0.1)),
        ("epsilon", "renoise", 0),
        ("flow", "renoise", 0),
    ],
)
@pytest.mark.slow
def test_a_batch_is_its_rows_one_by_one(target: str, mode: str, eta: float, checkpoint: Checkpoint) -> None:
    """Four pairs at different levels: time, x_t, target, for both members."""
    folder = checkpoint(target)
    ours = opened(folder, mode, inversion_eta=eta)
    batch = drawn(ours)
    assert len(set(batch.t.tolist())) >= 3, "the rows have to stop at different levels"
    reached = batch.t[:4] if target == "flow" else batch.t[:4] / 1000
    torch.testing.assert_close(batch.time, reached.float().clamp(max=1 - 1e-6))
    latents = {b: [e.latents[b] for e in ours.encode(make_pairs(4))] for b in ours.branches}
    for row in range(8):
        pair, branch = row % 4, ours.branches[row // 4]
        time, x, noise = by_hand(ours, folder, target, pair, branch, mode, eta)
        assert batch.t[row].item() == pytest.approx(time, rel=1e-6)
        torch.testing.assert_close(batch.noisy[row], x[0], rtol=1e-4, atol=1e-5)
        clean = latents[branch][pair]
        a, s = (float(f(batch.t[row])) for f in (ours.loaded.process.a, ours.loaded.process.s))
        wanted = {"epsilon": noise[0], "flow": noise[0] - clean, "v_prediction": a * noise[0] - s * clean}[target]
        torch.testing.assert_close(batch.target[row], wanted, rtol=1e-4, atol=1e-4)


def test_members_share_the_level_and_not_the_noise(checkpoint: Checkpoint) -> None:
    batch = drawn(opened(checkpoint("epsilon")))
    assert torch.equal(batch.t[:4], batch.t[4:])
    assert all(not torch.allclose(w, r) for w, r in zip(batch.target[:4], batch.target[4:], strict=True))


@pytest.mark.slow
def test_a_perfect_inversion_is_undone_by_sampling(checkpoint: Checkpoint) -> None:
    """x_t and its implied noise lead back to x0 in one step: that is what makes it the noise that x0 comes from."""
    ours = opened(checkpoint("epsilon"))
    batch, process = drawn(ours), ours.loaded.process
    clean = torch.stack([e.latents[b] for b in ours.branches for e in ours.encode(make_pairs(4))])
    torch.testing.assert_close(process.step(batch.noisy, batch.target, batch.t, None), clean, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_eta_noise_is_a_function_of_seed_sample_and_draw(checkpoint: Checkpoint) -> None:
    """Alone or in company, in any order; another index, seed or name gives another."""
    ours = opened(checkpoint("epsilon"), inversion_eta=0.5, t_min=0.5)
    pairs = make_pairs(3)
    encoded = ours.encode(pairs)
    together = ours.draw(encoded, keys(pairs), ours.model)
    for i in range(3):
        alone = ours.draw(encoded[i : i + 1], keys(pairs)[i : i + 1], ours.model)
        torch.testing.assert_close(alone.noisy, together.noisy[[i, i + 3]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.target, together.target[[i, i + 3]], rtol=1e-4, atol=1e-4)
    again = ours.draw(encoded, keys(pairs), ours.model)
    assert torch.equal(again.noisy, together.noisy)

    def noise(key: DrawKey) -> Tensor:
        return ours.draw(encoded[:1], [key], ours.model).target

    first = noise(DrawKey(0, "p0", 0))
    for other in (DrawKey(1, "p0", 0), DrawKey(0, "p9", 0), DrawKey(0, "p0", 1)):
        assert not torch.allclose(noise(other), first)


def test_eta_zero_has_no_randomness_but_the_level(checkpoint: Checkpoint) -> None:
    ours = opened(checkpoint("flow"), t_min=0.5, t_max=0.5)
    first, second = (drawn(ours, index=i) for i in (0, 1))
    assert torch.equal(first.t, second.t) and torch.equal(first.noisy, second.noisy)


@pytest.mark.slow
def test_the_policy_that_inverts_is_part_of_the_draws_name(checkpoint: Checkpoint) -> None:
    """A reference's score cached for one x_t is not replayed for the x_t of a later policy; in shared mode x_t stays."""
    for mode, moves in (("inversion", True), ("shared", False)):
        ours = opened(checkpoint("epsilon"), mode)
        before = drawn(ours)
        with torch.no_grad():
            for name, parameter in ours.model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(1.0)
        after = drawn(ours)
        assert torch.equal(before.noisy, after.noisy) != moves
        assert (before.keys != after.keys) == moves


def test_what_has_no_meaning_is_refused_before_anything_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="renoise averages two predictions.*predicts v: use inversion"):
        opened(checkpoint("v_prediction"), "renoise")
    x0 = tiny.make("sd", tmp_path, scheduler=tiny.ddim(prediction_type="sample"))
    with pytest.raises(ValueError, match="predicts x0 implies no noise at the clean end"):
        opened(x0)
