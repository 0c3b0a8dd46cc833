"""Text preference formats: every published shape in, every row accounted for, and out again without loss."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpo import cli
from mmpo.datasets.convert import convert
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.formats.hh_rlhf import write_hh_rlhf
from mmpo.datasets.formats.swift import write_swift
from mmpo.datasets.formats.trl import write_trl
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, load, load_candidates, rows
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.validate import validate
from mmpo.errors import DataError, RecipeError
from mmpo.pair import Block, Pair, Role, Span, image, text

SHARED = Path(os.environ.get("MMPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "text"
needs_shared = pytest.mark.skipif(
    not (SHARED / "llmbar_natural.json").is_file(), reason=f"no real text at {SHARED} (or MMPO_TEST_DATA)"
)
PAIRED = ("trl", "swift", "llama_factory", "hh_rlhf", "llmbar", "pandalm", "alpaca_eval")
Turn = tuple[Role, str]
Q, GOOD, BAD = "What is 2 + 2?", "It is 4.", "It is 5."


def write(path: Path, *items: Any) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return path


def said(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": role, "content": words} for role, words in turns]


def blocks(*turns: Turn) -> tuple[Block, ...]:
    return tuple(text(words, role) for role, words in turns)


def sides(pair: Pair) -> tuple[Any, ...]:
    return pair.prompt, pair.chosen, pair.rejected


def everything(pair: Pair) -> tuple[Any, ...]:
    told = (pair.label, pair.weight, pair.margin, dict(pair.scores), dict(pair.spans), dict(pair.meta))
    return (pair.id, *sides(pair), pair.group, *told)


ASKED: Turn = ("user", Q)
RIGHT: Turn = ("assistant", GOOD)
WRONG: Turn = ("assistant", BAD)
PLAIN = ((text(Q),), (text(GOOD),), (text(BAD),))
SPOKEN = (blocks(ASKED), blocks(RIGHT), blocks(WRONG))
LONG: tuple[Turn, ...] = (("system", "Be brief."), ASKED, RIGHT, ("user", "Sure?"))
GPT = {"from": "gpt", "value": GOOD}
TURNS = [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": w} for r, w in LONG]

SHAPES: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("trl", {"prompt": Q, "chosen": GOOD, "rejected": BAD}, PLAIN),
    ("trl", {"chosen": f"{Q} {GOOD}", "rejected": f"{Q} Five."}, ((text(Q),), (text(f" {GOOD}"),), (text(" Five."),))),
    ("trl", {"prompt": said(*LONG), "chosen": said(RIGHT), "rejected": said(WRONG)}, (blocks(*LONG), *SPOKEN[1:])),
    ("trl", {"chosen": said(*LONG, RIGHT), "rejected": said(*LONG, WRONG)}, (blocks(*LONG), *SPOKEN[1:])),
    ("trl", {"prompt": Q, "chosen": said(ASKED, RIGHT), "rejected": said(ASKED, WRONG)}, SPOKEN),
    ("trl", {"prompt": Q, "completion": GOOD, "label": True}, (PLAIN[0], PLAIN[1], ())),
    ("trl", {"prompt": said(ASKED), "completion": said(WRONG), "label": False}, (SPOKEN[0], (), SPOKEN[2])),
    ("swift", {"messages": said(ASKED, RIGHT), "rejected_response": BAD}, SPOKEN),
    ("swift", {"messages": said(*LONG, RIGHT), "rejected_messages": said(*LONG, WRONG)}, (blocks(*LONG), *SPOKEN[1:])),
    ("swift", {"messages": said(ASKED, WRONG), "label": False}, (SPOKEN[0], (), SPOKEN[2])),
    ("llama_factory", {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD}, PLAIN),
    ("llama_factory", {"instruction": "Add.", "input": "2, 2", "chosen": GOOD, "rejected": BAD},
     ((text("Add.\n2, 2"),), *PLAIN[1:])),
    ("llama_factory", {"instruction": "Sure?", "system": "Be brief.", "history": [[Q, GOOD]], "chosen": GOOD, "rejected": BAD},
     (blocks(*LONG), *SPOKEN[1:])),
    ("llama_factory", {"instruction": Q, "output": BAD, "kto_tag": False}, (PLAIN[0], (), PLAIN[2])),
    ("llama_factory", {"conversations": TURNS, "chosen": GPT, "rejected": GPT | {"value": BAD}},
     (blocks(*LONG), *SPOKEN[1:])),
    ("llama_factory", {"conversations": [*TURNS, GPT], "kto_tag": True}, (blocks(*LONG), SPOKEN[1], ())),
    ("llama_factory", {"messages": said(ASKED, RIGHT), "kto_tag": True}, (SPOKEN[0], SPOKEN[1], ())),
    ("hh_rlhf", {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {BAD}"}, SPOKEN),
    ("llmbar", {"input": Q, "output_1": BAD, "output_2": GOOD, "label": 2}, PLAIN),
    ("alpaca_eval", {"instruction": Q, "output_1": GOOD, "output_2": BAD, "preference": 1}, PLAIN),
    ("pandalm", {"instruction": Q, "input": "", "response1": BAD, "response2": GOOD, "annotator1": 2, "annotator2": 0,
                 "annotator3": 2}, PLAIN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "wanted"), SHAPES, ids=[f"{i}-{s[0]}" for i, s in enumerate(SHAPES)])
def test_every_published_shape(tmp_path: Path, name: str, row: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    path = write(tmp_path / "x.jsonl", row)
    if set(row) == {"chosen", "rejected"}:
        with pytest.raises(DataError, match="fits hh_rlhf and trl; set format"):
            detect(path)
    else:
        assert detect(path) == name
    (pair,), ledger = load(path, format=name)
    assert sides(pair) == wanted and ledger.used == 1 and not ledger.notes
    assert pair.label == 1 and pair.weight == 1 and pair.group


@pytest.mark.parametrize(("name", "row", "wanted"), SHAPES, ids=[f"{i}-{s[0]}" for i, s in enumerate(SHAPES)])
def test_every_shape_comes_back_from_its_own_format(tmp_path: Path, name: str, row: dict[str, Any], wanted: Any) -> None:
    path = write(tmp_path / "x.jsonl", row)
    assert convert(path, name, tmp_path / "y.json", format=name)[0] == 1
    assert [everything(p) for p in load(tmp_path / "y.json", format=name)[0]] == [
        everything(p) for p in load(path, format=name)[0]
    ]


def example(format: str) -> dict[str, Any]:
    """A row that all formats can say: one question and two answers."""
    return next(row for name, row, wanted in SHAPES if name == format and wanted in (PLAIN, SPOKEN))


@pytest.mark.parametrize(("source", "to"), itertools.permutations(PAIRED, 2))
def test_any_format_to_any_other(tmp_path: Path, source: str, to: str) -> None:
    """The words of question and answers survive every way; what is not the same is noted."""
    path, out = write(tmp_path / "x.jsonl", example(source)), tmp_path / "y.jsonl"
    count, ledger = convert(path, to, out, format=source)
    (pair,), (before,) = load(out, format=to)[0], load(path, format=source)[0]
    assert count == 1 and [b.data for side in sides(pair) for b in side] == [Q, GOOD, BAD]
    same = sides(pair) == sides(before)
    assert same != any("roles" in note for note in ledger.notes)
    lost = before.meta.keys() - pair.meta.keys() - {"position"}
    assert lost == {note.split("'")[1] for note in ledger.notes if note.startswith("meta")} - {"position"}


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@st.composite
def any_pair(draw: Any) -> Pair:
    """A pair with everything that a pair of text can carry: one turn or many, one side or two."""
    spoken = draw(st.booleans())
    if spoken:
        middle = draw(st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), WORDS), max_size=3))
        prompt = blocks(("system", draw(WORDS)), *middle, ("user", draw(WORDS)))
    else:
        prompt = (text(draw(WORDS)),)
    role: Role | None = "assistant" if spoken else None
    good, bad = draw(st.tuples(WORDS, WORDS).filter(lambda two: two[0] != two[1]))
    chosen, rejected = (text(good, role),), (text(bad, role),)
    if spoken and draw(st.booleans()):
        more = (text(draw(WORDS), "user"), text(draw(WORDS), "assistant"))
        chosen, rejected = draw(st.sampled_from([((*chosen, *more), rejected), ((*more[1:], *chosen), (*more[1:], *rejected))]))
    rest: dict[str, Any] = {"weight": draw(st.floats(0, 5)), "margin": draw(st.floats(-3, 3)), "label": draw(st.floats(0, 1))}
    rest["scores"] = draw(st.sampled_from([{}, {"chosen": 1.5, "rejected": -2.0}]))
    rest["meta"] = draw(st.dictionaries(WORDS, st.none() | st.booleans() | WORDS, max_size=2))
    rest["spans"] = draw(st.sampled_from([{}, {"chosen": (), "rejected": (Span(0, 1, 0.5),)}]))
    if draw(st.booleans()):
        chosen, rejected = draw(st.sampled_from([(chosen, ()), ((), rejected)]))
    return Pair("x", prompt, chosen, rejected, **rest)


@pytest.mark.parametrize("to", ["trl", "swift"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pair=any_pair())
def test_what_a_pair_of_text_carries_survives(tmp_path: Path, to: str, pair: Pair) -> None:
    """trl says everything; swift too, but for text without roles and for answers whose beginning would join the prompt."""
    path = tmp_path / "x.jsonl"
    try:
        {"trl": write_trl, "swift": write_swift}[to]([pair], path)
    except DataError as error:
        assert to == "swift" and "a part of the prompt" in str(error) and max(map(len, sides(pair)[1:])) > 1
        return
    (back,) = load(path, format=to, ties="soft")[0]
    assert everything(back)[5:] == everything(pair)[5:]
    if to == "trl" or pair.prompt[0].role:
        assert sides(back) == sides(pair)


TIES: dict[str, list[dict[str, Any]]] = {
    "alpaca_eval": [{"preference": 1.5}, {"preference": 0}],
    "pandalm": [{"annotator1": 0, "annotator2": 0}],
    "trl": [{"chosen_probability": 0.5}],
}


@pytest.mark.parametrize("name", TIES)
def test_ties_follow_the_policy(tmp_path: Path, name: str) -> None:
    row = example(name)
    path = write(tmp_path / "x.jsonl", row, *[row | tie for tie in TIES[name]])
    pairs, ledger = load(path)
    assert len(pairs) == 1 and ledger.skipped == {"tie": len(TIES[name])}
    kept, ledger = load(path, ties="soft")
    assert [p.label for p in kept[1:]] == [0.5] * len(TIES[name]) and ledger.used == len(kept)
    first = {"alpaca_eval": GOOD, "pandalm": BAD, "trl": GOOD}[name]  # a tie keeps the order of the file
    assert {p.chosen[0].data for p in kept[1:]} == {first}
    convert(path, name, tmp_path / "y.jsonl", ties="soft")
    assert [p.label for p in load(tmp_path / "y.jsonl", ties="soft")[0]] == [p.label for p in kept]


def test_soft_preferences(tmp_path: Path) -> None:
    """The preference less 1 is the probability of the second output, as in length-controlled AlpacaEval's annotations."""
    row = example("alpaca_eval")
    path = write(tmp_path / "x.jsonl", *[row | {"preference": p} for p in (1.25, 1.75, None, math.nan, 3)])
    pairs, ledger = load(path, on_bad="skip")
    assert [(p.label, p.chosen[0].data) for p in pairs] == [(0.75, GOOD), (0.75, BAD)]
    assert ledger.skipped == {"no preference": 2} and ledger.refused == {"bad preference": 1}
    assert ledger.notes == {"soft labels": 2}
    convert(path, "alpaca_eval", tmp_path / "y.jsonl", on_bad="skip")
    assert [json.loads(line)["preference"] for line in (tmp_path / "y.jsonl").read_text().splitlines()] == [1.25, 1.75]


SPOILT: list[tuple[str, dict[str, Any], str]] = [
    ("trl", {"chosen": GOOD, "rejected": None}, "missing rejected"),
    ("trl", {"chosen": "abc", "rejected": "xyz"}, "no common prompt"),
    ("trl", {"prompt": " ", "chosen": GOOD, "rejected": BAD}, "missing prompt"),
    ("trl", {"prompt": Q, "chosen": 4, "rejected": BAD}, "wrong type of chosen"),
    ("trl", {"prompt": Q, "chosen": "\ud800", "rejected": BAD}, "not Unicode"),
    ("trl", {"prompt": Q, "chosen": GOOD, "rejected": BAD, "videos": ["a.mp4"]}, "row with media"),
    ("trl", {"prompt": Q, "completion": GOOD, "label": None}, "missing label"),
    ("trl", {"prompt": "else", "chosen": said(ASKED, RIGHT), "rejected": said(ASKED, WRONG)}, "prompt of another conversation"),
    ("trl", {"prompt": said(ASKED), "chosen": said(("user", "?")), "rejected": said(WRONG)}, "answer by somebody else"),
    ("trl", {"prompt": said(ASKED), "chosen": [{"role": "alien", "content": "x"}], "rejected": said(WRONG)}, "unknown role"),
    ("trl", {"prompt": said(ASKED), "chosen": [said(RIGHT)[0] | {"tool_calls": [1]}], "rejected": said(WRONG)},
     "message with more than text"),
    ("trl", {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": said(RIGHT), "rejected": said(WRONG)},
     "placeholder count"),
    ("trl", {"prompt": Q, "chosen": GOOD, "rejected": BAD, "spans": {"chosen": [[3, 1, 0.5]]}}, "bad spans"),
    ("trl", {"prompt": Q, "chosen": GOOD, "rejected": BAD, "chosen_probability": 1.5}, "bad chosen_probability"),
    ("trl", {"chosen": said(ASKED, RIGHT, ("user", "a"), RIGHT), "rejected": said(ASKED, RIGHT, ("user", "b"), RIGHT)},
     "answer by somebody else"),
    ("swift", {"messages": said(RIGHT), "rejected_response": BAD}, "no answer"),
    ("swift", {"messages": said(ASKED, RIGHT)}, "missing rejected_response"),
    ("llama_factory", {"instruction": Q, "chosen": GOOD, "rejected": BAD, "history": ["x"]}, "bad history"),
    ("llama_factory", {"instruction": Q, "chosen": GOOD, "rejected": BAD, "tools": "[]"}, "row with tools"),
    ("hh_rlhf", {"chosen": "Hello", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "no transcript"),
    ("hh_rlhf", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "no common prompt"),
    ("llmbar", {"input": Q, "output_1": GOOD, "output_2": BAD, "label": 0}, "bad label"),
    ("pandalm", {"instruction": Q, "response1": GOOD, "response2": BAD, "annotator1": 1, "annotator2": 3, "annotator3": 1},
     "bad annotator2"),
    ("pandalm", {"instruction": Q, "response1": True, "response2": BAD, "annotator1": 1, "annotator2": 1, "annotator3": 1},
     "wrong type of response1"),
    ("ultrafeedback", {"instruction": Q, "completions": ["x"]}, "bad completions"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "reason"), SPOILT, ids=[f"{i}-{s[2]}" for i, s in enumerate(SPOILT)])
def test_spoilt_rows_are_refused_for_a_reason(tmp_path: Path, name: str, row: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "x.jsonl", row)
    assert validate(path, name).ledger.refused == {reason: 1}
    with pytest.raises(DataError, match=r"x.jsonl:line 1 field '.*': expected .*, found "):
        load(path, format=name)


def test_rows_that_are_no_pairs_are_skipped(tmp_path: Path) -> None:
    row = example("trl")
    path = write(tmp_path / "x.jsonl", row, row | {"rejected": GOOD}, row | {"chosen": "  "}, row | {"source": "web"})
    pairs, ledger = load(path)
    assert len(pairs) == 2 and ledger.skipped == {"identical sides": 1, "empty answer": 1} and ledger.rows == 4
    assert ledger.notes == {"column 'source' left out": 1, "repeated pairs (kept)": 1}
    same = {"chosen": said(ASKED, RIGHT), "rejected": said(ASKED, RIGHT)}
    assert load(write(tmp_path / "y.jsonl", same), format="trl")[1].skipped == {"identical sides": 1}
    votes = example("pandalm") | {"annotator1": 0, "annotator2": 1, "annotator3": 2}
    assert load(write(tmp_path / "z.jsonl", votes))[1].skipped == {"no majority": 1}


def test_sides_that_part_early_keep_their_turns(tmp_path: Path) -> None:
    chosen = f"\n\nHuman: {Q}\n\nAssistant: Four.\n\nHuman: Sure?\n\nAssistant: Yes."
    rejected = f"\n\nHuman: {Q}\n\nAssistant: {BAD}"
    path = write(tmp_path / "x.jsonl", {"chosen": chosen, "rejected": rejected})
    (pair,), _ = load(path, format="hh_rlhf")
    assert pair.prompt == blocks(ASKED) and [b.role for b in pair.chosen] == ["assistant", "user", "assistant"]
    for to in ("trl", "swift", "hh_rlhf"):
        convert(path, to, tmp_path / "y.jsonl", format="hh_rlhf")
        assert load(tmp_path / "y.jsonl", format=to)[0] == [pair]
    assert json.loads((tmp_path / "y.jsonl").read_text()) == {"chosen": chosen, "rejected": rejected}
    with pytest.raises(DataError, match="answers are one turn each"):
        convert(path, "llama_factory", tmp_path / "z.jsonl", format="hh_rlhf")
    count, ledger = convert(path, "llama_factory", tmp_path / "z.jsonl", format="hh_rlhf", on_bad="skip")
    assert count == 0 and sum(n for note, n in ledger.notes.items() if note.startswith("pairs not written")) == 1


def test_what_a_format_cannot_say_is_refused_or_counted(tmp_path: Path) -> None:
    row = example("trl")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("weight", {"weight": 2}),
        ("margin", {"margin": 1}),
        ("spans", {"spans": {"chosen": [[0, 2, 0.0]]}}),
    ]
    cases += [("label", {"chosen_probability": 0.8})]
    for (name, more), to in itertools.product(cases, ("llmbar", "hh_rlhf", "pandalm")):
        path = write(tmp_path / "x.jsonl", row | more)
        message = "votes are for one side" if (to, name) == ("pandalm", "label") else f"{to} cannot say {name}"
        with pytest.raises(DataError, match=message):
            convert(path, to, tmp_path / "y.jsonl", ties="soft")
    single = write(tmp_path / "x.jsonl", {"prompt": Q, "completion": GOOD, "label": True})
    with pytest.raises(DataError, match="cannot say unpaired"):
        convert(single, "alpaca_eval", tmp_path / "y.jsonl")
    for to in ("llmbar", "alpaca_eval", "pandalm"):
        path = write(tmp_path / "x.jsonl", {"prompt": said(*LONG), "chosen": said(RIGHT), "rejected": said(WRONG)})
        with pytest.raises(DataError, match="holds one prompt and its answers, found system, user"):
            convert(path, to, tmp_path / "y.jsonl")
    with pytest.raises(DataError, match="Human and Assistant, found system"):
        convert(path, "hh_rlhf", tmp_path / "y.jsonl")
    scored = write(tmp_path / "x.jsonl", row | {"score_chosen": 1, "score_rejected": 0, "meta": {"from": "web"}})
    _, ledger = convert(scored, "llmbar", tmp_path / "y.jsonl")
    assert ledger.notes == {
        "scores left out: no place for it in llmbar": 1,
        "meta 'from' left out: no place for it in llmbar": 1,
    }
    with pytest.raises(DataError, match="holds image, text"):
        write_hh_rlhf([Pair("i", (text(Q),), (image(b"1"),), (image(b"2"),))], tmp_path / "y.jsonl")
    with pytest.raises(DataError, match="'Human:' or 'Assistant:'"):
        write_hh_rlhf([Pair("h", (text("a\n\nHuman: b"),), (text("c"),), (text("d"),))], tmp_path / "y.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {"x.jsonl", "y.jsonl"}  # nothing half-written


def completion(response: str, overall: Any, **ratings: Any) -> dict[str, Any]:
    annotations = {aspect: {"Rating": str(rating), "Rationale": "because"} for aspect, rating in ratings.items()}
    return {"model": f"m-{response}", "response": response, "overall_score": overall, "annotations": annotations}


def test_ultrafeedback_by_aspect(tmp_path: Path) -> None:
    """The overall score and helpfulness order the answers differently; N/A is no score."""
    answers = [completion("a", 9, helpfulness=2, honesty=5), completion("b", 5, helpfulness=5, honesty=4)]
    answers += [completion("c", 7, helpfulness="N/A"), completion("d", None, honesty=1)]
    path = write(tmp_path / "x.jsonl", {"source": "s", "instruction": Q, "models": [], "completions": answers})
    assert detect(path) == "ultrafeedback"
    (pair,), ledger = load(path)
    assert (pair.chosen[0].data, pair.rejected[0].data) == ("a", "d") and pair.scores == {"chosen": 9.0, "rejected": 1.0}
    assert pair.meta["answers"]["chosen"] == {
        "model": "m-a",
        "aspects": {"helpfulness": 2.0, "honesty": 5.0},
        "overall_score": 9.0,
    }
    assert ledger.notes["rationales of ratings left out"] == 6 and ledger.notes["column 'source' left out"] == 1
    (pair,), ledger = load(path, aspect="helpfulness")
    assert (pair.chosen[0].data, pair.rejected[0].data) == ("b", "a")
    assert ledger.notes["completions without a score or text left out"] == 2
    assert len(load(path, strategy="all")[0]) == 6
    assert load(path, aspect="wit")[1].skipped == {"no completion with a rating of wit": 1}
    with pytest.raises(RecipeError, match="trl has no scores by aspect"):
        load(write(tmp_path / "t.jsonl", example("trl")), aspect="helpfulness")


def test_candidates_of_text_come_back(tmp_path: Path) -> None:
    answers = [completion("a", 9.5, helpfulness=2.5), completion("b", 5)]
    path = write(tmp_path / "x.jsonl", {"instruction": Q, "completions": answers}, {"prompt": "?", "completions": answers})
    convert(path, "ultrafeedback", tmp_path / "y.jsonl")
    before, after = (list(rows(p, Ledger(), format="ultrafeedback")) for p in (path, tmp_path / "y.jsonl"))
    assert before == after and len(before) == 4
    _, ledger = convert(path, "candidates", tmp_path / "c.parquet")
    plain = [Candidate(c.prompt, c.block, c.score) for c in before]
    groups, _ = load_candidates(tmp_path / "c.parquet")
    assert [c for g in groups.values() for c in g] == plain and ledger.notes["aspects left out: candidates have one score"] == 4
    spoken = [Candidate(blocks(*LONG), text(word, "assistant"), 1.0, i) for i, word in enumerate(("x", "y"))]
    assert write_candidates(spoken, tmp_path / "s.parquet") == 2 and detect(tmp_path / "s.parquet") == "candidates"
    assert list(rows(tmp_path / "s.parquet", Ledger())) == spoken
    for wrong in ([plain[0], Candidate(plain[0].prompt, image(b"1"))], [plain[0], spoken[0]]):
        with pytest.raises(DataError, match="candidate 1: expected a prompt of one text and one text"):
            write_candidates(wrong, tmp_path / "w.parquet")
    _, ledger = load_candidates(write(tmp_path / "b.jsonl", {"prompt": "p", "response": " ", "score": 1}))
    assert ledger.skipped == {"empty answer": 1}
    with pytest.raises(DataError, match="do not say what one answer is worth"):
        convert(write(tmp_path / "t.jsonl", example("trl")), "ultrafeedback", tmp_path / "u.jsonl")


def test_parquet_csv_gzip_and_lists(tmp_path: Path) -> None:
    """The same pair from all kinds of files; parquet adds keys without a value to messages."""
    message = {"role": "assistant", "content": GOOD, "name": None, "tool_calls": None}
    table = {"prompt": said(ASKED), "chosen": [message], "rejected": [message | {"content": BAD}]}
    pq.write_table(pa.Table.from_pylist([table]), tmp_path / "x.parquet")
    assert sides(load(tmp_path / "x.parquet")[0][0]) == SPOKEN
    (tmp_path / "x.csv").write_text(f"prompt,completion,label\n{Q},{GOOD},true\n")
    assert sides(load(tmp_path / "x.csv")[0][0]) == (PLAIN[0], PLAIN[1], ())
    parts = [{"role": "user", "content": [{"type": "text", "text": Q[:4]}, {"type": "text", "text": Q[4:]}]}]
    write(tmp_path / "p.jsonl", {"prompt": parts, "chosen": said(RIGHT), "rejected": said(WRONG)})
    assert sides(load(tmp_path / "p.jsonl")[0][0]) == SPOKEN
    pair = Pair("x", *PLAIN)
    for name in ("a.jsonl", "a.jsonl.gz", "a.json"):
        assert write_trl([pair] * 2, tmp_path / name) == 2
        assert [sides(p) for p in load(tmp_path / name)[0]] == [PLAIN] * 2
    assert len(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()) == 2
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2
    with pytest.raises(RecipeError, match=r"a name that ends in .jsonl, .jsonl.gz or .json"):
        write_swift([pair], tmp_path / "a.parquet")
    assert write_trl([], tmp_path / "empty.json") == 0 and json.loads((tmp_path / "empty.json").read_text()) == []


def test_an_ambiguous_table_names_both_formats(tmp_path: Path) -> None:
    row = {"prompt": Q, "conversations": TURNS, "chosen": GOOD, "rejected": BAD}
    with pytest.raises(DataError, match="fits llama_factory and trl"):
        detect(write(tmp_path / "x.jsonl", row))


def test_words_cut_by_an_implicit_prompt_are_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"chosen": "The sky is blue.", "rejected": "The sky is black."})
    (pair,), ledger = load(path, format="trl")
    assert pair.caption == "The sky is bl" and ledger.notes == {"prompt that ends inside a word (kept, as in TRL)": 1}


def test_roles_make_other_blocks_and_none_leaves_digests_as_they_were() -> None:
    assert text("a").digest == hashlib.sha256(b"text\0a").hexdigest()
    digests = {text("a", role).digest for role in (None, "system", "user", "assistant", "tool")}  # type: ignore[arg-type]
    assert len(digests) == 5


def test_convert_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    path, out = write(tmp_path / "x.jsonl", example("llama_factory")), tmp_path / "y.jsonl"
    assert cli.main(["data", "convert", str(path), "--to", "swift", "--out", str(out)]) == 0
    assert "1 rows of format swift\n1 rows = 1 used" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"messages": said(ASKED, RIGHT), "rejected_response": BAD}
    assert cli.main(["data", "convert", str(out), "--from", "swift", "--to", "llama_factory", "--out", str(path)]) == 0
    assert json.loads(path.read_text())["conversations"] == [{"from": "human", "value": Q}]


# PandaLM's file has responses that are true or false instead of text, and one blank instruction.
PANDALM = {"missing prompt": 1, "wrong type of response1": 4, "wrong type of response2": 2}
REAL: list[Any] = [
    ("llmbar_natural.json", "llmbar", 100, {}, {}),
    ("pandalm_first500.json", "pandalm", 485, {"empty answer": 8}, PANDALM),
    ("alpaca_eval_alpaca-7b.json", "alpaca_eval", 789, {"identical sides": 16}, {}),
    ("alpaca_eval_falcon-7b-instruct.json", "alpaca_eval", 801, {"identical sides": 4}, {}),
    ("alpaca_eval_vicuna-13b.json", "alpaca_eval", 803, {"identical sides": 2}, {}),
    pytest.param("hh_rlhf_harmless_test.jsonl.gz", "hh_rlhf", 2308, {"empty answer": 4}, {}, marks=pytest.mark.slow),
]


def as_rows(path: Path) -> Sequence[dict[str, Any]]:
    raw = path.read_bytes()
    if path.suffix == ".json":
        return json.loads(raw)
    return [json.loads(line) for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()]


@needs_shared
@pytest.mark.parametrize(("file", "name", "used", "skipped", "refused"), REAL)
def test_real_files_come_back_row_for_row(
    tmp_path: Path, file: str, name: str, used: int, skipped: dict[str, int], refused: dict[str, int]
) -> None:
    """Every used row is written again as it was; through trl, too, which keeps what it has no column for."""
    source = SHARED / file
    options: dict[str, Any] = {"ties": "soft", "on_bad": "skip"}
    pairs, ledger = load(source, format=name, **options)
    assert (len(pairs), ledger.skipped, ledger.refused) == (used, skipped, refused)
    assert convert(source, "trl", tmp_path / "t.jsonl", format=name, **options)[0] == used
    assert convert(tmp_path / "t.jsonl", name, tmp_path / "back.jsonl", format="trl", **options)[0] == used
    wanted = {json.dumps(row, sort_keys=True) for row in as_rows(source)}
    assert all(json.dumps(row, sort_keys=True) in wanted for row in as_rows(tmp_path / "back.jsonl"))
