"""Votes become preference pairs, each with who voted, when, on what: a data set that `mmpo train` reads.

Every vote that stands is a row of the ledger: used, or left out as a tie, as "both bad", or because an answer is gone or has
changed since. Several voters on the same two answers give several pairs.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from mmpo.datasets.formats.mmpo import TABLE
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.media_files import FOLDER
from mmpo.datasets.pairing import digest, pair_id
from mmpo.datasets.tables import sync
from mmpo.demos.ballots import FILE, Ballot, about, opened, standing
from mmpo.demos.pool import Entry, Pool, open_pool
from mmpo.errors import DataError, RecipeError, RunFailed
from mmpo.lock import RunBusy, RunLock
from mmpo.media import ForbiddenPath
from mmpo.pair import Pair

Ties = Literal["drop", "soft"]
NAMES = {"mmpo": "pairs", "trl": "pairs.trl.jsonl", "pick_a_pic": "pairs.pick_a_pic.parquet"}  # format: what it is called
ASIDE = ".export"  # the folder of the lock of who writes there, and of what is not whole yet
BUSY = "another export is being written there; try again when it is done"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def export(
    folder: Path, to: str, out: Path | None = None, ties: Ties = "drop", source: Path | None = None
) -> tuple[int, Ledger]:
    """Write the votes of a folder as pairs; returns their number and the ledger of the votes.

    to: mmpo (a folder), trl or pick_a_pic. out: default a name inside `folder`. source: what was voted on, where it is not
    any more where it was. May run while a server takes votes. Raises DataError for what the format cannot hold, RecipeError
    for a place where nothing can be written, RunFailed for a disk that takes no more, RunBusy as `write` does.
    """
    with closing(opened(folder / FILE, readonly=True)) as db:
        place, mode = about(db)
        ballots = standing(db)
    out = out or folder / NAMES.get(to, to)
    pool = open_pool(source or (folder / place), mode)
    try:
        return write(ballots, pool, to, out, ties)
    except OSError as error:
        what = f"--out {out}: cannot be written ({error.strerror or error});"
        if error.errno in FULL:
            raise RunFailed(f"{what} make room there, or choose another place") from error
        raise RecipeError(f"{what} choose another place") from error


def write(ballots: Iterable[Ballot], pool: Pool, to: str, out: Path, ties: Ties = "drop") -> tuple[int, Ledger]:
    """Write votes as pairs in one of the formats, whole or not at all.

    Raises RecipeError for any other format, DataError where nothing is left, RunBusy while another process or thread writes
    into the same folder: exports that have media/ in common would take them away from each other.
    """
    if to not in NAMES:
        raise RecipeError(f"--to {to}: expected one of {', '.join(NAMES)}")
    if ties not in get_args(Ties):
        raise RecipeError(f"--ties {ties}: expected one of {', '.join(get_args(Ties))}")
    ledger, cast, tried = Ledger(), list(ballots), Ledger("skip")  # the first refuses what the format cannot hold
    if not any(True for _ in pairs_of(cast, pool, ties, tried)):
        none = f"of {len(cast)} votes none prefers one answer that is still there to another"
        raise DataError(f"no pairs to write: {none}; nothing was written\n{tried}")
    writer: Any = getattr(importlib.import_module(f"mmpo.datasets.formats.{to}"), f"write_{to}")
    out = Path(os.path.realpath(out))
    try:
        lock = RunLock(_place(out, to == "mmpo") / ASIDE)
    except RunBusy as error:
        raise RunBusy(f"{out}: {BUSY}") from error
    with lock:
        return _whole(writer, pairs_of(cast, pool, ties, ledger), out, ledger, to == "mmpo"), ledger


def _place(out: Path, folder: bool) -> Path:
    """The folder that ASIDE is made in: beside what is written, or inside of a folder beside which nothing can be made."""
    return out if folder and out.is_dir() and not os.access(out.parent, os.W_OK | os.X_OK) else out.parent


def _whole(writer: Callable[..., int], pairs: Iterator[Pair], out: Path, ledger: Ledger, folder: bool) -> int:
    """Files and tables are replaced as a whole by who writes them; a new folder is made aside and gets its name at the end.

    An empty folder that is there stays, as it may be a mount point: it gets what was made inside of it, the table last.
    """
    there = out.is_dir()
    made = (out if there else out.parent) / ASIDE / out.name
    if not folder or (out.exists() and not (there and _vacant(out, made))):
        return writer(pairs, out, ledger)
    shutil.rmtree(made, ignore_errors=True)  # of an export that was killed
    try:
        count = writer(pairs, made, ledger)
    except BaseException:
        _clear(made)
        raise
    _fill(out, made) if there else os.rename(made, out)
    sync(out if there else out.parent)
    _clear(made)
    return count


def _vacant(out: Path, made: Path) -> bool:
    """Whether a folder holds nothing, but for what an export that was killed has left."""
    return {path.name for path in out.iterdir()} <= {ASIDE, *([FOLDER] if made.is_dir() else [])}


def _fill(out: Path, made: Path) -> None:
    """Move a data set that was made inside of a folder to its place. Until the table is there, the folder holds no data set."""
    if (made / FOLDER).is_dir():
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        os.rename(made / FOLDER, out / FOLDER)
    os.rename(made / TABLE, out / TABLE)


def _clear(made: Path) -> None:
    """Remove what was made aside, and the folder of it where it holds no lock."""
    shutil.rmtree(made, ignore_errors=True)
    with contextlib.suppress(OSError):
        made.parent.rmdir()


def told(place: str, to: str, ties: str, count: int, ledger: Ledger) -> str:
    """What was written, for people; where ties are kept also that a run has to be told to keep them."""
    more = "\nties have label 0.5; train with data.ties=soft, or they are left out again" if ties == "soft" else ""
    return f"{place}: {count} pairs of format {to}\n{ledger}{more}"


def pairs_of(ballots: Iterable[Ballot], pool: Pool, ties: Ties, ledger: Ledger) -> Iterator[Pair]:
    """A Pair for each vote that prefers one answer; with ties "soft" also for ties, with label 0.5. The rest is counted.

    group is the digest of the prompt. meta: seeds, and provenance with annotator, time, comparison and systems.
    """
    seen: Counter[str] = Counter()
    for ballot in ballots:
        left, right = pool.by_id.get(ballot.left), pool.by_id.get(ballot.right)
        if left is None or right is None:
            ledger.skip(ballot.comparison, "an answer that is no longer in the source")
        elif ballot.choice == "both_bad":
            ledger.skip(ballot.comparison, "both bad")
        elif ballot.choice == "tie" and ties == "drop":
            ledger.skip(ballot.comparison, "tie")
        else:
            try:
                pair = _pair(ballot, *((right, left) if ballot.choice == "right" else (left, right)), seen)
            except ForbiddenPath:  # its message names the file, and with it maybe the system
                ledger.skip(ballot.comparison, "an answer that has changed since")
                continue
            ledger.used += 1
            yield pair


def _pair(ballot: Ballot, chosen: Entry, rejected: Entry, seen: Counter[str]) -> Pair:
    better, worse = (chosen.block,), (rejected.block,)
    name = pair_id(chosen.prompt, better, worse)
    seen[name] += 1
    sides = {"chosen": chosen, "rejected": rejected}
    provenance = {
        "annotator": ballot.voter,
        "time": datetime.fromtimestamp(ballot.time, UTC).isoformat(timespec="seconds"),
        "comparison": ballot.comparison,
        "systems": {side: entry.system for side, entry in sides.items()},
        "seeds": {side: entry.seed for side, entry in sides.items()},
    }
    return Pair(
        name if seen[name] == 1 else f"{name}#{seen[name]}", chosen.prompt, better, worse,
        label=0.5 if ballot.choice == "tie" else 1.0,
        group=digest(*chosen.prompt) if chosen.prompt else chosen.item, meta={"provenance": provenance},
    )  # fmt: skip
