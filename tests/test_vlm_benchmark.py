"""The benchmark of the step on images without its clock: equal results, images encoded once, the cost model's work. Small."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import side_by_side as side
from benchmarks import vlm_step as bench

pytestmark = pytest.mark.slow
SHAPE = bench.Shape(
    hidden=64, layers=2, heads=4, kv_heads=2, ff=96, vocab=384,
    side=112, window=56, tower=48, tower_ff=72, tower_layers=2, tower_heads=2, whole=(1,),
)  # fmt: skip
CASE = side.Case(4 * (16 + 2) + bench.AROUND + 19, 9, {"online": ("trl", 1.0)}, saved=0.6, encodes=bench.ENCODES)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, side.Contestant]]:
    """mmpo's side alone."""
    folder = tmp_path_factory.mktemp("bench")
    runs = bench.mmpo_contestants(bench.make_models(folder, SHAPE), bench.make_rows(CASE, SHAPE, 1), folder)
    yield {name: side.mmpo_contestant(name, run) for name, run in runs.items()}


def test_the_work_is_the_cost_models(ours: dict[str, side.Contestant]) -> None:
    """Operations, rows that meet the head, and images: each met once for both answers and both models, or never again."""
    torch.testing.assert_close(ours["stored"].logps(), ours["online"].logps(), rtol=0, atol=1e-6)
    found = {name: bench.counted(c, SHAPE) for name, c in ours.items()}
    for name, flops in bench.expected(CASE, SHAPE).items():
        assert 0.98 * flops <= found[name]["flops"] <= side.FLOPS * flops, "the counter sees all of it, and no more"
    assert [found[name]["encodes"] for name in ("online", "cached", "stored")] == [4, 4, 0]
    scored = 2 * CASE.answer
    assert [found[name]["head_rows"] for name in ("online", "cached", "stored")] == [2 * scored, scored, scored]


def test_an_image_too_many_is_a_broken_promise() -> None:
    expected = bench.expected(CASE, SHAPE)
    rows = {name: 2 * CASE.answer * (2 if name == "online" else 1) for name in expected}
    counted = {
        name: {"flops": int(expected.get(name, 0)), "head_rows": rows.get(name, 0), "saved_bytes": 50, "encodes": images}
        for name, images in bench.ENCODES.items()
    }
    counted["trl"]["saved_bytes"] = 100
    assert side.broken(CASE, expected, {}, counted) == []
    counted["online"]["encodes"] = 8
    assert side.broken(CASE, expected, {}, counted) == ["online: 8 images meet a tower, 4 are expected"]


def test_the_full_case_has_the_prompt_it_names() -> None:
    """P = 1062: four images of 256 tokens and their marks, and a question in the template."""
    shape, (case,) = bench.Shape(), bench.CASES
    (row,) = bench.make_rows(case, shape, 1)
    words = len(row["prompt"][0]["content"].split())
    assert (shape.tokens, case.prompt, case.answer) == (256, 1062, 40)
    assert bench.IMAGES * (shape.tokens + 2) + bench.AROUND + words == case.prompt


def test_the_gates_hold_against_trl(tmp_path: Path) -> None:
    """And see a prompt whose images stand in another order."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install mmpo[parity]")
    found = bench.contestants(tmp_path, CASE, SHAPE)
    equal = side.equality(found)
    assert equal["trl_cached"]["gradient"] <= side.TOLERANCE
    counted = {c.name: bench.counted(c, SHAPE) for c in found}
    assert side.broken(CASE, bench.expected(CASE, SHAPE), equal, counted) == []
    assert [counted[name]["encodes"] for name in ("trl", "trl_cached", "online")] == [16, 8, 4]
    (tmp_path / "other").mkdir()
    rows = [row | {"images": row["images"][::-1]} for row in bench.make_rows(CASE, SHAPE)]
    other = bench.mmpo_run((tmp_path / "policy", tmp_path / "reference"), rows, tmp_path / "other", "online", False, False)
    turned = dataclasses.replace(side.mmpo_contestant("online", other), model=found[0].model, loss=found[0].loss)
    away = side.equality([found[0], turned])["online"]["logp"]
    assert away > 100 * side.TOLERANCE
