"""Measurements against numbers worked out by hand: pair accuracy, its table over the schedule, drift and win rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmpo.evaluate import Trial, evaluate_pairs, sample, trials, win_rate
from mmpo.judging import Blocks, JudgeResult
from mmpo.modality import DrawKey
from mmpo.pair import Block, Pair, image, text
from mmpo.reference import Frozen
from mmpo.scores import Scores


@dataclass
class Drawn:
    ratios: torch.Tensor  # (B, 2): log-ratios of chosen and rejected
    time: torch.Tensor


class Told:
    """A modality whose log-ratios and times are written in the pairs: one (chosen, rejected, time) for each draw."""

    PROVIDES: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.seen: list[DrawKey] = []

    def encode(self, pairs: list[Pair]) -> list[Pair]:
        return pairs

    def draw(self, pairs: list[Pair], keys: list[DrawKey], model: nn.Module) -> Drawn:
        self.seen += keys
        rows = torch.tensor([p.meta["draws"][k.index] for p, k in zip(pairs, keys, strict=True)])
        return Drawn(rows[:, :2], rows[:, 2])

    def score(self, model: nn.Module, batch: Drawn, wants: Any = (), against: Any = None) -> dict[str, Scores]:
        """The policy is above the reference by the ratio; both are far below 0."""
        own = batch.ratios if isinstance(model, nn.Linear) else torch.zeros_like(batch.ratios)
        logp = own.unsqueeze(-1) - 100
        return {b: Scores(logp[:, i], torch.ones_like(logp[:, i], dtype=torch.bool)) for i, b in enumerate(BRANCHES)}


BRANCHES = ("chosen", "rejected")
DRAWS = [
    [(1.0, 0.0, 0.0), (1.0, 4.0, 0.99)],  # margins 1, -3: the pair is told wrong, one of its draws right
    [(-1.0, -3.0, 0.25), (2.0, 1.0, 0.24)],  # 2, 1: right
    [(0.5, 0.5, 0.5), (-1.0, -1.0, 0.75)],  # 0, 0: undecided
]
PAIRS = [Pair(str(i), (text("p"),), (text("a"),), (text("b"),), meta={"draws": draws}) for i, draws in enumerate(DRAWS)]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_pair_accuracy_drift_and_the_table(batch: int) -> None:
    modality = Told()
    found = evaluate_pairs(modality, nn.Linear(1, 1), Frozen(nn.Identity()), PAIRS, seed=7, draws=2, batch=batch)
    assert found["accuracy"] == pytest.approx((0 + 1 + 0.5) / 3)  # of the margins' means over the draws
    assert found["accuracy_per_draw"] == pytest.approx((1 + 0 + 1 + 1 + 0.5 + 0.5) / 6)
    assert found["margin"] == pytest.approx((1 - 3 + 2 + 1) / 6)
    drift = found["drift"]  # minus the log-ratio: positive is less likely than under the reference
    assert drift["chosen"] == pytest.approx(-(1 + 1 - 1 + 2 + 0.5 - 1) / 6)
    assert drift["rejected"] == pytest.approx(-(0 + 4 - 3 + 1 + 0.5 - 1) / 6)
    assert drift["chosen_error"] == pytest.approx(np.std([-1, -0.5, 0.25], ddof=1) / 3**0.5)
    table = [(r["bucket"], r["from"], r["to"], r["n"], r["accuracy"], r["margin"]) for r in found["by_time"]]
    assert table == [
        ("t0", 0.0, 0.25, 2, 1.0, 1.0),  # margins 1 and 1
        ("t1", 0.25, 0.5, 1, 1.0, 2.0),
        ("t2", 0.5, 0.75, 1, 0.5, 0.0),
        ("t3", 0.75, 1.0, 2, 0.25, -1.5),  # -3 and 0
    ]
    assert {k.seed for k in modality.seen} == {7} and {k.sample for k in modality.seen} == {f"heldout/{i}" for i in range(3)}


def test_without_a_reference_the_likelihoods_themselves_are_compared() -> None:
    found = evaluate_pairs(Told(), nn.Linear(1, 1), None, PAIRS, seed=7, draws=2)
    assert found["accuracy"] == pytest.approx(0.5) and found["drift"] == {}


def test_an_untrained_policy_reads_one_half() -> None:
    found = evaluate_pairs(Told(), nn.Identity(), Frozen(nn.Identity()), PAIRS, seed=7, draws=2)
    assert found["accuracy"] == found["accuracy_per_draw"] == 0.5 and found["margin"] == 0
    assert [r["accuracy"] for r in found["by_time"]] == [0.5] * 4


def test_win_rate_counts_ties_half_and_resamples_prompts() -> None:
    aligned, base = np.array([2.0, 1.0, 5.0, 0.0]), np.array([1.0, 1.0, 4.0, 3.0])
    found = win_rate(aligned, base, per_prompt=2)
    assert found["value"] == (1 + 0.5 + 1 + 0) / 4 and found["n"] == 4
    assert (found["low"], found["high"]) == (0.5, 0.75)  # prompts won by 0.75 and 0.5: no resampling leaves that range
    certain = win_rate(np.ones(40), np.zeros(40), per_prompt=4)
    assert (certain["value"], certain["high"]) == (1, 1) and certain["low"] == pytest.approx(0.025 ** (1 / 10))  # ten prompts
    lost = win_rate(np.zeros(3), np.ones(3), per_prompt=1)  # three prompts say little
    assert (lost["value"], lost["low"]) == (0, 0) and lost["high"] == pytest.approx(0.7076, abs=1e-4)
    one_seed, many = (win_rate(np.repeat([1.0, 0.0], 20), np.full(40, 0.5), per_prompt=n) for n in (1, 20))
    assert many["high"] - many["low"] == 1 > one_seed["high"] - one_seed["low"]  # seeds of a prompt are one piece of evidence


def test_trials_are_a_function_of_seed_purpose_and_prompt() -> None:
    prompts = [(text("a"),), (text("b"),)]
    made = trials(prompts, 3, "select", 0)
    assert made == trials(prompts, 3, "select", 0) and made[1:] == trials(prompts[1:], 3, "select", 0)
    others = [made, trials(prompts, 3, "test", 0), trials(prompts, 3, "select", 1)]
    assert len({seed for each in others for trial in each for seed in trial.seeds}) == 18
    assert trials(prompts, 2, "select", 0)[0].seeds == made[0].seeds[:2]


class Painter:
    """Paints a picture of its seed's value, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def sample(self, model: Any, prompts: list[Blocks], seeds: list[int]) -> list[Block]:
        self.asked += [(str(p[0].data), s) for p, s in zip(prompts, seeds, strict=True)]
        return [image(np.full((2, 2, 3), s, np.uint8)) for s in seeds]


def test_samples_are_judged_in_order_and_compared_within_a_prompt() -> None:
    def judge(prompts: Any, answers: Any) -> JudgeResult:
        shown = torch.tensor([float(np.asarray(a[0].data).mean()) for a in answers], dtype=torch.float64)
        return JudgeResult(shown, correct=shown > 20)

    painter: Any = Painter()
    asked = [Trial((text("a"),), (0, 51)), Trial((text("b"),), (10, 10))]
    found = sample(painter, nn.Identity(), judge, asked)
    assert painter.asked == [("a", 0), ("a", 51), ("b", 10), ("b", 10)]
    assert found.scores.tolist() == [0, 51, 10, 10] and found.diversity == pytest.approx((0.2 + 0) / 2)
    assert found.summary() == {"score": 71 / 4, "diversity": pytest.approx(0.1), "correct": 0.25}


class Blinder:
    """Says what its pictures show: their first pixel; hides them where told."""

    def sample(self, model: nn.Module, prompts: list[Blocks], seeds: list[int]) -> list[Block]:
        self.seeds = seeds
        return [text(" ".join(str(np.asarray(b.data)[0, 0, 0]) for b in p if b.kind == "image")) for p in prompts]

    def blinded(self, prompt: Blocks) -> Blocks | None:
        hidden = tuple(image(np.full_like(b.data, 128)) if b.kind == "image" else b for b in prompt)
        return hidden if any(b.kind == "image" for b in prompt) else None


def told(prompts: list[Blocks], answers: list[Blocks]) -> JudgeResult:
    """Right is what the prompt's text says; answers of two signs are counted beside."""
    right = torch.tensor([a[0].data == p[-1].data for p, a in zip(prompts, answers, strict=True)])
    return JudgeResult(right.double(), right, rates={"short": torch.tensor([len(a[0].data) == 2 for a in answers])})


def test_rates_of_the_judge_and_answers_to_hidden_images_are_in_the_summary() -> None:
    shown = [(image(np.full((2, 2, 3), i, np.uint8)), text(str(w))) for i, w in ((10, 10), (20, 128), (128, 128))]
    asked = trials([*shown, (text("no picture"),)], 1, "test", 0)
    modality = Blinder()
    found = sample(modality, nn.Linear(1, 1), told, asked)  # type: ignore[arg-type]
    assert modality.seeds == [t.seeds[0] for t in asked[:3]]  # hidden prompts are answered under the same seeds
    assert np.array_equal(found.rates["blind_correct"], [0, 1, 1, np.nan], equal_nan=True)
    summary = found.summary()
    assert (summary["correct"], summary["short"]) == (2 / 4, 2 / 4)
    assert summary["blind_correct"] == pytest.approx(2 / 3)


def test_nothing_is_blind_where_no_image_can_be_hidden() -> None:
    asked = trials([(text("a"),)], 1, "test", 0)
    assert sample(Blinder(), nn.Linear(1, 1), told, asked).rates.keys() == {"short"}  # type: ignore[arg-type]
