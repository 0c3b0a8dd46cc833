"""Exports from the page and the command line: one at a time, whole or not at all, and each failure as a message."""

from __future__ import annotations

import errno
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
from mmpo.errors import RunFailed
from mmpo.lock import RunBusy, RunLock
from tests.demos.pools import picture_folder
from tests.demos.test_ballot_pairs import cast


def test_exports_at_once_leave_one_whole_data_set(tmp_path: Path) -> None:
    """From two tabs, say: whoever comes second is told so, and what was written is what the first one said."""
    pool = open_pool(picture_folder(tmp_path / "samples", 12))
    halves = [[ballot_on(pool, place) for place in places] for places in (range(8), range(4, 12))]
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
            counts = list(threads.map(go, halves))
        assert 8 in counts and len(load(tmp_path / "pairs")[0]) == 8


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
