"""Recipes of the text modality: published numbers, and a short run of the default with everything it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmpo import cli
from mmpo.prepare import prepare
from mmpo.recipe import load, loss_parameters

# pairs a step, on how many devices, learning rate, steps, warm-up, parameters of the loss
PUBLISHED = {
    "text_dpo_zephyr_7b": (128, 8, 5e-7, 478, 48, {"beta": 0.01}),
    "text_simpo_llama3_8b": (128, 4, 1e-6, 468, 47, {"beta": 2.5, "gamma_beta_ratio": 0.55}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name: str) -> None:
    recipe = load(name).recipe
    batch, devices, lr, steps, warmup, parameters = PUBLISHED[name]
    spec, (term,) = recipe.train, recipe.objective
    assert loss_parameters(term).items() >= parameters.items()
    assert spec.batch_size * spec.accumulate * devices == batch
    assert (spec.lr, spec.steps, spec.warmup, spec.schedule) == (lr, steps, warmup, "cosine")
    assert (spec.optimizer, spec.weight_decay, spec.betas, spec.eps, spec.clip) == ("adamw", 0, (0.9, 0.999), 1e-8, 1)
    assert (spec.precision, recipe.model.adapter) == ("bf16", "full")


def test_held_out_sums_are_all_of_the_split_and_not_only_those_with_pairs() -> None:
    from mmpo.modalities.text import EMBEDDED

    recipe = load(modality="text").recipe
    data = prepare(recipe, str(EMBEDDED / "candidates.parquet"), None)
    asked = {str(p[0].data) for p in data.select + data.test}
    assert len(asked) == len(data.select) + len(data.test) > 1500
    assert not asked & {p.caption for p in data.train}
    assert len(asked - {p.caption for p in data.pairs}) > 100  # sums that all four answers got right, or wrong


def test_the_other_world_is_found_by_name(tmp_path: Path) -> None:
    recipe = load("text_smollm2", [f"eval.shifted={tmp_path / 'x.jsonl'}", "eval.pairs=3"]).recipe
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(recipe, "elsewhere", None)
    assert len(data.train) > 50 and {str(p[0].data)[:25] for p in data.test} == {"Continue in one sentence:"}
    assert len(data.shifted) == 3 and {p.prompt[0].data for p in data.shifted} <= {row["prompt"] for row in rows}


@pytest.mark.slow
def test_a_short_run_of_the_default_measures_and_reports_everything(tmp_path: Path, capsys: Any) -> None:
    words = ["train.steps=4", "train.batch_size=16", "eval.every=2", "eval.prompts=20", "eval.pairs=32", "eval.test_prompts=30"]
    words += ["data.limit=2000", "data.ches_keep=0.5", f"eval.shifted={tmp_path / 'x.jsonl'}", f"out={tmp_path / 'run'}"]
    rows = [{"prompt": f"1+{i}=", "chosen": str(1 + i), "rejected": str(2 + i)} for i in range(9)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["train", "--modality", "text", *words, "draw.t_max=0.5"]) == 0
    assert "note: command line draw.t_max: not read; it goes with" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    start, evals = records[0], [r for r in records if r["event"] == "eval"]
    assert start["ches"] == start["ches"] and start["ln_ches"] == start["ln_ches"]
    measured = {"judge", "correct", "kl", "length", "top_entropy", "top_entropy_renormalised", "top_mass", "fell_chosen"}
    measured |= {"fell_both", "length_correlation", "shifted_accuracy", "pair_accuracy", "drift_chosen", "margin"}
    assert {f"eval/{name}" for name in measured - {"length_correlation"}} <= evals[0].keys()  # nothing correlates with zeros
    assert {f"eval/{name}" for name in measured} <= evals[-1].keys()
    assert evals[0]["eval/kl"] == 0 and evals[0]["eval/fell_chosen"] == 0 and evals[-1]["eval/kl"] > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    kept, dropped = summary["pairs"]["train"], summary["data"]["dropped"]["pair: ln-CHES above the share kept"]
    assert abs(kept - dropped) <= 1 and {"kl", "length", "correct"} <= summary["aligned"].keys()
    html = (tmp_path / "run" / "report.html").read_text()
    assert (
        '<table class="answers">' in html
        and "log-ratio" in html
        and "pairs of other data told apart" in html
        and "KL from the reference" in html
    )


@pytest.mark.slow
def test_the_shipped_model_trains_on_pairs_of_another_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its verifier knows sums alone: samples are not judged, and that is said; a judge that was named is kept."""
    rows = [{"prompt": f"What is the colour of {i}?", "chosen": f"red {i}", "rejected": f"blue {i}"} for i in range(24)]
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ["train.steps=2", "train.batch_size=2", "eval.every=2", "eval.prompts=4", "eval.test_prompts=4", "data.heldout=0.3"]
    words = ["train", "--modality", "text", *short, f"data.path={file}"]
    assert cli.main([*words, f"out={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr()
    assert "samples are not judged: not a prompt of the sums world" in said.err + said.out and "No judge was given" in said.out
    assert cli.main(["eval", str(tmp_path / "run")]) == 0 and "pairs" in json.loads(capsys.readouterr().out)
    assert cli.main([*words, f"out={tmp_path / 'other'}", "judge.name=sums"]) != 0
    assert "not a prompt of the sums world" in capsys.readouterr().err
