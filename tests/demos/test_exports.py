"""Exports from the page and the command line: one at a time, whole or not at all, and each failure as a message."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
from mmpo import cli
from mmpo.datasets.load import load
from mmpo.demos.ballot_pairs import ASIDE, NAMES, export, write
from mmpo.demos.ballots import Ballot
from mmpo.demos.pool import Pool, default_folder, open_pool
from mmpo.demos.vote import exported
from mmpo.errors import DataError, RunFailed
from mmpo.lock import RunBusy, RunLock
from tests.demos.pools import picture_folder
from tests.demos.test_ballot_pairs import cast


def test_exports_at_once_leave_one_whole_data_set(tmp_path: Path) -> None:
    """From two tabs, say: whoever comes second is told so, and what was written is what the first one said."""
    pool = open_pool(picture_folder(tmp_path / "samples", 12))
    parts = [[ballot_on(pool, place) for place in places] for places in (range(8), range(5, 12))]
    start = threading.Barrier(2)

    def go(ballots: list[Ballot]) -> int | None:
        start.wait()
        try:
            return write(ballots, pool, "mmpo", tmp_path / "pairs")[0]
        except RunBusy as busy:
            assert "another export is being written there" in str(busy)
            return None

    for _ in range(4):  # the first ones make the folder, the others replace what is in it
        with ThreadPoolExecutor(2) as threads:
            counts = list(threads.map(go, parts))
        pairs, _ = load(tmp_path / "pairs")
        assert counts[0] in (8, None) and counts[1] in (7, None) and len(pairs) in counts
        asked = {(pool.by_id[b.left].prompt, pool.by_id[b.left].block.digest) for b in parts[counts.index(len(pairs))]}
        assert {(pair.prompt, pair.chosen[0].digest) for pair in pairs} == asked


def ballot_on(pool: Pool, place: int) -> Ballot:
    a, b = pool.matchups[place]
    return Ballot(f"c{place}", "ann", a.item, a.id, b.id, "left", 0.0)


@pytest.mark.parametrize("to", list(NAMES))
def test_page_and_command_line_write_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    source = picture_folder(tmp_path / "samples")
    votes = default_folder(source)
    ballots = cast(votes, open_pool(source))
    with RunLock(votes / ASIDE):
        said = exported(ballots.standing(), ballots.pool, votes, "votes", to, "drop")
        assert said == f"votes/{NAMES[to]}: another export is being written there; try again when it is done"
        assert cli.main(["demo", "export", str(votes), "--to", to]) == cli.USAGE
        assert "another export is being written there" in capsys.readouterr().err
    assert not list(votes.glob("pairs*"))
    ballots.close()


def test_a_new_data_set_has_its_name_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an export that was killed, of which a part is left."""
    pool = open_pool(picture_folder(tmp_path / "samples"))
    left = tmp_path / ASIDE / "pairs" / "media"
    left.mkdir(parents=True)
    (left / "part.png").write_bytes(b"")
    there: list[bool] = []
    monkeypatch.setattr("mmpo.datasets.formats.mmpo.sync", lambda path: there.append((tmp_path / "pairs").exists()))
    assert write([ballot_on(pool, 0)], pool, "mmpo", tmp_path / "pairs")[0] == 1
    assert there == [False] and len(load(tmp_path / "pairs")[0]) == 1
    assert [path.name for path in (tmp_path / ASIDE).iterdir()] == ["run.lock"]


@pytest.mark.parametrize("alone", [False, True])
def test_an_empty_folder_is_filled_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """It may be a mount point, which cannot be renamed; alone: beside it nothing can be made, not even the lock."""
    pool, out = open_pool(picture_folder(tmp_path / "samples")), tmp_path / "there" / "pairs"
    out.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (alone and Path(path) == out.parent))
    before = out.stat().st_ino
    for places in ((0, 1), (1, 2, 3)):
        assert write([ballot_on(pool, place) for place in places], pool, "mmpo", out)[0] == len(places) == len(load(out)[0])
        assert out.stat().st_ino == before and {p.name for p in out.iterdir()} - {ASIDE} == {"media", "pairs.parquet"}
        assert (out / ASIDE).exists() == alone != (out.parent / ASIDE).exists()
    assert not alone or [path.name for path in (out / ASIDE).iterdir()] == ["run.lock"]
    with RunLock((out if alone else out.parent) / ASIDE), pytest.raises(RunBusy):
        write([ballot_on(pool, 0)], pool, "mmpo", out)


def test_an_empty_folder_is_filled_after_an_export_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time until the table is there; media of other people are nothing of that kind."""
    pool, out = open_pool(picture_folder(tmp_path / "samples")), tmp_path / "pairs"
    (out / "media").mkdir(parents=True)
    (out / "media" / "holiday.png").write_bytes(b"")
    with pytest.raises(DataError, match="expected a new folder, an empty one"):
        write([ballot_on(pool, 0)], pool, "mmpo", out)
    (out / "media" / "holiday.png").unlink()
    (out / "media").rmdir()
    rename = os.rename
    for name in ("media", "pairs.parquet"):

        def killed(source: Path, place: Path, name: str = name) -> None:
            if place.name == name:
                raise KeyboardInterrupt
            rename(source, place)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "rename", killed)
            write([ballot_on(pool, 0)], pool, "mmpo", out)
        assert not (out / "pairs.parquet").exists()
    assert write([ballot_on(pool, 1)], pool, "mmpo", out)[0] == 1 == len(load(out)[0])
    assert {path.name for path in out.iterdir()} == {"media", "pairs.parquet"} and len(list((out / "media").iterdir())) == 2


def test_the_page_names_no_file_of_an_answer(tmp_path: Path) -> None:
    """Whoever writes the pairs may still be blind."""
    source = picture_folder(tmp_path / "samples")
    ballots = cast(tmp_path / "votes", open_pool(source))
    item = next(ballot.item for ballot in ballots.standing() if ballot.choice in ("left", "right"))
    (source / "aligned" / f"{item}.png").write_bytes(b"another")
    said = exported(ballots.standing(), ballots.pool, tmp_path / "votes", "votes", "mmpo", "drop")
    assert "pairs of format mmpo" in said and "an answer that has changed since" in said and "aligned" not in said
    for file in (source / "aligned").iterdir():
        file.unlink()
    said = exported(ballots.standing(), ballots.pool, tmp_path / "votes", "votes", "mmpo", "soft")
    assert said.startswith("no pairs to write") and "an answer that has changed since" in said and "aligned" not in said
    ballots.close()


def test_what_cannot_be_written_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = picture_folder(tmp_path / "samples")
    votes = default_folder(source)
    ballots = cast(votes, open_pool(source))
    (votes / "pairs.pick_a_pic.parquet" / "inside").mkdir(parents=True)
    said = exported(ballots.standing(), ballots.pool, votes, "votes", "pick_a_pic", "drop")
    assert said.startswith("votes/pairs.pick_a_pic.parquet: cannot be written (Is a directory)")
    ballots.close()
    (tmp_path / "file").write_text("")
    for to in NAMES:
        out = tmp_path / "file" / "pairs"
        assert cli.main(["demo", "export", str(votes), "--to", to, "--out", str(out)]) == cli.USAGE
        assert f"mmpo: --out {out}: cannot be written (" in capsys.readouterr().err


def test_a_full_disk_is_no_mistake_in_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = picture_folder(tmp_path / "samples")
    cast(default_folder(source), open_pool(source)).close()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmpo.datasets.formats.mmpo.sync", full)
    with pytest.raises(RunFailed, match="No space left on device.*make room there"):
        export(default_folder(source), "mmpo")
    assert not (default_folder(source) / "pairs").exists()


def test_ties_that_are_kept_say_how_a_run_keeps_them(tmp_path: Path) -> None:
    """Every format is read with ties left out by default."""
    pool = open_pool(picture_folder(tmp_path / "samples"))
    ballots = cast(tmp_path, pool)
    for to in ("mmpo", "pick_a_pic"):
        assert "data.ties" not in exported(ballots.standing(), pool, tmp_path, "votes", to, "drop")
        assert "train with data.ties=soft" in exported(ballots.standing(), pool, tmp_path, "votes", to, "soft")
        assert (len(load(tmp_path / NAMES[to])[0]), len(load(tmp_path / NAMES[to], ties="soft")[0])) == (4, 6)
    ballots.close()
