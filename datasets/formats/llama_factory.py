"""LLaMA-Factory's rankings: sharegpt (conversations, chosen, rejected) and alpaca (instruction, input, chosen, rejected).

With kto_tag a row has one answer: the last of its conversations (or messages), or `output` beside an instruction. Pictures
are in the column images, in the order of the tags <image> in the text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import (
    EXTRAS,
    SHAREGPT,
    TABLES,
    Blocks,
    Dialect,
    answer,
    extras,
    joined,
    note_others,
    refuse_media,
    text_pair,
    unpaired,
)
from mmpo.datasets.fields import checked_text, flag_field, list_field, shown
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.media_files import write_pictured
from mmpo.datasets.pictures import Album, root_of
from mmpo.datasets.placeholders import PLAIN, pictures_of, tagged
from mmpo.datasets.tables import rows_of, write_json
from mmpo.datasets.wording import (
    Unsayable,
    check_boundary,
    check_sayable,
    extra_cells,
    has_roles,
    single_texts,
    with_roles,
)
from mmpo.pair import Block, Pair, text

SIDES = {"chosen", "rejected"}
COLUMNS = (
    "conversations", "messages", "instruction", "input", "output", "system", "history", "tools", "kto_tag", *SIDES, *EXTRAS,
)  # fmt: skip
OPENAI, SHARED = Dialect(), Dialect("from", "value", SHAREGPT)


def recognises(kind: str, columns: frozenset[str]) -> bool:
    spoken = "conversations" in columns and (columns >= SIDES or "kto_tag" in columns)
    alpaca = "instruction" in columns and (columns >= SIDES or columns >= {"output", "kto_tag"})
    return kind in TABLES and (spoken or alpaca or columns >= {"messages", "kto_tag"})


def llama_factory(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Pair]:
    """One Pair a row. Alpaca rows are text without roles, unless `system` or `history` make them a conversation.

    `input` stands below the instruction, as LLaMA-Factory puts it. ties: as in the trl format. root: where paths of pictures
    start from. Rows with video or sound are refused, and those with tools or calls of functions: their text depends on a
    template that is not in the data.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, ties, album)], ledger)


def _pair(row: Row, ties: str, album: Album) -> Pair:
    refuse_media(row, ("videos", "audios"))
    if row.get("tools"):
        raise BadField("tools", "none", shown(row["tools"]), "row with tools")
    rest, liked = extras(row, ties), flag_field(row, "kto_tag")
    read = _alpaca if row.get("instruction") is not None else _spoken
    prompt, chosen, rejected = (PLAIN.blanks(side) for side in read(row, liked is not None))
    prompt, chosen, rejected = album.placed((prompt, chosen, rejected), album.named(row, "images"))
    pair = text_pair(prompt, chosen, rejected, **rest) if liked is None else unpaired(prompt, chosen, liked, **rest)
    note_others(row, COLUMNS, album.ledger)
    return pair


def _spoken(row: Row, single: bool) -> tuple[Blocks, Blocks, Blocks]:
    """The conversation and its two answers, or its last message as the one answer."""
    name = "conversations" if row.get("conversations") is not None else "messages"
    system = (text(checked_text(row["system"], "system"), "system"),) if row.get("system") else ()
    turns = system + _messages(row.get(name), name)
    if not single:
        return turns, _messages(row.get("chosen"), "chosen"), _messages(row.get("rejected"), "rejected")
    if len(turns) < 2:
        raise BadField(name, "a prompt and an answer", f"{len(turns)} message", "no answer")
    return turns[:-1], turns[-1:], ()


def _messages(value: Any, name: str) -> Blocks:
    """Messages by {from, value}, LLaMA-Factory's own keys, or by {role, content}."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return (OPENAI if isinstance(first, dict) and "role" in first else SHARED).blocks(value, name)


def _alpaca(row: Row, single: bool) -> tuple[Blocks, Blocks, Blocks]:
    asked = joined(row, "instruction", "input")
    spoken = bool(row.get("system") or row.get("history"))
    role: Literal["assistant"] | None = "assistant" if spoken else None
    names = ("output",) if single else ("chosen", "rejected")
    first, *second = (answer(row.get(name), name, role) for name in names)
    return _history(row, asked, spoken), first, second[0] if second else ()


def _history(row: Row, asked: str, spoken: bool) -> Blocks:
    """The prompt: the instruction after what was said before it."""
    if not spoken:
        return (text(asked),)
    turns: list[Block] = [text(checked_text(row["system"], "system"), "system")] if row.get("system") else []
    for i, said in enumerate(list_field(row, "history") if row.get("history") else []):
        if not isinstance(said, (list, tuple)) or len(said) != 2:
            raise BadField(f"history[{i}]", "an instruction and its answer", shown(said), "bad history")
        turns += [text(checked_text(said[0], "history"), "user"), text(checked_text(said[1], "history"), "assistant")]
    return (*turns, text(asked, "user"))


def write_llama_factory(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs as JSON lines (or one list, where `path` ends in .json), pictures beside them; returns the number of rows.

    One file holds rows of one shape, the first pair's: alpaca where it has no roles, sharegpt where it has, with kto_tag where
    it has one side. Later pairs without roles become a user's turn and the assistant's answer, and are counted. What
    LLaMA-Factory has no column for stands in columns of ours. Raises DataError for pictures in answers, other media, and a pair
    that does not fit the shape.
    """
    iterator = iter(pairs)
    first = next(iterator, None)
    if first is None:
        return write_json(path, [])
    row = partial(_row, spoken=has_roles(first), both=bool(first.chosen and first.rejected))
    return write_pictured(itertools.chain([first], iterator), path, ledger, row)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any], *, spoken: bool, both: bool) -> dict[str, Any]:
    check_sayable(pair, "llama_factory", ledger, pictures="prompt")
    pictures = {"images": [put(b) for b in seen]} if (seen := pictures_of(pair.prompt)) else {}
    return _told(pair, ledger, spoken, both) | pictures | extra_cells(pair)


def _told(pair: Pair, ledger: Ledger | None, spoken: bool, both: bool) -> dict[str, Any]:
    if bool(pair.chosen and pair.rejected) != both:
        raise Unsayable(pair.id, "a file of LLaMA-Factory holds either pairs or single answers, not both")
    if not spoken:
        return _alpaca_row(pair, both)
    told = tagged(with_roles(pair, ledger), PLAIN)
    check_boundary(told, "llama_factory")
    if both and len(told.chosen) == len(told.rejected) == 1:
        sides = {"chosen": SHARED.messages(told.chosen)[0], "rejected": SHARED.messages(told.rejected)[0]}
        return {"conversations": SHARED.messages(told.prompt), **sides}
    if both:
        raise Unsayable(pair.id, "LLaMA-Factory's answers are one turn each; swift and trl hold longer ones")
    turns = SHARED.messages(told.prompt + told.chosen + told.rejected)
    return {"conversations": turns, "kto_tag": bool(told.chosen)}


def _alpaca_row(pair: Pair, both: bool) -> dict[str, Any]:
    if has_roles(pair):
        raise Unsayable(pair.id, "a conversation in a file of single instructions; write the two kinds to two files")
    prompt, chosen, rejected = single_texts(tagged(pair, PLAIN), "alpaca", None)
    if both:
        return {"instruction": prompt, "input": "", "chosen": chosen, "rejected": rejected}
    return {"instruction": prompt, "input": "", "output": chosen or rejected, "kto_tag": chosen is not None}
