"""The noise process against diffusers' own schedulers and against closed forms."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo.modalities.noise import NoiseProcess

D: Any = diffusers  # its classes are untyped lazy objects

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = {
    "linear": D.DDPMScheduler(),
    "scaled": D.DDIMScheduler(**SD),
    "cosine": D.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "trained": D.DDPMScheduler(trained_betas=[0.1, 0.2, 0.3]),
    "zero": D.DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "cogvideox": D.CogVideoXDDIMScheduler(
        **SD, snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
}


def vp(target: str = "epsilon") -> NoiseProcess:
    name = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[target]
    return NoiseProcess.from_scheduler_config(D.DDIMScheduler(**SD, prediction_type=name).config, "DDIMScheduler")


def process(target: str) -> NoiseProcess:
    return NoiseProcess(None, "flow") if target == "flow" else vp(target)


@pytest.mark.parametrize("name", VP)
def test_table_is_the_schedulers(name: str) -> None:
    scheduler = VP[name]
    mine = NoiseProcess.from_scheduler_config(scheduler.config, type(scheduler).__name__)
    assert mine.abar is not None and mine.num_train_timesteps == len(scheduler.alphas_cumprod)
    torch.testing.assert_close(mine.abar.float(), scheduler.alphas_cumprod.float(), rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_noise_and_target_are_the_schedulers(target: str) -> None:
    scheduler, mine = D.DDIMScheduler(**SD), vp(target)
    x0, eps, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(mine.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t))
    want = eps if target == "epsilon" else scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(mine.target_of(x0, eps, t), want)


@pytest.mark.parametrize("target", ["epsilon", "v", "x0", "flow"])
@settings(max_examples=25)
@given(u=st.floats(0.01, 0.99), seed=st.integers(0, 99), rank=st.integers(0, 4))
def test_native_errors_convert_to_eps_errors(target: str, u: float, seed: int, rank: int) -> None:
    """Table 1.2: at the same x_t, weight * native squared error = squared error of the implied noise."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps, wrong = (torch.randn(2, *(3,) * rank, generator=generator, dtype=torch.float64) for _ in range(3))
    mine = process(target)
    t = mine.time(torch.tensor([u, u / 2]))
    x_t, want = mine.add_noise(x0, eps, t), mine.target_of(x0, eps, t)
    x0_hat, eps_hat = mine.x0_and_eps(x_t, want + wrong, t)
    native, implied = wrong.square().reshape(2, -1).mean(1), (eps_hat - eps).square().reshape(2, -1).mean(1)
    torch.testing.assert_close(mine.eps_weight(t) * native, implied, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(mine.add_noise(x0_hat, eps_hat, t), x_t)


@pytest.mark.parametrize("target", ["epsilon", "v", "flow"])
def test_perfect_model_steps_both_ways(target: str) -> None:
    """With a constant (x0, eps) the path is known: clean -> t -> t' -> clean lands on every point of it."""
    mine, x0, eps = process(target), torch.randn(2, 3), torch.randn(2, 3)
    low, high = mine.time(torch.tensor([0.2, 0.4])), mine.time(torch.tensor([0.7, 0.9]))
    clean_output = eps if target != "flow" else eps - x0  # v at the clean end is eps
    x = mine.step(x0, clean_output, None, low)
    torch.testing.assert_close(x, mine.add_noise(x0, eps, low))
    x = mine.step(x, mine.target_of(x0, eps, low), low, high)
    torch.testing.assert_close(x, mine.add_noise(x0, eps, high))
    torch.testing.assert_close(mine.step(x, mine.target_of(x0, eps, high), high, None), x0, rtol=1e-4, atol=1e-4)


def test_x0_models_cannot_start_clean() -> None:
    with pytest.raises(ValueError, match="predicts x0"):
        vp("x0").step(torch.zeros(1, 2), torch.zeros(1, 2), None, torch.tensor([5]))


def test_flow_step_is_euler() -> None:
    x, u = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    t, t_next = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.7, 0.1], dtype=torch.float64)
    torch.testing.assert_close(NoiseProcess(None, "flow").step(x, u, t, t_next), x + (t_next - t)[:, None] * u)


@pytest.mark.parametrize("target", ["epsilon", "flow"])
@given(u=st.floats(0, 1, exclude_max=True))
def test_time_stays_inside(target: str, u: float) -> None:
    t = process(target).time(torch.tensor([u], dtype=torch.float64))
    assert (0 < t < 1) if target == "flow" else (t == int(u * 1000))


def test_snr_by_hand() -> None:
    assert NoiseProcess(None, "flow").snr(torch.tensor([0.25])).item() == pytest.approx(9.0)
    assert NoiseProcess(torch.tensor([0.8]).double(), "v").snr(torch.tensor([0])).item() == pytest.approx(4.0)


def test_low_precision_latents_get_fp32_coefficients() -> None:
    x = torch.randn(2, 3).bfloat16()
    assert vp().add_noise(x, x, torch.tensor([1, 2])).dtype == torch.float32


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_vp_levels_are_the_schedulers(spacing: str, steps: int) -> None:
    scheduler = D.DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    mine = NoiseProcess.from_scheduler_config(scheduler.config, "DDIMScheduler")
    scheduler.set_timesteps(steps)
    assert mine.levels(steps).tolist() == scheduler.timesteps.tolist()


def test_flow_levels_are_the_schedulers() -> None:
    static = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    mine = NoiseProcess.from_scheduler_config(static.config, "FlowMatchEulerDiscreteScheduler")
    static.set_timesteps(6)
    torch.testing.assert_close(mine.levels(6).float(), static.sigmas[:-1])
    dynamic = D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    mine = NoiseProcess.from_scheduler_config(dynamic.config, "FlowMatchEulerDiscreteScheduler")
    dynamic.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)  # FLUX's mu at 4096 tokens
    torch.testing.assert_close(mine.levels(4, tokens=4096).float(), dynamic.sigmas[:-1])
    with pytest.raises(ValueError, match="pass tokens"):
        mine.levels(4)


def test_one_linspace_step_starts_at_noise() -> None:
    """The schedulers' own grid starts a single step at t = 0, where there is nothing left to denoise."""
    assert NoiseProcess(vp().abar, "epsilon", spacing="linspace").levels(1).tolist() == [999]


def test_sampling_steps_are_bounded() -> None:
    for n in (0, 1001):
        with pytest.raises(ValueError, match="expected 1 to 1000"):
            vp().levels(n)


@pytest.mark.parametrize(
    ("config", "class_name", "message"),
    [
        (SD | {"beta_schedule": "sigmoid"}, "DDPMScheduler", "beta_schedule 'sigmoid'"),
        ({"sigma_min": 0.002, "sigma_max": 80.0}, "EDMEulerScheduler", "EDMEulerScheduler: beta_schedule None"),
        (SD | {"prediction_type": "score"}, "DDPMScheduler", "prediction_type 'score'"),
        (SD | {"timestep_spacing": "random", "num_train_timesteps": 10}, "DDPMScheduler", "timestep_spacing 'random'"),
        (SD | {"rescale_betas_zero_snr": True, "num_train_timesteps": 10}, "DDIMScheduler", "zero terminal SNR"),
        (SD | {"use_flow_sigmas": True, "prediction_type": "epsilon"}, "UniPCMultistepScheduler", "use_flow_sigmas"),
        ({"invert_sigmas": True}, "FlowMatchEulerDiscreteScheduler", "invert_sigmas"),
    ],
)
def test_unknown_settings_are_named(config: dict, class_name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseProcess.from_scheduler_config(config, class_name)


def test_flow_is_recognised() -> None:
    for scheduler in (
        D.FlowMatchEulerDiscreteScheduler(),
        D.FlowMatchHeunDiscreteScheduler(),
        D.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ):
        mine = NoiseProcess.from_scheduler_config(scheduler.config, type(scheduler).__name__)
        assert (mine.target, mine.abar) == ("flow", None)
    assert mine.shift == 3.0
