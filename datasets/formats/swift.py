"""ms-swift's rows: messages that end in the better answer, with rejected_response or rejected_messages; or with label (KTO)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import (
    EXTRAS,
    TABLES,
    Dialect,
    answer,
    extras,
    note_others,
    refuse_media,
    shared_prompt,
    text_pair,
    unpaired,
)
from mmpo.datasets.fields import flag_field, shown
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.tables import rows_of, write_json
from mmpo.datasets.wording import check_boundary, check_sayable, extra_cells, with_roles, written
from mmpo.pair import Pair

COLUMNS = ("messages", "rejected_response", "rejected_messages", "label", "rejected_images", *EXTRAS)
OPENAI = Dialect()


def recognises(kind: str, columns: frozenset[str]) -> bool:
    second = columns & {"rejected_response", "rejected_messages", "label"}
    return kind in TABLES and "messages" in columns and bool(second) and not columns & {"chosen", "kto_tag"}


def swift(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row. The last message is the better answer, `rejected_response` the worse one to the messages before it.

    `rejected_messages` is a whole conversation; what it shares with `messages` is then the prompt. A row with neither has
    one side only, chosen where `label` is true. `margin` becomes the pair's. ties: as in the trl format. root: not used.
    """
    return import_rows(rows_of(path), lambda row: [_pair(row, ties, ledger)], ledger)


def _pair(row: Row, ties: str, ledger: Ledger) -> Pair:
    refuse_media(row)
    rest = extras(row, ties)
    messages = OPENAI.blocks(row.get("messages"), "messages")
    if len(messages) < 2:
        raise BadField("messages", "a prompt and an answer", f"{len(messages)} message", "no answer")
    prompt, chosen = messages[:-1], messages[-1:]
    if row.get("rejected_messages") is not None:
        pair = text_pair(*shared_prompt(messages, OPENAI.blocks(row["rejected_messages"], "rejected_messages")), **rest)
    elif row.get("rejected_response") is not None:
        other = row["rejected_response"]
        given = isinstance(other, (list, dict))
        rejected = OPENAI.blocks(other, "rejected_response") if given else answer(other, "rejected_response", "assistant")
        pair = text_pair(prompt, chosen, rejected, **rest)
    elif (liked := flag_field(row, "label")) is not None:
        pair = unpaired(prompt, chosen, liked, **rest)
    else:
        expected = "rejected_response, rejected_messages or label"
        raise BadField("rejected_response", expected, shown(None), "missing rejected_response")
    note_others(row, COLUMNS, ledger)
    return pair


def write_swift(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of text as JSON lines (or one list, where `path` ends in .json); returns the number of rows.

    Text without roles becomes a user's turn and the assistant's answer, and is counted in the ledger. What ms-swift has no
    column for stands in columns of ours. Raises DataError for a pair that is not text, or with branches besides its sides.
    """
    return write_json(path, written(pairs, _row, ledger))


def _row(pair: Pair, ledger: Ledger | None) -> dict[str, Any]:
    check_sayable(pair, "swift", ledger)
    check_boundary(pair, "swift")
    spoken, cells = with_roles(pair, ledger), extra_cells(pair)
    prompt, chosen, rejected = (OPENAI.messages(side) for side in (spoken.prompt, spoken.chosen, spoken.rejected))
    if not (chosen and rejected):
        return {"messages": prompt + (chosen or rejected), "label": bool(chosen), **cells}
    if len(chosen) == len(rejected) == 1:
        return {"messages": prompt + chosen, "rejected_response": rejected[0]["content"], **cells}
    return {"messages": prompt + chosen, "rejected_messages": prompt + rejected, **cells}
