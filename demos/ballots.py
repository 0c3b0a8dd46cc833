"""Votes in a database of their own: a vote is acknowledged once it is on the disk, once, and nothing is deleted.

SQLite in WAL mode with synchronous=FULL. Which side an answer stands on is drawn when its comparison is served, and stored, so
that a voter finds the same comparison after a reload, another server or a kill. Taking a vote back is a row as well. All
methods belong to one thread at a time; a lock in the folder keeps other servers away, reading is free.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import secrets
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mmpo.datasets.pairing import digest
from mmpo.demos.pool import Entry, Mode, Pool
from mmpo.demos.rating import Outcome, gains, wins_of
from mmpo.errors import DataError
from mmpo.lock import RunLock

Choice = Literal["left", "right", "tie", "both_bad"]
CHOICES = get_args(Choice)
UNDO = "undo"
MOST = 200  # answers to one item that are ranked
NONCE = re.compile(r"[A-Za-z0-9_-]{8,64}")
FILE = "votes.db"
APPLICATION, VERSION = 0x6D6D706F, 1  # "mmpo"; what a file of ours says of itself
SCHEMA = """
CREATE TABLE source (path TEXT NOT NULL, mode TEXT NOT NULL);
CREATE TABLE items (id TEXT PRIMARY KEY, prompt TEXT NOT NULL);
CREATE TABLE entries (
    id TEXT PRIMARY KEY, item TEXT NOT NULL REFERENCES items, system TEXT NOT NULL, seed INTEGER, digest TEXT NOT NULL
);
CREATE TABLE comparisons (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, voter TEXT NOT NULL, item TEXT NOT NULL REFERENCES items,
    left_entry TEXT NOT NULL REFERENCES entries, right_entry TEXT NOT NULL REFERENCES entries, served REAL NOT NULL
);
CREATE INDEX comparisons_of ON comparisons (voter);
CREATE TABLE votes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, comparison TEXT NOT NULL REFERENCES comparisons (id), voter TEXT NOT NULL,
    nonce TEXT NOT NULL, choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'both_bad', 'undo')),
    time REAL NOT NULL, UNIQUE (comparison, voter, nonce)
);
CREATE INDEX votes_on ON votes (comparison, number);
CREATE INDEX votes_of ON votes (voter, number);
CREATE TABLE voters (id TEXT PRIMARY KEY, finished REAL NOT NULL);
CREATE VIEW standing AS
    SELECT comparison, voter, choice, time, number FROM votes AS v WHERE choice != 'undo'
    AND NOT EXISTS (SELECT 1 FROM votes AS later WHERE later.comparison = v.comparison AND later.number > v.number);
"""


class Refused(ValueError):
    """A vote that is not stored. status: of HTTP; 400 malformed, 404 no such comparison of this voter, 409 against another."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Served:
    """A comparison as a voter sees it."""

    id: str
    left: Entry
    right: Entry


@dataclass(frozen=True)
class Ballot:
    """A vote that stands. left, right: ids of entries. time: seconds since 1970."""

    comparison: str
    voter: str
    item: str
    left: str
    right: str
    choice: str
    time: float


class Ballots:
    """The votes of a folder on a pool. Raises DataError for a file that is none of ours, RunBusy where a server holds it."""

    def __init__(self, folder: Path, pool: Pool, mode: Mode = "vote", clock: Callable[[], float] = time.time) -> None:
        self.pool, self.mode, self._clock = pool, mode, clock
        self._asked = pool.asked(mode)
        self._limits = limits(pool) if mode == "label" else {}
        self._folder = folder.resolve()
        self._lock = RunLock(folder)
        try:
            self._db = opened(folder / FILE)
            self._describe()
            self._remember()
        except BaseException:
            self._lock.release()
            raise

    def _describe(self) -> None:
        """The items and entries of the pool, as rows that votes refer to, and where they are, seen from the folder."""
        known = self._db.execute("SELECT mode FROM source").fetchone()
        if known and known[0] != self.mode:
            raise DataError(f"{self._folder}: holds what `mmpo demo {known[0]}` collected; choose another folder with --out")
        with self._writing() as db:
            db.execute("DELETE FROM source")
            db.execute("INSERT INTO source VALUES (?, ?)", (os.path.relpath(self.pool.source, self._folder), self.mode))
            for item, entries in self.pool.items.items():
                db.execute("INSERT OR IGNORE INTO items VALUES (?, ?)", (item, digest(*entries[0].prompt)))
                for e in entries:
                    row = (e.id, item, e.system, e.seed, e.digest)
                    db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?)", row)

    def _remember(self) -> None:
        """How often each two answers were served, and to whom: what the next question depends on."""
        self._place = {frozenset((a.id, b.id)): i for i, (a, b) in enumerate(self._asked)}
        self._served = np.zeros(len(self._place), np.int64)
        self._seen: dict[str, set[int]] = defaultdict(set)
        for voter, left, right in self._db.execute("SELECT voter, left_entry, right_entry FROM comparisons"):
            if (place := self._place.get(frozenset((left, right)))) is not None:
                self._note(voter, place)

    def _note(self, voter: str, place: int) -> None:
        self._served[place] += 1
        self._seen[voter].add(place)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on the disk when this returns, or as if it had never been."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    # What a voter is asked

    def serve(self, voter: str) -> Served | None:
        """The voter's open comparison, or a new one; None when there is nothing left to ask, or the voter has finished."""
        if self.finished(voter):
            return None
        if found := self._open(voter):
            return found
        couple = self._next(voter)
        if couple is None:
            return None
        left, right = couple if secrets.randbits(1) else couple[::-1]
        id = secrets.token_urlsafe(16)
        with self._writing() as db:
            row = (id, voter, left.item, left.id, right.id, self._clock())
            columns = "id, voter, item, left_entry, right_entry, served"
            db.execute(f"INSERT INTO comparisons ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)
        self._note(voter, self._place[frozenset((left.id, right.id))])
        return Served(id, left, right)

    def _open(self, voter: str) -> Served | None:
        """What was taken back last, else what was served and not voted on."""
        rows = self._db.execute(
            "SELECT id, left_entry, right_entry, (SELECT MAX(number) FROM votes WHERE comparison = c.id) AS last "
            "FROM comparisons c WHERE voter = ? AND id NOT IN (SELECT comparison FROM standing WHERE voter = ?) "
            "ORDER BY last DESC NULLS LAST, number DESC",
            (voter, voter),
        )
        known = self.pool.by_id
        return next((Served(id, known[a], known[b]) for id, a, b, _ in rows if frozenset((a, b)) in self._place), None)

    def _next(self, voter: str) -> tuple[Entry, Entry] | None:
        """Two answers that this voter has not compared."""
        seen = self._seen[voter]
        if self.mode == "label":
            return self._informative(seen)
        often = self._served.copy()
        often[list(seen)] = np.iinfo(np.int64).max
        if len(seen) == len(often):
            return None
        return self._asked[secrets.choice(np.flatnonzero(often == often.min()).tolist())]

    def _informative(self, seen: set[int]) -> tuple[Entry, Entry] | None:
        """Of the item with the most left to ask, the comparison whose outcome would tell the most."""
        asked = Counter(self._asked[place][0].item for place in seen)
        open = {item: asked[item] / limit for item, limit in self._limits.items() if asked[item] < limit}
        if not open:
            return None
        entries = self.pool.items[min(open, key=lambda item: (open[item], secrets.randbits(32)))]
        votes = [found for b in self.standing(entries[0].item) if (found := outcome(b, self.pool, "label"))]
        worth = gains(wins_of(votes, [entry.id for entry in entries]))
        left = []
        for i, j in itertools.combinations(range(len(entries)), 2):
            place = self._place.get(frozenset((entries[i].id, entries[j].id)))
            if place is not None and place not in seen:
                left.append((worth[i, j], secrets.randbits(32), i, j))
        _, _, i, j = max(left)
        return entries[i], entries[j]

    def progress(self, voter: str) -> tuple[int, int]:
        """How many votes of this voter stand on what is asked here, and how many there can be."""
        return self.tally(voter)[:2]

    def tally(self, voter: str) -> tuple[int, int, int]:
        """`progress`, and how many votes stand on answers that have changed since, or are not asked about any more."""
        cast = self._cast(voter)
        places = [place for _, place in cast if place is not None]
        others = len(cast) - len(places)
        if self.mode == "vote":
            return len(places), len(self._place), others
        done = Counter(self._asked[place][0].item for place in places)
        return sum(min(done[item], limit) for item, limit in self._limits.items()), sum(self._limits.values()), others

    def _cast(self, voter: str) -> list[tuple[str, int | None]]:
        """The comparisons on which a vote of this voter stands, the last one first, and the place of its two answers."""
        rows = self._db.execute(
            "SELECT s.comparison, c.left_entry, c.right_entry FROM standing s JOIN comparisons c ON c.id = s.comparison "
            "WHERE s.voter = ? ORDER BY s.number DESC",
            (voter,),
        )
        return [(comparison, self._place.get(frozenset(couple))) for comparison, *couple in rows]

    def served(self, voter: str, comparison: str) -> Served:
        """A comparison that was served to this voter. Raises Refused for any other."""
        if not comparison.isascii():  # SQLite takes no half of a surrogate pair
            raise Refused(404, "there is no such comparison; reload the page")
        found = self._db.execute(
            "SELECT left_entry, right_entry FROM comparisons WHERE id = ? AND voter = ?", (comparison, voter)
        ).fetchone()
        if found is None or not all(id in self.pool.by_id for id in found):
            raise Refused(404, "there is no such comparison; reload the page")
        return Served(comparison, *(self.pool.by_id[id] for id in found))

    # What a voter says

    def vote(self, voter: str, comparison: str, choice: str, nonce: Any) -> None:
        """Store a vote; when this returns it is on the disk. The same again, with its nonce, changes nothing.

        Another vote on the same comparison, with a nonce of its own, takes the place of the first. Raises Refused, also for a
        voter who has finished, unless the vote was stored before.
        """
        if choice not in CHOICES:
            raise Refused(400, f"choice: expected one of {', '.join(CHOICES)}")
        self.served(voter, _checked(nonce) and comparison)
        if self.finished(voter) and self._stored(comparison, voter, nonce) is None:
            raise Refused(409, "this voter has finished and seen who was who; no more votes are taken")
        self._add(comparison, voter, nonce, choice)

    def undo(self, voter: str, nonce: Any) -> bool:
        """Take back the last vote of this voter that stands on what is asked here; False when there is none.

        Idempotent by nonce. Raises Refused.
        """
        again = "SELECT 1 FROM votes WHERE voter = ? AND nonce = ? AND choice = ?"
        if self._db.execute(again, (voter, _checked(nonce), UNDO)).fetchone():
            return True
        if self.finished(voter):
            raise Refused(409, "this voter has finished and seen who was who; no vote can be taken back")
        last = next((comparison for comparison, place in self._cast(voter) if place is not None), None)
        if last is not None:
            self._add(last, voter, nonce, UNDO)
        return last is not None

    def _add(self, comparison: str, voter: str, nonce: str, choice: str) -> None:
        with self._writing() as db:
            stored = self._stored(comparison, voter, nonce)
            if stored is None:
                row = (comparison, voter, nonce, choice, self._clock())
                db.execute("INSERT INTO votes (comparison, voter, nonce, choice, time) VALUES (?, ?, ?, ?, ?)", row)
            elif stored != choice:
                raise Refused(409, "this nonce has been used for another choice")

    def _stored(self, comparison: str, voter: str, nonce: str) -> str | None:
        """The choice that was stored with this nonce."""
        known = "SELECT choice FROM votes WHERE comparison = ? AND voter = ? AND nonce = ?"
        found = self._db.execute(known, (comparison, voter, nonce)).fetchone()
        return found and str(found[0])

    def finish(self, voter: str) -> None:
        """End the voting of this voter, who may then see who was who."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO voters VALUES (?, ?)", (voter, self._clock()))

    def finished(self, voter: str) -> bool:
        return self._db.execute("SELECT 1 FROM voters WHERE id = ?", (voter,)).fetchone() is not None

    # What was said

    def standing(self, item: str | None = None) -> list[Ballot]:
        """The votes that stand, each voter's last on each comparison, in the order in which they came."""
        return standing(self._db, item)

    def close(self) -> None:
        self._db.close()
        self._lock.release()


def limits(pool: Pool) -> dict[str, int]:
    """How many comparisons of each item a voter is asked for when labelling: n log2 n of them rank n answers.

    Raises DataError for an item with more than MOST answers.
    """
    pairs = Counter(a.item for a, _ in pool.matchups)
    sizes = {item: len(pool.items[item]) for item in pairs}
    if (largest := max(sizes.values())) > MOST:
        raise DataError(
            f"{pool.source}: {largest} answers to one item, at most {MOST} can be ranked; prompts.jsonl groups them"
        )
    return {item: min(count, sizes[item] * math.ceil(math.log2(sizes[item]))) for item, count in pairs.items()}


def _checked(nonce: Any) -> str:
    if not isinstance(nonce, str) or not NONCE.fullmatch(nonce):
        raise Refused(400, "nonce: expected 8 to 64 letters, digits, - and _")
    return nonce


def standing(db: sqlite3.Connection, item: str | None = None) -> list[Ballot]:
    """The votes of a database that stand, on all items or one."""
    rows = db.execute(
        "SELECT s.comparison, s.voter, c.item, c.left_entry, c.right_entry, s.choice, s.time "
        "FROM standing s JOIN comparisons c ON c.id = s.comparison WHERE ?1 IS NULL OR c.item = ?1 ORDER BY s.number",
        (item,),
    )
    return [Ballot(*row) for row in rows]


def about(db: sqlite3.Connection) -> tuple[str, Mode]:
    """Where what was voted on is, seen from the folder of the database, and how it was voted on."""
    path, mode = db.execute("SELECT path, mode FROM source").fetchone()
    return path, mode


def outcome(ballot: Ballot, pool: Pool, mode: Mode) -> Outcome | None:
    """A vote as one of its two names over the other: by system and prompt, when labelling by entry and comparison.

    Answers to one prompt under several seeds are several items, but no independent ones. None for an entry that is no longer
    in the pool, where a system has no name, and by system for two answers of one.
    """
    left, right = pool.by_id.get(ballot.left), pool.by_id.get(ballot.right)
    if left is None or right is None:
        return None
    share = {"left": 1.0, "right": 0.0}.get(ballot.choice, 0.5)
    if mode == "label":
        return Outcome(ballot.comparison, left.id, right.id, share)
    named = left.system and right.system and left.system != right.system
    unit = digest(*left.prompt) if left.prompt else ballot.item
    return Outcome(unit, left.system, right.system, share) if named else None


def opened(file: Path, readonly: bool = False) -> sqlite3.Connection:
    """A database of votes, made where there is none. Raises DataError for a file that is something else."""
    if readonly and not file.is_file():
        raise DataError(f"{file}: no such file; `mmpo demo vote` writes it")
    if not file.exists():
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))  # who voted how is nobody else's business
    db = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        _check(db, file)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", f"query_only = {readonly}"):
            db.execute(f"PRAGMA {pragma}")
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise DataError(f"{file}: expected a database of votes, found something else ({error})") from error
        raise
    return db


def _check(db: sqlite3.Connection, file: Path) -> None:
    """Make the tables in an empty database; refuse another program's, and other versions of ours."""
    (application,), (version,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        db.executescript(f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;")
    elif application != APPLICATION:
        raise DataError(f"{file}: expected a database of votes, found another program's; choose another folder with --out")
    elif version != VERSION:
        raise DataError(f"{file}: written by another version of mmpo: votes of version {version}, expected {VERSION}")
