"""Corrected segments: which characters are found, and that the objective then is DDPO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmpo import cli
from mmpo.datasets.builders.segments import GAMMA, gaps, segments
from mmpo.datasets.stages import Record
from mmpo.datasets.tools import Tools
from mmpo.objective import Objective, make_term, rows_of
from mmpo.pair import Pair, Span, image, text
from mmpo.scores import Scores
from tests.datasets.judged import built
from tests.modalities.tiny_text import adapter, make, tokenizer


def source(rejected: str, chosen: str, id: str = "a") -> Record:
    pair = Pair(id, (text("What is there?"),), (text(chosen),), (text(rejected),))
    return Record(id, pair.prompt, fields={"source": pair})


def marked(rejected: str, chosen: str, **options: Any) -> tuple[list[str], list[str]]:
    """The marked words of the rejected and of the chosen side."""
    found, drops = built(segments(Tools(), **options), source(rejected, chosen))
    assert not drops, drops
    pair = found[0].fields["pair"]
    assert set(pair.spans) == {"chosen", "rejected"}, "both sides were looked at"
    cut = {side: [str(getattr(pair, side)[0].data)[s.start : s.end] for s in pair.spans[side]] for side in pair.spans}
    return cut["rejected"], cut["chosen"]


def test_replaced_words_are_marked_on_both_sides() -> None:
    wrong = "The photo shows a red car on the street, and two dogs in the park."
    right = "The photo shows a small blue van on the street, and three cats in the park."
    assert marked(wrong, right) == (["red car", "two dogs"], ["small blue van", "three cats"])


def test_common_blocks_shorter_than_the_least_belong_to_the_change() -> None:
    wrong, right = "a b c X the Y d e f", "a b c P the Q d e f"
    assert marked(wrong, right) == (["X the Y"], ["P the Q"]), "a block of one is thrown away"
    assert marked(wrong, right, min_block=1) == (["X", "Y"], ["P", "Q"])
    assert marked("a b X c d e", "a b Y c d e", min_block=3) == (["a b X"], ["a b Y"]), "2 < 3"
    assert marked("a b c X c d e", "a b c Y c d e", min_block=3) == (["X"], ["Y"]), "3 is long enough"


def test_what_is_only_inserted_or_deleted_counts_where_it_is_asked_for() -> None:
    """RLHF-V's code gives weight 1 to it (sheet, trap 22); a deletion beside a replacement is a part of that."""
    shorter, longer = "One two three four five six.", "One two three and more four five six."
    assert marked(shorter, longer) == ([], []) == marked(longer, shorter)
    assert marked(shorter, longer, count_insert_delete=True) == ([], ["and more"])
    assert marked(longer, shorter, count_insert_delete=True) == (["and more"], [])


def test_a_long_answer_keeps_its_frequent_words() -> None:
    """difflib takes what makes up more than 1 % of 200 units for junk: without any rare word nothing at all would match."""
    sentence = "the cat is on the mat . "
    wrong, right = sentence * 40 + "it has a hat", sentence * 40 + "one sees no shoe"
    assert marked(wrong, right) == (["it has a hat"], ["one sees no shoe"])


def test_units_are_words_characters_or_tokens(tmp_path: Path) -> None:
    assert marked("一只红色的猫坐在桌子上", "一只黑色的猫坐在桌子上", units="characters", min_block=2) == (["红"], ["黑"])
    assert marked("一只红色的猫坐在桌子上", "一只黑色的猫坐在桌子上") == (
        ["一只红色的猫坐在桌子上"],
        ["一只黑色的猫坐在桌子上"],
    ), "without blanks it is one word"
    tokenizer().save_pretrained(tmp_path)
    found = marked(
        "the capital of 1 dog is it", "the capital of 23 dog is it", units="tokens", tokenizer=str(tmp_path), min_block=2
    )
    assert [x.strip() for side in found for x in side] == ["1", "23"]


def test_no_gap_is_lost_and_none_overlaps() -> None:
    found = gaps("xabcyyabcz", "pabcqabc", 3)
    assert found == [((0, 1), (0, 1)), ((4, 6), (4, 5)), ((9, 10), (8, 8))]
    assert gaps("abc", "abc", 1) == [] and gaps("", "a", 1) == [((0, 0), (0, 1))] and gaps("ab", "cd", 1) == [((0, 2), (0, 2))]


def test_weights_are_gamma_of_the_preset_or_a_given_one() -> None:
    def weight(**options: Any) -> set[float]:
        record = built(segments(Tools(), **options), source("a b c X d e f", "a b c Y d e f"))[0][0]
        assert record.provenance[-1]["segments"] == {"chosen": 1, "rejected": 1}
        return {s.weight for spans in record.fields["pair"].spans.values() for s in spans}

    assert GAMMA == {"paper": 5.0, "code": 1.1}
    code = {"preset": "code", "units": "words"}
    assert weight() == {5.0} and weight(**code) == {1.1} and weight(**code, segment_weight=2.0) == {2.0}


def test_preset_code_aligns_tokens_as_the_code_does(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    wrong, right = "the capital of 12 dog is it", "the capital of 123 dog is it"
    assert marked(wrong, right, preset="code", tokenizer=str(tmp_path), min_block=1) == ([], []), "a token was inserted"
    assert marked(wrong, right, preset="code", units="words", min_block=1) == (["12"], ["123"])
    with pytest.raises(ValueError, match="preset code: aligns token ids: give tokenizer=DIR, .* or units=words"):
        segments(Tools(), preset="code")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, why in ((tmp_path / "none", "there is no such folder"), (tmp_path, "what is there is none")):
        words = [
            "pairs",
            "segments",
            f"tokenizer={folder}",
            "--data",
            str(tmp_path / "x.jsonl"),
            "--out",
            str(tmp_path / "out"),
        ]
        assert cli.main(words) == cli.USAGE
        assert f"tokenizer: expected a local folder with a fast tokenizer, found {folder}: {why}" in capsys.readouterr().err


def test_what_cannot_be_compared_is_dropped_or_refused() -> None:
    two_turns = Pair("t", (text("q"),), (text("a"), text("b")), (text("c"),))
    picture = Pair("i", (text("q"),), (image(b"x"),), (text("c"),))
    rows = [Record("n", (text("q"),)), source("same", "same", "s")]
    rows += [Record(p.id, p.prompt, fields={"source": p}) for p in (two_turns, picture)]
    found, drops = built(segments(Tools()), *rows)
    assert not found and drops == {
        "spans: no two sides to compare": 1, "spans: identical sides": 1, "spans: a side that is not one text": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="finite weight"):
        segments(Tools(), segment_weight=-1.0)
    with pytest.raises(ValueError, match="min_block"):
        segments(Tools(), min_block=0)
    for wrong in ({"units": "tokens"}, {"units": "words", "tokenizer": "x"}):
        with pytest.raises(ValueError, match="tokens need a tokenizer"):
            segments(Tools(), **wrong)  # type: ignore[arg-type]


# The objective ---------------------------------------------------------------------------------------------------------


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def ddpo(preset: str, policy: dict[str, list[float]], ref: dict[str, list[float]], changed: dict[str, list[int]]) -> float:
    """The loss of the card, from per-token log-likelihoods and the places of corrected tokens."""
    gamma, beta = (5.0, 0.5) if preset == "paper" else (1.1, 0.1)

    def likelihood(logps: list[float], places: list[int]) -> float:
        total = sum(v for i, v in enumerate(logps) if i not in places) + gamma * sum(logps[i] for i in places)
        return total / (len(logps) - len(places) + gamma * len(places)) if preset == "paper" else total

    ratio = {b: likelihood(policy[b], changed[b]) - likelihood(ref[b], changed[b]) for b in policy}
    return -log_sigmoid(beta * (ratio["chosen"] - ratio["rejected"]))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "paper": {"loss": "dpo", "beta": 0.5, "weights": "spans", "reduce": "mean"},
    "code": {"loss": "dpo", "beta": 0.1, "weights": "spans"},
}


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_the_objective_is_the_weighted_sum_of_the_card(preset: str) -> None:
    """Paper: (sum over unchanged + gamma sum over changed) / (|unchanged| + gamma |changed|), for policy and reference."""
    policy = {"chosen": [-1.0, -2.0, -0.5, -3.0], "rejected": [-2.0, -0.25, -4.0]}
    ref = {"chosen": [-1.5, -2.5, -1.0, -2.0], "rejected": [-1.0, -0.5, -3.0]}
    changed = {"chosen": [1, 3], "rejected": [2]}

    def scores(values: dict[str, list[float]], branch: str) -> Scores:
        units = values[branch] + [-99.0] * (4 - len(values[branch]))
        weights = [GAMMA[preset] if i in changed[branch] else 1.0 for i in range(4)]
        mask = torch.arange(4)[None] < len(values[branch])
        return Scores(torch.tensor([units]), mask, weights=torch.tensor([weights]))

    mine, theirs = ({b: scores(values, b) for b in values} for values in (policy, ref))
    rows = rows_of([Pair("p", (text("q"),), (text("c"),), (text("r"),))], "cpu")
    got = Objective([make_term(**OBJECTIVES[preset])])(mine, theirs, rows).loss
    assert got.item() == pytest.approx(ddpo(preset, policy, ref, changed), rel=1e-5)
    plain = Objective([make_term("dpo", beta=OBJECTIVES[preset]["beta"])])(mine, theirs, rows).loss
    assert abs(got.item() - plain.item()) > 1e-3, "and it is not DPO"


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_from_corrections_to_the_loss_by_plain_transformers(tmp_path: Path, preset: str) -> None:
    """Builder, adapter and objective together, against a forward of each side alone and token places found by hand."""
    import transformers as T

    from tests.modalities.test_text import drawn

    folder = make(tmp_path / "model")
    wrong, right = "the dog jumps over 12 of the lazy foxes", "the dog jumps over 345 of the lazy foxes"
    pair = built(segments(Tools(), preset=preset, units="words"), source(wrong, right))[0][0].fields["pair"]  # type: ignore[arg-type]
    assert pair.spans["chosen"] == (Span(19, 22, GAMMA[preset]),)
    ours = adapter(folder)
    scores = ours.score(ours.model, drawn(ours, [pair]))
    reference = {b: Scores(torch.full_like(s.logp, -3.0), s.mask) for b, s in scores.items()}
    got = Objective([make_term(**OBJECTIVES[preset])])(scores, reference, rows_of([pair], "cpu")).loss

    model, words = T.AutoModelForCausalLM.from_pretrained(folder).eval(), T.AutoTokenizer.from_pretrained(folder)
    policy, ref, changed = {}, {}, {}
    for side, answer, digits in (("chosen", right, "345"), ("rejected", wrong, "12")):
        turns = [{"role": "user", "content": "What is there?"}, {"role": "assistant", "content": answer}]
        asked = words.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = words(words.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        start = len(words(asked, add_special_tokens=False)["input_ids"])
        end = whole.index(words.convert_tokens_to_ids("<stop>"), start) + 1
        policy[side] = token_logps(model, whole)[start - 1 : end - 1].tolist()
        ref[side] = [-3.0] * (end - start)
        spelled = [words.decode([t]).strip() for t in whole[start:end]]
        changed[side] = [i for i, s in enumerate(spelled) if s and s in digits]
        assert changed[side]
    assert got.item() == pytest.approx(ddpo(preset, policy, ref, changed), rel=1e-4)


@torch.no_grad()
def token_logps(model: Any, ids: list[int]) -> Tensor:
    logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
