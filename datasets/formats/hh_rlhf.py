"""HH-RLHF: chosen and rejected are whole transcripts of Human: and Assistant:, whose common first turns are the prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, Blocks, note_others, shared_prompt, text_pair
from mmpo.datasets.fields import checked_text, shown
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.tables import rows_of, write_json
from mmpo.datasets.wording import Unsayable, check_boundary, check_sayable, with_roles, written
from mmpo.pair import Block, Pair, Role, text

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
NAMES = {role: name for name, role in SPEAKERS.items()}


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns == {"chosen", "rejected"}


def hh_rlhf(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row. Sides that part before their last turn keep all the turns they do not share.

    ties, root: not used. Rows whose answer is blank are skipped, text before the first speaker is refused.
    """
    return import_rows(rows_of(path), lambda row: [_pair(row, ledger)], ledger)


def _pair(row: Row, ledger: Ledger) -> Pair:
    pair = text_pair(*shared_prompt(_turns(row, "chosen"), _turns(row, "rejected")))
    note_others(row, ("chosen", "rejected"), ledger)
    return pair


def _turns(row: Row, name: str) -> Blocks:
    """A transcript's turns; the blank after the colon is no part of them."""
    if row.get(name) is None:
        raise BadField(name, "a transcript", "nothing", f"missing {name}")
    before, *rest = TURN.split(checked_text(row[name], name))
    if before or not rest:
        raise BadField(name, "a transcript that starts with Human: or Assistant:", shown(row[name]), "no transcript")
    return tuple(text(said.removeprefix(" "), SPEAKERS[who]) for who, said in zip(rest[::2], rest[1::2], strict=True))


def write_hh_rlhf(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of text as transcripts in JSON lines (gzipped where `path` ends in .gz); returns the number of rows.

    Text without roles becomes Human's turn and the Assistant's, and is counted. Raises DataError for other roles than these
    two, for text in which a speaker would seem to begin, and for what a transcript cannot say (see `check_sayable`).
    """
    return write_json(path, written(pairs, _row, ledger))


def _row(pair: Pair, ledger: Ledger | None) -> dict[str, Any]:
    check_sayable(pair, "hh_rlhf", ledger, can=(), meta=())
    check_boundary(pair, "hh_rlhf")
    told = with_roles(pair, ledger)
    prompt, chosen, rejected = ("".join(_said(b, pair.id) for b in side) for side in (told.prompt, told.chosen, told.rejected))
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def _said(turn: Block, id: str) -> str:
    if turn.role not in NAMES:
        raise Unsayable(id, f"a transcript of HH-RLHF has Human and Assistant, found {turn.role}")
    said = str(turn.data)
    if SPEAKER.search(said):
        raise Unsayable(id, "a turn holds 'Human:' or 'Assistant:' at the start of a paragraph, as only speakers may")
    return f"\n\n{NAMES[turn.role]}: {said}"
