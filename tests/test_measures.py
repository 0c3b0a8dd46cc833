"""Measures of held-out pairs and samples against numbers worked out by hand, and CHES on the published definition's toy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmpo import ches, measures
from mmpo.evaluate import Samples, Trial, sample, with_nats
from mmpo.judging import Blocks, JudgeResult
from mmpo.pair import Block, Pair, text
from mmpo.reference import Frozen
from mmpo.scores import NOTHING, Scores


def scores(logp: list[list[float]], lengths: list[int], **extras: list[list[float]]) -> Scores:
    values = torch.tensor(logp)
    mask = torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
    return Scores(values, mask, {name: torch.tensor(v) for name, v in extras.items()})


def test_of_batch_by_hand() -> None:
    confidence = {"top_mass": [[0.9, 0.5], [1.0, 9.0]], "top_entropy": [[0.571560043, 0.1], [0.0, 9.0]]}
    policy = {
        "chosen": scores([[-1.0, -2.0], [-3.0, -math.inf]], [2, 1], **confidence),  # what the mask hides may be anything
        "rejected": scores([[-4.0, -5.0, -6.0], [7.0, 7.0, 7.0]], [3, 0]),
    }
    ref = {"chosen": scores([[-1.5, -1.0], [-2.0, 0.0]], [2, 1]), "rejected": scores([[-4.0] * 3, [0.0] * 3], [3, 0])}
    found = measures.of_batch(policy, ref)
    assert found["ratio_chosen"].tolist() == [-0.5, -1.0] and found["length_chosen"].tolist() == [2, 1]
    assert found["ratio_rejected"][0] == -3 and found["ratio_rejected"][1].isnan() and found["length_rejected"][1].isnan()
    assert found["top_mass"].tolist() == pytest.approx([0.7, 1.0])
    assert found["top_entropy"].tolist() == pytest.approx([(0.571560043 + 0.1) / 2, 0.0])
    second = 0.1 / 0.5 + math.log(0.5)  # of p / M: the sheet's toy (.7, .2) of mass .9 has 0.529706199
    assert found["top_entropy_renormalised"][0].item() == pytest.approx((0.529706199 + second) / 2, abs=1e-6)


def test_summaries_by_hand() -> None:
    rows = {
        "ratio_chosen": torch.tensor([[1.0, -2.0, -1.0, 0.5]]),
        "ratio_rejected": torch.tensor([[-1.0, -1.0, 2.0, torch.nan]]),  # the last pair has no rejected side
        "length_chosen": torch.tensor([[4.0, 1.0, 2.0, 9.0]]),
        "length_rejected": torch.tensor([[2.0, 2.0, 5.0, torch.nan]]),
    }
    found = measures.summarise(rows, has_reference=True)
    assert found["fell"] == {"chosen": pytest.approx(2 / 3), "both": pytest.approx(1 / 3)}
    assert found["drift"]["chosen"] == pytest.approx(1.5 / 4) and found["drift"]["rejected"] == pytest.approx(0.0)
    assert found["length_correlation"] == pytest.approx(np.corrcoef([2, -1, -3], [2, -1, -3])[0, 1])
    assert measures.summarise(rows, has_reference=False)["fell"] == {}


def test_lengths_that_do_not_vary_have_no_correlation() -> None:
    assert measures.correlation(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)) is None
    assert measures.correlation(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([1.0, 3.0, 2.0])) is None


CHOSEN, REJECTED = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])


def test_ches_toy() -> None:
    """Sums (1, 1) and (2, 1): <h+, h-> = 3, |h+|^2 = 2; of means over 2 and 3 tokens both are 1/2."""
    sums = CHOSEN.sum(0)[None], REJECTED.sum(0)[None]
    assert ches.ches(*sums).item() == 1.0
    assert ches.ln_ches(*sums, torch.tensor([2.0]), torch.tensor([3.0])).item() == pytest.approx(0.0, abs=1e-7)


class Hidden:
    """A modality whose hidden states are written in the pairs; padding holds what no score may read."""

    PROVIDES = frozenset({"hidden_sum", "kl_policy"})

    def encode(self, pairs: list[Pair]) -> list[Pair]:
        return pairs

    def draw(self, pairs: list[Pair], keys: Any, model: nn.Module) -> list[Pair]:
        return pairs

    def score(
        self, model: nn.Module, pairs: list[Pair], wants: frozenset[str] = NOTHING, against: Mapping[str, Any] | None = None
    ) -> dict[str, Scores]:
        return {side: self._side(pairs, side, isinstance(model, nn.Linear)) for side in ("chosen", "rejected")}

    def _side(self, pairs: list[Pair], side: str, is_policy: bool) -> Scores:
        states = [p.meta.get(side, torch.zeros(0, 2)) if getattr(p, side) else torch.zeros(0, 2) for p in pairs]
        width = max(1, *(len(s) for s in states)) + 1
        mask = torch.arange(width) < torch.tensor([len(s) for s in states])[:, None]
        sums = torch.stack([s.sum(0) for s in states])
        kl = torch.where(mask, 0.25, torch.nan)
        logp = torch.where(mask, -1.0 if is_policy else -2.0, torch.nan)
        return Scores(logp, mask, {"hidden_sum": sums, "kl_policy": kl})

    def sample(self, model: nn.Module, prompts: list[Blocks], seeds: list[int]) -> list[Block]:
        return [text("a b c" if seed else "a b") for seed in seeds]


def pair(name: str, chosen: Tensor, rejected: Tensor) -> Pair:
    return Pair(name, (text("p"),), (text("a"),), (text("b"),), meta={"chosen": chosen, "rejected": rejected})


ALIKE, APART = pair("alike", CHOSEN, REJECTED), pair("apart", CHOSEN, -REJECTED)  # ln-CHES 0 and -1
ONE_SIDE = Pair("one", (text("p"),), (text("a"),), meta={"chosen": CHOSEN})


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_of_pairs_do_not_depend_on_the_batch(batch: int) -> None:
    modality: Any = Hidden()
    found = ches.score(modality, nn.Linear(1, 1), [ALIKE, ONE_SIDE, APART], batch)
    assert found["ches"][[0, 2]].tolist() == [1.0, -5.0] and found["ches"][1].isnan()
    assert found["ln_ches"][[0, 2]].tolist() == pytest.approx([0.0, -1.0], abs=1e-12)


def test_the_filter_keeps_the_lowest_scores_in_their_order() -> None:
    modality: Any = Hidden()
    pairs = [ONE_SIDE, ALIKE, APART]
    kept = {share: [p.id for p in ches.keep(modality, nn.Linear(1, 1), pairs, share)] for share in (0.01, 0.67, 1.0)}
    assert kept == {0.01: ["apart"], 0.67: ["alike", "apart"], 1.0: ["one", "alike", "apart"]}


def test_a_modality_without_states_is_refused() -> None:
    class Blind(Hidden):
        PROVIDES = frozenset({"err"})

    with pytest.raises(ValueError, match="data.ches_keep"):
        ches.score(Blind(), nn.Identity(), [ALIKE])


def test_texts_are_compared_by_words_and_measured_against_the_reference() -> None:
    def judge(prompts: Any, answers: Any) -> JudgeResult:
        return JudgeResult(torch.zeros(len(answers), dtype=torch.float64))

    modality: Any = Hidden()
    asked = [Trial((text("p"),), (0, 1))]
    found = sample(modality, nn.Linear(1, 1), judge, asked)
    assert found.diversity == pytest.approx(1 - 2 * 2 / 5)  # "a b" against "a b c"
    assert found.summary() == {"score": 0.0, "diversity": found.diversity, "length": 4.0}
    assert "diversity" not in sample(modality, nn.Linear(1, 1), judge, [Trial((text("p"),), (0,))]).summary()
    bare = with_nats(modality, nn.Linear(1, 1), None, asked, found)
    assert bare.nats == {} and isinstance(bare, Samples)


def test_samples_of_the_policy_have_a_divergence_and_those_of_others_a_log_ratio_only() -> None:
    class Told(Hidden):
        def _side(self, pairs: list[Pair], side: str, is_policy: bool) -> Scores:
            given = [Pair(p.id, p.prompt, p.chosen, meta={"chosen": torch.zeros(len(str(p.chosen[0].data)), 2)}) for p in pairs]
            return super()._side(given, side, is_policy)

    modality: Any = Told()
    asked, policy, ref = [Trial((text("p"),), (0, 1))], nn.Linear(1, 1), Frozen(nn.Identity())
    drawn = Samples([text("abc"), text("ab")], np.zeros(2), None, 0.5)
    own = with_nats(modality, policy, ref, asked, drawn)
    assert own.nats["log_ratio"].tolist() == [3.0, 2.0] and own.nats["kl"].tolist() == [0.75, 0.5]
    assert own.summary()["kl"] == 0.625
    other = with_nats(modality, policy, ref, asked, drawn, own=False)
    assert other.nats.keys() == {"log_ratio"} and "kl" not in other.summary()
