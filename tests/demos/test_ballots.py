"""The database of votes: what is served, what is stored, and that nothing is lost, doubled or deleted."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo.demos.ballots import CHOICES, FILE, Ballots, Refused
from mmpo.demos.pool import Pool
from mmpo.demos.standings import results
from mmpo.errors import DataError
from mmpo.lock import RunBusy
from tests.demos.pools import doubled_pool, text_pool


def opened(folder: Path, items: int = 6, mode: str = "vote", **more: object) -> Ballots:
    return Ballots(folder, text_pool(items, **more), mode)  # type: ignore[arg-type]


def nonce(number: int) -> str:
    return f"nonce-{number:06d}"


def test_a_voter_sees_everything_once_and_then_nothing(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    seen = []
    while served := ballots.serve("ann"):
        assert ballots.serve("ann") == served  # until it is voted on
        seen.append(served.left.item)
        assert {served.left.system, served.right.system} == {"base", "aligned"}
        ballots.vote("ann", served.id, "left", nonce(len(seen)))
        assert ballots.progress("ann") == (len(seen), 6)
    assert sorted(seen) == [str(i) for i in range(6)]
    assert ballots.progress("bob") == (0, 6)


def test_the_open_comparison_is_the_same_after_a_restart(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    before = [ballots.serve(voter) for voter in ("ann", "bob")]
    ballots.close()
    again = opened(tmp_path)
    assert [again.serve(voter) for voter in ("ann", "bob")] == before


def test_items_are_served_evenly(tmp_path: Path) -> None:
    ballots = opened(tmp_path, 5)
    for i in range(10):
        assert ballots.serve(f"voter {i}") is not None
    ballots.close()
    again = opened(tmp_path, 5)
    served = [found.left.item for i in range(15) if (found := again.serve(f"voter {i}"))]
    assert set(Counter(served).values()) == {3}


def test_undo_is_a_row_and_shows_the_comparison_again(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    first = ballots.serve("ann")
    assert first is not None
    ballots.vote("ann", first.id, "left", nonce(1))
    second = ballots.serve("ann")
    assert ballots.undo("ann", nonce(2)) and ballots.undo("ann", nonce(2))  # the same request twice
    assert ballots.serve("ann") == first and ballots.standing() == []
    ballots.vote("ann", first.id, "right", nonce(3))
    assert ballots.serve("ann") == second
    assert [(b.comparison, b.choice) for b in ballots.standing()] == [(first.id, "right")]
    assert ballots.undo("ann", nonce(4)) and not ballots.undo("ann", nonce(5))
    with sqlite3.connect(tmp_path / FILE) as db:
        assert [row[0] for row in db.execute("SELECT choice FROM votes ORDER BY number")] == ["left", "undo", "right", "undo"]


def test_a_vote_is_stored_once(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    served = ballots.serve("ann")
    assert served is not None
    for _ in range(3):
        ballots.vote("ann", served.id, "tie", nonce(1))
    with pytest.raises(Refused, match="another choice"):
        ballots.vote("ann", served.id, "left", nonce(1))
    ballots.vote("ann", served.id, "both_bad", nonce(2))  # changed their mind in another window
    assert [b.choice for b in ballots.standing()] == ["both_bad"]
    ballots.vote("ann", served.id, "tie", nonce(1))  # a retry that comes late changes nothing
    assert [b.choice for b in ballots.standing()] == ["both_bad"]


@pytest.mark.parametrize(
    ("voter", "choice", "key", "status"),
    [
        ("bob", "left", nonce(1), 404), ("ann", "undo", nonce(1), 400), ("ann", "LEFT", nonce(1), 400),
        ("ann", "left", "short", 400), ("ann", "left", "x" * 65, 400), ("ann", "left", "'; DROP TABLE votes", 400),
    ],
)  # fmt: skip
def test_what_is_refused_is_not_stored(tmp_path: Path, voter: str, choice: str, key: str, status: int) -> None:
    ballots = opened(tmp_path)
    served = ballots.serve("ann")
    assert served is not None
    with pytest.raises(Refused) as refusal:
        ballots.vote(voter, served.id, choice, key)
    assert refusal.value.status == status and ballots.standing() == []


def test_who_has_seen_who_was_who_votes_no_more(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    served = ballots.serve("ann")
    assert served is not None
    ballots.vote("ann", served.id, "left", nonce(1))
    ballots.finish("ann")
    assert ballots.serve("ann") is None and ballots.finished("ann") and not ballots.finished("bob")
    for refused in (lambda: ballots.vote("ann", served.id, "right", nonce(2)), lambda: ballots.undo("ann", nonce(3))):
        with pytest.raises(Refused) as refusal:
            refused()
        assert refusal.value.status == 409
    assert [b.choice for b in ballots.standing()] == ["left"]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from([*CHOICES, "undo"]), st.booleans()), max_size=25))
def test_any_history_is_what_a_list_would_say(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, str, bool]]
) -> None:
    """Voters act in any order, some requests arrive twice, and the server is started again in between."""
    folder = tmp_path_factory.mktemp("votes")
    ballots, model = opened(folder, 8), {"ann": [], "bob": []}  # type: ignore[var-annotated]
    for number, (voter, choice, twice) in enumerate(acts):
        served = ballots.serve(voter)
        for _ in range(2 if twice else 1):
            if choice == "undo":
                ballots.undo(voter, nonce(number))
            elif served:
                ballots.vote(voter, served.id, choice, nonce(number))
        if choice == "undo" and model[voter]:
            model[voter].pop()
        elif choice != "undo" and served:
            model[voter].append(choice)
        if number % 7 == 6:
            ballots.close()
            ballots = opened(folder, 8)
    for voter, said in model.items():
        assert sorted(b.choice for b in ballots.standing() if b.voter == voter) == sorted(said)
        assert ballots.progress(voter) == (len(said), 8)
    ballots.close()


def test_a_system_is_not_asked_against_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither anew nor where such a comparison was left open, and votes that were cast on one say nothing of systems."""
    pool = doubled_pool()
    with monkeypatch.context() as before:
        before.setattr(Pool, "asked", lambda pool, mode: [(a, b) for a, b in pool.matchups if a.system == b.system])
        ballots = Ballots(tmp_path, pool)
        for number in range(2):
            served = ballots.serve("ann")
            assert served is not None
            ballots.vote("ann", served.id, "left", nonce(number)) if number == 0 else None
        ballots.close()
    again = Ballots(tmp_path, pool)
    for voter in ("ann", *(f"voter {i}" for i in range(20))):
        served = again.serve(voter)
        assert served is not None and served.left.system != served.right.system
        again.vote(voter, served.id, "left", nonce(9)) if voter == "voter 19" else None
    told = results(again.standing(), pool, "vote", "ann")
    assert told["votes"] == 2 and told["win_rate"]["n"] == 1 and sum(row["wins"] for row in told["systems"]) == 1
    assert Ballots(tmp_path / "label", pool, "label").progress("ann") == (0, 4 * 6)
    again.close()


def test_a_vote_that_is_sent_again_after_the_end_is_acknowledged(tmp_path: Path) -> None:
    """As where its acknowledgement was lost, and another tab has finished meanwhile."""
    ballots = opened(tmp_path)
    served = ballots.serve("ann")
    assert served is not None
    ballots.vote("ann", served.id, "left", nonce(1))
    ballots.finish("ann")
    ballots.vote("ann", served.id, "left", nonce(1))
    for choice, key in (("right", nonce(1)), ("left", nonce(2))):
        with pytest.raises(Refused) as refusal:
            ballots.vote("ann", served.id, choice, key)
        assert refusal.value.status == 409
    assert [b.choice for b in ballots.standing()] == ["left"]
    ballots.close()


# Labelling


def test_labelling_ranks_with_fewer_comparisons_than_there_are(tmp_path: Path) -> None:
    """Ten answers of a hidden order: 40 of the 45 comparisons at most, and the best and the worst are found."""
    names = [f"{chr(ord('k') - i)}{i}" for i in range(10)]  # j, i, ... are the better the later
    pool = text_pool(1, names)
    ballots = Ballots(tmp_path, pool, "label")
    asked = 0
    while served := ballots.serve("ann"):
        better = "left" if served.left.system[1:] > served.right.system[1:] else "right"
        ballots.vote("ann", served.id, better, nonce(asked))
        asked += 1
    assert asked == ballots.progress("ann")[1] == 40
    (item,) = results(ballots.standing(), pool, "label", "ann")["items"]
    assert [row["name"] for row in item["answers"]] == names[::-1]


def test_labelling_asks_what_is_open(tmp_path: Path) -> None:
    """No answer is asked about a second time before all were asked about once, as long as nothing is known."""
    ballots = Ballots(tmp_path, text_pool(1, "abcdefgh"), "label")
    seen: Counter[str] = Counter()
    for number in range(4):
        served = ballots.serve("ann")
        assert served is not None
        seen.update((served.left.system, served.right.system))
        ballots.vote("ann", served.id, "left", nonce(number))
    assert set(seen.values()) == {1} and len(seen) == 8


def test_a_ranking_has_a_limit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="201 answers to one item, at most 200"):
        Ballots(tmp_path, text_pool(1, [f"{chr(200 + i)}" for i in range(201)]), "label")


# The file


def test_the_database_survives_power_cuts_and_others_cannot_read_it(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    modes = {
        name: ballots._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")
    }
    assert modes == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE votes (id)")


def newer(path: Path) -> None:
    ballots = opened(path.parent)
    ballots._db.execute("PRAGMA user_version = 2")
    ballots.close()


def labelled(path: Path) -> None:
    opened(path.parent, mode="label").close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "another program's"), (newer, "version 2, expected 1"), (labelled, "what `mmpo demo label` collected"),
        (lambda path: path.write_bytes(b"not a database " * 100), "expected a database of votes"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / FILE)  # type: ignore[operator]
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(DataError, match=message):
        opened(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_one_server_holds_a_folder(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    with pytest.raises(RunBusy):
        opened(tmp_path)
    ballots.close()
    opened(tmp_path).close()


def test_answers_that_are_gone_are_not_served(tmp_path: Path) -> None:
    ballots = opened(tmp_path, 4)
    for voter in range(8):
        served = ballots.serve(str(voter))
        assert served is not None
        ballots.vote(str(voter), served.id, "left", nonce(voter)) if voter % 2 else None
    ballots.close()
    smaller = Pool(Path("/nowhere"), text_pool(4).entries[:4])
    again = Ballots(tmp_path, smaller, "vote")
    assert all(found.left.item in "01" for voter in range(8) if (found := again.serve(str(voter))))
    assert results(again.standing(), smaller, "vote", "1")["votes"] == 4


def test_votes_on_answers_that_are_gone_are_no_progress_and_stand(tmp_path: Path) -> None:
    ballots = opened(tmp_path)
    while served := ballots.serve("ann"):
        ballots.vote("ann", served.id, "left", nonce(len(ballots.standing())))
    ballots.close()
    again = Ballots(tmp_path, Pool(Path("/nowhere"), text_pool(6).entries[:8]))
    assert again.progress("ann") == (4, 4) and again.tally("ann") == (4, 4, 2) and again.progress("bob") == (0, 4)
    assert [again.undo("ann", nonce(10 + i)) for i in range(6)] == [True] * 4 + [False] * 2
    assert again.tally("ann") == (0, 4, 2) and len(again.standing()) == 2
    again.close()


def test_progress_of_a_ranking_has_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Votes from when more was asked for, because there were more answers, are no more than what is asked for now."""
    pool = text_pool(1, "abcdefgh")
    with monkeypatch.context() as before:
        before.setattr("mmpo.demos.ballots.limits", lambda pool: {"0": 28})
        ballots = Ballots(tmp_path, pool, "label")
        for number in range(28):
            served = ballots.serve("ann")
            assert served is not None
            ballots.vote("ann", served.id, "left", nonce(number))
        ballots.close()
    again = Ballots(tmp_path, pool, "label")
    assert again.tally("ann") == (24, 24, 0) and again.serve("ann") is None
    again.close()
