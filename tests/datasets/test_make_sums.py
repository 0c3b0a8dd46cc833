"""Making the embedded text base, in very small, and what the shipped one is: a plain transformers model and its own answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmpo import cli
from mmpo import recipe as recipes
from mmpo.datasets.load import load_candidates
from mmpo.datasets.worlds import make_sums, sums
from mmpo.modalities.text import EMBEDDED
from mmpo.pair import text
from mmpo.prepare import is_heldout


def test_digits_are_tokens_and_any_text_is_read_back() -> None:
    tokenizer = make_sums.make_tokenizer()
    assert len(tokenizer("47+38=").input_ids) == 6 and len(tokenizer) == 257
    for words in ("47+38= 85", "eighty-five \u2260 86", "\n\t"):
        assert tokenizer.decode(tokenizer(words).input_ids) == words
    assert tokenizer(make_sums.END).input_ids == [tokenizer.eos_token_id]


def test_the_base_learns_answers_only_a_share_of_them_wrong_and_no_held_out_sum() -> None:
    tokenizer = make_sums.make_tokenizer()
    ids, labels = make_sums.encode(tokenizer, np.random.default_rng(0))
    rows = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    learnt = [tokenizer.decode(label[label >= 0]) for label in labels]
    split = [row.partition("=") for row in rows]
    assert learnt == [answer + make_sums.END for _, _, answer in split]
    assert not any(is_heldout((text(f"{sum_}="),), make_sums.HELDOUT) for sum_, _, _ in split)
    wrong = np.mean([not sums.verify(f"{sum_}=", answer) for sum_, _, answer in split])
    assert abs(wrong - make_sums.WRONG) < 0.02 and abs(len(rows) / 8100 - 0.8) < 0.02


@pytest.mark.slow
def test_make_base_writes_a_model_and_judged_candidates(tmp_path: Path) -> None:
    words = ["--steps=2", "--prompts=5", "--candidates=30"]
    assert cli.main(["make-base", "text", "--out", str(tmp_path / "a"), *words]) == 0
    assert cli.main(["make-base", "text", "--out", str(tmp_path / "b"), *words]) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json", "candidates.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    groups, ledger = load_candidates(tmp_path / "a" / "candidates.parquet")
    assert len(groups) <= 5 and not ledger.skipped, str(ledger)


def test_make_base_refuses_settings_of_another_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["make-base", "text", "--out", str(tmp_path), "--vae-steps=2"]) == cli.USAGE
    assert "--vae-steps" in capsys.readouterr().err


def test_the_shipped_base_is_small_and_plain_and_right_about_half_of_the_time() -> None:
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) <= 1_500_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(EMBEDDED), AutoTokenizer.from_pretrained(EMBEDDED)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0.3e6 < sum(p.numel() for p in model.parameters()) < 0.4e6
    held = [p for p in sums.prompts() if is_heldout((text(p),), make_sums.HELDOUT)][::4]
    ids = tokenizer(held, return_tensors="pt").input_ids
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=make_sums.ANSWER)
    said = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert abs(np.mean([sums.verify(p, a) for p, a in zip(held, said, strict=True)]) - 0.5) < 0.08


def test_the_shipped_candidates_carry_the_verifiers_scores_and_cover_every_sum() -> None:
    groups, ledger = load_candidates(EMBEDDED / "candidates.parquet")
    rows = [c for group in groups.values() for c in group]
    assert len(groups) == 8100 and not ledger.skipped
    assert all(c.score == float(sums.verify(str(c.prompt[0].data), str(c.block.data))) for c in rows)
    assert recipes.load(modality="text").recipe.data.heldout == make_sums.HELDOUT
