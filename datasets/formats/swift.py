"""ms-swift's rows: messages that end in the better answer, with rejected_response or rejected_messages; or with label (KTO).

Pictures are in the column images, in the order of the tags <image> in the text. With rejected_images the rejected side was
shown others: that side is then a branch of its own, `rejected@other`, or `chosen@other` where the answer is the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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
from mmpo.datasets.fields import flag_field, shown
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.media_files import write_pictured
from mmpo.datasets.pairing import digest
from mmpo.datasets.pictures import Album, Named, Sides, root_of
from mmpo.datasets.placeholders import PLAIN, pictures_of, tagged
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import ALL, Unsayable, check_boundary, check_sayable, extra_cells, with_roles
from mmpo.pair import Block, Branch, Pair

COLUMNS = ("messages", "rejected_response", "rejected_messages", "label", "rejected_images", *EXTRAS)
SHOWN_OTHERS = {"chosen@other", "rejected@other"}
OPENAI = Dialect()


def recognises(kind: str, columns: frozenset[str]) -> bool:
    second = columns & {"rejected_response", "rejected_messages", "rejected_images", "label"}
    return kind in TABLES and "messages" in columns and bool(second) and not columns & {"chosen", "kto_tag"}


def swift(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row. The last message is the better answer, `rejected_response` the worse one to the messages before it.

    `rejected_messages` is a whole conversation; what it shares with `messages` is then the prompt. A row with neither has
    one side only, chosen where `label` is true. `margin` becomes the pair's. ties: as in the trl format. root: where paths of
    pictures start from, the file's folder by default. Rows with video or sound are refused.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, ties, album)], ledger)


def _pair(row: Row, ties: str, album: Album) -> Pair:
    refuse_media(row, ("videos", "audios", "rejected_videos", "rejected_audios"))
    rest = extras(row, ties)
    prompt, chosen, rejected = (PLAIN.blanks(side) for side in _sides(row))
    pictures, others = album.named(row, "images"), album.named(row, "rejected_images")
    if not others[1]:
        pair = text_pair(*album.placed((prompt, chosen, rejected), pictures), **rest)
    else:
        pair = _shown_others(album, (prompt, chosen, rejected), pictures, others, rest)
    note_others(row, COLUMNS, album.ledger)
    return pair


def _sides(row: Row) -> Sides:
    messages = OPENAI.blocks(row.get("messages"), "messages")
    if len(messages) < 2:
        raise BadField("messages", "a prompt and an answer", f"{len(messages)} message", "no answer")
    prompt, chosen = messages[:-1], messages[-1:]
    if row.get("rejected_messages") is not None:
        return shared_prompt(messages, OPENAI.blocks(row["rejected_messages"], "rejected_messages"))
    if (other := row.get("rejected_response")) is not None:
        given = isinstance(other, (list, dict))
        rejected = OPENAI.blocks(other, "rejected_response") if given else answer(other, "rejected_response", "assistant")
        return prompt, chosen, rejected
    if (liked := flag_field(row, "label")) is not None:
        return (prompt, chosen, ()) if liked else (prompt, (), chosen)
    if row.get("rejected_images"):
        return prompt, chosen, ()
    expected = "rejected_response, rejected_messages, rejected_images or label"
    raise BadField("rejected_response", expected, shown(None), "missing rejected_response")


def _shown_others(album: Album, sides: Sides, pictures: Named, others: Named, rest: dict[str, Any]) -> Pair:
    """A pair whose rejected side was shown other pictures, or the same ones in the prompt and others in the answer."""
    prompt, chosen, rejected = sides
    seen, good, _ = album.placed((prompt, chosen, ()), pictures)
    instead, bad, _ = album.placed((prompt, rejected or chosen, ()), others)
    if digest(*seen) == digest(*instead):
        return text_pair(seen, good, bad, **rest)
    pair = text_pair(seen, good, (), **rest)
    text_pair(instead, bad, ())  # checks them
    return replace(pair, branches={"rejected@other" if rejected else "chosen@other": Branch(instead, bad)})


def write_swift(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs as JSON lines (or one list, where `path` ends in .json), pictures beside them; returns the number of rows.

    Text without roles becomes a user's turn and the assistant's answer, and is counted in the ledger. What ms-swift has no
    column for stands in columns of ours. Raises DataError for other media, and for branches other than this format's own.
    """
    return write_pictured(pairs, path, ledger, _row)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "swift", ledger, can=(*ALL, "branches"), pictures="all")
    both = with_roles(_joined(pair), ledger)
    told, cells = tagged(both, PLAIN), extra_cells(pair)
    check_boundary(told, "swift")
    seen, others = (pictures_of(both.prompt + side) for side in (both.chosen or both.rejected, both.rejected or both.chosen))
    if pair.branches:
        others = _others(pair)
    cells |= {"images": [put(b) for b in seen]} if seen else {}
    if digest(*others) != digest(*seen):
        if not others:
            raise Unsayable(
                pair.id, "swift takes the pictures of the chosen side where the rejected one has none; mmpo holds all"
            )
        cells |= {"rejected_images": [put(b) for b in others]}
    prompt, chosen, rejected = (OPENAI.messages(side) for side in (told.prompt, told.chosen, told.rejected))
    if "chosen@other" in pair.branches:
        return {"messages": prompt + chosen, **cells}
    if not (chosen and rejected):
        return {"messages": prompt + (chosen or rejected), "label": bool(chosen), **cells}
    if len(chosen) == len(rejected) == 1:
        return {"messages": prompt + chosen, "rejected_response": rejected[0]["content"], **cells}
    return {"messages": prompt + chosen, "rejected_messages": prompt + rejected, **cells}


def _joined(pair: Pair) -> Pair:
    """A pair with a branch of this format as one that has that branch's answer as its rejected side."""
    if not pair.branches:
        return pair
    (name, branch), *more = pair.branches.items()
    same = tagged(replace(pair, prompt=branch.prompt), PLAIN).prompt == tagged(pair, PLAIN).prompt
    if more or name not in SHOWN_OTHERS or pair.rejected or not same:
        reason = (
            "swift has no branches but the rejected side with other pictures, without one that has the same; mmpo holds all"
        )
        raise Unsayable(pair.id, reason)
    return replace(pair, rejected=branch.response) if name == "rejected@other" else pair


def _others(pair: Pair) -> Blocks:
    (branch,) = pair.branches.values()
    return pictures_of(branch.prompt + branch.response)
