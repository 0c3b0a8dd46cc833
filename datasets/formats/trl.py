"""TRL's preference rows: prompt, chosen, rejected, as texts or as lists of messages; or prompt, completion, label (KTO).

Without a prompt, or with conversations that start with it, the prompt is what both sides have in common. This is the format
that can say all of a pair of text: its weight, margin, scores, spans and the rest are columns of ours beside TRL's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
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
    unpaired,
)
from mmpo.datasets.fields import flag_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.tables import rows_of, write_json
from mmpo.datasets.wording import check_sayable, extra_cells, has_roles, single_texts, written
from mmpo.pair import Pair, text

COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", *EXTRAS)
FOREIGN = {"conversations", "instruction", "question", "kto_tag", "image"}  # with these, chosen and rejected are not TRL's
OPENAI = Dialect()


def recognises(kind: str, columns: frozenset[str]) -> bool:
    pairs = columns >= {"chosen", "rejected"} and ("prompt" in columns or not columns & FOREIGN)
    return kind in TABLES and (pairs or columns >= {"prompt", "completion", "label"})


def trl(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row; a row with `completion` has one side only, chosen where `label` is true.

    ties: a row whose `chosen_probability` (a column of ours) is 0.5 is skipped, or kept by "soft". root: not used, text has
    no paths. Rows with pictures are refused, as are messages that call tools.
    """
    return import_rows(rows_of(path), lambda row: [_pair(row, ties, ledger)], ledger)


def _pair(row: Row, ties: str, ledger: Ledger) -> Pair:
    refuse_media(row)
    rest = extras(row, ties)
    if row.get("completion") is not None:
        pair = _unpaired(row, rest)
    elif isinstance(row.get("chosen"), (list, dict)):
        pair = text_pair(*_conversation(row), **rest)
    else:
        pair = text_pair(*_texts(row, ledger), **rest)
    note_others(row, COLUMNS, ledger)
    return pair


def _unpaired(row: Row, rest: dict[str, Any]) -> Pair:
    liked = flag_field(row, "label")
    if liked is None:
        raise BadField("label", "true or false", "nothing", "missing label")
    if isinstance(row["completion"], (list, dict)):
        return unpaired(OPENAI.blocks(row["prompt"], "prompt"), OPENAI.blocks(row["completion"], "completion"), liked, **rest)
    return unpaired((text(text_field(row, "prompt")),), answer(row["completion"], "completion"), liked, **rest)


def _conversation(row: Row) -> tuple[Blocks, Blocks, Blocks]:
    """A prompt that is text repeats, as some datasets have it, the conversation's user, and is left to both sides."""
    chosen, rejected = (OPENAI.blocks(row.get(side), side) for side in ("chosen", "rejected"))
    if isinstance(row.get("prompt"), (list, dict)):
        return OPENAI.blocks(row["prompt"], "prompt"), chosen, rejected
    found = shared_prompt(chosen, rejected)
    if (said := row.get("prompt")) is not None and said not in [b.data for b in found[0]]:
        raise BadField("prompt", "what a turn of both conversations says", shown(said), "prompt of another conversation")
    return found


def _texts(row: Row, ledger: Ledger) -> tuple[Blocks, Blocks, Blocks]:
    """Whole sides where there is a prompt, otherwise cut where they part; the blank there is the answers', as in TRL."""
    chosen, rejected = (answer(row.get(side), side) for side in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        return (text(text_field(row, "prompt")),), chosen, rejected
    first, second = str(chosen[0].data), str(rejected[0].data)
    if first == second:
        raise Skip("identical sides")
    prompt = os.path.commonprefix([first, second]).removesuffix(" ")
    if not prompt.strip():
        raise BadField("chosen, rejected", "the same beginning on both sides", "none in common", "no common prompt")
    if any(prompt[-1:].isalnum() and side[len(prompt) :][:1].isalnum() for side in (first, second)):
        ledger.notes["prompt that ends inside a word (kept, as in TRL)"] += 1
    return (text(prompt),), answer(first[len(prompt) :], "chosen"), answer(second[len(prompt) :], "rejected")


def write_trl(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of text, one file of JSON lines (or one list, where `path` ends in .json); returns the number of rows.

    Prompts are explicit. Raises DataError for a pair that is not text, or with branches besides its sides.
    """
    return write_json(path, written(pairs, _row, ledger))


def _row(pair: Pair, ledger: Ledger | None) -> dict[str, Any]:
    check_sayable(pair, "trl", ledger)
    if has_roles(pair):
        prompt, chosen, rejected = (OPENAI.messages(side) or None for side in (pair.prompt, pair.chosen, pair.rejected))
    else:
        prompt, chosen, rejected = single_texts(pair, "trl", ledger)  # type: ignore[assignment]
    if chosen is not None and rejected is not None:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra_cells(pair)}
    return {"prompt": prompt, "completion": chosen or rejected, "label": chosen is not None, **extra_cells(pair)}
