"""What every file of the losses room owes, checked on every file found there."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

import mmpo.losses
from mmpo import objective
from mmpo.objective import Objective, Rows, make_term
from mmpo.scores import Losses, Scores, Side, side

NAMES = sorted(m.name for m in pkgutil.iter_modules(mmpo.losses.__path__))
EXTRAS = {"ref", "err", "kl_ref", "log_sum_p2"}
ROW_FIELDS = {"label", "margin"}
SLOTS = {"link"}
TERM_KEYS = {"loss", "of", *objective.SLOTS}  # an objective's line; a keyword of that name would never arrive
REF = -1000.0

# (loss, role) whose gradient changes sign by design, with the reason.
NOT_MONOTONE = {
    ("ipo", "chosen"): "regression onto a gap",
    ("ipo", "rejected"): "regression onto a gap",
    ("sppo", "chosen"): "regression onto a reward",
    ("sppo", "rejected"): "regression onto a reward",
    ("exo", "chosen"): "matches a smoothed label, which can be overshot",
    ("exo", "rejected"): "matches a smoothed label, which can be overshot",
    ("nca", "chosen"): "draws the chosen reward to log 2",
    ("apo_down", "chosen"): "lowers the chosen side too",
    ("discopop", "chosen"): "not convex next to 0",
    ("discopop", "rejected"): "not convex next to 0",
}


def module(name: str) -> ModuleType:
    return import_module(f"mmpo.losses.{name}")


def function(name: str) -> Callable[..., Losses]:
    """The loss; one with a state has seen so many rows that those of a test do not move it."""
    loss = getattr(module(name), name)
    state = {key: torch.tensor(1e15 if key == "count" else value) for key, value in getattr(module(name), "STATE", {}).items()}
    return functools.partial(loss, state=state) if state else loss


def parameters(name: str, kind: inspect._ParameterKind) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(getattr(module(name), name)).parameters.values() if p.kind is kind]


OVER_BATCH = {name for name in NAMES if getattr(module(name), "BATCH_STATISTICS", False)}


def roles(name: str) -> list[str]:
    return [p.name for p in parameters(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)]


def make(logp: Tensor, ref: float = REF, **row: Tensor) -> Side:
    """A side whose error and likelihood move together, as a denoiser's do; a divergence; and a policy that is nearly uniform,
    so that WPO's weight, which has no gradient, does not depend on the likelihood."""
    same = torch.ones_like(logp.detach())
    return side(logp, ref=ref * same, err=-logp, kl_ref=0.3 * same, log_sum_p2=-1e3 * same, **row)


def grid(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """All pairs of 40 log-likelihoods from -0.01 to -2000 around the reference's -1000, as leaves."""
    values = -torch.logspace(-2, 3.3, 40, dtype=dtype)
    chosen, rejected = torch.meshgrid(values, values, indexing="ij")
    return chosen.flatten().clone().requires_grad_(), rejected.flatten().clone().requires_grad_()


def gradients(name: str) -> dict[str, Tensor]:
    """d loss / d logp by role on the grid; an unpaired loss is asked as chosen (label 1) and as rejected (label 0)."""
    chosen, rejected = grid()
    if roles(name) == ["completion"]:
        baseline = torch.zeros_like(chosen)
        total = function(name)(make(chosen, kl_baseline=baseline)).loss.sum()
        total = total + function(name)(make(rejected, label=0 * baseline, kl_baseline=baseline)).loss.sum()
    else:
        total = function(name)(*(make({"chosen": chosen, "rejected": rejected}[r]) for r in roles(name))).loss.sum()
    found = torch.autograd.grad(total, (chosen, rejected), allow_unused=True)
    return {role: g for role, g in zip(("chosen", "rejected"), found, strict=True) if g is not None}


def scored(count: int, lowest: float = -3.0) -> dict[str, Scores]:
    """Two to seven units per branch, with every extra that a loss may need; fp64, logp a leaf and the error its negative."""
    g, found = torch.Generator().manual_seed(int(-lowest)), {}
    for branch in ("chosen", "rejected"):
        logp, kl, peak, length = torch.rand(4, count, 7, generator=g, dtype=torch.float64)
        logp = (lowest * logp).requires_grad_()
        mask = torch.arange(7) < 2 + 6 * length[:, :1]
        found[branch] = Scores(logp, mask, {"err": -logp, "kl_ref": kl, "log_sum_p2": -peak})
    return found


def part(scores: Scores, rows: slice) -> Scores:
    return Scores(scores.logp[rows], scores.mask[rows], {k: v[rows] for k, v in scores.extras.items()})


def columns(count: int, rows: slice = slice(None)) -> Rows:
    weight, margin, label = torch.rand(3, count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Rows(weight[rows], margin[rows], label[rows], {})


def the_objective(name: str) -> Objective:
    return Objective([make_term(name)])


def rows(count: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    logp, length, label, margin, score = torch.rand(5, count, generator=g, dtype=torch.float64)
    return {"logp": -20 * logp - 0.1, "length": (9 * length + 1).round(), "label": label, "margin": margin, "score": score}


def sides(name: str, row: dict[str, Tensor]) -> list[Side]:
    fields = {k: v for k, v in row.items() if k != "logp"}
    return [make(row["logp"] * (1 + i), ref=-8.0, **fields) for i in range(len(roles(name)))]


@pytest.mark.parametrize("name", NAMES)
class TestEveryLoss:
    def test_declares_itself(self, name: str) -> None:
        m = module(name)
        assert callable(getattr(m, name)) and inspect.getdoc(getattr(m, name)) and m.__doc__
        assert isinstance(m.NEEDS, frozenset) and m.NEEDS <= EXTRAS
        assert isinstance(m.READS, frozenset) and m.READS <= ROW_FIELDS | SLOTS
        assert all(type(v) is float for v in getattr(m, "STATE", {}).values())
        assert re.match(r"arXiv \d{4}\.\d{5}( eq\. \d+)?$", m.PAPER)

    def test_roles_are_known_branches(self, name: str) -> None:
        assert roles(name) in (["chosen", "rejected"], ["chosen"], ["completion"])

    def test_keywords_are_a_schema(self, name: str) -> None:
        loss = getattr(module(name), name)
        hints = typing.get_type_hints(loss)
        keywords = [p for p in parameters(name, inspect.Parameter.KEYWORD_ONLY) if p.name != "state"]
        assert not TERM_KEYS & set(hints) and ("state" in hints) == hasattr(module(name), "STATE")
        for p in keywords:
            hint = hints[p.name]
            allowed = typing.get_args(hint)
            assert p.default in allowed if allowed else type(p.default) is hint, p
            assert re.search(rf"\b{p.name}\b", inspect.getdoc(loss) or ""), f"{p.name} is not documented"

    def test_one_loss_per_row(self, name: str) -> None:
        result = function(name)(*sides(name, rows(5)))
        assert result.loss.shape == (5,)
        for reward in (result.chosen_reward, result.rejected_reward, *result.metrics.values()):
            assert reward is None or (reward.shape == (5,) and not reward.requires_grad)

    @pytest.mark.parametrize("gap", [0.0, 1e4, -1e4])
    def test_finite_at_extreme_margins_in_fp32(self, name: str, gap: float) -> None:
        low, high = torch.tensor([-1.0 - abs(gap)]), torch.tensor([-1.0])
        leaves = [v.clone().requires_grad_() for v in ((high, low) if gap > 0 else (low, high))][: len(roles(name))]
        loss = function(name)(*(make(v, ref=-1.0) for v in leaves)).loss
        found = torch.autograd.grad(loss.sum(), leaves)
        assert torch.isfinite(loss).all() and all(torch.isfinite(g).all() for g in found), (loss, found)

    def test_finite_under_every_link(self, name: str) -> None:
        for link in ("forward_kl", "jensen_shannon", "alpha_divergence"):
            for first in (-1e4, -1.0):
                leaves = [torch.tensor([v], requires_grad=True) for v in (first, -1.0 - 1e4 - first)][: len(roles(name))]
                loss = function(name)(*(replace(make(v, ref=-1.0), link=link) for v in leaves)).loss
                found = torch.autograd.grad(loss.sum(), leaves)
                assert torch.isfinite(loss).all() and all(torch.isfinite(g).all() for g in found), (link, first)

    def test_raises_the_chosen_and_lowers_the_rejected_side(self, name: str) -> None:
        for role, g in gradients(name).items():
            away = g if role == "chosen" else -g
            if (name, role) in NOT_MONOTONE:
                assert (away > 0).any() and (away < 0).any(), f"{role} is monotone: take it off the list of exceptions"
            else:
                assert (away <= 0).all() and (away < 0).any(), f"{role}: gradient of the wrong sign"

    def test_gradient_is_the_numerical_one(self, name: str) -> None:
        row = rows(3)
        leaf = row["logp"].clone().requires_grad_()
        whole = torch.sum if name in OVER_BATCH else torch.clone  # there a row's gradient may come by way of another row

        assert torch.autograd.gradcheck(lambda v: whole(function(name)(*sides(name, row | {"logp": v})).loss), (leaf,))

    def test_rows_do_not_know_their_order(self, name: str) -> None:
        row, order = rows(6), torch.tensor([3, 0, 5, 1, 4, 2])
        straight = function(name)(*sides(name, row)).loss[order]
        permuted = function(name)(*sides(name, {k: v[order] for k, v in row.items()})).loss
        torch.testing.assert_close(permuted, straight, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("field", sorted(ROW_FIELDS))
    def test_reads_the_row_fields_it_declares(self, name: str, field: str) -> None:
        row = rows(400)
        before = function(name)(*sides(name, row)).loss
        after = function(name)(*sides(name, row | {field: row[field] / 2})).loss
        assert torch.equal(before, after) == (field not in module(name).READS)

    def test_reads_the_link_if_and_only_if_declared(self, name: str) -> None:
        given = sides(name, rows(4))
        linked = [replace(s, link="jensen_shannon") for s in given]
        same = torch.equal(function(name)(*given).loss, function(name)(*linked).loss)
        assert same == ("link" not in module(name).READS)

    def test_no_gradient_reaches_the_reference(self, name: str) -> None:
        policy, reference = scored(6), scored(6, lowest=-5.0)
        the_objective(name)(policy, reference, columns(6)).loss.sum().backward()
        assert all(s.logp.grad is None for s in reference.values())
        learns = [g for s in policy.values() if (g := s.logp.grad) is not None]
        assert learns and all(bool(g.isfinite().all() and g.any()) for g in learns)

    def test_accumulation_is_a_large_batch_unless_declared(self, name: str) -> None:
        """Mean loss and gradient of eight rows are the means over their two halves."""
        policy, reference = scored(8), scored(8, lowest=-5.0)
        leaves = [s.logp for b, s in policy.items() if b in the_objective(name).branches]

        def halves() -> Iterator[Tensor]:
            for at in (slice(0, 4), slice(4, 8)):
                mine, ref = ({b: part(s, at) for b, s in given.items()} for given in (policy, reference))
                yield the_objective(name)(mine, ref, columns(8, at)).loss.mean() / 2

        whole = the_objective(name)(policy, reference, columns(8)).loss.mean()
        accumulated = torch.stack(list(halves())).sum()
        pairs = [(accumulated, whole)]
        pairs += zip(*(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (accumulated, whole)), strict=True)
        same = all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in pairs)
        assert same == (name not in OVER_BATCH), "what is declared as BATCH_STATISTICS, and nothing else, sees the batch"

    def test_needs_a_reference_if_and_only_if_declared(self, name: str) -> None:
        bare = [replace(s, ref=None) for s in sides(name, rows(4))]
        if "ref" in module(name).NEEDS:
            with pytest.raises(ValueError, match="reference"):
                function(name)(*bare)
        else:
            assert torch.equal(function(name)(*bare).loss, function(name)(*sides(name, rows(4))).loss)


@pytest.mark.parametrize("name", [n for n in NAMES if roles(n) == ["completion"]])
def test_absent_completions_neither_count_nor_learn(name: str) -> None:
    present = torch.tensor([True, False, True, False])
    logp = torch.tensor([-1.0, float("nan"), -3.0, float("-inf")], requires_grad=True)
    result = function(name)(replace(make(logp, ref=-4.0), present=present))
    (found,) = torch.autograd.grad(result.loss.sum(), logp)
    assert result.loss[~present].tolist() == [0, 0] and found[~present].tolist() == [0, 0]
    assert (found[present] < 0).all()
    assert torch.equal(result.loss[present], function(name)(make(logp[present], ref=-4.0)).loss)


def test_the_room_is_not_empty() -> None:
    assert len(NAMES) >= 20 and "dpo" in NAMES


def test_exceptions_name_real_losses() -> None:
    assert {name for name, _ in NOT_MONOTONE} <= set(NAMES)
