"""The text benchmark without its clock: equal results, and the work that the cost model promises, at a small size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import side_by_side as side
from benchmarks import text_step as bench

SHAPE = bench.Shape(hidden=64, layers=2, heads=4, kv_heads=2, ff=96, vocab=384)
CASE = side.Case(96, 9, {"online": ("trl", 1.0)}, saved=0.6)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, side.Contestant]]:
    """mmpo's side alone, with an online reference in shared and in separate rows, and with a cached one."""
    folder = tmp_path_factory.mktemp("bench")
    paths, rows = bench.make_models(folder, SHAPE), bench.make_rows(CASE, SHAPE.vocab, 2)
    kinds = {"online": ("shared", False), "cached": ("shared", True), "separate": ("packed", False)}
    runs = {name: bench.mmpo_run(paths, rows, folder, *kind) for name, kind in kinds.items()}
    side.fill(runs["cached"])
    yield {name: side.mmpo_contestant(name, run) for name, run in runs.items()}


def test_the_work_is_the_cost_models(ours: dict[str, side.Contestant]) -> None:
    """Operations, rows that meet the head, and reference passes; sharing pays for its prompt once."""
    found = {name: bench.counted(c, SHAPE) for name, c in ours.items()}
    for name, flops in bench.expected(CASE, SHAPE).items():
        assert 0.98 * flops <= found[name]["flops"] <= side.FLOPS * flops, "the counter sees all of it, and no more"
    scored = 2 * CASE.answer
    assert [found[name]["head_rows"] for name in ("online", "cached", "separate")] == [2 * scored, scored, 2 * scored]
    assert found["separate"]["flops"] > 1.6 * found["online"]["flops"]
    assert found["separate"]["saved_bytes"] > 1.6 * found["online"]["saved_bytes"]


def test_a_reason_per_broken_promise() -> None:
    expected = bench.expected(CASE, SHAPE)
    good = {"flops": int(expected["online"]), "head_rows": 4 * CASE.answer, "saved_bytes": 50}
    cached = {"flops": int(expected["cached"]), "head_rows": 2 * CASE.answer, "saved_bytes": 50}
    counted = {"trl": {"flops": 0, "head_rows": 0, "saved_bytes": 100}, "online": good, "cached": cached}
    equal = {"online": {"logp": 1e-6, "gradient": 1e-6}}
    assert side.broken(CASE, expected, equal, counted) == []
    assert side.broken(CASE, expected, {"online": {"logp": float("nan"), "gradient": 1e-4}}, counted) == [
        "online: logp differs by nan", "online: gradient differs by 0.0001"
    ]  # fmt: skip
    for change, message in (
        ({"flops": int(good["flops"] * 1.03)}, "1.030 times the operations"),
        ({"head_rows": good["head_rows"] + 1}, "rows meet the head"),
        ({"saved_bytes": 61}, "keeps 0.610 of TRL's bytes"),
    ):
        (told,) = side.broken(CASE, expected, equal, counted | {"online": good | change})
        assert message in told
    unbounded = dataclasses.replace(CASE, saved=None)
    assert side.broken(unbounded, expected, equal, counted | {"online": good | {"saved_bytes": 99}}) == []


def test_a_bar_is_met_by_the_lower_end_of_the_interval() -> None:
    rng = np.random.default_rng(0)
    slow, fast = (np.stack([scale * (1 + 0.01 * rng.standard_normal(15))] * 2, 1) for scale in (2.0, 1.0))
    counted = {name: {"flops": 100, "head_rows": 1, "saved_bytes": 10} for name in ("trl", "online", "cached", "separate")}
    seconds = {"trl": slow, "online": fast, "cached": slow, "separate": 1.05 * slow}
    for bar, met in ((1.9, True), (2.1, False)):
        case = side.Case(96, 9, {"online": ("trl", bar), "cached": ("separate", 1.0)})
        rows = side.results(case, bench.expected(case, SHAPE), seconds, counted)
        assert rows["online"]["faster_than"]["trl"]["met"] is met
        assert rows["cached"]["faster_than"]["separate"]["met"] and "met" not in rows["cached"]["faster_than"]["trl"]
        assert f"bar {bar}: {'met' if met else 'missed'}" in side.report(case, rows)


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "6"])
    assert "at least 7" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gates_hold_against_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And see another objective, after which nothing is timed."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install mmpo[parity]")
    (tmp_path / "a").mkdir()
    found = bench.contestants(tmp_path / "a", CASE, SHAPE)
    equal = side.equality(found)
    assert equal["trl_cached"]["gradient"] <= side.TOLERANCE
    assert side.broken(CASE, bench.expected(CASE, SHAPE), equal, {c.name: bench.counted(c, SHAPE) for c in found}) == []
    doubled = [dataclasses.replace(c, loss=lambda c=c: 2 * c.loss()) for c in found[1:]]  # type: ignore[misc]
    spoilt = dataclasses.replace(
        bench.bench((CASE,), SHAPE), contestants=lambda *_: [found[0], *doubled],
        counts=lambda _: {"flops": 0, "head_rows": 0, "saved_bytes": 1},
    )  # fmt: skip
    monkeypatch.setattr(side, "measure", lambda *_: pytest.fail("was timed"))
    assert side.main(spoilt, ["--rounds", "7"]) == 1
    assert "online: gradient differs by" in capsys.readouterr().err
