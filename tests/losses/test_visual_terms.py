"""Terms over a third branch, computed by hand: Re-Align's rDPO and mDPO's conditional preference and anchor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpo.losses.bco import bco
from mmpo.losses.reward_anchor import reward_anchor
from mmpo.objective import Objective, Rows, make_term
from mmpo.scores import Scores, side

POLICY = {"chosen": [-1.0, -2.0, -0.5], "rejected": [-3.0, -1.0], "other": [-2.0, -2.5, -1.5]}
REFERENCE = {"chosen": [-1.5, -2.0, -1.0], "rejected": [-2.0, -1.5], "other": [-2.0, -2.0, -1.0]}
BETA = 0.3


def scores(of: dict[str, list[float]], other: str, grad: bool = False) -> dict[str, Scores]:
    names = {"chosen": "chosen", "rejected": "rejected", "other": f"chosen@{other}"}
    units = {name: torch.tensor([of[key]], dtype=torch.float64, requires_grad=grad) for key, name in names.items()}
    return {name: Scores(logp, torch.ones_like(logp, dtype=torch.bool)) for name, logp in units.items()}


def rows() -> Rows:
    one = torch.ones(1, dtype=torch.float64)
    return Rows(one, 0 * one, one, {})


def ratio(branch: str) -> float:
    return sum(POLICY[branch]) - sum(REFERENCE[branch])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_rdpo_is_two_dpo_terms_by_hand() -> None:
    objective = Objective(
        [make_term("dpo", beta=BETA), make_term("dpo", of=["chosen", "chosen@retrieved"], beta=BETA)],
    )
    assert objective.branches == ("chosen", "rejected", "chosen@retrieved")
    result = objective(scores(POLICY, "retrieved"), scores(REFERENCE, "retrieved"), rows())
    spoken = -log_sigmoid(BETA * (ratio("chosen") - ratio("rejected")))  # 0.3 (1 - (-0.5))
    visual = -log_sigmoid(BETA * (ratio("chosen") - ratio("other")))  # 0.3 (1 - (-1))
    assert result.loss.item() == pytest.approx(spoken + visual, rel=1e-12)
    assert result.loss.item() == pytest.approx(0.49324895 + 0.43748795, abs=1e-7)
    assert result.metrics["loss/dpo/chosen/rejected"].item() == pytest.approx(spoken, rel=1e-12)
    assert result.metrics["loss/dpo/chosen/chosen@retrieved"].item() == pytest.approx(visual, rel=1e-12)


def test_mdpo_is_three_terms_by_hand() -> None:
    objective = Objective(
        [
            make_term("dpo", beta=BETA),
            make_term("dpo", of=["chosen", "chosen@crop"], beta=BETA),
            make_term("reward_anchor", beta=BETA, delta=0.25),
        ]
    )
    result = objective(scores(POLICY, "crop"), scores(REFERENCE, "crop"), rows())
    parts = [
        BETA * (ratio("chosen") - ratio("rejected")),
        BETA * (ratio("chosen") - ratio("other")),
        BETA * ratio("chosen") - 0.25,
    ]
    assert result.loss.item() == pytest.approx(-sum(map(log_sigmoid, parts)), rel=1e-12)
    assert result.metrics["loss/reward_anchor"].item() == pytest.approx(-log_sigmoid(parts[2]), rel=1e-12)


def test_at_the_reference_every_term_is_log_2() -> None:
    terms = [make_term("dpo"), make_term("dpo", of=["chosen", "chosen@crop"]), make_term("reward_anchor")]
    same = scores(REFERENCE, "crop", grad=True)
    result = Objective(terms)(same, scores(REFERENCE, "crop"), rows())
    assert result.loss.item() == pytest.approx(3 * math.log(2), rel=1e-12)
    result.loss.sum().backward()
    for name, sign, share in (("chosen", -1, 3), ("rejected", 1, 1), ("chosen@crop", 1, 1)):
        found = same[name].logp.grad
        assert found is not None and torch.allclose(found, torch.full_like(found, sign * share * 0.1 / 2), rtol=1e-12)


@given(st.floats(-20, 20), st.floats(0.01, 2), st.floats(-3, 3))
def test_the_anchor_is_the_chosen_half_of_bco_at_a_fixed_delta(gap: float, beta: float, delta: float) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    chosen, rejected = side(zero + gap, ref=zero), side(zero - 1e6, ref=zero)  # a rejected side that costs nothing any more
    fixed = {"delta": torch.tensor(delta, dtype=torch.float64), "count": torch.tensor(1e30, dtype=torch.float64)}
    half = bco(chosen, rejected, beta=beta, state=fixed).loss.item()
    assert reward_anchor(chosen, beta=beta, delta=delta).loss.item() == pytest.approx(half, rel=1e-9, abs=1e-12)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_a_higher_reward_costs_less(first: float, second: float) -> None:
    low, high = sorted((first, second))
    costs = [reward_anchor(side(torch.tensor([v], dtype=torch.float64), ref=torch.zeros(1))).loss.item() for v in (low, high)]
    assert costs[0] >= costs[1] > 0
