"""Votes as preference pairs: who is chosen, what is counted, and that every format reads back as many pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmpo import cli
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import load
from mmpo.demos.ballot_pairs import export, pairs_of, write
from mmpo.demos.ballots import Ballots
from mmpo.demos.pool import Pool, default_folder, open_pool
from mmpo.errors import DataError, RecipeError
from tests.demos.pools import picture_folder, text_pool

CHOICES = ["left", "right", "tie", "both_bad", "left", "undo"]


def cast(folder: Path, pool: Pool, choices: list[str] = CHOICES, voters: tuple[str, ...] = ("ann", "bob")) -> Ballots:
    """Each voter makes these choices; `undo` takes the one before it back."""
    ballots = Ballots(folder, pool, "vote", clock=lambda: 1_700_000_000.0)
    for voter in voters:
        for number, choice in enumerate(choices):
            served = ballots.serve(voter)
            if choice == "undo":
                ballots.undo(voter, f"{number:08d}")
            elif served:
                ballots.vote(voter, served.id, choice, f"{number:08d}")
    return ballots


def test_the_better_one_is_chosen(tmp_path: Path) -> None:
    pool = text_pool()
    ballots = cast(tmp_path, pool)
    ledger = Ledger("skip")
    pairs = list(pairs_of(ballots.standing(), pool, "drop", ledger))
    assert len(pairs) == 4 == ledger.used and ledger.skipped == {"tie": 2, "both bad": 2}
    kept = [b for b in ballots.standing() if b.choice in ("left", "right")]
    for ballot, pair in zip(kept, pairs, strict=True):
        better, worse = (pool.by_id[id] for id in ((ballot.left, ballot.right)[:: 1 if ballot.choice == "left" else -1]))
        assert (pair.chosen, pair.rejected, pair.prompt) == ((better.block,), (worse.block,), better.prompt)
        assert pair.meta["provenance"] == {
            "annotator": ballot.voter, "time": "2023-11-14T22:13:20+00:00", "comparison": ballot.comparison,
            "systems": {"chosen": better.system, "rejected": worse.system},
            "seeds": {"chosen": better.seed, "rejected": worse.seed},
        }  # fmt: skip
        assert pair.group == pairs[0].group if pair.prompt == pairs[0].prompt else pair.group != pairs[0].group


def test_soft_ties_have_label_one_half(tmp_path: Path) -> None:
    pool = text_pool()
    pairs = list(pairs_of(cast(tmp_path, pool).standing(), pool, "soft", ledger := Ledger("skip")))
    assert sorted(p.label for p in pairs) == [0.5] * 2 + [1.0] * 4 and ledger.skipped == {"both bad": 2}


def test_voters_who_agree_give_pairs_of_their_own(tmp_path: Path) -> None:
    pool = text_pool(1)
    ballots = Ballots(tmp_path, pool, "vote")
    for voter in ("ann", "bob", "eve"):
        served = ballots.serve(voter)
        assert served is not None
        ballots.vote(voter, served.id, "left" if served.left.system == "base" else "right", "nonce-01")
    pairs = list(pairs_of(ballots.standing(), pool, "drop", Ledger("skip")))
    assert [p.id for p in pairs] == [pairs[0].id, f"{pairs[0].id}#2", f"{pairs[0].id}#3"]
    assert {p.meta["provenance"]["annotator"] for p in pairs} == {"ann", "bob", "eve"}


def test_answers_that_are_gone_are_counted(tmp_path: Path) -> None:
    ballots, ledger = cast(tmp_path, text_pool()), Ledger("skip")
    assert list(pairs_of(ballots.standing(), Pool(Path("/nowhere"), ()), "drop", ledger)) == []
    assert ledger.skipped == {"an answer that is no longer in the source": 8}


def test_answers_that_have_changed_are_counted(tmp_path: Path) -> None:
    """While the server runs, whose pool knows them as they were; also where none is left, and never with the name of a file."""
    source = picture_folder(tmp_path / "samples")
    pool = open_pool(source)
    ballots = cast(tmp_path / "votes", pool)
    changed = "an answer that has changed since"
    (source / "aligned" / "000.png").write_bytes(b"another")
    (source / "base" / "001.png").unlink()
    used = [b for b in ballots.standing() if b.choice in ("left", "right")]
    gone = sum(b.item in ("000", "001") for b in used)
    pairs = list(pairs_of(ballots.standing(), pool, "drop", ledger := Ledger("skip")))
    assert len(pairs) == len(used) - gone == ledger.used and ledger.skipped[changed] == gone and ledger.rows == 8
    for file in (source / "aligned").iterdir():
        file.write_bytes(b"another")
    with pytest.raises(DataError, match=changed) as refused:
        write(ballots.standing(), pool, "mmpo", tmp_path / "out")
    assert "aligned" not in str(refused.value) and not (tmp_path / "out").exists()
    ballots.close()


@pytest.mark.parametrize("ties", ["drop", "soft"])
@pytest.mark.parametrize("to", ["mmpo", "trl"])
def test_text_is_read_back_with_equal_counts(tmp_path: Path, to: str, ties: Any) -> None:
    pool = text_pool()
    ballots = cast(tmp_path / "votes", pool)
    out = tmp_path / ("pairs" if to == "mmpo" else "pairs.jsonl")
    count, ledger = write(ballots.standing(), pool, to, out, ties)
    pairs, read = load(out, ties="soft")
    assert count == ledger.used == len(pairs) == read.used == (4 if ties == "drop" else 6)
    assert ledger.rows == len(ballots.standing()) == 8
    assert sorted((p.chosen[0].data, p.label) for p in pairs) == sorted(
        (p.chosen[0].data, p.label) for p in pairs_of(ballots.standing(), pool, ties, Ledger("skip"))
    )
    assert all(pair.meta["provenance"]["annotator"] in ("ann", "bob") for pair in pairs)


@pytest.mark.parametrize("to", ["mmpo", "pick_a_pic"])
def test_pictures_are_read_back_with_equal_counts(tmp_path: Path, to: str) -> None:
    source = picture_folder(tmp_path / "samples")
    ballots = cast(default_folder(source), open_pool(source))
    ballots.close()
    count, ledger = export(default_folder(source), to, ties="soft")  # finds what was voted on by itself
    out = default_folder(source) / {"mmpo": "pairs", "pick_a_pic": "pairs.pick_a_pic.parquet"}[to]
    pairs, _ = load(out, ties="soft")
    assert count == ledger.used == len(pairs) == 6
    assert {p.caption for p in pairs} <= {f"picture {i}" for i in range(6)}
    assert {p.meta["provenance"]["seeds"]["chosen"] for p in pairs} <= set(range(70, 76)) if to == "mmpo" else True


def test_a_moved_run_takes_its_votes_along(tmp_path: Path) -> None:
    source = picture_folder(tmp_path / "here")
    cast(default_folder(source), open_pool(source)).close()
    source.rename(tmp_path / "there")
    assert export(tmp_path / "there" / "votes", "mmpo")[0] == 4


def test_while_a_server_takes_votes(tmp_path: Path) -> None:
    source = picture_folder(tmp_path)
    ballots = cast(default_folder(source), open_pool(source))
    assert export(default_folder(source), "mmpo")[0] == 4
    ballots.close()


@pytest.mark.parametrize(
    ("to", "ties", "error", "message"),
    [
        ("trl", "drop", DataError, "trl"), ("csv", "drop", RecipeError, "expected one of mmpo"),
        ("mmpo", "keep", RecipeError, "expected one of drop"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold(tmp_path: Path, to: str, ties: Any, error: type[Exception], message: str) -> None:
    source = picture_folder(tmp_path / "samples")
    ballots = cast(tmp_path / "votes", open_pool(source))
    with pytest.raises(error, match=message):
        write(ballots.standing(), open_pool(source), to, tmp_path / "out.jsonl", ties)
    assert not list(tmp_path.glob("out*"))


def test_no_preference_no_file(tmp_path: Path) -> None:
    ballots = cast(tmp_path / "votes", text_pool(), ["tie", "both_bad"])
    with pytest.raises(DataError, match="of 4 votes none prefers"):
        write(ballots.standing(), text_pool(), "mmpo", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = picture_folder(tmp_path / "samples")
    cast(default_folder(source), open_pool(source)).close()
    asked = [
        "demo",
        "export",
        str(source / "votes"),
        "--to",
        "pick_a_pic",
        "--out",
        str(tmp_path / "p.parquet"),
        "--ties",
        "soft",
    ]
    assert cli.main(asked) == 0
    assert f"{tmp_path / 'p.parquet'}: 6 pairs of format pick_a_pic\n8 rows = 6 used + 2 skipped" in capsys.readouterr().out
    assert cli.main(["demo", "export", str(tmp_path)]) == 3
    assert "no such file; `mmpo demo vote` writes it" in capsys.readouterr().err
