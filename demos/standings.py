"""What is shown when the voting is over: who was who, and what all votes say, as plain values for a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

from mmpo.demos.ballots import Ballot, outcome
from mmpo.demos.pool import Entry, Mode, Pool
from mmpo.demos.rating import Outcome, krippendorff_alpha, ratings
from mmpo.errors import DataError

SHOWN = 200  # comparisons that are listed with their systems
ITEMS = 20  # items whose answers are ranked on the page


def results(ballots: Sequence[Ballot], pool: Pool, mode: Mode, voter: str) -> dict[str, Any]:
    """Win rate, table of systems or ranking of answers, agreement, and the voter's own comparisons with their systems.

    others: of the votes, those on answers that have changed since, or are not asked about any more; they count for nothing.
    """
    asked = {frozenset((a.id, b.id)) for a, b in pool.asked(mode)}
    here = [ballot for ballot in ballots if frozenset((ballot.left, ballot.right)) in asked]
    own = [ballot for ballot in ballots if ballot.voter == voter]
    found = {
        "mode": mode,
        "votes": len(ballots),
        "others": len(ballots) - len(here),
        "voters": len({ballot.voter for ballot in ballots}),
        "who": [_named(ballot, pool) for ballot in own[:SHOWN] if ballot.left in pool.by_id and ballot.right in pool.by_id],
        "own": len(own),
    }
    return found | agreement(here, pool, mode) | (ranking(here, pool) if mode == "label" else table(here, pool))


def agreement(ballots: Sequence[Ballot], pool: Pool, mode: Mode) -> dict[str, Any]:
    """Krippendorff's alpha of what was preferred, over the pairs of answers that several voters saw; `why` where it is None.

    ballots: on answers of the pool. Chance is estimated from how often each label is used, so labels have to recur from pair to
    pair: that of one system or the other where there are two and each answer has one, else of the lower or the higher id, which
    are as good as drawn. Besides them "tie" and "both_bad".
    """
    by_system = mode == "vote" and len(pool.systems) == 2 and all(entry.system for entry in pool.entries)
    units: dict[tuple[str, str], list[Hashable]] = defaultdict(list)
    for ballot in ballots:
        first, second = sorted((ballot.left, ballot.right), key=lambda id: pool.by_id[id].system if by_system else id)
        preferred = {"left": ballot.left, "right": ballot.right}.get(ballot.choice)
        units[first, second].append(ballot.choice if preferred is None else preferred == first)
    alpha = krippendorff_alpha(units.values())
    why = "no comparison was voted on by two people"
    if any(len(labels) > 1 for labels in units.values()):
        why = "every vote on what several people saw says the same, so that chance would agree as well"
    return {"agreement": alpha, "why": why if alpha is None else None}


def table(ballots: Sequence[Ballot], pool: Pool) -> dict[str, Any]:
    """One row a system, best first; with two systems the win rate of the second of the source over the first."""
    outcomes = [vote for ballot in ballots if (vote := outcome(ballot, pool, "vote"))]
    two = len(pool.systems) == 2
    rows = ratings(outcomes, pool.systems, draws=2000 if two else 300)  # only more names are rated anew for each draw
    found: dict[str, Any] = {"systems": [asdict(row) for row in rows]}
    if two and outcomes:
        before, after = pool.systems
        (rate,) = (row.win_rate for row in rows if row.name == after)
        found["win_rate"] = asdict(rate) | {"of": after, "over": before}
    return found


def ranking(ballots: Sequence[Ballot], pool: Pool) -> dict[str, Any]:
    """The answers of the first items by Bradley-Terry, best first, and how many items there are."""
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for ballot in ballots:
        if found := outcome(ballot, pool, "label"):
            outcomes[ballot.item].append(found)
    items = []
    for item, entries in list(pool.items.items())[:ITEMS]:
        rows = ratings(outcomes[item], [entry.id for entry in entries], draws=60)
        ranked = [asdict(row) | _entry(pool.by_id[row.name]) for row in rows]
        items.append({"prompt": caption(entries[0]), "answers": ranked})
    return {"items": items, "of": len(pool.items)}


def _entry(entry: Entry) -> dict[str, Any]:
    shown = {"text": said(entry)} if entry.kind == "text" else {"media": f"/vote/entry/{entry.id}", "kind": entry.kind}
    return shown | {"name": entry.system or "unnamed"}


def said(entry: Entry) -> str:
    """The words of a text; one that has changed on the disk since is no reason to stop."""
    try:
        return str(entry.block.data)
    except DataError:
        return "This answer cannot be read any more."


def _named(ballot: Ballot, pool: Pool) -> dict[str, Any]:
    left, right = pool.by_id[ballot.left], pool.by_id[ballot.right]
    names = {"left": left.system or "unnamed", "right": right.system or "unnamed"}
    return {"prompt": caption(left), "choice": ballot.choice} | names


def caption(entry: Entry) -> str:
    """The words of an entry's prompt."""
    return " ".join(str(block.data) for block in entry.prompt if block.kind == "text")
