"""Links against the divergences they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mmpo.links import LINKS, apply

A = 0.5
GENERATORS: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda r: r * math.log(r),
    "forward_kl": lambda r: -math.log(r),
    "jensen_shannon": lambda r: r * math.log(r) - (r + 1) * math.log((r + 1) / 2),
    "alpha_divergence": lambda r: (r ** (1 - A) - (1 - A) * r - A) / (A * (A - 1)),
}


def derivative(f: Callable[[float], float], r: float) -> float:
    step = 1e-5 * r
    return (f(r + step) - f(r - step)) / (2 * step)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("u", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_link_is_the_generator_s_derivative(name: str, u: float) -> None:
    """g(u) - g(0) = f'(e^u) - f'(1)."""
    f = GENERATORS[name]
    expected = derivative(f, math.exp(u)) - derivative(f, 1.0)
    assert apply(name, torch.tensor(u, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("u", [-3.0, 0.0, 3.0])
def test_slope_is_r_times_the_second_derivative(name: str, u: float) -> None:
    f, r = GENERATORS[name], math.exp(u)
    leaf = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(apply(name, leaf), leaf)
    step = 1e-3 * r
    second = (f(r + step) - 2 * f(r) + f(r - step)) / step**2
    assert slope.item() == pytest.approx(r * second, rel=1e-5)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_where_policy_is_reference(name: str, dtype: torch.dtype) -> None:
    assert apply(name, torch.zeros(3, dtype=dtype)).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("name", LINKS)
def test_rises_and_stays_finite(name: str) -> None:
    u = torch.linspace(-1e4, 1e4, 4001).requires_grad_()
    g = apply(name, u)
    (slope,) = torch.autograd.grad(g.sum(), u)
    assert torch.isfinite(g).all() and torch.isfinite(slope).all()
    assert (slope >= 0).all() and (slope[u < 0] > 0).all()
    assert (g.diff() >= 0).all()


@pytest.mark.parametrize("name", LINKS)
def test_slope_in_fp32_is_as_good_as_in_fp64(name: str) -> None:
    def slope(dtype: torch.dtype) -> torch.Tensor:
        u = torch.linspace(-18, 18, 37, dtype=dtype).requires_grad_()
        return torch.autograd.grad(apply(name, u).sum(), u)[0].double()

    torch.testing.assert_close(slope(torch.float32), slope(torch.float64), rtol=1e-5, atol=1e-7)


def test_smooth_where_the_exponential_becomes_a_line() -> None:
    for name, edge in (("forward_kl", -20.0), ("alpha_divergence", -40.0)):
        u = torch.tensor([edge - 1e-6, edge + 1e-6], dtype=torch.float64, requires_grad=True)
        g = apply(name, u)
        (slope,) = torch.autograd.grad(g.sum(), u)
        assert g[0].item() == pytest.approx(g[1].item(), rel=1e-5)
        assert slope[0].item() == pytest.approx(slope[1].item(), rel=1e-5)


def test_unknown_link() -> None:
    with pytest.raises(ValueError, match="expected one of reverse_kl, .* got 'renyi'"):
        apply("renyi", torch.zeros(1))
