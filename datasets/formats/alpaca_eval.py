"""alpaca_eval's annotations: an instruction, two generators' outputs, and a preference.

1 and 2 name the better output. Numbers in between are soft: the preference less 1 is the probability that output_2 is the
better one. 1.5 is a tie, and so is 0, as older annotators write it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, answer, judged, note_others
from mmpo.datasets.fields import number_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.tables import rows_of, write_json
from mmpo.datasets.wording import Unsayable, check_sayable, sided, single_texts, written
from mmpo.pair import Pair, text

META = ("generator_1", "generator_2", "annotator", "dataset", "datasplit")
COLUMNS = ("instruction", "output_1", "output_2", "preference")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= set(COLUMNS)


def alpaca_eval(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Pair]:
    """One Pair a row; `meta` keeps the generators, the annotator and the chosen output's position.

    ties: "drop" skips tied rows, "soft" keeps them with label 0.5 and output_1 as chosen. Rows without a preference, where
    the annotator failed, are skipped. root: not used.
    """
    return import_rows(rows_of(path), lambda row: [_pair(row, ties, ledger)], ledger)


def _pair(row: Row, ties: str, ledger: Ledger) -> Pair:
    outputs = answer(row.get("output_1"), "output_1"), answer(row.get("output_2"), "output_2")
    prompt = (text(text_field(row, "instruction")),)
    pair = judged(prompt, outputs, _second(row), ties, {name: row.get(name) for name in META})
    if pair.label not in (0.5, 1):
        ledger.notes["soft labels"] += 1
    note_others(row, COLUMNS + META, ledger)
    return pair


def _second(row: Row) -> float:
    """The probability that the second output is the better one."""
    given = row.get("preference")
    if given is None or (isinstance(given, float) and math.isnan(given)):
        raise Skip("no preference")
    found = number_field(row, "preference")
    if found == 0:
        return 0.5
    if not 1 <= found <= 2:
        raise BadField("preference", "a number from 1 to 2, or 0 for a tie", shown(given))
    return found - 1


def write_alpaca_eval(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of one prompt and two answers as one list (or JSON lines, by the name); returns the number of rows.

    Ties are written as 1.5. Raises DataError for conversations, a chosen side that is the less likely one, and all else
    that alpaca_eval cannot say (see `check_sayable`).
    """
    return write_json(path, written(pairs, _row, ledger))


def _row(pair: Pair, ledger: Ledger | None) -> dict[str, Any]:
    check_sayable(pair, "alpaca_eval", ledger, can=("label",), meta=("position", *META))
    if not 0.5 <= pair.label <= 1:
        raise Unsayable(pair.id, "alpaca_eval's preferred output has a label of at least 0.5")
    prompt, *sides = single_texts(pair, "alpaca_eval", ledger)
    (first, second), position = sided(pair, sides)
    preference = 1 + pair.label if position == 2 else 2 - pair.label
    row = {"instruction": prompt, "output_1": first, "output_2": second}
    row |= {name: pair.meta[name] for name in META if name in pair.meta}
    return row | {"preference": int(preference) if preference in (1, 2) else preference}
