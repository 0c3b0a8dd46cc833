"""LLaVA's conversations (JSON): id, image (a path, several, or none), and turns of human and gpt with <image> in their text.

These are questions with known answers, what builders of pairs start from: a row has one side, the last turn, and the turns
before it are the prompt. With rejected_conversations, as POVID writes them, a row is a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import SHAREGPT, TABLES, Dialect, note_others, shared_prompt, text_pair
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.media_files import write_pictured
from mmpo.datasets.pictures import Album, Sides, root_of
from mmpo.datasets.placeholders import LLAVA, pictures_of, tagged
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import Unsayable, check_boundary, check_sayable, with_roles
from mmpo.pair import Block, Pair

COLUMNS = ("conversations", "rejected_conversations", "id", "model")
SHARED = Dialect("from", "value", SHAREGPT)


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and "conversations" in columns and not columns & {"chosen", "rejected", "kto_tag"}


def llava(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row: only `chosen`, its last turn, or both sides where there are rejected_conversations. `meta` keeps the id,
    which is that of the picture in LLaVA's own data, where several rows have it.

    The end of a line after <image> belongs to it. root: where paths start from. ties: not used, there are none.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, album)], ledger, own_ids=False)


def _pair(row: Row, album: Album) -> Pair:
    prompt, chosen, rejected = (LLAVA.blanks(side) for side in _sides(row))
    meta = {"id": row["id"]} if row.get("id") is not None else {}
    pair = text_pair(*album.placed((prompt, chosen, rejected), album.named(row, "image", "images")), meta=meta)
    note_others(row, COLUMNS, album.ledger)
    return pair


def _sides(row: Row) -> Sides:
    turns = SHARED.blocks(row.get("conversations"), "conversations")
    if row.get("rejected_conversations") is not None:
        others = SHARED.blocks(row["rejected_conversations"], "rejected_conversations")
        return shared_prompt(turns, others, "conversations, rejected_conversations")
    if len(turns) < 2:
        raise BadField("conversations", "a question and an answer", f"{len(turns)} turn", "no answer")
    return turns[:-1], turns[-1:], ()


def write_llava(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write chosen answers as conversations, and rejected ones, where there are any, as POVID does; returns the number of rows.

    One list, or JSON lines by the name, pictures beside it. Text without roles becomes a human's turn and gpt's answer, and is
    counted. Raises DataError for pairs without a chosen side, and for what a conversation cannot say.
    """
    return write_pictured(pairs, path, ledger, _row)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "llava", ledger, can=("unpaired",), meta=("id",), pictures="prompt")
    if not pair.chosen:
        raise Unsayable(pair.id, "a conversation of LLaVA is one that was liked, and this pair has a rejected side only")
    told = tagged(with_roles(pair, ledger), LLAVA)
    check_boundary(told, "llava")
    row: dict[str, Any] = {"id": pair.meta.get("id", pair.id)}
    if pictures := [put(block) for block in pictures_of(pair.prompt)]:
        row["image"] = pictures[0] if len(pictures) == 1 else pictures
    row["conversations"] = SHARED.messages(told.prompt + told.chosen)
    return row | ({"rejected_conversations": SHARED.messages(told.prompt + told.rejected)} if told.rejected else {})
