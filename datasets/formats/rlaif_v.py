"""RLAIF-V's table: an image (inside, or a path in image or image_path), a question, and the chosen and rejected answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmpo.datasets.conversations import TABLES, answer, described, note_others, text_pair
from mmpo.datasets.fields import text_field
from mmpo.datasets.ledger import Ledger, Row, import_rows
from mmpo.datasets.media_files import PICTURE, write_pictured
from mmpo.datasets.pictures import Album, about, one_picture, root_of
from mmpo.datasets.placeholders import LLAVA, question_about_one
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import check_sayable
from mmpo.pair import Block, Pair, text

META = ("ds_name", "origin_dataset", "origin_split", "idx", "ds_question_id", "image_path")
LOGPS = ("logps", *(f"ref_{side}_{what}" for side in ("win", "rej") for what in ("logp", "avg_logp", "per_token_logp")))
NAMES = ("question", "chosen", "rejected")
SCHEMA = pa.schema([("image", PICTURE), *((name, pa.string()) for name in (*NAMES, *META))])


def recognises(kind: str, columns: frozenset[str]) -> bool:
    shown = columns & {"image", "image_path"}
    return kind in TABLES and columns >= set(NAMES) and bool(shown) and not columns & {"prompt", "retrieved_image"}


def rlaif_v(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row, without roles, the image before the question; `meta` keeps where the row came from.

    Log-probabilities of the authors' reference model are counted as left out. root: where paths start from. ties: not used.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, album)], ledger)


def _pair(row: Row, album: Album) -> Pair:
    pictures = album.named(row, "image", "image_path")
    one_picture(row, pictures)
    prompt = album.shown(about((text(text_field(row, "question")),), pictures, LLAVA), pictures)
    chosen, rejected = (answer(row.get(side), side) for side in ("chosen", "rejected"))
    if any(row.get(name) is not None for name in LOGPS):
        album.ledger.notes["log-probabilities of another reference model left out"] += 1
    note_others(row, (*NAMES, *META, *LOGPS), album.ledger)
    return text_pair(prompt, chosen, rejected, meta=described(row, META))


def write_rlaif_v(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of one question about one image as parquet (or JSON lines, the images beside them); returns the number.

    Raises DataError for what RLAIF-V cannot say.
    """
    return write_pictured(pairs, path, ledger, _row, SCHEMA)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "rlaif_v", ledger, can=(), meta=META, pictures="prompt")
    picture, *words = question_about_one(pair, "rlaif_v", ledger)
    return {"image": put(picture), **dict(zip(NAMES, words, strict=True)), **described(pair.meta, META)}
