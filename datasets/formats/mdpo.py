"""mDPO's rows (JSON): img_path, a prompt, and the chosen and rejected answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, answer, note_others, text_pair
from mmpo.datasets.fields import text_field
from mmpo.datasets.ledger import Ledger, Row, import_rows
from mmpo.datasets.media_files import write_pictured
from mmpo.datasets.pictures import Album, about, one_picture, root_of
from mmpo.datasets.placeholders import LLAVA, question_about_one
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import check_sayable
from mmpo.pair import Block, Pair, text

NAMES = ("prompt", "chosen", "rejected")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= {"img_path", *NAMES}


def mdpo(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row, without roles, the image before the prompt, as the authors' loader puts it.

    The crop that the method compares with is no part of the data; `mmpo pairs crop` makes it. root: where paths start from.
    ties: not used, there are none.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, album)], ledger)


def _pair(row: Row, album: Album) -> Pair:
    pictures = album.named(row, "img_path")
    one_picture(row, pictures)
    prompt = album.shown(about((text(text_field(row, "prompt")),), pictures, LLAVA), pictures)
    chosen, rejected = (answer(row.get(side), side) for side in ("chosen", "rejected"))
    note_others(row, ("img_path", *NAMES), album.ledger)
    return text_pair(prompt, chosen, rejected)


def write_mdpo(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of one question about one image as JSON lines (or one list), images beside them; returns the number.

    A branch chosen@crop is left out and counted, because the authors' trainer cuts its own. Raises DataError for what mDPO
    cannot say.
    """
    return write_pictured(pairs, path, ledger, _row)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    can = ("branches",) if pair.branches.keys() == {"chosen@crop"} else ()
    check_sayable(pair, "mdpo", ledger, can=can, meta=(), pictures="prompt")
    if can and ledger is not None:
        ledger.notes["crops left out: mDPO's trainer cuts its own"] += 1
    picture, *words = question_about_one(pair, "mdpo", ledger)
    return {"img_path": put(picture), **dict(zip(NAMES, words, strict=True))}
