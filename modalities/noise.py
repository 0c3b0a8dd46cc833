"""The noise process x_t = a(t) x0 + s(t) eps, once for every denoiser: epsilon, v, x0 and rectified-flow targets.

A process is read from a scheduler's configuration and never touches the scheduler object: those are mutated by sampling,
and the flow-matching ones silently return one noise level for a whole batch. Variance-preserving (VP) processes have
integer times 0..T-1 and a table abar with a = sqrt(abar), s = sqrt(1 - abar); rectified flow has real times sigma in
[0, 1] with a = 1 - sigma, s = sigma. Time `None` means clean: a = 1, s = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Target = Literal["epsilon", "v", "x0", "flow"]
Spacing = Literal["leading", "trailing", "linspace"]

TARGETS: dict[str, Target] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
SPACINGS: dict[str, Spacing] = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
EDGE = 1e-3  # drawn flow times keep this distance from 0 and 1, where one of the two ends carries no signal


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """Coefficients, targets and deterministic steps of one noise process. Latents may have any rank, batch first.

    abar: (T,) float64 for VP, None for rectified flow. target: what the model predicts.
    spacing, steps_offset, shift, dynamic_shift: the grid of sampling times only. dynamic_shift is (base_shift, max_shift,
    base_tokens, max_tokens): the log of the shift is linear in the number of latent tokens (FLUX).
    """

    abar: Tensor | None
    target: Target
    num_train_timesteps: int = 1000
    spacing: Spacing = "leading"
    steps_offset: int = 0
    shift: float = 1.0
    dynamic_shift: tuple[float, float, int, int] | None = None

    def __post_init__(self) -> None:
        if self.target == "epsilon" and self.abar is not None and bool((self.abar == 0).any()):
            raise ValueError(
                "noise process: prediction_type 'epsilon' with zero terminal SNR: the last step has no signal to recover x0 "
                "from; expected prediction_type 'v_prediction' or rescale_betas_zero_snr = false in scheduler_config.json"
            )

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], class_name: str) -> NoiseProcess:
        """The process a diffusers scheduler describes. ValueError names the first setting that is not known."""
        if is_flow(config, class_name):
            return _flow(config, class_name)
        spacing = _known(config.get("timestep_spacing", "leading"), SPACINGS, "timestep_spacing", class_name)
        target = _known(config.get("prediction_type", "epsilon"), TARGETS, "prediction_type", class_name)
        abar = _abar(config, class_name)
        return cls(abar, target, len(abar), spacing, int(config.get("steps_offset") or 0))

    def to(self, device: torch.device | str) -> NoiseProcess:
        """The same process with its table on `device`, so that looking up a time needs no transfer."""
        return self if self.abar is None else replace(self, abar=self.abar.to(device))

    def time(self, u: Tensor) -> Tensor:
        """The time of a uniform draw u in [0, 1): floor(u T) as int64 for VP, sigma = u kept off the edges for flow."""
        if self.abar is None:
            return u.clamp(EDGE, 1 - EDGE)
        return (u.double() * self.num_train_timesteps).floor().long().clamp(0, self.num_train_timesteps - 1)

    def place(self, t: Tensor) -> Tensor:
        """Where on the schedule times t are, in [0, 1), fp32: t / T for VP, sigma for flow."""
        return (t.float() if self.abar is None else t / self.num_train_timesteps).clamp(0, 1 - 1e-6)

    def a(self, t: Tensor) -> Tensor:
        """Signal coefficient at times t, float64, t's shape."""
        return 1 - t.double() if self.abar is None else self.abar.to(t.device)[t].sqrt()

    def s(self, t: Tensor) -> Tensor:
        """Noise coefficient at times t, float64, t's shape."""
        return t.double() if self.abar is None else (1 - self.abar.to(t.device)[t]).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a^2 / s^2 at times t, float64."""
        return (self.a(t) / self.s(t)).square()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of clean latents x0 and noise eps (both (N, ...)) at times t (N,), at least fp32."""
        a, s = self._coefficients(t, x0)
        return a * x0 + s * eps

    def target_of(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect model predicts at x_t: eps, a eps - s x0 (v), x0, or eps - x0 (flow)."""
        if self.target == "epsilon":
            return eps
        if self.target == "x0":
            return x0
        if self.target == "flow":
            return eps - x0
        a, s = self._coefficients(t, x0)
        return a * eps - s * x0

    def eps_weight(self, t: Tensor) -> Tensor:
        """The factor that turns a squared error in the native target into the squared error in eps, float64 (N,)."""
        a, s = self.a(t), self.s(t)
        if self.target == "epsilon":
            return torch.ones_like(a)
        if self.target == "x0":
            return (a / s).square()
        return (a / (a + s)).square() if self.target == "flow" else (a / (a.square() + s.square())).square()

    def x0_and_eps(self, x_t: Tensor, output: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a native prediction `output` at x_t implies: x_t = a x0 + s eps."""
        a, s = self._coefficients(t, x_t)
        if self.target == "epsilon":
            return (x_t - s * output) / a, output
        if self.target == "flow":
            return (x_t - s * output) / (a + s), (x_t + a * output) / (a + s)
        if self.target == "v":
            norm = a.square() + s.square()
            return (a * x_t - s * output) / norm, (s * x_t + a * output) / norm
        if t is None:
            raise ValueError("noise process: a model that predicts x0 implies no noise at the clean end; start at a time > 0")
        return output, (x_t - a * output) / s

    def step(self, x_t: Tensor, output: Tensor, t: Tensor | None, t_next: Tensor | None) -> Tensor:
        """One deterministic step from t to t_next, in either direction; None is the clean end.

        For VP it is DDIM with eta = 0 (arXiv 2010.02502 eq. 12), for flow Euler's x + (sigma' - sigma) u. Backwards it
        is DDIM inversion. t, t_next: (N,).
        """
        x0, eps = self.x0_and_eps(x_t, output, t)
        a, s = self._coefficients(t_next, x_t)
        return a * x0 + s * eps

    def levels(self, n: int, tokens: int | None = None) -> Tensor:
        """A descending grid of n sampling times (n,): int64 for VP, float64 for flow, spaced as the scheduler spaces it.

        tokens: number of latent tokens, read by processes whose shift depends on it.
        """
        total = self.num_train_timesteps
        if not 1 <= n <= total:
            raise ValueError(f"sampling steps: expected 1 to {total} (num_train_timesteps), got {n}")
        if self.abar is None:
            shift = self._shift(tokens)
            low = _shifted(1 / total, shift) if self.spacing == "linspace" else 1 / n
            return _shifted(torch.linspace(1, low, n, dtype=torch.float64), shift)
        if self.spacing == "leading":
            return (torch.arange(n).flip(0) * (total // n) + self.steps_offset).clamp(max=total - 1)
        if self.spacing == "trailing":
            return (torch.arange(n, 0, -1, dtype=torch.float64) * total / n).round().long() - 1
        return torch.linspace(total - 1, 0, n, dtype=torch.float64).round().long()

    def _shift(self, tokens: int | None) -> float:
        if self.dynamic_shift is None:
            return self.shift
        if tokens is None:
            raise ValueError("noise process: its sampling grid depends on the number of latent tokens; pass tokens")
        low, high, first, last = self.dynamic_shift
        return math.exp(low + (high - low) * (tokens - first) / (last - first))

    def _coefficients(self, t: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and s in float64, cast to at least fp32 and shaped to broadcast over `like` (N, ...)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if t is None:
            return torch.ones((), dtype=dtype, device=like.device), torch.zeros((), dtype=dtype, device=like.device)
        shape = (-1, *(1,) * (like.ndim - 1))
        return self.a(t).to(dtype).view(shape), self.s(t).to(dtype).view(shape)


def is_flow(config: Mapping[str, Any], class_name: str) -> bool:
    """Whether a scheduler's configuration describes rectified flow."""
    flow_prediction = config.get("prediction_type") == "flow_prediction"
    return "FlowMatch" in class_name or bool(config.get("use_flow_sigmas")) or flow_prediction


def _flow(config: Mapping[str, Any], class_name: str) -> NoiseProcess:
    if config.get("invert_sigmas"):
        raise ValueError(f"{class_name}: invert_sigmas reverses the clock, which is not supported; expected false")
    prediction = config.get("prediction_type") or "flow_prediction"
    if "FlowMatch" not in class_name and prediction != "flow_prediction":
        raise ValueError(f"{class_name}: use_flow_sigmas with prediction_type {prediction!r}; expected 'flow_prediction'")
    keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    dynamic = bool(config.get("use_dynamic_shifting")) and "FlowMatch" in class_name
    return NoiseProcess(
        abar=None,
        target="flow",
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        # Only the plain flow-matching grid ends one training step above clean; pipelines with a dynamic shift pass their own.
        spacing="linspace" if "FlowMatch" in class_name and not dynamic else "trailing",
        shift=float(config.get("shift", config.get("flow_shift")) or 1.0),
        dynamic_shift=tuple(config[k] for k in keys) if dynamic else None,  # type: ignore[arg-type]
    )


def _abar(config: Mapping[str, Any], class_name: str) -> Tensor:
    """The table prod(1 - beta), (T,) float64, after the SNR shift and the zero-terminal-SNR rescaling."""
    abar = (1 - _betas(config, class_name)).cumprod(0)
    scale = config.get("snr_shift_scale") or 1.0
    abar = abar / (scale + (1 - scale) * abar)
    if config.get("rescale_betas_zero_snr"):  # arXiv 2305.08891 algorithm 1
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return abar


def _betas(config: Mapping[str, Any], class_name: str) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    schedules = {"linear": _linear, "scaled_linear": _scaled_linear, "squaredcos_cap_v2": _cosine}
    return _known(config.get("beta_schedule"), schedules, "beta_schedule", class_name)(config)


def _linear(config: Mapping[str, Any]) -> Tensor:
    return torch.linspace(config["beta_start"], config["beta_end"], config["num_train_timesteps"], dtype=torch.float64)


def _scaled_linear(config: Mapping[str, Any]) -> Tensor:
    start, end = config["beta_start"] ** 0.5, config["beta_end"] ** 0.5
    return torch.linspace(start, end, config["num_train_timesteps"], dtype=torch.float64).square()


def _cosine(config: Mapping[str, Any]) -> Tensor:
    """Improved DDPM, arXiv 2102.09672 eq. 17, each beta at most 0.999."""
    grid = torch.linspace(0, 1, config["num_train_timesteps"] + 1, dtype=torch.float64)
    alpha_bar = ((grid + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _shifted(sigma: Any, shift: float) -> Any:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _known(value: Any, table: Mapping[str, Any], field: str, class_name: str) -> Any:
    if value not in table:
        raise ValueError(f"{class_name}: {field} {value!r} is not supported; expected one of {', '.join(table)}")
    return table[value]
