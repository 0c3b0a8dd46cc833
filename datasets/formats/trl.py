"""TRL's preference rows: prompt, chosen, rejected, as texts or as lists of messages; or prompt, completion, label (KTO).

Pictures are in the column images, or a single one in image. In messages they stand at {"type": "image"}, otherwise, as in
TRL, before the first text of the user's; in a text at <image>.

Without a prompt, or with conversations that start with it, the prompt is what both sides have in common. This is the format
that can say all of a pair of text: its weight, margin, scores, spans and the rest are columns of ours beside TRL's. What TRL
itself is to read, write as .parquet: every row is a conversation there, and the pictures are inside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmpo.datasets.conversations import (
    EXTRAS,
    TABLES,
    Blocks,
    Dialect,
    answer,
    extras,
    note_others,
    refuse_media,
    shared_prompt,
    text_pair,
)
from mmpo.datasets.fields import flag_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.media_files import PICTURE, write_pictured
from mmpo.datasets.pictures import Album, Sides, about, root_of
from mmpo.datasets.placeholders import PLAIN, blanks_in, pictures_of, tagged, turns
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import ALL, check_sayable, extra_cells, has_roles, single_texts, with_roles
from mmpo.pair import Block, Pair, text

COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", *EXTRAS)
IMAGES = ("images", "image")
FOREIGN = {"conversations", "instruction", "question", "kto_tag"}  # with these, chosen and rejected are not TRL's
OTHERS = {"branches", "gt", "img_path", "retrieved_image"}  # columns of mmpo, mia, mdpo and realign
OPENAI, SEEN = Dialect(), Dialect(pictures=True)
CONTENT = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", CONTENT)]))
SCHEMA = pa.schema(
    [("images", pa.list_(PICTURE)), ("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES)]
    + [(name, pa.float64()) for name in EXTRAS[:5]]
    + [(name, pa.string()) for name in EXTRAS[5:]]
)


def recognises(kind: str, columns: frozenset[str]) -> bool:
    pairs = columns >= {"chosen", "rejected"} and ("prompt" in columns or not columns & FOREIGN) and not columns & OTHERS
    return kind in TABLES and (pairs or columns >= {"prompt", "completion", "label"})


def trl(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row; a row with `completion` has one side only, chosen where `label` is true.

    ties: a row whose `chosen_probability` (a column of ours) is 0.5 is skipped, or kept by "soft". root: where pictures given
    as paths lie. Rows with video or sound are refused, as are messages that call tools. In a row without a column of
    pictures, <image> is text.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, ties, album)], ledger)


def _pair(row: Row, ties: str, album: Album) -> Pair:
    refuse_media(row, ("videos", "audios"))
    rest = extras(row, ties)
    if row.get("completion") is not None:
        sides = _unpaired(row)
    elif isinstance(row.get("chosen"), (list, dict)):
        sides = _conversation(row)
    else:
        sides = _texts(row, album.ledger)
    pair = text_pair(*_seen(row, sides, album), **rest)
    note_others(row, COLUMNS, album.ledger)
    return pair


def _seen(row: Row, sides: Sides, album: Album) -> Sides:
    """Prompt and answers with the row's pictures in their places."""
    if any(row.get(name) is not None for name in IMAGES) or any(map(blanks_in, sides)):
        pictures = album.named(row, *IMAGES)
        prompt, chosen, rejected = about(sides[0], pictures, PLAIN), PLAIN.blanks(sides[1]), PLAIN.blanks(sides[2])
        return album.placed((prompt, chosen, rejected), pictures)
    return sides


def _unpaired(row: Row) -> Sides:
    liked = flag_field(row, "label")
    if liked is None:
        raise BadField("label", "true or false", "nothing", "missing label")
    if isinstance(row["completion"], (list, dict)):
        prompt, found = SEEN.blocks(row["prompt"], "prompt"), SEEN.blocks(row["completion"], "completion")
    else:
        prompt, found = (text(text_field(row, "prompt")),), answer(row["completion"], "completion")
    return (prompt, found, ()) if liked else (prompt, (), found)


def _conversation(row: Row) -> Sides:
    """A prompt that is text repeats, as some datasets have it, the conversation's user, and is left to both sides."""
    chosen, rejected = (SEEN.blocks(row.get(side), side) for side in ("chosen", "rejected"))
    if isinstance(row.get("prompt"), (list, dict)):
        return SEEN.blocks(row["prompt"], "prompt"), chosen, rejected
    found = shared_prompt(chosen, rejected)
    if (said := row.get("prompt")) is not None and said not in [b.data for b in found[0]]:
        raise BadField("prompt", "what a turn of both conversations says", shown(said), "prompt of another conversation")
    return found


def _texts(row: Row, ledger: Ledger) -> Sides:
    """Whole sides where there is a prompt, otherwise cut where they part; the blank there is the answers', as in TRL."""
    chosen, rejected = (answer(row.get(side), side) for side in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        return (text(text_field(row, "prompt")),), chosen, rejected
    first, second = str(chosen[0].data), str(rejected[0].data)
    if first == second:
        raise Skip("identical sides", "chosen, rejected")
    prompt = os.path.commonprefix([first, second]).removesuffix(" ")
    if not prompt.strip():
        raise BadField("chosen, rejected", "the same beginning on both sides", "none in common", "no common prompt")
    if any(prompt[-1:].isalnum() and side[len(prompt) :][:1].isalnum() for side in (first, second)):
        ledger.notes["prompt that ends inside a word (kept, as in TRL)"] += 1
    return (text(prompt),), answer(first[len(prompt) :], "chosen"), answer(second[len(prompt) :], "rejected")


def write_trl(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs with explicit prompts; returns the number of rows.

    JSON lines, or one list where `path` ends in .json, say all of a pair; pictures are files of media/ beside them. A .parquet
    has the pictures inside and is made of conversations only, so that TRL reads it: text without roles becomes a user's turn
    and the assistant's answer, and is counted. Raises DataError for pictures in answers, other media, branches besides the
    sides, and in a .parquet one side only.
    """
    row = _message_row if path.suffix.lower() == ".parquet" else _row
    return write_pictured(pairs, path, ledger, row, SCHEMA)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "trl", ledger, pictures="prompt")
    pictures = pictures_of(pair.prompt)
    told = tagged(pair, PLAIN) if pictures else pair  # refuses what would not be read again as it is
    cells = extra_cells(pair) | ({"images": [put(b) for b in pictures]} if pictures else {})
    if has_roles(pair):
        prompt, chosen, rejected = (
            _messages(side, bool(pictures)) or None for side in (pair.prompt, pair.chosen, pair.rejected)
        )
    else:
        prompt, chosen, rejected = single_texts(told, "trl", ledger)  # type: ignore[assignment]
    if chosen is not None and rejected is not None:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **cells}
    return {"prompt": prompt, "completion": chosen or rejected, "label": chosen is not None, **cells}


def _message_row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "trl in parquet", ledger, [what for what in ALL if what != "unpaired"], pictures="prompt")
    told, cells = with_roles(pair, ledger), extra_cells(pair)
    tagged(told, PLAIN)  # refuses what would not be read again as it is
    cells |= {name: json.dumps(cells[name]) for name in ("spans", "meta") if name in cells}
    sides = {name: _messages(getattr(told, name), True) for name in ("prompt", "chosen", "rejected")}
    return {"images": [put(b) for b in pictures_of(pair.prompt)], **sides, **cells}


def _messages(blocks: Blocks, parts: bool) -> list[dict[str, Any]]:
    """The turns as messages, their content in parts or as one text each."""
    if not parts:
        return OPENAI.messages(blocks)
    return [{"role": turn[0].role, "content": [_part(block) for block in turn]} for turn in turns(blocks)]


def _part(block: Block) -> dict[str, Any]:
    return {"type": "image", "text": None} if block.kind == "image" else {"type": "text", "text": block.data}
