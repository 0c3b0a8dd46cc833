"""Formats of pairs about pictures: every published shape in, pictures at their places, and out again without loss."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmpo import media
from mmpo.datasets.convert import convert
from mmpo.datasets.formats.llava import write_llava
from mmpo.datasets.formats.mmpo import write_mmpo
from mmpo.datasets.formats.swift import write_swift
from mmpo.datasets.formats.trl import write_trl
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, load, rows
from mmpo.datasets.placeholders import LLAVA, MIA, PLAIN, Tag, blank, filled, tagged, turns
from mmpo.datasets.validate import validate
from mmpo.errors import DataError
from mmpo.pair import Block, Branch, Pair, Role, image, text

NAMES = ("a.png", "b.jpg", "c.webp")
PHOTOS = [np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8) for i in range(3)]
FILES = [media.encode(PHOTOS[0]), media.encode(PHOTOS[1], "JPEG", quality=95), media.encode(PHOTOS[2], "WEBP")]
Q, GOOD, BAD = "What is this?", "A cat.", "A dog."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset's folder with three pictures in img/."""
    (tmp_path / "img").mkdir()
    for name, data in zip(NAMES, FILES, strict=True):
        (tmp_path / "img" / name).write_bytes(data)
    return tmp_path


def seen(i: int, role: Role | None = None) -> Block:
    return Block("image", FILES[i], f"img/{NAMES[i]}", role)


def write(path: Path, *items: Any) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    return path


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": words} for role, words in turns]


def gpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": words} for who, words in turns]


def content(pair: Pair) -> Any:
    """All that is to survive: blocks by kind, content and role, wherever their file is."""
    sides: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    for name, branch in pair.branches.items():
        sides |= {f"{name}/prompt": branch.prompt, f"{name}/response": branch.response}
    told = (pair.id, pair.label, pair.weight, pair.margin, dict(pair.scores), dict(pair.spans), dict(pair.meta))
    return {name: [b.digest for b in side] for name, side in sides.items()}, told


A, B = "img/a.png", "img/b.jpg"
USER, YES, NO = ("user", Q), ("assistant", GOOD), ("assistant", BAD)
PARTS = [{"type": "image"}, {"type": "text", "text": Q}]
ONE = ((seen(0), text(Q)), (text(GOOD),), (text(BAD),))
SPOKEN = ((seen(0, "user"), text(Q, "user")), (text(GOOD, "assistant"),), (text(BAD, "assistant"),))
TWO = ((seen(0), seen(1), text("In Image2, what?")), *ONE[1:])
TWICE = (text("Image1:"), seen(0), text("Image2:"), seen(1), text("In Image2, what?"))
LONG = [("human", f"<image>\n{Q}"), ("gpt", "A pet."), ("human", "Which?")]
LONG_BLOCKS = (*SPOKEN[0], text("A pet.", "assistant"), text("Which?", "user"))
PAIR = {"chosen": GOOD, "rejected": BAD}
LLAVA_ONE = {"id": "7", "image": A, "conversations": gpt(*LONG, ("gpt", GOOD))}
RLHF = {"image": A, "text": json.dumps({"question": Q, **PAIR}), "ds_name": "RLHF-V", "idx": 3}

SHAPES: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("trl", {"images": [A], "prompt": said(("user", PARTS)), "chosen": said(YES), "rejected": said(NO)}, SPOKEN),
    ("trl", {"image": A, "prompt": said(USER), "chosen": said(YES), "rejected": said(NO)}, SPOKEN),
    ("trl", {"images": [A], "chosen": said(USER, YES), "rejected": said(USER, NO)}, SPOKEN),
    ("trl", {"images": [A], "chosen": said(("user", PARTS), YES), "rejected": said(("user", PARTS), NO)}, SPOKEN),
    ("trl", {"images": [A, B], "prompt": "<image><image>In Image2, what?", **PAIR}, TWO),
    ("trl", {"images": [A, B], "prompt": "In Image2, what?", **PAIR}, TWO),
    ("trl", {"images": [A], "prompt": "See <image> here", **PAIR}, ((text("See "), seen(0), text(" here")), *ONE[1:])),
    ("trl", {"images": [], "prompt": Q, **PAIR}, ((text(Q),), *ONE[1:])),
    ("trl", {"images": [A], "prompt": said(USER), "completion": said(YES), "label": True}, (*SPOKEN[:2], ())),
    ("trl", {"images": [A], "prompt": said(("system", "Hi"), USER), "chosen": said(YES), "rejected": said(NO)},
     ((text("Hi", "system"), *SPOKEN[0]), *SPOKEN[1:])),
    ("swift", {"images": [A], "messages": said(("user", f"<image>{Q}"), YES), "rejected_response": BAD}, SPOKEN),
    ("swift", {"messages": said(USER, YES), "rejected_response": BAD}, ((text(Q, "user"),), *SPOKEN[1:])),
    ("swift", {"images": A, "messages": said(("user", f"<image>{Q}"), NO), "label": False}, (SPOKEN[0], (), SPOKEN[2])),
    ("llama_factory", {"images": [A], "conversations": gpt(("human", f"<image>{Q}")), "chosen": gpt(("gpt", GOOD))[0],
                       "rejected": gpt(("gpt", BAD))[0]}, SPOKEN),
    ("llama_factory", {"images": [A], "instruction": f"<image>{Q}", "input": "", **PAIR}, ONE),
    ("llama_factory", {"images": [A], "messages": said(("user", f"<image>{Q}"), YES), "kto_tag": True}, (*SPOKEN[:2], ())),
    ("mia", {"id": 1, "image": [A], "prompt": f"<image-placeholder>\n{Q}", **PAIR, "gt": GOOD}, ONE),
    ("mia", {"id": "x", "image": A, "prompt": f"<image>\n{Q}", **PAIR, "gt": "cat"}, ONE),
    ("mia", {"id": "x", "image": [A, B], "prompt": "Image1:<image>\nImage2:<image>\nIn Image2, what?", **PAIR, "gt": GOOD},
     (TWICE, *ONE[1:])),
    ("mia", {"image": [], "prompt": Q, **PAIR, "gt": GOOD}, ((text(Q),), *ONE[1:])),
    ("rlhf_v", RLHF, ONE),
    ("rlhf_v", RLHF | {"text": json.dumps([Q, GOOD, BAD])}, ONE),
    ("rlaif_v", {"ds_name": "RLAIF-V", "image": A, "question": Q, **PAIR, "idx": 5}, ONE),
    ("rlaif_v", {"image_path": A, "question": f"<image>\n{Q}", **PAIR}, ONE),
    ("mdpo", {"img_path": A, "prompt": Q, **PAIR}, ONE),
    ("llava", LLAVA_ONE, (LONG_BLOCKS, SPOKEN[1], ())),
    ("llava", {"conversations": gpt(("human", Q), ("gpt", GOOD))}, ((text(Q, "user"),), SPOKEN[1], ())),
    ("llava", {"image": A, "conversations": gpt(("human", f"{Q}\n<image>"), ("gpt", GOOD)),
               "rejected_conversations": gpt(("human", f"{Q}\n<image>"), ("gpt", BAD))},
     ((SPOKEN[0][1], SPOKEN[0][0]), *SPOKEN[1:])),
]  # fmt: skip
IDS = [f"{i}-{shape[0]}" for i, shape in enumerate(SHAPES)]
INSIDE = ("rlhf_v", "rlaif_v")


@pytest.mark.parametrize(("name", "row", "wanted"), SHAPES, ids=IDS)
def test_every_published_shape(folder: Path, name: str, row: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    path = write(folder / "x.jsonl", row)
    assert detect(path) == name
    (pair,), ledger = load(path, format=name)
    assert (pair.prompt, pair.chosen, pair.rejected) == wanted
    assert ledger.used == 1 and not ledger.remarks and not pair.branches


@pytest.mark.parametrize(("name", "row", "wanted"), SHAPES, ids=IDS)
def test_every_shape_comes_back_from_its_own_format(folder: Path, name: str, row: dict[str, Any], wanted: Any) -> None:
    """Also after the folder has moved: pictures are found beside the new file."""
    path, out = write(folder / "x.jsonl", row), folder / "out"
    out.mkdir()
    assert convert(path, name, out / "y.json", format=name)[0] == 1
    before = [content(p) for p in load(path, format=name)[0]]
    out.rename(folder / "moved")
    after, ledger = load(folder / "moved" / "y.json", format=name)
    if name in ("mia", "llava") and "id" not in row:
        assert after[0].meta["id"] == before[0][1][0]  # a row there needs an id
        after = [dataclasses.replace(p, meta={}) for p in after]
    assert [content(p) for p in after] == before and not ledger.remarks


@pytest.mark.parametrize(
    ("name", "row", "wanted"), [s for s in SHAPES if s[0] in INSIDE], ids=[i for i in IDS if i[3:] in INSIDE]
)
def test_pictures_inside_parquet(folder: Path, name: str, row: dict[str, Any], wanted: Any) -> None:
    path = write(folder / "x.jsonl", row)
    convert(path, name, folder / "y.parquet")
    assert not (folder / "media").exists() and detect(folder / "y.parquet") == name
    (pair,), _ = load(folder / "y.parquet")
    assert (pair.prompt, pair.chosen, pair.rejected) == wanted
    bare = pq.read_table(folder / "y.parquet").to_pylist()
    for item in bare:
        item["image"] = item["image"]["bytes"]
    pq.write_table(pa.Table.from_pylist(bare), folder / "z.parquet")
    assert load(folder / "z.parquet")[0][0].prompt[0].data == FILES[0]


PAIRED = ["trl", "swift", "llama_factory", "mia", "rlhf_v", "rlaif_v", "mdpo", "llava"]


@pytest.mark.parametrize(("source", "to"), list(itertools.permutations(PAIRED, 2)))
def test_any_format_to_any_other(folder: Path, source: str, to: str) -> None:
    """One question about one picture with two answers is the same everywhere, roles aside, and what differs is noted."""
    row = next((r for n, r, w in SHAPES if n == source and w in (ONE, SPOKEN)), None)
    if source == "llava":
        turns = [gpt(("human", f"<image>\n{Q}"), ("gpt", a)) for a in (GOOD, BAD)]
        row = {"image": A, "conversations": turns[0], "rejected_conversations": turns[1]}
    path = write(folder / "x.jsonl", row)
    count, ledger = convert(path, to, folder / "y.jsonl", format=source)
    (pair,), (before,) = load(folder / "y.jsonl", format=to)[0], load(path, format=source)[0]
    assert count == 1
    assert [(b.kind, b.data) for s in (pair.prompt, pair.chosen, pair.rejected) for b in s] == [
        ("image", FILES[0]), ("text", Q), ("text", GOOD), ("text", BAD)]  # fmt: skip
    assert (content(pair)[0] == content(before)[0]) != any("roles" in note for note in ledger.notes)


RETRIEVED = {"image": A, "retrieved_image": B, "chosen": said(("user", f"<image>\n{Q}"), YES),
             "rejected": said(("user", f"<image>\n{Q}"), NO)}  # fmt: skip


def test_realign_has_the_retrieved_condition(folder: Path) -> None:
    path = write(folder / "x.jsonl", RETRIEVED)
    assert detect(path) == "realign"
    (pair,), _ = load(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == SPOKEN
    assert pair.branches == {"chosen@retrieved": Branch((seen(1, "user"), text(Q, "user")), SPOKEN[1])}
    convert(path, "realign", folder / "y.json")
    assert content(load(folder / "y.json")[0][0]) == content(pair)
    with pytest.raises(DataError, match="swift has no branches but"):
        convert(path, "swift", folder / "y.jsonl")
    with pytest.raises(DataError, match="trl cannot say branches"):
        convert(path, "trl", folder / "y.jsonl")
    with pytest.raises(DataError, match="one image, and another in chosen@retrieved"):
        convert(write(folder / "m.jsonl", {"img_path": A, "prompt": Q, **PAIR}), "realign", folder / "y.jsonl")


@pytest.mark.parametrize("more", [{}, {"rejected_response": BAD}, {"rejected_images": [A], "rejected_response": BAD}], ids=str)
def test_swift_shows_the_rejected_side_other_pictures(folder: Path, more: dict[str, Any]) -> None:
    row = {"messages": said(("user", f"<image>{Q}"), YES), "images": [A], "rejected_images": [B]} | more
    path = write(folder / "x.jsonl", row)
    assert detect(path) == "swift"
    (pair,), _ = load(path)
    other = (seen(1, "user"), text(Q, "user"))
    if row["rejected_images"] == [A]:
        assert (pair.prompt, pair.chosen, pair.rejected) == SPOKEN and not pair.branches
    else:
        name, answered = ("rejected@other", SPOKEN[2]) if more else ("chosen@other", SPOKEN[1])
        assert (pair.prompt, pair.chosen, pair.rejected) == (*SPOKEN[:2], ())
        assert pair.branches == {name: Branch(other, answered)}
    convert(path, "swift", folder / "y.jsonl")
    assert content(load(folder / "y.jsonl")[0][0]) == content(pair)


def test_vlfeedback_becomes_candidates(folder: Path) -> None:
    """Lists of objects and objects of lists are the same; the mean of the ratings or one aspect is the score."""
    ratings = [{"Helpfulness": {"Rating": h, "Rationale": "because"}, "Visual Faithfulness": {"Rating": v}}
               for h, v in (("5", "1"), ("3", "4"), ("1", "N/A"))]  # fmt: skip
    answers = [{"model": f"m{i}", "response": f"r{i}", "annotations": r} for i, r in enumerate(ratings)]
    lists = {key: [a[key] for a in answers] for key in answers[0]}
    row = {"id": "q", "prompt": Q, "image": A, "models": ["m0", "m1", "m2"], "completions": answers}
    path = write(folder / "x.jsonl", row, row | {"id": "p", "prompt": "Why?", "completions": lists})
    assert detect(path) == "vlfeedback"
    found = list(rows(path, Ledger()))
    assert [c.score for c in found] == [3, 3.5, 1] * 2 and found[0].prompt == ONE[0] and len(found) == 6
    pairs, _ = load(path)
    assert [(p.chosen[0].data, p.rejected[0].data) for p in pairs] == [("r1", "r2")] * 2
    assert load(path, aspect="Helpfulness")[0][0].chosen[0].data == "r0"
    convert(path, "vlfeedback", folder / "y.jsonl")
    after = list(rows(folder / "y.jsonl", Ledger()))
    assert [(c.prompt[0].digest, c.prompt[1:], c.block, c.score, c.meta) for c in after] == [
        (c.prompt[0].digest, c.prompt[1:], c.block, c.score, c.meta) for c in found
    ]
    bad = write(folder / "b.jsonl", row | {"completions": lists | {"model": ["m0"]}})
    assert validate(bad).ledger.refused == {"bad completions": 1}
    convert(path, "mmpo", folder / "d")
    assert [content(p) for p in load(folder / "d")[0]] == [content(p) for p in pairs]


@pytest.mark.parametrize("name", ["mia", "llava"])
def test_ids_of_pictures_may_repeat(folder: Path, name: str) -> None:
    """LLaVA's ids are those of the pictures, about which there are several questions."""
    row = next(row for n, row, _ in SHAPES if n == name)
    asked = {"prompt": "<image>\nWhy?"} if name == "mia" else {"conversations": gpt(("human", "<image>\nWhy?"), ("gpt", GOOD))}
    pairs, ledger = load(write(folder / "x.jsonl", row, row | asked))
    assert ledger.used == 2 and pairs[0].meta["id"] == pairs[1].meta["id"] == row["id"] and pairs[0].id != pairs[1].id
    assert pairs[0].prompt[0] is pairs[1].prompt[0]  # one picture in memory


def test_columns_of_reference_models_are_counted(folder: Path) -> None:
    logps = {f"ref_{side}_{what}": [0.5] for side in ("win", "rej") for what in ("logp", "avg_logp", "per_token_logp")}
    left = {"log-probabilities of another reference model left out": 1}
    assert load(write(folder / "x.jsonl", RLHF | logps))[1].notes == left
    row = {"image": A, "question": Q, **PAIR, "logps": json.dumps([[1], 2]), "note": "x"}
    assert load(write(folder / "y.jsonl", row))[1].notes == left | {"column 'note' left out": 1}


WORDS = st.text("ab \n<>:", min_size=1, max_size=8)
SEQUENCE = st.lists(st.none() | WORDS, min_size=1, max_size=6).filter(
    lambda items: not any(a is not None and b is not None for a, b in itertools.pairwise(items))
)


@given(items=SEQUENCE, tag=st.sampled_from([PLAIN, LLAVA, MIA]), role=st.sampled_from([None, "user"]))
def test_tags_and_blanks_are_inverse(items: list[str | None], tag: Tag, role: Role | None) -> None:
    blocks = tuple(blank(role) if item is None else text(item, role) for item in items)
    written = tag.words(blocks, "id")
    assert written.count(tag.written) == items.count(None)
    assert tag.blanks((text(written, role),)) == blocks


def test_turns_and_places() -> None:
    mixed = (image(FILES[0]), text("a"), text("b", "user"), text("c", "user"), blank("assistant"), text("d", "assistant"))
    assert [len(turn) for turn in turns(mixed)] == [2, 1, 1, 2]
    shown = filled((blank("user"), text("x", "user"), blank("user")), [seen(0, "user"), seen(1, "user")])
    assert shown == (seen(0, "user"), text("x", "user"), seen(1, "user"))
    with pytest.raises(DataError, match="its text holds <image>"):
        tagged(Pair("p", (seen(0), text("<image> is a tag")), (text("a"),)), PLAIN)
    with pytest.raises(DataError, match="two texts in a row"):
        tagged(Pair("p", (seen(0), text("a"), text("b")), (text("a"),)), PLAIN)


SPOILT: list[tuple[str, dict[str, Any], str, str]] = [
    ("trl", {"images": [A], "prompt": "<image><image>", **PAIR}, "images", "placeholder count"),
    ("trl", {"images": [], "prompt": "<image>?", **PAIR}, "images", "placeholder count"),
    ("trl", {"images": [A, B], "prompt": said(("user", PARTS)), "chosen": said(YES), "rejected": said(NO)}, "images",
     "placeholder count"),
    ("trl", {"images": [A, "img/none.png"], "prompt": Q, **PAIR}, "images[1]", "missing file"),
    ("trl", {"images": [3], "prompt": Q, **PAIR}, "images[0]", "wrong type of images"),
    ("swift", {"messages": said(("user", f"<image>{Q}"), YES), "rejected_response": BAD}, "images", "placeholder count"),
    ("swift", {"images": [A], "messages": said(USER, YES), "rejected_response": BAD}, "images", "placeholder count"),
    ("swift", {"images": [A], "rejected_images": [A, B], "messages": said(("user", f"<image>{Q}"), YES)}, "rejected_images",
     "placeholder count"),
    ("llama_factory", {"images": [A, B], "instruction": f"<image>{Q}", "input": "", **PAIR}, "images", "placeholder count"),
    ("mia", {"image": [A, B], "prompt": f"<image>\n{Q}", **PAIR, "gt": GOOD}, "image", "placeholder count"),
    ("mia", {"image": ["../x.png"], "prompt": f"<image>\n{Q}", **PAIR, "gt": GOOD}, "image[0]", "forbidden path"),
    ("rlhf_v", RLHF | {"image": None}, "image", "missing image"),
    ("rlhf_v", RLHF | {"text": "no JSON"}, "text", "bad text"),
    ("rlhf_v", RLHF | {"text": json.dumps({"question": Q, "chosen": GOOD})}, "rejected", "missing rejected"),
    ("rlaif_v", {"image": "https://x/y.png", "question": Q, **PAIR}, "image", "URL"),
    ("rlaif_v", {"image": A, "question": " ", **PAIR}, "question", "missing prompt"),
    ("mdpo", {"img_path": A, "prompt": "<image><image>", **PAIR}, "img_path", "placeholder count"),
    ("realign", RETRIEVED | {"retrieved_image": "img/none.png"}, "retrieved_image", "missing file"),
    ("llava", LLAVA_ONE | {"image": None}, "image", "placeholder count"),
    ("llava", LLAVA_ONE | {"conversations": gpt(("human", "<image>"))}, "conversations", "no answer"),
    ("vlfeedback", {"image": A, "prompt": "<image> <image>", "completions": []}, "image", "placeholder count"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "field", "reason"), SPOILT, ids=[f"{i}-{s[0]}-{s[3]}" for i, s in enumerate(SPOILT)])
def test_spoilt_rows_are_refused_by_field(folder: Path, name: str, row: dict[str, Any], field: str, reason: str) -> None:
    report = validate(write(folder / "x.jsonl", row), name)
    assert report.ledger.refused == {reason: 1}
    assert report.ledger.problems[0].startswith(f"x.jsonl:line 1 field '{field}': expected ")


def test_cmyk_is_converted_and_remarked(folder: Path) -> None:
    """The picture is used, in RGB, and the report names row and field."""
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG", quality=100)
    (folder / "img" / "k.jpg").write_bytes(buffer.getvalue())
    path = write(folder / "x.jsonl", {"images": [A, "img/k.jpg"], "prompt": Q, **PAIR})
    report = validate(path)
    assert report.ledger.remarks == ["x.jsonl:line 1 field 'images[1]': CMYK picture (its colours converted to RGB)"]
    assert report.bad == 0 and report.lines()[0] == report.ledger.remarks[0]
    (pair,), _ = load(path)
    red = media.pixels(pair.prompt[1])
    assert red.shape == (8, 8, 3) and np.abs(red.astype(int) - (254, 0, 0)).max() < 4


def test_what_formats_cannot_hold_is_refused_or_counted(folder: Path) -> None:
    shown = Pair("p", (text(Q),), (seen(0),), (seen(1),))
    with pytest.raises(DataError, match="pictures in the prompt only; mmpo holds all pairs"):
        write_trl([shown], folder / "y.jsonl")
    with pytest.raises(DataError, match="two texts in a row"):
        write_trl([Pair("p", (seen(0), text("a"), text("b")), *ONE[1:])], folder / "y.jsonl")
    with pytest.raises(DataError, match="its text holds <image>"):
        write_trl([Pair("p", (text("<image>?"),), *ONE[1:])], folder / "y.parquet")
    with pytest.raises(DataError, match="takes the pictures of the chosen side"):
        write_swift([Pair("p", (text(Q),), (seen(0),), (text(BAD),))], folder / "y.jsonl")
    write_swift([shown], folder / "y.jsonl")
    assert [b.kind for b in load(folder / "y.jsonl")[0][0].chosen] == ["image"]
    with pytest.raises(DataError, match="one picture before them"):
        convert(write(folder / "x.jsonl", SHAPES[4][1]), "rlhf_v", folder / "y.parquet")
    with pytest.raises(DataError, match="a rejected side only"):
        write_llava([Pair("p", ONE[0], (), ONE[2])], folder / "y.json")
    clip = Pair("p", (Block("video", b"x"), text(Q)), *ONE[1:])
    with pytest.raises(DataError, match="expected text and pictures, found video"):
        write_swift([clip], folder / "y.jsonl")
    with pytest.raises(DataError, match="trl in parquet cannot say unpaired"):
        write_trl([Pair("p", ONE[0], ONE[1])], folder / "y.parquet")
    cropped = Pair("p", *ONE, branches={"chosen@crop": Branch((seen(1), text(Q)), ONE[1])})
    write_mmpo([cropped], folder / "d")
    _, ledger = convert(folder / "d", "mdpo", folder / "m.jsonl")
    assert ledger.notes == {"crops left out: mDPO's trainer cuts its own": 1}


def for_trl(folder: Path) -> Path:
    """Rows with no, one and two pictures, with and without roles, as parquet."""
    two = {"images": [A, B], "prompt": "<image><image>In Image2, what?", **PAIR, "weight": 2.0, "meta": {"k": [1]}}
    one = {"images": [A], "prompt": said(USER), "chosen": said(YES), "rejected": said(NO), "spans": {"chosen": [[0, 1, 0.5]]}}
    _, ledger = convert(write(folder / "x.jsonl", two, one, {"prompt": Q, **PAIR}), "trl", folder / "y.parquet")
    assert ledger.notes == {"text without roles written as a user's turn and the assistant's answer": 2}
    return folder / "y.parquet"


def test_parquet_for_trl_is_made_of_conversations(folder: Path) -> None:
    pairs, _ = load(for_trl(folder))
    assert [p.weight for p in pairs] == [2, 1, 1] and pairs[0].meta == {"k": [1]} and len(pairs[1].spans["chosen"]) == 1
    assert [[b.kind for b in p.prompt] for p in pairs] == [["image", "image", "text"], ["image", "text"], ["text"]]
    assert {b.role for p in pairs for b in p.prompt} == {"user"}


@pytest.mark.slow
def test_trl_reads_what_was_written_for_it(folder: Path, family_folder: Callable[[str], Path]) -> None:
    """Hugging Face's datasets open the pictures, and TRL finds each at its place, and makes a batch of them."""
    hf = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    transformers = pytest.importorskip("transformers")
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    table = hf.Dataset.from_parquet(str(for_trl(folder)), cache_dir=str(folder / "cache"))
    assert [len(row["images"]) for row in table] == [2, 1, 0]
    assert np.array_equal(np.asarray(table[0]["images"][0]), PHOTOS[0])
    for row in table:
        (asked,) = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
        assert [part["type"] for part in asked["content"]] == ["image"] * len(row["images"]) + ["text"]
        assert data_utils.is_conversational(row)
    processor = transformers.AutoProcessor.from_pretrained(family_folder("llava"))
    batch = DataCollatorForVisionPreference(processor)(list(table))
    assert len(batch["input_ids"]) == 6 and len(batch["pixel_values"]) == 2 * 3  # chosen, then rejected
    answers = [
        processor.tokenizer.decode(r[m.bool()]) for r, m in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert all(GOOD in a for a in answers[:3]) and all(BAD in a for a in answers[3:])
