"""The diffusion benchmark without its clock: equal results, and how much is computed how often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import diffusion_step as bench

pytestmark = pytest.mark.slow


@pytest.fixture
def contestants(tmp_path: Path) -> list[bench.Variant]:
    return bench.variants(tmp_path, bench.pairs(4), batch_size=2)


def test_the_same_draw_gives_the_scripts_loss_and_gradients(contestants: list[bench.Variant]) -> None:
    for differences in bench.equality(contestants).values():
        assert differences["loss"] <= bench.TOLERANCE
        assert differences["gradient"] <= bench.TOLERANCE


def test_the_gate_sees_another_objective(contestants: list[bench.Variant], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BETA_DPO", 2 * bench.BETA_DPO)  # of the script alone
    assert all(d["gradient"] > 1000 * bench.TOLERANCE for d in bench.equality(contestants).values())


def test_frozen_parts_run_only_where_nothing_is_cached(contestants: list[bench.Variant]) -> None:
    found = {v.name: bench.counts(v) for v in contestants}
    calls = {name: (row["vae"], row["text"], row["denoiser"]) for name, row in found.items()}
    assert calls == {"script": (1, 1, 2), "latents": (0, 0, 2), "reference": (0, 0, 1)}
    for name, bar in bench.BARS.items():
        assert found["script"]["flops"] >= bar * found[name]["flops"]
    # LoRA: forward, backward to the inputs and the reference's forward are three times about the same
    assert found["latents"]["flops"] / found["reference"]["flops"] == pytest.approx(1.5, abs=0.1)


def test_the_ratio_of_medians_and_its_interval() -> None:
    fast = np.array([1.0, 1.0, 1.0, 5.0, 1.0])
    assert bench.ratio(3 * fast, fast)["value"] == 3
    assert bench.ratio(np.full(5, 3.0), np.ones(5)) == {"value": 3.0, "low": 3.0, "high": 3.0}
    spread = bench.ratio(np.linspace(2, 4, 15), np.ones(15))
    assert 2 < spread["low"] < spread["value"] == 3 < spread["high"] < 4


def test_too_few_rounds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "14"])
    assert "at least 15" in capsys.readouterr().err


def test_a_failed_gate_times_nothing(
    contestants: list[bench.Variant], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "variants", lambda *_: contestants)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("was timed"))
    monkeypatch.setattr(bench, "equality", lambda _: {"latents": {"loss": 1e-3, "gradient": 0.0}})
    assert bench.main([]) == 1
    assert "nothing was timed" in capsys.readouterr().err
