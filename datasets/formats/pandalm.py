"""PandaLM's test set: an instruction with its input, two responses, and three people's votes (1, 2, or 0 for a tie)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, answer, joined, judged, note_others
from mmpo.datasets.fields import shown, whole_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.tables import rows_of, write_json
from mmpo.datasets.wording import Unsayable, check_sayable, sided, single_texts, written
from mmpo.pair import Pair, text

VOTERS = ("annotator1", "annotator2", "annotator3")
META = ("idx", "motivation_app", "cmp_key", "input")
COLUMNS = ("instruction", "input", "response1", "response2")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= {"instruction", "response1", "response2", *VOTERS}


def pandalm(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row, by the majority of the votes, all of which `meta` keeps; `input` stands below the instruction.

    ties: "drop" skips rows that most people call a tie, "soft" keeps them with label 0.5 and response1 as chosen. Rows
    without a majority are skipped. root: not used.
    """
    return import_rows(rows_of(path), lambda row: [_pair(row, ties, ledger)], ledger)


def _pair(row: Row, ties: str, ledger: Ledger) -> Pair:
    votes = [_vote(row, name) for name in VOTERS]
    responses = answer(row.get("response1"), "response1"), answer(row.get("response2"), "response2")
    prompt = (text(joined(row, "instruction", "input")),)
    winner, count = Counter(votes).most_common(1)[0]
    if count < 2:
        raise Skip("no majority")
    meta = {name: row.get(name) for name in META if name != "input" or row.get(name)} | {"votes": votes}
    pair = judged(prompt, responses, {0: 0.5, 1: 0.0, 2: 1.0}[winner], ties, meta)
    note_others(row, (*COLUMNS, *VOTERS, *META), ledger)
    return pair


def _vote(row: Row, name: str) -> int:
    found = whole_field(row, name, -1)
    if found not in (0, 1, 2):
        raise BadField(name, "1, 2, or 0 for a tie", shown(row.get(name)))
    return found


def write_pandalm(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of one prompt and two answers as one list (or JSON lines, by the name); returns the number of rows.

    A pair that brings no votes gets three that agree. Raises DataError for conversations, soft labels other than ties, and
    all else that PandaLM cannot say (see `check_sayable`).
    """
    return write_json(path, written(pairs, _row, ledger))


def _row(pair: Pair, ledger: Ledger | None) -> dict[str, Any]:
    check_sayable(pair, "pandalm", ledger, can=("label",), meta=("position", "votes", *META))
    if pair.label not in (0.5, 1):
        raise Unsayable(pair.id, "PandaLM's votes are for one side or for a tie, not in between")
    prompt, *sides = single_texts(pair, "pandalm", ledger)
    (first, second), position = sided(pair, sides)
    more = str(pair.meta.get("input", ""))
    instruction = prompt.removesuffix(f"\n{more}") if more else prompt
    row = {name: pair.meta[name] for name in META[:3] if name in pair.meta}
    row |= {"instruction": instruction, "input": more if instruction != prompt else "", "response1": first, "response2": second}
    votes = pair.meta.get("votes") or [0 if pair.label == 0.5 else position] * 3
    return row | dict(zip(VOTERS, votes, strict=True))
