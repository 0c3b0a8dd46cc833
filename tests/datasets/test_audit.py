"""The audit: planted defects are found, each by its own check, and clean data give no alarm."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo import cli, media
from mmpo.datasets.audit import Audit, audit, interval
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.formats.trl import write_trl
from mmpo.datasets.formatting import FEATURES
from mmpo.datasets.load import load
from mmpo.datasets.near_copies import jaccard, near_copies, triples
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.separability import STRENGTH, auc, fit, separate
from mmpo.errors import DataError
from mmpo.pair import Pair, image, text

SHARED = Path(os.environ.get("MMPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "text"
needs_shared = pytest.mark.skipif(
    not (SHARED / "llmbar_natural.json").is_file(), reason=f"no real text at {SHARED} (or MMPO_TEST_DATA)"
)
WORDS = [a + b + c for a in ("bar", "lo", "sti", "gren") for b in ("ma", "ti", "vu", "sol") for c in ("n", "ra", "x", "dol")]
Row = dict[str, Any]
COUNT = 200


def sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most))).capitalize() + "."


def clean(seed: int, count: int = COUNT) -> list[dict[str, Any]]:
    """Random questions, and random answers, of which nothing tells the sides apart."""
    rng = random.Random(seed)
    rows = [{"prompt": sentence(rng, 16, 24)[:-1] + "?"} for _ in range(count)]
    return [row | {"chosen": sentence(rng, 10, 30), "rejected": sentence(rng, 10, 30)} for row in rows]


def audited(path: Path, rows: list[dict[str, Any]], **options: Any) -> Audit:
    path.write_text("\n".join(map(json.dumps, rows)))
    return audit(path, **options)


def alarms(found: Audit) -> list[str]:
    return [f.name for f in found.alarms]


@pytest.mark.parametrize("seed", range(3))
def test_clean_pairs_give_no_alarm(tmp_path: Path, seed: int) -> None:
    found = audited(tmp_path / "x.jsonl", clean(seed))
    assert alarms(found) == [] and found.verdict.endswith("should wait for")
    assert (found.pairs, found.prompts, found.unpaired) == (COUNT, COUNT, 0)


def every(share: int, change: Callable[[Row], Row]) -> Callable[[list[Row]], list[Row]]:
    """A defect in every `share`-th row."""
    return lambda rows: [row | change(row) if i % share == 0 else row for i, row in enumerate(rows)]


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}


def one_word_off(row: dict[str, Any]) -> dict[str, Any]:
    words = (row["chosen"] + " " + row["rejected"]).split()
    return {"chosen": " ".join(words), "rejected": " ".join([*words[:-1], "otherwise."])}


DEFECTS: dict[str, tuple[Callable[[list[Row]], list[Row]], set[str]]] = {
    "longer": (every(1, lambda r: {"chosen": max(r["chosen"], r["rejected"], key=len),
                                   "rejected": min(r["chosen"], r["rejected"], key=len)}), {"length"}),
    "shorter": (every(1, lambda r: {"chosen": min(r["chosen"], r["rejected"], key=len),
                                    "rejected": max(r["chosen"], r["rejected"], key=len)}), {"length"}),
    "bullets": (every(4, lambda r: {"chosen": "- " + r["chosen"].replace(" ", "\n- ", 3)}), {"format, bullets"}),
    "refusals": (every(6, lambda r: {"rejected": "I cannot " + r["rejected"]}), {"format, refusal at the start"}),
    "cut off": (every(5, lambda r: {"rejected": r["rejected"][:-1]}), {"format, unfinished end"}),
    "blank at the start": (every(3, lambda r: {"chosen": " " + r["chosen"]}), {"format, white space at the ends"}),
    "copies": (lambda rows: rows + rows[::20], {"copies"}),
    "contradictions": (lambda rows: rows + [swapped(r) for r in rows[::20]], {"copies"}),
    "near prompts": (lambda rows: rows + [r | {"prompt": r["prompt"] + " Please", "chosen": sentence(random.Random(i), 9, 30),
                                               "rejected": sentence(random.Random(i + 0.5), 9, 30)}
                                          for i, r in enumerate(rows[::8])], {"prompts"}),
    "one prompt": (lambda rows: every(5, lambda r: {"prompt": rows[0]["prompt"]})(rows), {"prompts"}),
    "case only": (every(40, lambda r: {"rejected": r["chosen"].upper()}), {"equal sides"}),
    "small edits": (every(8, one_word_off), {"equal sides"}),
    "stock answers": (every(8, lambda r: {"rejected": "Barman loti gren, as always and everywhere."}), {"stock answers"}),
    "a word that gives it away": (every(1, lambda r: {"chosen": r["chosen"][:-1] + " indeed.",
                                                      "rejected": r["rejected"][:-1] + " lora."}), {"words"}),
    "ties": (every(3, lambda r: {"chosen_probability": 0.5}), {"ties"}),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found_by_its_check(tmp_path: Path, defect: str) -> None:
    plant, wanted = DEFECTS[defect]
    found = audited(tmp_path / "x.jsonl", plant(clean(7)))
    assert set(alarms(found)) == wanted
    assert all(f"ALARM {name}" in "\n".join(found.lines()) and name in found.verdict for name in wanted)
    assert all(f.advice and f.said for f in found.alarms)


def test_prompts_of_another_split(tmp_path: Path) -> None:
    rows = clean(3)
    near = [r | {"prompt": r["prompt"].replace("?", " then?"), "chosen": "Another answer."} for r in rows[10:20]]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [*rows[:10], *near, *clean(4, 50)])))
    found = audited(tmp_path / "train.jsonl", rows, against=tmp_path / "test.jsonl")
    assert alarms(found) == ["overlap"]
    numbers = found.alarms[0].numbers
    assert (numbers["exact"], numbers["near_or_exact"]) == (10, 20)
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, clean(4, 50))))
    assert alarms(audit(tmp_path / "train.jsonl", against=tmp_path / "test.jsonl")) == []


def test_every_prompt_counts_once(tmp_path: Path) -> None:
    """A prompt with 100 pairs in which the longer answer wins is one vote against 99 in which it loses."""
    rng = random.Random(0)
    rows = [{"prompt": f"question {sentence(rng, 9, 9)}", "chosen": sentence(rng, 5, 5), "rejected": sentence(rng, 25, 25)}]
    rows = rows + [r | {"prompt": f"question {sentence(rng, 9, 9)}"} for r in rows * 98]
    rows += [{"prompt": "the same", "chosen": sentence(rng, 25, 25), "rejected": sentence(rng, 5, 5)} for _ in range(100)]
    length = next(f for f in audited(tmp_path / "x.jsonl", rows).findings if f.name == "length")
    assert length.numbers["rate"] == pytest.approx(0.01) and length.numbers["prompts"] == 100 and length.alarm


def test_wilson() -> None:
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # 50 of 100, as in the textbooks
    assert interval(0.0, 0) == (0.0, 1.0)
    assert interval(0.9, 50, tests=20)[0] < interval(0.9, 50)[0] < 0.9


@settings(max_examples=60)
@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_jaccard_is_that_of_the_sets_of_triples(first: list[str], second: list[str]) -> None:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        padded = words + [""] * (3 - len(words))
        return {tuple(padded[i : i + 3]) for i in range(len(padded) - 2)}

    a, b = runs(first), runs(second)
    assert jaccard(triples(" ".join(first)), triples(" ".join(second))) == len(a & b) / len(a | b)


def test_near_copies_are_found_and_others_are_not() -> None:
    rng = random.Random(1)
    originals = [sentence(rng, 40, 60) for _ in range(200)]
    edited = [words.replace(" ", "  ").upper() if i % 2 else words + " Truly." for i, words in enumerate(originals)]
    roots = near_copies([*originals, *edited])
    assert roots[:200] == list(range(200)) and roots[200:] == list(range(200))
    assert near_copies(["a", "b", "A ", ""]) == [0, 1, 0, 3]


def test_auc_is_the_share_of_won_comparisons() -> None:
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 40).astype(float), rng.integers(0, 7, 30).astype(float)
    won = (high[:, None] > low).mean() + 0.5 * (high[:, None] == low).mean()
    assert auc(high, low) == pytest.approx(won)


@pytest.mark.slow
def test_fit_is_scikit_learns_logistic_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    from scipy import sparse

    rng = np.random.default_rng(0)
    differences = rng.normal(size=(80, 5)) + [0.5, 0, 0, -0.5, 0]
    model = linear.LogisticRegression(C=STRENGTH, fit_intercept=False, tol=1e-10)
    model.fit(np.concatenate([differences, -differences]), [1] * 80 + [0] * 80, sample_weight=np.full(160, 0.5))
    assert fit(sparse.csr_matrix(differences)) == pytest.approx(model.coef_[0], abs=1e-3)


def test_a_fold_never_sees_its_prompts() -> None:
    """A word that tells the sides apart within one fold only is worth nothing on the others."""
    folds = [i % 2 for i in range(40)]
    chosen = [f"yes{f} word" for f in folds]
    found = separate(chosen, ["word no word"] * 40, folds)
    assert found is not None and found.auc == 1.0  # `no` is in both folds
    found = separate([f"yes{f} word" for f in folds], [f"no{f} word" for f in folds], folds)
    assert found is not None and found.auc == 0.5 and set(found.right) == {0.5}
    assert separate(["a"], ["b"], [0]) is None


LOOKS = {
    "headings": "# Title\ntext", "bullets": "- a\n- b", "numbered list": "1. a\n2. b", "bold": "so **very** bold",
    "code": "```python\nx\n```", "table": "| a | b |\n| c | d |", "link": "see https://example.org", "LaTeX": r"\(x^2\)",
    "emoji": "fine \U0001f600", "several paragraphs": "a.\n\nb.", "exclamation mark": "no!", "refusal at the start": "I can’t.",
    "apology at the start": "I'm so sorry.", "agreement at the start": "Sure, here.", "question at the end": "is it? ",
    "speaks of itself as an AI": "I'm an AI model.", "unfinished end": "and then the", "starts in lower case": "but.",
    "white space at the ends": " A.", "letters beyond ASCII": "Grüße.",
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_features_see_what_they_are_named_for(name: str) -> None:
    assert FEATURES[name](LOOKS[name]) and not FEATURES[name]("It is 4, and that is all there is to say “here”.")


def test_one_sided_rows_and_other_media(tmp_path: Path) -> None:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(clean(0, 60))]
    found = audited(tmp_path / "x.jsonl", rows)
    assert found.unpaired == 60 and [f.name for f in found.findings] == ["ties", "copies", "prompts"] and not found.alarms
    assert "60 with one side only" in found.lines()[0]
    pictures = [image(media.encode(np.full((4, 4, 3), i, np.uint8))) for i in (1, 2)]
    write_candidates([Candidate((text("p"),), p, float(i)) for i, p in enumerate(pictures)], tmp_path / "c.parquet")
    with pytest.raises(DataError, match="the audit reads text, and these pairs hold image"):
        audit(tmp_path / "c.parquet")
    write_trl([], tmp_path / "e.jsonl")
    with pytest.raises(DataError):
        audit(tmp_path / "e.jsonl", format="trl")


def test_only_what_the_assistant_says_is_looked_at(tmp_path: Path) -> None:
    """In answers of several turns the user's words are no part of the length."""
    turns = [text("Short.", "assistant"), text("A very long remark by somebody else, again and again.", "user")]
    sides = [
        ((*turns, text(f"Yes {i}.", "assistant")), (text(f"Rather longer {i} than that.", "assistant"),)) for i in range(40)
    ]
    pairs = [Pair(f"{i}", (text(f"question {i}", "user"),), *side) for i, side in enumerate(sides)]
    write_trl(pairs, tmp_path / "x.jsonl")
    length = next(f for f in audit(tmp_path / "x.jsonl").findings if f.name == "length")
    assert length.numbers["rate"] == 0 and length.alarm


def test_the_gap_to_a_model_is_that_of_plain_transformers(tmp_path: Path) -> None:
    """Mean log-probability of an answer's tokens and the end of turn, by a plain forward pass of each row."""
    import torch
    import transformers

    from tests.modalities import tiny_text

    folder = str(tiny_text.make(tmp_path / "model", template="none"))
    rows = [
        {"prompt": r["prompt"], "chosen": f"the dog {i}", "rejected": f"I do not know {i}"} for i, r in enumerate(clean(0, 5))
    ]
    found = audited(tmp_path / "x.jsonl", rows, model=folder, model_pairs=3).findings[-1]
    assert found.name == "off-policy" and found.numbers["pairs"] == 3 and found.alarm  # a random model knows nothing
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def mean(prompt: str, answer: str) -> float:
        before, after = (tokenizer(words, add_special_tokens=False).input_ids for words in (prompt, answer))
        after = [*after, tokenizer.eos_token_id]
        ids = torch.tensor([before + after])
        with torch.no_grad():
            logp = model.eval()(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return float(logp.gather(1, ids[0, len(before) :, None]).mean())

    kept = sorted(load(tmp_path / "x.jsonl")[0], key=lambda p: hashlib.sha256(p.id.encode()).hexdigest())[:3]
    for side in ("chosen", "rejected"):
        wanted = [mean(p.caption, str(getattr(p, side)[0].data)) for p in kept]
        assert found.numbers[side] == pytest.approx(sum(wanted) / 3, abs=1e-5)


def test_the_command_line(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, DEFECTS["longer"][0](clean(2, 100)))))
    assert cli.main(["data", "audit", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "ALARM length: the longer answer is chosen in 100.0%" in printed and "verdict: look at length" in printed
    assert cli.main(["data", "audit", str(path), "--json", "--limit", "50"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pairs"] == 50 and told["rows"]["used"] >= 50
    assert {f["name"] for f in told["findings"] if f["alarm"]} == {"length"}


@pytest.mark.slow
def test_audit_without_a_model_imports_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, clean(2, 40))))
    code = "import sys; from mmpo.cli import main; a = ['data', 'audit']; main(a + ['--help']); print('scipy' in sys.modules); "
    code += "main(a + sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert [line for line in out.stdout.splitlines() if line in ("True", "False")] == ["False", "False"]


REAL = [
    ("llmbar_natural.json", "llmbar", set()),
    ("pandalm_first500.json", "pandalm", {"copies"}),
    ("alpaca_eval_alpaca-7b.json", "alpaca_eval", {"length", "format, numbered list", "format, several paragraphs"}),
    pytest.param("alpaca_eval_falcon-7b-instruct.json", "alpaca_eval", set(), marks=pytest.mark.slow),
    pytest.param("hh_rlhf_harmless_test.jsonl.gz", "hh_rlhf", {"format, apology at the start"}, marks=pytest.mark.slow),
]


@needs_shared
@pytest.mark.parametrize(("file", "name", "wanted"), REAL)
def test_real_sets(file: str, name: str, wanted: set[str]) -> None:
    found = audit(SHARED / file, format=name)
    assert set(alarms(found)) == wanted
