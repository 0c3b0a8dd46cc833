"""What can be voted on: runs, folders of samples, datasets; and what is refused, with its reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmpo import media
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.demos.pool import default_folder, open_pool
from mmpo.errors import DataError
from mmpo.pair import Block, image, text
from tests import clips
from tests.demos.pools import picture, picture_folder


def test_a_folder_for_each_system(tmp_path: Path) -> None:
    pool = open_pool(picture_folder(tmp_path))
    assert pool.systems == ["base", "aligned"] and len(pool.matchups) == 6 and pool.title == tmp_path.name
    first = pool.items["000"][0]
    assert (first.system, first.seed, first.kind, first.prompt) == ("base", 70, "image", (text("picture 0"),))
    assert media.pixels(first.block).tolist() == picture(0).tolist()
    assert open_pool(tmp_path).by_id.keys() == pool.by_id.keys()
    assert pool.ledger.counts()["used"] == 12 + 6  # files and lines of prompts


@pytest.mark.parametrize("line", ['{"item": "001", "prompt": 7}', '{"item": "001"', None])
def test_a_file_without_its_line_of_prompts_is_refused(tmp_path: Path, line: str | None) -> None:
    """The name of a file is nobody's prompt where prompts are given."""
    root = picture_folder(tmp_path, 3)
    lines = (root / "prompts.jsonl").read_text().splitlines()
    (root / "prompts.jsonl").write_text("\n".join([lines[0], lines[2], *([line] if line else [])]) + "\n")
    pool = open_pool(root)
    assert [e[0].prompt[0].data for e in pool.items.values()] == ["picture 0", "picture 2"]
    assert pool.ledger.refused["no prompt for the file"] == 2 and pool.ledger.refused.total() == 2 + (line is not None)


@pytest.mark.parametrize("mode", ["vote", "label"])
def test_a_file_of_prompts_without_a_good_line(tmp_path: Path, mode: Any) -> None:
    root = picture_folder(tmp_path, 3)
    for folder in (root, root / "base"):
        (folder / "prompts.jsonl").write_text('{"item": "000"}\n')
    with pytest.raises(DataError, match="6: no prompt for the file"):
        open_pool(root, mode)
    with pytest.raises(DataError, match="3: no prompt for the file"):
        open_pool(root / "base", "label")


def test_every_kind_of_file(tmp_path: Path) -> None:
    files = {
        "a.txt": b"hello", "b.mp4": clips.video(frames=4), "c.webm": clips.video("webm", frames=4), "d.wav": clips.sound(),
        "e.flac": clips.sound("FLAC"), "f.mp3": clips.sound("MP3"), "g.ogg": clips.sound("OGG"),
    }  # fmt: skip
    for system in ("one", "two"):
        (tmp_path / system).mkdir()
        for name, data in files.items():
            (tmp_path / system / name).write_bytes(data if name != "a.txt" else data + system.encode())
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "d.wav").write_bytes(clips.sound(seconds=0.3))
    pool = open_pool(tmp_path)
    kinds = {item: entries[0].kind for item, entries in pool.items.items()}
    assert kinds == dict(a="text", b="video", c="video", d="audio", e="audio", f="audio", g="audio")
    assert {a.item for a, b in pool.matchups} == {"a", "d"}  # the others are equal
    assert pool.ledger.notes["comparisons of two equal answers (not asked)"] == 6
    assert pool.items["a"][0].prompt == (text("a"),)


def test_hostile_files_are_refused_and_counted(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "root", 2)
    (tmp_path / "secret.png").write_bytes(media.encode(picture(9)))
    here = root / "base"
    (here / "link.png").symlink_to(tmp_path / "secret.png")
    (here / "loop.png").symlink_to(here / "loop.png")
    os.mkfifo(here / "pipe.png")
    (here / "picture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    (here / "page.html").write_text("<script>alert(1)</script>")
    (here / "bomb.png").write_bytes(bomb())
    (here / "cut.png").write_bytes((here / "000.png").read_bytes()[:200])
    (here / "playlist.mp4").write_text("#EXTM3U\nfile:///etc/hostname\n")
    (here / "latin.txt").write_bytes(b"\xff\xfe")
    (here / os.fsdecode(b"\xff.png")).write_bytes(b"")
    (here / "back\\slash.png").write_bytes(b"")
    (here / ".hidden.png").write_bytes(b"")
    pool = open_pool(root)
    assert sorted(pool.items) == ["000", "001"]
    assert pool.ledger.refused == {
        "path leaves the root": 1, "unreadable file": 1, "not a regular file": 1, "not a supported kind of file": 2,
        "cannot be decoded": 3, "bad UTF-8": 1, "not Unicode": 1, "forbidden path": 1,
    }  # fmt: skip


def bomb() -> bytes:
    """A PNG that says it has 400 megapixels."""
    data = bytearray(media.encode(picture(0)))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    return bytes(data)


def test_a_system_that_is_a_link_to_elsewhere(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "root", 2)
    other = picture_folder(tmp_path / "other", 2, ["x"])
    (root / "more").symlink_to(other / "x", target_is_directory=True)
    pool = open_pool(root)
    assert pool.systems == ["base", "aligned"] and pool.ledger.refused["path leaves the root"] == 2


def test_a_file_that_changes_later_is_refused(tmp_path: Path) -> None:
    entry = open_pool(picture_folder(tmp_path)).entries[0]
    (tmp_path / "base" / "000.png").write_bytes(media.encode(picture(77)))
    with pytest.raises(DataError, match="other content"):
        _ = entry.block


# Runs


def test_a_run_of_pictures(tmp_path: Path) -> None:
    picture_folder(tmp_path / "samples", 3)
    (tmp_path / "samples" / "prompts.jsonl").unlink()
    (tmp_path / "samples" / "sheet.png").write_bytes(media.encode(picture(5)))
    (tmp_path / "summary.json").write_text(json.dumps({"prompts": ["red", "green", "blue"], "seeds": [5, 6, 7]}))
    pool = open_pool(tmp_path)
    assert pool.systems == ["base", "aligned"] and default_folder(tmp_path) == tmp_path / "votes"
    assert [(e[0].prompt[0].data, e[0].seed, e[1].system) for e in pool.items.values()] == [
        ("red", 5, "aligned"), ("green", 6, "aligned"), ("blue", 7, "aligned")
    ]  # fmt: skip


def test_a_run_of_answers_about_pictures(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    (samples / "pictures").mkdir(parents=True)
    (samples / "pictures" / "p.png").write_bytes(media.encode(picture(1)))
    turns = [{"role": "user", "picture": "p.png"}, {"role": "user", "text": "What is it?"}]
    for side in ("base", "aligned"):
        asked: dict[str, object] = {"prompt": "[image 1]\nuser: What is it?", "turns": turns}
        lines = [asked | {"text": f"{side} {i}"} for i in range(2)]
        lines.append({"prompt": "x", "text": side, "turns": [{"role": "user", "picture": "../../secret.png"}]})
        lines.append({"prompt": "x", "text": 7})
        (samples / f"{side}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"seeds": [1, 2, 3, 4]}))
    pool = open_pool(tmp_path)
    assert len(pool.matchups) == 2 and pool.ledger.refused == {"forbidden path": 2, "wrong type of text": 2}
    prompt = pool.entries[0].prompt
    assert [(b.kind, b.role) for b in prompt] == [("image", "user"), ("text", "user")]
    assert pool.entries[0].block == text("base 0", "assistant") and pool.entries[1].seed == 1
    (folder,) = [open_pool(samples)]
    assert [e.digest for e in folder.entries] == [e.digest for e in pool.entries]


def test_a_run_that_has_no_samples_yet(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("modality: text")
    with pytest.raises(DataError, match="not come to its end"):
        open_pool(tmp_path)


def test_a_sample_is_known_by_its_number(tmp_path: Path) -> None:
    """Not by its place among the files that there are: one is gone, and as text 1000 comes before 101."""
    for number in (0, 2, 101, 1000):
        for k, side in enumerate(("base", "aligned")):
            (tmp_path / "samples" / side).mkdir(parents=True, exist_ok=True)
            (tmp_path / "samples" / side / f"{number:03d}.png").write_bytes(media.encode(picture(2 * number + k)))
    told = {"prompts": [f"prompt {i}" for i in range(1001)], "seeds": [7 * i for i in range(1001)]}
    (tmp_path / "summary.json").write_text(json.dumps(told))
    for entry in (pool := open_pool(tmp_path)).entries:
        assert (entry.prompt, entry.seed) == ((text(f"prompt {int(entry.item)}"),), 7 * int(entry.item))
    assert len(pool.matchups) == 4
    (tmp_path / "summary.json").write_text(json.dumps({"prompts": ["a", "b"], "seeds": [1, 2]}))
    assert [(e[0].prompt[0].data, e[0].seed) for e in open_pool(tmp_path).items.values()] == [
        ("a", 1), ("002", None), ("1000", None), ("101", None)
    ]  # fmt: skip


# Datasets and folders to label


def test_a_dataset_of_candidates(tmp_path: Path) -> None:
    rows = [Candidate((text(f"q{i}"),), image(picture(10 * i + k)), float(k), seed=k) for i in range(2) for k in range(3)]
    write_candidates(rows, tmp_path / "candidates.parquet")
    pool = open_pool(tmp_path / "candidates.parquet")
    assert len(pool.matchups) == 6 and pool.systems == [] and pool.entries[1].seed == 1
    assert default_folder(tmp_path / "candidates.parquet") == tmp_path / "candidates.parquet.votes"


def test_candidates_that_name_their_models(tmp_path: Path) -> None:
    completions = [{"model": f"m{k}", "response": f"answer {k}", "overall_score": k} for k in range(3)]
    (tmp_path / "u.jsonl").write_text(json.dumps({"instruction": "q", "models": [], "completions": completions}) + "\n")
    pool = open_pool(tmp_path / "u.jsonl")
    assert pool.systems == ["m0", "m1", "m2"] and len(pool.matchups) == 3


def test_a_system_is_not_compared_with_itself(tmp_path: Path) -> None:
    """A prompt that occurs twice, and two files of one stem, give two answers of one system to the same item."""
    rows = [
        {"instruction": "q", "models": [], "completions": [{"model": f"m{k}", "response": f"{take}{k}", "overall_score": k}]}
        for take in "ab"
        for k in range(2)
    ]
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture_folder(tmp_path / "set", 1)
    Image.fromarray(picture(9)).save(tmp_path / "set" / "base" / "000.jpg")
    for source, asked, own in ((tmp_path / "u.jsonl", 4, 2), (tmp_path / "set", 2, 1)):
        pool = open_pool(source)
        assert len(pool.asked("vote")) == asked and all(a.system != b.system for a, b in pool.asked("vote"))
        assert pool.ledger.notes["comparisons of two answers of one system (not asked)"] == own
        labelled = open_pool(source, "label")
        assert len(labelled.asked("label")) == asked + own and not labelled.ledger.notes
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    with pytest.raises(DataError, match="by different systems; `mmpo demo label` compares"):
        open_pool(tmp_path / "one.jsonl")


def test_pairs_are_no_candidates(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match="holds pairs of format trl"):
        open_pool(tmp_path / "pairs.jsonl")


def test_one_folder_is_labelled_in_one_group_or_by_prompt(tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.jpg")
    (whole,) = open_pool(tmp_path, "label").items.values()
    assert [(e.system, e.prompt) for e in whole] == [(f"{i}.jpg", ()) for i in range(5)]
    (tmp_path / "prompts.csv").write_text("item,prompt\n0,cat\n1.jpg,cat\n2,dog\n3,dog\n")
    pool = open_pool(tmp_path, "label")
    assert [[e.system for e in entries] for entries in pool.items.values()] == [["0.jpg", "1.jpg"], ["2.jpg", "3.jpg"]]
    assert pool.ledger.refused == {"no prompt for the file": 1}
    with pytest.raises(DataError, match="mmpo demo label"):
        open_pool(tmp_path)


@pytest.mark.parametrize("made", [[], ["base"]])
def test_nothing_to_compare(tmp_path: Path, made: list[str]) -> None:
    picture_folder(tmp_path, 2, made)
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(DataError):
        open_pool(tmp_path)


def test_answers_of_several_kinds_are_no_comparison(tmp_path: Path) -> None:
    root = picture_folder(tmp_path, 2)
    (root / "base" / "001.png").unlink()
    (root / "base" / "001.txt").write_text("one thousand words")
    pool = open_pool(root)
    assert list(pool.items) == ["000"] and any("different kinds" in note for note in pool.ledger.notes)


def test_entries_of_blocks_are_read_as_they_are() -> None:
    from mmpo.demos.pool import entry_of

    block = Block("image", np.zeros((2, 2, 3), np.uint8))
    assert entry_of("i", "s", (), block, None).block is block


def test_a_relative_source_is_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a command line names it; the server leaves that folder."""
    picture_folder(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    pool = open_pool(Path("set"))
    monkeypatch.chdir("/")
    assert all(entry.block.digest for entry in pool.entries)


def test_exported_pairs_in_the_folder_of_votes_change_nothing(tmp_path: Path) -> None:
    before = open_pool(picture_folder(tmp_path))
    (tmp_path / "votes" / "pairs").mkdir(parents=True)
    (tmp_path / "votes" / "pairs" / "pairs.parquet").write_bytes(b"PAR1")
    assert open_pool(tmp_path).by_id.keys() == before.by_id.keys() and default_folder(tmp_path) == tmp_path / "votes"
