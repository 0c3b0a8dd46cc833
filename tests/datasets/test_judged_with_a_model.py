"""The builders that judge, with a real tiny LLaVA that sees pictures as generator, and as a judge that makes no sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mmpo import media
from mmpo.datasets.builders.annotate import annotate
from mmpo.datasets.builders.claims import claims
from mmpo.datasets.builders.rank_and_sift import rank_and_sift
from mmpo.datasets.judge_tools import ModelPairs, ModelPoints, judge_pairs, judge_points
from mmpo.datasets.stages import Record
from mmpo.datasets.tools import Generator, Tools
from mmpo.judging import Blocks, JudgeResult
from mmpo.pair import Pair, image, text
from tests.datasets.judged import built, told

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llava(family_folder: Callable[[str], Path]) -> Generator:
    from mmpo.modalities.vlm_generate import generator

    return generator(family_folder("llava"))


def asked(count: int = 3) -> list[Record]:
    from tests.vlm_families import photo

    return [Record(f"r{i}", (image(media.encode(photo(i))), text("what is it?"))) for i in range(count)]


def letters(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
    return JudgeResult(torch.tensor([sum(c in "aeiou" for c in told(a)) for a in answers], dtype=torch.float64))


def duels(llava: Generator, batch: int) -> list[Pair]:
    tools = Tools(generator=llava, pair_judge=judge_pairs(letters), point_judge=judge_points(letters))
    stages = rank_and_sift(tools, answers=6, max_new_tokens=8, temperature=1.0, batch=batch)
    return [r.fields["pair"] for r in built(stages, *asked())[0]]


def test_own_answers_meet_and_batches_change_nothing(llava: Generator) -> None:
    pairs = duels(llava, 3)
    assert pairs == duels(llava, 1) and len({p.prompt[0].digest for p in pairs}) == len(pairs) >= 2
    for pair in pairs:
        count = {side: sum(c in "aeiou" for c in told(getattr(pair, side))) for side in ("chosen", "rejected")}
        assert pair.scores == count and count["chosen"] > count["rejected"]


def test_a_judge_without_sense_drops_everything(llava: Generator) -> None:
    """Unparsable replies are counted, and are neither scores nor votes."""
    points, pairs = ModelPoints(llava, max_new_tokens=4), ModelPairs(llava, max_new_tokens=4)
    tools = Tools(generator=llava, pair_judge=pairs, point_judge=points)
    options = {"answers": 2, "max_new_tokens": 6, "temperature": 1.0}
    checked = built(claims(tools, split="sentences", **options), *asked(2))[1]  # type: ignore[arg-type]
    graded = built(annotate(tools, **options), *asked(2))[1]  # type: ignore[arg-type]
    fought = built(rank_and_sift(tools, **options), *asked(2))[1]  # type: ignore[arg-type]
    assert checked == {"checks: fewer than two answers with every statement judged": 2} and points.unparsable["holds"] >= 4
    assert graded == {"grades: no answer with all five grades": 2} and points.unparsable["verbosity"] == 4
    assert fought == {"duels: no duel with a verdict that holds in both orders": 2} and pairs.unparsable == {"verdict": 4}
