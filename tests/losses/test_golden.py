"""Published values of every loss on one worked example, in float64.

Sums of log-probabilities: chosen -12 (reference -13, 6 tokens), rejected -15 (reference -14, 10 tokens), so the log-ratios
are 1 and -1 and their gap is 2. KL(reference || policy), summed over tokens: 0.8 and 0.5.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from mmpo.losses.dpo import dpo
from mmpo.losses.err_anchor import err_anchor
from mmpo.losses.kto import kto
from mmpo.losses.mapo import mapo
from mmpo.losses.sppo import sppo
from mmpo.scores import Side, side


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seen(delta: float, count: float = 1e15) -> dict[str, Tensor]:
    """BCO's state after so many rows that one more does not move it."""
    return {"delta": f64(delta)[0], "count": f64(count)[0]}


CHOSEN = side(f64(-12), ref=f64(-13), length=f64(6), kl_ref=f64(0.8))
REJECTED = side(f64(-15), ref=f64(-14), length=f64(10), kl_ref=f64(0.5))
SIDES = {"chosen": CHOSEN, "rejected": REJECTED}


def at(name: str, sides: dict[str, Side] = SIDES, **keywords: Any) -> float:
    loss = getattr(import_module(f"mmpo.losses.{name}"), name)
    roles = ("chosen",) if name in ("nll", "reward_anchor") else ("chosen", "rejected")
    return loss(*(sides[r] for r in roles), **keywords).loss.item()


@pytest.mark.parametrize(
    ("name", "keywords", "expected"),
    [
        ("dpo", {"beta": 0.1}, 0.598138869),
        ("dpo", {"beta": 0.1, "label_smoothing": 0.1}, 0.618138869),
        ("robust", {"beta": 0.1, "label_smoothing": 0.1}, 0.573138869),
        ("sigmoid_norm", {"beta": 0.1}, 0.679902733),
        ("ipo", {"beta": 0.1, "length_norm": "sum"}, 9.0),
        ("ipo", {"beta": 0.1, "length_norm": "mean"}, 22.404444444),
        ("hinge", {"beta": 0.1}, 0.8),
        ("exo", {"beta": 0.1, "label_smoothing": 1e-3}, 2.422014621),
        ("nca", {"beta": 0.1}, 1.338793320),
        ("sppo", {"beta": 0.1}, 32.0 / 2),  # TRL's 32 has no factor one half
        ("apo_zero", {"beta": 0.1}, 0.950041625),
        ("apo_down", {"beta": 0.1}, 0.975145190),
        ("discopop", {"beta": 0.1, "temperature": 0.05}, 0.814763141),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, 2.126928011),
        ("cpo", {"beta": 0.1, "alpha": 1.0}, 2.554355244),
        ("orpo", {"beta": 0.1}, 2.104205781),
        ("rdpo", {"beta": 0.1, "alpha": 0.05}, 0.693147181),
        ("dpop", {"beta": 0.1, "penalty": 50.0}, 0.598138869),
        ("slic", {"delta": 1.0, "alpha": 0.1}, 0.2),
        ("bco", {"beta": 0.1, "state": seen(0.0)}, 1.288793320),
        ("bco", {"beta": 0.1, "state": seen(0.05)}, 1.289416696),
        ("bco", {"beta": 0.1, "shift": False, "state": seen(0.05)}, 1.288793320),
        ("tdpo1", {"beta": 0.1}, 0.584745157),
        ("tdpo2", {"beta": 0.1, "alpha": 0.5}, 0.591414211),
        ("aot", {"beta": 0.1}, 0.598138869),  # of a batch of one: DPO
        ("aot", {"beta": 0.1, "label_smoothing": 0.1}, 0.618138869),
        ("aot_unpaired", {"beta": 0.1}, 0.598138869),
        ("nll", {}, 2.0),
        ("reward_anchor", {"beta": 0.1}, 0.644396660),
        ("reward_anchor", {"beta": 0.1, "delta": 0.5}, 0.913015252),
        ("nll", {"length_norm": "sum"}, 12.0),
    ],
)
def test_golden_value(name: str, keywords: dict[str, Any], expected: float) -> None:
    assert at(name, **keywords) == pytest.approx(expected, rel=1e-9)


def test_dpop_penalises_a_fallen_chosen_side() -> None:
    swapped = {"chosen": REJECTED, "rejected": CHOSEN}
    assert at("dpop", swapped, beta=0.1, penalty=5.0) == pytest.approx(1.103186049, rel=1e-9)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("reverse_kl", 0.598138869),
        ("forward_kl", 0.582516713),
        ("jensen_shannon", 0.644396660),
        ("alpha_divergence", 0.594349123),
    ],
)
def test_dpo_under_every_divergence(link: str, expected: float) -> None:
    linked = {role: replace(s, link=link) for role, s in SIDES.items()}
    assert at("dpo", linked, beta=0.1) == pytest.approx(expected, rel=1e-9)


def test_dpo_margin_is_modpo() -> None:
    """MODPO, w_k = 0.5, margin rewards 0.3 and 0.6: beta' = beta / w_k, margin = w_-k (0.3 - 0.6) / w_k."""
    chosen = replace(CHOSEN, margin=f64(0.5 * (0.3 - 0.6) / 0.5))
    assert dpo(chosen, REJECTED, beta=0.1 / 0.5).loss.item() == pytest.approx(0.403186049, rel=1e-9)


@pytest.mark.parametrize(("label", "expected"), [(1.0, 0.480010660), (0.0, 0.470035948)])
def test_kto_with_a_given_baseline(label: float, expected: float) -> None:
    of = CHOSEN if label else REJECTED
    completion = replace(of, label=f64(label), extras={"kl_baseline": f64(0.2)})
    assert kto(completion, beta=0.1).loss.item() == pytest.approx(expected, rel=1e-9)


def test_kto_loss_averse_is_minus_log_of_its_utility() -> None:
    completion = replace(CHOSEN, extras={"kl_baseline": f64(0.2)})
    gain = 1 - kto(completion, beta=0.1).loss.item()
    assert kto(completion, beta=0.1, utility="loss_averse").loss.item() == pytest.approx(-math.log(gain), rel=1e-9)


def test_kto_baseline_is_the_mean_of_present_rows_clamped_at_zero() -> None:
    ratios, present = f64(3, 1, 1000), torch.tensor([True, True, False])
    result = kto(replace(side(ratios, ref=f64(0, 0, 0)), present=present), beta=1.0)
    assert result.metrics["kl"].tolist() == [2, 2, 2]
    assert result.loss.tolist() == pytest.approx([1 / (1 + math.e), 1 / (1 + 1 / math.e), 0])
    assert kto(side(f64(-3), ref=f64(0))).metrics["kl"].tolist() == [0]


def test_sppo_soft() -> None:
    """P = 0.8 and 0.3, eta = 1 / beta = 10."""
    chosen, rejected = replace(CHOSEN, score=f64(0.8)), replace(REJECTED, score=f64(0.3))
    assert sppo(chosen, rejected, beta=0.1, soft=True).loss.item() == pytest.approx(2.5, rel=1e-9)


def test_sppo_soft_refuses_scores_that_are_not_probabilities() -> None:
    with pytest.raises(ValueError, match=r"win probabilities in \[0, 1\], got 21.5"):
        sppo(replace(CHOSEN, score=f64(21.5)), REJECTED, soft=True)


def test_err_anchor_is_the_error() -> None:
    assert err_anchor(side(f64(-12), err=f64(0.25))).loss.item() == 0.25


def test_mapo_closed_form() -> None:
    """err 0.2 and 0.3, kappa 0.5, written out: x / (e^x - 1) is 0.1 / (e^0.1 - 1) and 0.15 / (e^0.15 - 1)."""
    s_chosen, s_rejected = 0.1 / (math.e**0.1 - 1), 0.15 / (math.e**0.15 - 1)
    expected = 0.2 + 0.1 * math.log1p(math.exp(-10 * (s_chosen - s_rejected)))
    got = mapo(side(f64(-1), err=f64(0.2)), side(f64(-1), err=f64(0.3)), timesteps=10.0).loss.item()
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("err", [0.0, 1e-8, 1e-4, 0.0999, 0.1001, 3.0])
def test_mapo_likelihood_is_exact_in_fp32(err: float) -> None:
    """The published exp(x) - 1 is off by 1e-3 at err = 1e-4, a logit error of 1."""
    x = 0.5 * err
    expected = x / math.expm1(x) if x else 1.0
    one = torch.tensor([1.0])
    reward = mapo(side(-one, err=err * one), side(-one, err=one), timesteps=1.0).chosen_reward
    assert reward is not None and reward.item() == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize(("label", "scale"), [(1.0, 10.0), (0.75, 5.0), (0.5, 0.0), (0.0, -10.0)])
def test_smpo_is_dpo_with_a_scaled_beta(label: float, scale: float) -> None:
    labelled = {"chosen": replace(CHOSEN, label=f64(label)), "rejected": REJECTED}
    assert at("smpo", labelled, beta=0.1) == pytest.approx(at("dpo", beta=0.1 * scale), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.7])
def test_alpha_divergence_takes_the_papers_alpha(alpha: float) -> None:
    """TRL's alpha_divergence_coef is 1 - alpha: f'(t) = (t^(a - 1) - 1) / (a - 1) with a = 1 - alpha."""
    linked = {role: replace(s, link="alpha_divergence", link_alpha=alpha) for role, s in SIDES.items()}
    a = 1 - alpha
    reward = [(math.exp((a - 1) * u) - 1) / (a - 1) for u in (1.0, -1.0)]
    assert at("dpo", linked, beta=0.1) == pytest.approx(math.log1p(math.exp(-0.1 * (reward[0] - reward[1]))), rel=1e-12)


def test_internvls_mix() -> None:
    """0.8 DPO + 0.2 BCO without its shift + 1.0 NLL per token, as in configs/text_internvl_mix.yaml."""
    mix = 0.8 * at("dpo", beta=0.1) + 0.2 * at("bco", beta=0.1, shift=False, state=seen(0.0)) + 1.0 * at("nll")
    assert mix == pytest.approx(2.736269759, rel=1e-9)


def test_bco_remembers_the_mean_of_all_rewards() -> None:
    """Rewards 1 and -1, then 3 and 1: means 0 and 1. The batch at hand is in its own mean."""

    def step(chosen: float, rejected: float, state: dict[str, Tensor]) -> Any:
        sides = (side(f64(v), ref=f64(0)) for v in (chosen, rejected))
        return import_module("mmpo.losses.bco").bco(*sides, beta=1.0, state=state)

    first = step(1, -1, seen(0.0, 0.0))
    second = step(3, 1, first.state)
    assert [first.metrics["bco_delta"].item(), second.metrics["bco_delta"].item()] == [0, 1]
    assert [v.item() for v in second.state.values()] == [1, 4]
    assert second.loss.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log(2), rel=1e-12)


def test_bco_unpaired_is_half_of_bco() -> None:
    bco_unpaired = import_module("mmpo.losses.bco_unpaired").bco_unpaired
    one, two = (replace(s, label=f64(label)) for s, label in ((CHOSEN, 1.0), (REJECTED, 0.0)))
    halves = [bco_unpaired(s, beta=0.1, state=seen(0.05)).loss.item() for s in (one, two)]
    assert sum(halves) == pytest.approx(1.289416696, rel=1e-9)


@pytest.mark.parametrize(("name", "chosen", "rejected"), [("tdpo1", 1, -1), ("tdpo2", 0, -1)])
def test_tdpo_gradient_through_the_divergences(name: str, chosen: int, rejected: int) -> None:
    """As printed, z grows with K_chosen and falls with K_rejected; TDPO2 passes no gradient to K_chosen. By sign of dz/dK."""
    leaves = [s.extras["kl_ref"].clone().requires_grad_() for s in (CHOSEN, REJECTED)]
    sides = {r: replace(s, extras={"kl_ref": leaf}) for (r, s), leaf in zip(SIDES.items(), leaves, strict=True)}
    loss = getattr(import_module(f"mmpo.losses.{name}"), name)(*sides.values()).loss
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert [0 if g is None else int(-g.sign()) for g in found] == [chosen, rejected]


def test_wpo_weight() -> None:
    """p = (0.7, 0.2, 0.1): log sum p^2 = -0.616186139 at both tokens, 0 and 1, of either side; a mean weight of 0.692899516."""
    logp, spread = math.log(0.7) + math.log(0.2), 2 * -0.616186139
    one = side(f64(logp), ref=f64(logp), length=f64(2), log_sum_p2=f64(spread))
    result = import_module("mmpo.losses.wpo").wpo(one, one, beta=0.1)
    assert result.metrics["wpo_weight"].item() == pytest.approx(0.692899516**2, rel=1e-8)
    assert result.loss.item() == pytest.approx(0.692899516**2 * math.log(2), rel=1e-8)


@pytest.mark.parametrize(("clamp", "weight"), [(True, 1.0), (False, (0.7 / 0.54) ** 2)])
def test_wpo_weight_above_1_is_cut_unless_trls_form_is_asked_for(clamp: bool, weight: float) -> None:
    one = side(f64(math.log(0.7)), ref=f64(0), log_sum_p2=f64(math.log(0.54)))
    result = import_module("mmpo.losses.wpo").wpo(one, one, clamp=clamp)
    assert result.metrics["wpo_weight"].item() == pytest.approx(weight, rel=1e-12)


def test_aot_sorts_the_gaps_of_both_models() -> None:
    """Policy gaps 3, 1, 2 meet the reference's 10, 30, 20 in order of size, whatever row they come from."""
    aot = import_module("mmpo.losses.aot").aot
    chosen, rejected = side(f64(3, 1, 2), ref=f64(10, 30, 20)), side(f64(0, 0, 0), ref=f64(0, 0, 0))
    expected = [math.log1p(math.exp(-(u - v))) for u, v in ((3, 30), (1, 10), (2, 20))]
    assert aot(chosen, rejected, beta=1.0).loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_aot_unpaired_is_differentiable_through_both_sorts() -> None:
    """Loss and gradient of the sorted lists themselves, by autograd."""
    g = torch.Generator().manual_seed(0)
    win, lose = torch.randn(2, 7, generator=g, dtype=torch.float64).unbind()
    leaves = [v.clone().requires_grad_() for v in (win, lose)]
    expected = torch.nn.functional.softplus(-0.5 * (leaves[0].sort().values - leaves[1].sort().values)).sum()
    wanted = torch.autograd.grad(expected, leaves)
    zero = torch.zeros_like(win)
    loss = import_module("mmpo.losses.aot_unpaired").aot_unpaired(*(side(v, ref=zero) for v in leaves), beta=0.5).loss.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_orpo_log_odds() -> None:
    """The oracle's log odds ratio, -0.607069001, through the loss: OR = softplus(0.607069001)."""
    odds_ratio_term = (at("orpo", beta=1.0) - 2.0) / 1.0
    assert odds_ratio_term == pytest.approx(math.log1p(math.exp(0.607069001)), rel=1e-9)
