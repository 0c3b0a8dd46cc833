"""RLHF-V's table: an image inside, and text, which is JSON of a question with the corrected and the original answer.

text is {"question", "chosen", "rejected"}, or a list of the three. Log-probabilities of a reference model (ref_win_logp, ...)
belong to the authors' own model and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmpo.datasets.conversations import TABLES, answer, described, note_others, text_pair
from mmpo.datasets.fields import shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.media_files import PICTURE, write_pictured
from mmpo.datasets.pictures import Album, about, one_picture, root_of
from mmpo.datasets.placeholders import LLAVA, question_about_one
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import check_sayable
from mmpo.pair import Block, Pair, text

META = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path")
LOGPS = tuple(f"ref_{side}_{what}" for side in ("win", "rej") for what in ("logp", "avg_logp", "per_token_logp"))
NAMES = ("question", "chosen", "rejected")
SCHEMA = pa.schema([("image", PICTURE), ("text", pa.string()), *((name, pa.string()) for name in META)])


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= {"image", "text"} and not columns & {"caption", "prompt", "label", "chosen"}


def rlhf_v(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row, without roles, the image before the question; `meta` keeps where the row came from.

    ref_* columns are counted as left out. root: where an image given as a path lies. ties: not used, there are none.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, album)], ledger)


def _pair(row: Row, album: Album) -> Pair:
    told, pictures = _triple(row), album.named(row, "image")
    one_picture(row, pictures)
    prompt = album.shown(about((text(text_field(told, "question")),), pictures, LLAVA), pictures)
    chosen, rejected = (answer(told.get(side), side) for side in ("chosen", "rejected"))
    if any(row.get(name) is not None for name in LOGPS):
        album.ledger.notes["log-probabilities of another reference model left out"] += 1
    note_others(row, ("text", *META, *LOGPS), album.ledger)
    return text_pair(prompt, chosen, rejected, meta=described(row, META))


def _triple(row: Row) -> dict[str, Any]:
    expected = "JSON of question, chosen and rejected"
    if row.get("text") is None:
        raise BadField("text", expected, "nothing", "missing text")
    try:
        found = json.loads(row["text"]) if isinstance(row["text"], str) else row["text"]
    except ValueError as error:
        raise BadField("text", expected, shown(row["text"]), "bad text") from error
    if isinstance(found, list) and len(found) == 3:
        return dict(zip(NAMES, found, strict=True))
    if not isinstance(found, dict):
        raise BadField("text", expected, shown(found), "bad text")
    return found


def write_rlhf_v(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs of one question about one image as parquet (or JSON lines, the images beside them); returns the number.

    The image is before the question, as in the authors' data. Raises DataError for what RLHF-V cannot say.
    """
    return write_pictured(pairs, path, ledger, _row, SCHEMA)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "rlhf_v", ledger, can=(), meta=META, pictures="prompt")
    picture, *words = question_about_one(pair, "rlhf_v", ledger)
    return {
        "image": put(picture),
        "text": json.dumps(dict(zip(NAMES, words, strict=True)), ensure_ascii=False),
        **described(pair.meta, META),
    }
