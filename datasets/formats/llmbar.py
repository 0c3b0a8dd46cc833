"""LLMBar: an instruction (input), two outputs, and which of them follows it (label 1 or 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, answer, judged, note_others
from mmpo.datasets.fields import shown, text_field, whole_field
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.tables import rows_of, write_json
from mmpo.datasets.wording import check_sayable, sided, single_texts, written
from mmpo.pair import Pair, text

COLUMNS = ("input", "output_1", "output_2", "label")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= set(COLUMNS)


def llmbar(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row; `meta` keeps the chosen output's position. ties, root: not used, a label is 1 or 2."""
    return import_rows(rows_of(path), lambda row: [_pair(row, ledger)], ledger)


def _pair(row: Row, ledger: Ledger) -> Pair:
    label = whole_field(row, "label", 0)
    if label not in (1, 2):
        raise BadField("label", "1 or 2", shown(row.get("label")))
    outputs = answer(row.get("output_1"), "output_1"), answer(row.get("output_2"), "output_2")
    pair = judged((text(text_field(row, "input")),), outputs, label - 1, "drop", {})
    note_others(row, COLUMNS, ledger)
    return pair


def write_llmbar(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of one prompt and two answers as one list (or JSON lines, by the name); returns the number of rows.

    Raises DataError for conversations, ties, and all else that LLMBar cannot say (see `check_sayable`).
    """
    return write_json(path, written(pairs, _row, ledger))


def _row(pair: Pair, ledger: Ledger | None) -> dict[str, Any]:
    check_sayable(pair, "llmbar", ledger, can=(), meta=("position",))
    prompt, *sides = single_texts(pair, "llmbar", ledger)
    (first, second), position = sided(pair, sides)
    return {"input": prompt, "output_1": first, "output_2": second, "label": position}
