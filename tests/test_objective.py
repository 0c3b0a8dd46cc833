"""Objectives on bare scores: roles and branches, weights, rows, units, and what is refused before anything loads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpo.links import LINKS
from mmpo.objective import Objective, accuracy, make_term, rows_of
from mmpo.pair import Pair, text
from mmpo.scores import Losses, Scores, Side

CHOSEN, REJECTED = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.5])
REF_CHOSEN, REF_REJECTED = torch.tensor([-3.5, -4.0]), torch.tensor([-4.0, -4.0])
Z = (CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)


def scores(values: Tensor, present: list[bool] | None = None, **extras: Tensor) -> Scores:
    """One unit per row, as denoisers have it."""
    mask = torch.tensor(present or [True] * len(values))[:, None]
    return Scores(values[:, None], mask, {k: v[:, None] for k, v in extras.items()})


def policy(**extras: Any) -> dict[str, Scores]:
    given = {"chosen": CHOSEN.clone().requires_grad_(), "rejected": REJECTED.clone().requires_grad_()}
    return {b: scores(v, err=-v.detach() / 500) for b, v in given.items()}


REFERENCE = {"chosen": scores(REF_CHOSEN), "rejected": scores(REF_REJECTED)}


def rows(**columns: list[Any]) -> Any:
    pairs = [Pair(f"p{i}", (text("a"),), (text("b"),), (text("c"),), **{k: v[i] for k, v in columns.items()}) for i in range(2)]
    return rows_of(pairs, "cpu")


def loss_of(*terms: dict[str, Any], rows: Any = None) -> Tensor:
    return Objective([make_term(**t) for t in terms])(policy(), REFERENCE, rows or globals()["rows"]()).loss


def test_dpo_by_hand() -> None:
    torch.testing.assert_close(loss_of({"loss": "dpo", "beta": 0.5}), -F.logsigmoid(0.5 * Z))


def test_policy_equal_to_reference_is_log_2() -> None:
    result = Objective([make_term("dpo", beta=5.0)])(REFERENCE, REFERENCE, rows())
    assert torch.equal(result.metrics["rewards/margins"], torch.zeros(2))
    assert torch.equal(result.metrics["rewards/accuracies"], torch.full((2,), 0.5))
    assert result.loss.tolist() == pytest.approx([math.log(2)] * 2)


def test_roles_read_the_branches_that_of_names() -> None:
    """Swapped roles negate the logit; a one-role loss reads the branch it is given."""
    torch.testing.assert_close(loss_of({"loss": "dpo", "beta": 0.5, "of": ["rejected", "chosen"]}), -F.logsigmoid(-0.5 * Z))
    torch.testing.assert_close(loss_of({"loss": "err_anchor"}), -CHOSEN / 500)
    torch.testing.assert_close(loss_of({"loss": "err_anchor", "of": ["rejected"]}), -REJECTED / 500)


def test_terms_are_summed_with_their_weights() -> None:
    got = loss_of({"loss": "dpo", "beta": 0.5, "weight": 2.0}, {"loss": "err_anchor", "weight": 0.1})
    torch.testing.assert_close(got, -2 * F.logsigmoid(0.5 * Z) + 0.1 * -CHOSEN / 500)


def test_margin_and_label_come_from_the_rows() -> None:
    got = loss_of({"loss": "dpo", "beta": 0.5}, rows=rows(margin=[0.3, 0.0], label=[1.0, 0.7]))
    logits = 0.5 * Z - torch.tensor([0.3, 0.0])
    label = torch.tensor([1.0, 0.7])
    torch.testing.assert_close(got, -label * F.logsigmoid(logits) - (1 - label) * F.logsigmoid(-logits))


def test_row_columns() -> None:
    columns = rows(weight=[1.0, 2.0], margin=[0.0, 0.5], label=[1.0, 0.5], scores=[{"chosen": 0.9}, {"rejected": 0.2}])
    assert columns.weight.tolist() == [1, 2] and columns.label.tolist() == [1, 0.5] and columns.margin.tolist() == [0, 0.5]
    nan = math.nan
    wanted = {"chosen": pytest.approx([0.9, nan], nan_ok=True), "rejected": pytest.approx([nan, 0.2], nan_ok=True)}
    assert {k: v.tolist() for k, v in columns.scores.items()} == wanted


def test_a_row_without_scores_is_no_row_with_scores_of_0() -> None:
    with pytest.raises(ValueError, match="win probabilities .* got nan"):
        loss_of({"loss": "sppo", "soft": True})
    half = loss_of({"loss": "sppo", "soft": True}, rows=rows(scores=[{"chosen": 0.5, "rejected": 0.5}] * 2))
    torch.testing.assert_close(half, ((CHOSEN - REF_CHOSEN) ** 2 + (REJECTED - REF_REJECTED) ** 2) / 2)


def test_what_the_rows_say_and_no_loss_reads_is_told() -> None:
    pairs = [Pair(f"p{i}", (text("a"),), label=label, margin=0.1) for i, label in enumerate((1.0, 0.8, 0.5))]
    told = Objective([make_term("ipo"), make_term("hinge")]).unread(pairs)
    assert told == ["2 of 3 rows have a label of their own, which no loss reads (ipo, hinge)"]
    assert Objective([make_term("dpo")]).unread(pairs) == [] and Objective([make_term("ipo")]).unread(pairs[:0]) == []


def test_beta_is_per_nat_or_none() -> None:
    assert make_term("dpo", beta=5.0).beta == 5.0 and make_term("mapo", beta=0.1).beta is None and make_term("nll").beta is None


@pytest.mark.parametrize("link", sorted(LINKS))
def test_links_change_the_reward_of_both_sides(link: str) -> None:
    ratios = (CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED)
    wanted = -F.logsigmoid(0.5 * (LINKS[link](ratios[0]) - LINKS[link](ratios[1])))
    torch.testing.assert_close(loss_of({"loss": "dpo", "beta": 0.5, "link": link}), wanted)


def test_kto_pools_both_sides() -> None:
    """z0 is the mean over all four answers, cut at 0; a row's loss is the mean over its sides."""
    ratios = torch.stack([CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED])
    value = 0.5 * (ratios - ratios.mean().clamp(min=0))
    each = torch.stack([torch.sigmoid(-value[0]), torch.sigmoid(value[1])])
    torch.testing.assert_close(loss_of({"loss": "kto", "beta": 0.5}), each.mean(0))
    metrics = Objective([make_term("kto", beta=0.5)])(policy(), REFERENCE, rows()).metrics
    torch.testing.assert_close(metrics["rewards/margins"], 0.5 * Z)


def test_kto_of_an_uncertain_pair_mixes_both_ways_round() -> None:
    """Label 0.8: with probability 0.2 it is the other answer that is desirable."""
    sure, other = (loss_of({"loss": "kto", "beta": 0.5}, rows=rows(label=[label] * 2)) for label in (1.0, 0.0))
    torch.testing.assert_close(loss_of({"loss": "kto", "beta": 0.5}, rows=rows(label=[0.8] * 2)), 0.8 * sure + 0.2 * other)


def test_an_extra_of_one_number_a_row_is_passed_as_it_is() -> None:
    """Text KTO's own baseline, (B,), beside the extras of each unit, (B, U)."""
    mine = {b: scores(s.logp[:, 0]) for b, s in policy().items()}
    for side in mine.values():
        side.extras["kl_baseline"] = torch.tensor([0.2, 0.4])
    metrics = Objective([make_term("kto", beta=0.5)])(mine, REFERENCE, rows()).metrics
    torch.testing.assert_close(metrics["kl"], torch.tensor([0.2, 0.4]))


def test_kto_on_unpaired_rows() -> None:
    """Row 0 has only a good answer, row 1 only a bad one: neither side's absence enters the baseline, loss or gradient."""
    mine = {
        "chosen": scores(torch.tensor([-3.0, 99.0], requires_grad=True), [True, False]),
        "rejected": scores(torch.tensor([99.0, -2.5], requires_grad=True), [False, True]),
    }
    logps = {b: s.logp for b, s in mine.items()}
    for value in logps.values():
        value.retain_grad()
    result = Objective([make_term("kto", beta=0.5)])(mine, REFERENCE, rows())
    good, bad = -3.0 + 3.5, -2.5 + 4.0
    z0 = (good + bad) / 2
    torch.testing.assert_close(result.loss, torch.sigmoid(torch.tensor([-0.5 * (good - z0), 0.5 * (bad - z0)])))
    result.loss.sum().backward()
    assert logps["chosen"].grad is not None and logps["chosen"].grad[1] == 0 and logps["chosen"].grad[0] < 0
    assert logps["rejected"].grad is not None and logps["rejected"].grad[0] == 0 and logps["rejected"].grad[1] > 0
    assert Objective([make_term("dpo")]).needs_pairs and not Objective([make_term("kto")]).needs_pairs
    assert Objective([make_term("kto"), make_term("err_anchor")]).needs_pairs


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_units_are_summed_or_averaged_under_the_mask(reduce: str) -> None:
    logp = {"chosen": torch.tensor([[-1.0, -2.0, -50.0]]), "rejected": torch.tensor([[-1.0, -1.0, -4.0]])}
    mask = {"chosen": torch.tensor([[True, True, False]]), "rejected": torch.ones(1, 3, dtype=torch.bool)}
    mine = {b: Scores(logp[b], mask[b]) for b in logp}
    ref = {b: Scores(torch.full((1, 3), -2.0), mask[b]) for b in logp}
    row = rows_of([Pair("p", (text("a"),), (text("b"),), (text("c"),))], "cpu")
    got = Objective([make_term("dpo", beta=1.0, reduce=reduce)])(mine, ref, row).loss
    chosen, rejected = (1.0, 0.0) if reduce == "sum" else (0.5, 0.0)  # (-3 - -4) and (-6 - -6), over 2 and 3 units
    torch.testing.assert_close(got, -F.logsigmoid(torch.tensor([chosen - rejected])))


CHOSEN_UNITS = torch.tensor([[-1.0, -2.0, -50.0], [-1.0, -3.0, -5.0]])  # 2 and 3 units
REJECTED_UNITS = torch.tensor([[-1.0, -1.0, -4.0], [-2.0, -60.0, -70.0]])  # 3 and 1
MASKS = {"chosen": torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(), "rejected": torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()}


def in_units(**weights: list[list[float]]) -> dict[str, Scores]:
    """Branches of several units; outside the masks there is what a sum must not see."""
    units = {"chosen": CHOSEN_UNITS, "rejected": REJECTED_UNITS}
    given = {b: torch.tensor(weights[b]) for b in weights}
    return {b: Scores(units[b], MASKS[b], {"kl_ref": -units[b] / 2}, given.get(b)) for b in units}


def reduced(policy: dict[str, Scores], loss: str = "dpo", **term: Any) -> dict[str, Side]:
    """The sides that a term's loss is given."""
    seen: dict[str, Side] = {}

    def spy(chosen: Side, rejected: Side, **options: Any) -> Losses:
        seen.update(chosen=chosen, rejected=rejected)
        return Losses(chosen.logp)

    reference = {b: Scores(torch.full((2, 3), -2.0), s.mask) for b, s in policy.items()}
    Objective([replace(make_term(loss, **term), loss=spy)])(policy, reference, rows())
    return seen


def test_ld_counts_units_beyond_the_shorter_side_by_alpha() -> None:
    """Row 0: 2 against 3 units, so the rejected side's third counts a quarter. Row 1: 3 against 1."""
    sides = reduced(in_units(), reduce="ld", ld_alpha=0.25)
    assert sides["chosen"].logp.tolist() == [-3, -1 - 0.25 * 8] and sides["rejected"].logp.tolist() == [-3, -2]
    assert sides["chosen"].ref is not None and sides["chosen"].ref.tolist() == [-4, -2 - 0.25 * 4]
    assert sides["chosen"].length.tolist() == [2, 1.5] and sides["rejected"].length.tolist() == [2.25, 1]
    plain, whole = reduced(in_units()), reduced(in_units(), reduce="ld", ld_alpha=1.0)
    assert all(torch.equal(plain[b].logp, whole[b].logp) for b in plain)


def test_spans_weigh_units_of_policy_reference_and_extras() -> None:
    weights = {"chosen": [[1.0, 0.0, 9.0], [0.5, 1.0, 1.0]], "rejected": [[1.0, 1.0, 2.0], [0.0, 9.0, 9.0]]}
    sides = reduced(in_units(**weights), "tdpo1", weights="spans")
    assert sides["chosen"].logp.tolist() == [-1, -0.5 - 3 - 5] and sides["rejected"].logp.tolist() == [-1 - 1 - 8, 0]
    assert sides["chosen"].ref is not None and sides["chosen"].ref.tolist() == [-2, -5]
    assert sides["chosen"].extras["kl_ref"].tolist() == [0.5, 4.25] and sides["chosen"].length.tolist() == [1, 2.5]
    assert sides["rejected"].length.tolist() == [4, 0] and sides["rejected"].present.tolist() == [True, False]
    assert sides["rejected"].mean_logp.tolist() == [-2.5, 0]
    means = reduced(in_units(**weights), "tdpo1", weights="spans", reduce="mean")["chosen"]
    assert means.logp.tolist() == [-1, pytest.approx(-8.5 / 2.5)] and means.extras["kl_ref"][1].item() == pytest.approx(1.7)
    unread = reduced(in_units(**weights), "tdpo1")["chosen"]
    assert unread.logp.tolist() == [-3, -9], "weights are read where the term asks for them"
    both = reduced(in_units(**weights), weights="spans", reduce="ld", ld_alpha=0.5)
    assert both["chosen"].logp.tolist() == [-1, -0.5 - 0.5 * 8]


def test_extras_are_summed_like_the_likelihood_where_the_loss_needs_them() -> None:
    policy = in_units()
    policy["chosen"].extras["hidden_sum"] = torch.zeros(2, 16)  # of no unit: for diagnostics
    sides = reduced(policy, "tdpo1")
    assert sides["chosen"].extras["kl_ref"].tolist() == [1.5, 4.5] and set(sides["chosen"].extras) == {"kl_ref"}
    assert reduced(policy)["chosen"].extras == {}


def test_what_is_asked_of_the_modality() -> None:
    def wants(*terms: dict[str, Any]) -> tuple[set[str], set[str]]:
        objective = Objective([make_term(**t) for t in terms])
        return set(objective.wants), set(objective.wants_of_reference)

    assert wants({"loss": "dpo"}, {"loss": "nll"}) == (set(), set())
    assert wants({"loss": "wpo"}, {"loss": "dpo", "weights": "spans"}) == ({"log_sum_p2", "weights"}, set())
    assert wants({"loss": "dpo"}, {"loss": "tdpo2"}) == ({"kl_ref"}, {"states"})


def test_what_a_loss_remembers_is_adopted_when_the_step_is_taken() -> None:
    """BCO's threshold after one batch is its mean reward; two terms remember apart; a look changes nothing."""
    objective = Objective([make_term("bco", beta=1.0), make_term("bco", beta=2.0)])
    before = objective.states
    result = objective(policy(), REFERENCE, rows())
    assert objective.states is before and result.metrics["bco_delta"].shape == (2,)
    objective.adopt(result.states)
    mean = torch.cat([CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED]).mean().item()
    kept = {name: value.item() for name, value in objective.states.items()}
    assert kept == pytest.approx({"0.bco.delta": mean, "0.bco.count": 4, "1.bco.delta": 2 * mean, "1.bco.count": 4})
    again = objective(policy(), REFERENCE, rows())
    assert again.states["0.bco.count"].item() == 8 and not any(v.requires_grad for v in again.states.values())
    objective.adopt(before)
    assert objective.states["0.bco.count"].item() == 0


def test_bco_on_unpaired_rows_counts_the_sides_there_are() -> None:
    mine = {
        "chosen": scores(torch.tensor([-3.0, 99.0]), [True, False]),
        "rejected": scores(torch.tensor([99.0, -2.5]), [False, True]),
    }
    result = Objective([make_term("bco_unpaired", beta=1.0)])(mine, REFERENCE, rows())
    assert [v.item() for v in result.states.values()] == [pytest.approx((0.5 + 1.5) / 2), 2]
    torch.testing.assert_close(result.loss, F.softplus(torch.tensor([1.0 - 0.5, 1.5 - 1.0])))


def test_metrics_have_trls_names() -> None:
    metrics = Objective([make_term("dpo", beta=0.5)])(policy(), REFERENCE, rows()).metrics
    assert set(metrics) == {
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    }  # fmt: skip
    torch.testing.assert_close(metrics["rewards/chosen"], 0.5 * (CHOSEN - REF_CHOSEN))
    assert metrics["rewards/accuracies"].tolist() == [float(z > 0) for z in Z]
    assert not any(m.requires_grad for m in metrics.values())
    assert accuracy(torch.tensor([1.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]


def test_the_reference_gets_no_gradient() -> None:
    ref = {b: scores(s.logp[:, 0].clone().requires_grad_()) for b, s in REFERENCE.items()}
    assert not Objective([make_term("dpo")])(REFERENCE, ref, rows()).loss.requires_grad


@pytest.mark.parametrize(
    ("term", "provides", "branches", "reference", "message"),
    [
        ({"loss": "dpo"}, set(), ("chosen", "rejected"), False, "loss dpo needs ref: set reference.kind"),
        ({"loss": "mapo"}, set(), ("chosen", "rejected"), True, "loss mapo needs err: this modality provides nothing more"),
        (
            {"loss": "dpo", "of": ["chosen@crop", "rejected"]}, {"err"}, ("chosen", "rejected"), True,
            "loss dpo reads branch 'chosen@crop'; this modality has chosen, rejected",
        ),
        (
            {"loss": "tdpo1"}, {"err"}, ("chosen", "rejected"), True,
            r"loss tdpo1 needs kl_ref: this modality provides \['err'\]",
        ),
        ({"loss": "tdpo2"}, {"kl_ref"}, ("chosen", "rejected"), False, "loss tdpo2 needs ref: set reference.kind, e.g. start"),
        (
            {"loss": "dpo", "weights": "spans"}, {"err"}, ("chosen", "rejected"), True,
            "loss dpo weighs units by spans of text, which this modality's scores do not have",
        ),
        (
            {"loss": "simpo", "link": "forward_kl"}, {"err"}, ("chosen", "rejected"), True,
            "loss simpo reads no link: leave out link: forward_kl",
        ),
        ({"loss": "aot", "link": "jensen_shannon"}, {"err"}, ("chosen", "rejected"), True, "loss aot reads no link"),
        ({"loss": "nll", "reduce": "ld"}, {"err"}, ("chosen", "rejected"), True, "reduce: ld compares the lengths of two"),
        ({"loss": "kto", "reduce": "ld"}, {"err"}, ("chosen", "rejected"), True, "loss kto reads no pair"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_before_anything_loads(
    term: dict[str, Any], provides: set[str], branches: tuple[str, ...], reference: bool, message: str
) -> None:
    objective = Objective([make_term("err_anchor"), make_term(**term)] if "err" in provides else [make_term(**term)])
    with pytest.raises(ValueError, match=message):
        objective.check(frozenset(provides), branches, reference)


def test_terms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="loss dpo reads chosen, rejected; of: names 1 branches"):
        make_term("dpo", of=["chosen"])
    with pytest.raises(ValueError, match="no 'dpoo' in losses.*did you mean 'dpo'"):
        make_term("dpoo")
    with pytest.raises(ValueError, match="objective: no terms"):
        Objective([])


def test_branches_are_those_of_all_terms_in_order() -> None:
    terms = [make_term("err_anchor", of=["rejected"]), make_term("dpo"), make_term("dpo", of=["chosen", "chosen@crop"])]
    assert Objective(terms).branches == ("rejected", "chosen", "chosen@crop")
