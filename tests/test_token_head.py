"""The head's benchmark without its clock: equal results, its gate, and how bars are judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl", reason="needs the extra parity")

from benchmarks import token_head as bench

pytestmark = pytest.mark.slow  # importing TRL alone takes seconds


def test_contestants_agree_with_full_logits() -> None:
    equal = bench.equality(bench.inputs(40, 300))
    assert equal.keys() == {"trl", "ours", "ours_kl"} and max(equal.values()) <= bench.TOLERANCE


def test_a_failed_gate_times_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = bench.inputs(40, 300)
    monkeypatch.setattr(bench, "inputs", lambda: given)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("was timed"))
    monkeypatch.setitem(bench.CONTESTANTS, "ours", lambda given: (bench.naive(given)[0] * (1 + 1e-4),))
    assert bench.main([]) == 1
    assert "nothing was timed" in capsys.readouterr().err


def test_a_bar_is_met_by_the_whole_interval_and_by_memory() -> None:
    seconds = {"naive": np.ones(9), "trl": np.full(9, 2.0), "naive_tdpo": np.ones(9)}
    peaks = {"naive": 100, "trl": 300, "ours": 30, "naive_tdpo": 100, "ours_kl": 16}
    spread = np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.7, 1.8, 1.9])
    rows = bench.results(seconds | {"ours": spread, "ours_kl": np.full(9, 1.3)}, peaks)
    judged = {(r["name"], r["peer"]): (r["time_met"], r["memory_met"]) for r in rows}
    assert judged == {
        ("ours", "naive"): (False, True),
        ("ours", "trl"): (False, True),
        ("ours_kl", "naive_tdpo"): (True, False),
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_growth_is_at_least_what_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.CONTESTANTS, "naive", lambda given: (given["hidden"] @ given["weight"].T).sum(1)[None])
    given = bench.inputs(64, 20_000)
    monkeypatch.setattr(bench, "inputs", lambda *shape: given)
    assert bench.growth("naive") >= given["weight"].nbytes
