"""Implicit rewards on other people's pairs, against plain transformers and peft that know nothing of mmpo."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from mmpo import cli, implicit, packaged
from mmpo.datasets.load import load
from mmpo.pair import Pair

SHORT = (
    "train.steps=2",
    "train.batch_size=8",
    "train.lr=1e-3",
    "eval.every=2",
    "eval.prompts=2",
    "eval.pairs=4",
    "eval.test_prompts=2",
    "data.limit=400",
)
SHARED = Path(os.environ.get("MMPO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "text"
SETS = {
    "llmbar_natural.json": "llmbar",
    "pandalm_first500.json": "pandalm",
    "hh_rlhf_harmless_test.jsonl.gz": "hh_rlhf",
    "alpaca_eval_vicuna-13b.json": "alpaca_eval",
}
SMOLLM2 = packaged.folder() / "smollm2"
Likelihood = Callable[[Pair, str], float]


def exported(base: Path, export: Path, end: str) -> tuple[Likelihood, Likelihood]:
    """log-likelihood of a side in nats, under the exported policy and under its base: the whole of the independent way."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    policy = PeftModel.from_pretrained(plain, export).eval()

    def likelihood(pair: Pair, side: str) -> float:
        said = [{"role": b.role or "user", "content": str(b.data)} for b in pair.prompt]
        turn = {"tokenize": False, "add_generation_prompt": True}
        start = tokenizer.apply_chat_template(said, **turn) if tokenizer.chat_template else pair.caption
        first = len(tokenizer(start, add_special_tokens=False).input_ids)
        ids = tokenizer(start + str(getattr(pair, side)[0].data) + end, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logp = policy(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
        return float(logp[first - 1 :].sum())

    def reference(pair: Pair, side: str) -> float:
        with policy.disable_adapter():
            return likelihood(pair, side)

    return likelihood, reference


@pytest.mark.slow
def test_rewards_equal_plain_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{a}+27=", "chosen": str(a + 27), "rejected": str(a + 28)} for a in range(20, 30)]
    rows += [{"prompt": "10+10=", "chosen": "20", "rejected": "20 "}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["train", "--modality", "text", *SHORT, "model.adapter=lora", f"out={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    words = ["--data", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "rows.jsonl")]
    assert cli.main(["eval", str(tmp_path / "run"), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    base = Path(implicit.__file__).parent / "assets" / "sums"
    end = transformers.AutoTokenizer.from_pretrained(base).eos_token
    agree(tmp_path, found, exported(base, tmp_path / "run" / "export", end), load(tmp_path / "x.jsonl")[0])
    assert found["account"]["pairs"] == len(rows) and found["account"]["one side only"] == 0


def agree(folder: Path, found: dict[str, Any], both: tuple[Likelihood, Likelihood], pairs: list[Pair]) -> None:
    """Every row to 1e-5 of its size, and the accuracies exactly."""
    written = {row["id"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}
    margins = []
    for pair in (p for p in pairs if p.id in written):
        row, own = written[pair.id], [[of(pair, side) for of in both] for side in ("chosen", "rejected")]
        told = [[row[f"{name}_{side}"] for name in ("policy", "reference")] for side in ("chosen", "rejected")]
        np.testing.assert_allclose(told, own, rtol=1e-5, atol=1e-5)
        margins.append((own[0][0] - own[0][1]) - (own[1][0] - own[1][1]))
    counts = found["told apart by"]["implicit reward"]
    assert counts["n"] == len(margins) == len(written) == counts["right"] + counts["ties"] + counts["wrong"]
    sure = sum(m > 1e-4 for m in margins), sum(m < -1e-4 for m in margins)
    assert counts["right"] >= sure[0] and counts["wrong"] >= sure[1]
    assert abs(counts["margin"] - np.mean(margins)) < 1e-4 + 1e-5 * max(map(abs, margins))


def test_ties_are_counted_as_such() -> None:
    sides = {"chosen": np.array([-1.0, -2.0, -3.0, -8.0]), "rejected": np.array([-2.0, -2.0, -1.0, -9.0])}
    zero = {name: np.full(4, -1.0) for name in sides}
    units = {"chosen": np.array([1.0, 2.0, 3.0, 8.0]), "rejected": np.array([2.0, 1.0, 1.0, 3.0])}
    found = implicit.Opinions(("a", "b", "c", "d"), sides, zero, units).summary()
    whole = {"accuracy": 0.625, "right": 2, "ties": 1, "wrong": 1, "n": 4, "margin": 0.0}
    assert found["implicit reward"] == found["policy likelihood"] == whole
    assert found["policy likelihood per unit"]["right"] == 2 and found["reference likelihood"]["ties"] == 4
    assert "implicit reward" not in implicit.Opinions(("a",) * 4, sides, {}, units).summary()


def test_rows_without_an_order_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tmp_path / "nothing"), "--data", str(tmp_path / "x.jsonl")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2 / "asset.json").is_file(), reason=f"no {SMOLLM2}: mmpo assets add smollm2")
@pytest.mark.skipif(not (SHARED / "llmbar_natural.json").is_file(), reason=f"no real text at {SHARED} (or MMPO_TEST_DATA)")
def test_smollm2_on_real_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("train.steps=2", "train.lr=1e-3", "train.save_every=2", "eval.every=2", "eval.prompts=1", "eval.test_prompts=1")
    assert cli.main(["train", "text_smollm2", *small, "eval.pairs=2", f"out={tmp_path / 'run'}"]) == 0
    likelihoods = exported(SMOLLM2, tmp_path / "run" / "export", "<|im_end|>")
    limit = int(os.environ.get("MMPO_TEST_PAIRS", "4"))
    for name, format in SETS.items():
        words = ["--data", str(SHARED / name), "--format", format, "--limit", str(limit), "--on-bad", "skip"]
        capsys.readouterr()
        assert cli.main(["eval", str(tmp_path / "run"), *words, "--out", str(tmp_path / "rows.jsonl")]) == 0
        found = json.loads(capsys.readouterr().out)
        agree(tmp_path, found, likelihoods, load(SHARED / name, format=format, limit=limit, on_bad="skip")[0])
        with capsys.disabled():
            print(name, json.dumps(found))
