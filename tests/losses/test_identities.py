"""The identities that the pages of DPO and its closest relatives promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpo.losses.discopop import discopop
from mmpo.losses.dpo import dpo
from mmpo.losses.exo import exo
from mmpo.losses.robust import robust
from mmpo.scores import Losses, side

probability = st.floats(0, 1, width=32)
ratio = st.floats(-50, 50)


@given(label=probability, smoothing=st.floats(0, 0.49), logp=st.floats(-1e4, 0, width=32))
def test_exactly_log_2_where_policy_is_reference(label: float, smoothing: float, logp: float) -> None:
    at = torch.tensor([logp])
    loss = dpo(side(at, ref=at, label=torch.tensor([label])), side(at, ref=at), label_smoothing=smoothing).loss
    assert loss.item() == torch.tensor(2.0).log().item()


@given(gap=ratio, label=probability, smoothing=st.floats(0, 0.49))
def test_soft_label_mixes_the_two_hard_losses(gap: float, label: float, smoothing: float) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    up, down = side(zero + gap, ref=zero), side(zero, ref=zero)
    keep = label * (1 - smoothing) + (1 - label) * smoothing
    expected = keep * dpo(up, down).loss + (1 - keep) * dpo(down, up).loss
    got = dpo(replace(up, label=zero + label), down, label_smoothing=smoothing).loss
    assert got.item() == pytest.approx(expected.item(), rel=1e-9)


def test_swapping_the_sides_negates_the_gradient_at_zero() -> None:
    def gradient(swapped: bool) -> tuple[float, float]:
        a, b = (torch.zeros(1, requires_grad=True) for _ in range(2))
        sides = side(a, ref=torch.zeros(1)), side(b, ref=torch.zeros(1))
        dpo(*(sides[::-1] if swapped else sides), beta=0.1).loss.sum().backward()
        assert a.grad is not None and b.grad is not None
        return a.grad.item(), b.grad.item()

    assert gradient(False) == pytest.approx((-0.05, 0.05))
    assert gradient(True) == pytest.approx((0.05, -0.05))


@given(gap=ratio, rate=st.floats(0, 0.45))
def test_robust_is_unbiased_under_flips(gap: float, rate: float) -> None:
    """(1 - e) robust(pair) + e robust(flipped pair) is the clean DPO loss."""
    zero = torch.zeros(1, dtype=torch.float64)
    up, down = side(zero + gap, ref=zero), side(zero, ref=zero)
    seen = (1 - rate) * robust(up, down, label_smoothing=rate).loss + rate * robust(down, up, label_smoothing=rate).loss
    assert seen.item() == pytest.approx(dpo(up, down).loss.item(), rel=1e-9, abs=1e-12)


def test_exo_is_zero_at_its_label() -> None:
    target = torch.tensor([math.log(0.999 / 0.001) / 0.1], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    assert exo(side(target, ref=zero), side(zero, ref=zero)).loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "keywords"),
    [(exo, {"label_smoothing": 0.0}), (robust, {"label_smoothing": 0.5}), (dpo, {"label_smoothing": 0.5})],
)
def test_flip_rates_that_mean_nothing_are_refused(loss: Callable[..., Losses], keywords: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="label_smoothing: expected"):
        loss(side(torch.zeros(1), ref=torch.zeros(1)), side(torch.zeros(1), ref=torch.zeros(1)), **keywords)


def test_discopop_refuses_a_temperature_that_overflows() -> None:
    with pytest.raises(ValueError, match="temperature"):
        discopop(side(torch.zeros(1), ref=torch.zeros(1)), side(torch.zeros(1), ref=torch.zeros(1)), temperature=2.0)
