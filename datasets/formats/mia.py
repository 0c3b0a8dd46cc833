"""MIA-DPO's rows (JSON): image (one path or several), prompt with <image> or <image-placeholder>, chosen, rejected and gt.

gt, the known answer, is chosen itself in the authors' data; where it is not, it is kept in `meta`, as is id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, answer, note_others, text_pair
from mmpo.datasets.fields import checked_text, text_field
from mmpo.datasets.ledger import Ledger, Row, import_rows
from mmpo.datasets.media_files import write_pictured
from mmpo.datasets.pictures import Album, root_of
from mmpo.datasets.placeholders import MIA, pictures_of, tagged
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import check_sayable, single_texts
from mmpo.pair import Block, Pair, text

COLUMNS = ("id", "image", "prompt", "chosen", "rejected", "gt")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= {"prompt", "chosen", "rejected", "gt"}


def mia(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row, without roles; "Image1:<image>\\nImage2:<image>\\n" keeps its words around the pictures.

    The end of a line after a placeholder belongs to it. root: where paths of pictures start from. ties: not used, there are
    none. Raises DataError at the first bad row unless ledger.on_bad is "skip".
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, album)], ledger, own_ids=False)


def _pair(row: Row, album: Album) -> Pair:
    prompt = album.shown(MIA.blanks((text(text_field(row, "prompt")),)), album.named(row, "image"))
    chosen, rejected = (answer(row.get(side), side) for side in ("chosen", "rejected"))
    known = row.get("gt")
    meta = {"id": row["id"]} if row.get("id") is not None else {}
    meta |= {} if known in (None, chosen[0].data) else {"gt": checked_text(known, "gt")}
    note_others(row, COLUMNS, album.ledger)
    return text_pair(prompt, chosen, rejected, meta=meta)


def write_mia(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs as one list (or JSON lines, by the name), pictures beside it; returns the number of rows.

    Roles of a single turn are left out and counted. Raises DataError for pictures in answers, longer conversations, and all
    else that MIA-DPO cannot say (see `check_sayable`).
    """
    return write_pictured(pairs, path, ledger, _row)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "mia", ledger, can=(), meta=("id", "gt"), pictures="prompt")
    prompt, chosen, rejected = single_texts(tagged(pair, MIA), "mia", ledger)
    pictures = [put(block) for block in pictures_of(pair.prompt)]
    row = {"id": pair.meta.get("id", pair.id), "image": pictures, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row | {"gt": pair.meta.get("gt", chosen)}
