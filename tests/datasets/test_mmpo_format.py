"""The suite's own format: everything of a pair comes back, each medium is there once, and a table is whole or not there."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpo import cli, media
from mmpo.datasets.convert import convert
from mmpo.datasets.formats.mmpo import SCHEMA, write_mmpo
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, load
from mmpo.datasets.tables import write_parquet
from mmpo.datasets.validate import validate
from mmpo.errors import DataError
from mmpo.pair import Block, Branch, Pair, Span, image, text

PHOTOS = [np.random.default_rng(i).integers(0, 256, (5, 7, 3), np.uint8) for i in range(3)]
FILES = [media.encode(PHOTOS[0]), media.encode(PHOTOS[1], "JPEG", quality=90), media.encode(PHOTOS[2], "WEBP")]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.floats(0, 9)


def same(left: Block, right: Block) -> bool:
    told = [(b.kind, b.path, b.role, type(b.data), b.digest) for b in (left, right)]
    return told[0] == told[1]


def flat(pair: Pair) -> list[Block]:
    branches = [b for branch in pair.branches.values() for b in (*branch.prompt, *branch.response)]
    return [*pair.prompt, *pair.chosen, *pair.rejected, *branches]


def shape(pair: Pair) -> list[Any]:
    """All of a pair but its blocks, and how many of these are where."""
    names = ("id", "weight", "margin", "label", "scores", "group", "meta", "spans")
    branches = {name: (len(b.prompt), len(b.response)) for name, b in pair.branches.items()}
    return [getattr(pair, name) for name in names] + [branches, len(pair.prompt), len(pair.chosen), len(pair.rejected)]


def assert_same(left: Pair, right: Pair) -> None:
    assert shape(left) == shape(right)
    assert all(same(a, b) for a, b in zip(flat(left), flat(right), strict=True))


ROLES = st.sampled_from([None, "system", "user", "assistant", "tool"])
MEDIUM = st.sampled_from([*FILES, *PHOTOS]).flatmap(
    lambda data: st.builds(Block, st.just("image"), st.just(data), st.none() | WORDS, ROLES)
)
SOUND = st.builds(Block, st.sampled_from(["audio", "video"]), st.binary(min_size=1, max_size=9), st.none(), ROLES)
BLOCK = st.builds(Block, st.just("text"), WORDS, st.none() | WORDS, ROLES) | MEDIUM | SOUND
SIDE = st.lists(BLOCK, max_size=4).map(tuple)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | NUMBER | WORDS, lambda v: st.lists(v, max_size=2), max_leaves=4)
SPAN = st.builds(
    lambda start, length, weight: Span(start, start + length, weight), st.integers(0, 9), st.integers(1, 9), NUMBER
)
PAIR = st.builds(
    Pair, st.text("abc", min_size=1), SIDE, SIDE, SIDE, NUMBER, st.floats(-9, 9), st.floats(0, 1),
    st.dictionaries(WORDS, NUMBER, max_size=2),
    st.none() | WORDS, st.dictionaries(WORDS, st.builds(Branch, SIDE, SIDE), max_size=2),
    st.dictionaries(WORDS | st.just("provenance"), JSON.filter(lambda v: v is not None), max_size=3),
    st.dictionaries(WORDS, st.lists(SPAN, max_size=2).map(tuple), max_size=2),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait for a disk that others use as well takes longer than all else here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(PAIR, max_size=3, unique_by=lambda p: p.id))
@pytest.mark.slow
def test_everything_comes_back(tmp_path: Path, pairs: list[Pair]) -> None:
    assert write_mmpo(pairs, tmp_path / "d") == len(pairs)
    back, ledger = load(tmp_path / "d", ties="soft")
    assert ledger.used == len(pairs) == len(back) and not ledger.notes
    for left, right in zip(pairs, back, strict=True):
        assert_same(left, right)
    named = {b.digest for p in pairs for b in flat(p) if b.kind != "text"}
    assert len(list((tmp_path / "d").glob("media/*"))) <= len(named)


def pairs() -> list[Pair]:
    """A conversation with two images in front, the same images as a retrieved condition, and a pair of text."""
    asked = (Block("image", FILES[0], "a.png", "user"), Block("image", FILES[1], role="user"), text("Which?", "user"))
    answers = (text("The first.", "assistant"),), (text("The second.", "assistant"),)
    other = Branch((Block("image", FILES[2], role="user"), *asked[1:]), answers[0])
    first = Pair("p1", asked, *answers, branches={"chosen@retrieved": other}, meta={"provenance": [{"stage": "x"}], "k": 1})
    return [
        first,
        Pair("p2", (image(FILES[0]), text("What?")), (text("a"),), ()),
        Pair("p3", (text("q"),), (text("a"),), (text("b"),)),
    ]


def test_a_folder_is_recognised_and_holds_each_medium_once(tmp_path: Path) -> None:
    write_mmpo(pairs(), tmp_path / "d")
    assert detect(tmp_path / "d") == detect(tmp_path / "d" / "pairs.parquet") == "mmpo"
    assert sorted(p.suffix for p in (tmp_path / "d" / "media").iterdir()) == [".jpg", ".png", ".webp"]
    assert {p.read_bytes() for p in (tmp_path / "d" / "media").iterdir()} == set(FILES)
    assert pq.read_table(tmp_path / "d" / "pairs.parquet").column("provenance").to_pylist() == ['[{"stage": "x"}]', None, None]
    assert validate(tmp_path / "d").bad == 0
    (tmp_path / "d").rename(tmp_path / "moved")
    for left, right in zip(pairs(), load(tmp_path / "moved")[0], strict=True):
        assert_same(left, right)


def test_a_medium_of_many_pairs_is_in_memory_once(tmp_path: Path) -> None:
    write_mmpo([Pair(f"{i}", (image(FILES[0]),), (text(f"{i}"),)) for i in range(9)], tmp_path / "d")
    back, _ = load(tmp_path / "d")
    gc.collect()
    assert len({id(pair.prompt[0]) for pair in back}) == 1


def test_replacing_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    """A writer that fails leaves the folder as it was, byte for byte; one that succeeds leaves nothing of the old."""
    folder = tmp_path / "d"

    def content() -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def failing() -> Any:
        yield Pair("n", (image(PHOTOS[2]),), (text("x"),))
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_mmpo(failing(), folder)
    assert not folder.exists()
    write_mmpo(pairs(), folder)
    before = content()
    with pytest.raises(RuntimeError):
        write_mmpo(failing(), folder)
    assert content() == before
    write_mmpo(pairs()[1:], folder)
    assert set(content()) < set(before) and len(content()) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="found something else"):
        write_mmpo([], tmp_path / "other")


def test_everything_is_on_the_disk_before_the_table_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four names of media and table, each file synced; the table moves to its place after all of them."""
    told: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: told.append(os.path.realpath(f"/proc/self/fd/{fd}")))

    def moved(a: Path, b: Path) -> None:
        told.append(f"to {b.name}")
        replace(a, b)

    monkeypatch.setattr(os, "replace", moved)
    write_mmpo(pairs(), tmp_path / "d")
    place = told.index("to pairs.parquet")
    synced = {Path(name).name for name in told[:place] if not name.startswith("to ")}
    assert synced == {p.name for p in (tmp_path / "d" / "media").iterdir()} | {"media", "pairs.parquet.partial"}
    assert told[place + 1 :] == [str(tmp_path / "d")]


def test_what_cannot_be_held_is_named(tmp_path: Path) -> None:
    clip = Block("video", np.zeros((2, 4, 4, 3), np.uint8))
    for spoilt, message in [
        (Pair("p", (text("q"),), (text("a"),), meta={"x": {1, 2}}), "pair p: its meta is no JSON"),
        (pairs()[0], "pair p1: the id of an earlier pair"),
        (Pair("p", (clip,), (text("a"),)), "video as ndarray"),
    ]:
        with pytest.raises(DataError, match=message):
            write_mmpo([pairs()[0], spoilt], tmp_path / "d")
    assert not (tmp_path / "d").exists()
    ledger = Ledger("skip")
    assert write_mmpo([pairs()[0]] * 2, tmp_path / "d", ledger) == 1
    assert ledger.notes == {"pairs not written: the id of an earlier pair; ids have to differ": 1}


def test_damage_is_found_by_row_and_field(tmp_path: Path) -> None:
    write_mmpo(pairs(), tmp_path / "d")
    files = {p.suffix: p for p in (tmp_path / "d" / "media").iterdir()}
    files[".webp"].write_bytes(FILES[2][:-1] + b"x")
    report = validate(tmp_path / "d")
    assert report.ledger.refused == {"other content": 1} and report.ledger.used == 2
    assert "pairs.parquet:row 0 field 'branches.chosen@retrieved.prompt[0].media': expected a file" in report.ledger.problems[0]
    files[".png"].unlink()
    assert validate(tmp_path / "d").ledger.refused == {"missing file": 2}
    rows = pq.read_table(tmp_path / "d" / "pairs.parquet").to_pylist()
    rows[1]["prompt"][0]["media"] = "../../etc/passwd"
    write_parquet(tmp_path / "d" / "pairs.parquet", SCHEMA, rows)
    assert validate(tmp_path / "d").ledger.refused == {"missing file": 1, "bad name of a medium": 1}


def test_from_and_to_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """Text goes through the own format and comes back as the same rows."""
    source = tmp_path / "x.jsonl"
    source.write_text('{"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2.0}\n')
    assert cli.main(["data", "convert", str(source), "--to", "mmpo", "--out", str(tmp_path / "d")]) == 0
    assert cli.main(["data", "convert", str(tmp_path / "d"), "--to", "trl", "--out", str(tmp_path / "y.jsonl")]) == 0
    assert (tmp_path / "y.jsonl").read_bytes() == source.read_bytes()
    assert "1 rows of format mmpo" in capsys.readouterr().out
    assert convert(tmp_path / "d", "mmpo", tmp_path / "e")[0] == 1
    assert (tmp_path / "e" / "pairs.parquet").read_bytes() == (tmp_path / "d" / "pairs.parquet").read_bytes()
