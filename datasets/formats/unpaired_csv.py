"""Diffusion-KTO's CSV: file_path, caption, label: single images, each liked (1) or not (0)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mmpo.datasets.fields import image_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.pairing import digest, pair_id
from mmpo.datasets.tables import rows_of
from mmpo.pair import Pair, text

LABELS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in ("csv", "jsonl", "parquet") and columns >= {"file_path", "caption", "label"}


def unpaired_csv(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Pair]:
    """One Pair a row with one side only: `chosen` where the label is 1 or true, `rejected` where it is 0 or false.

    ties: not used, a single image cannot tie. root: where file_path leads, the file's folder by default.
    """
    base = root or path.parent
    return import_rows(rows_of(path), lambda row: [_pair(row, base)], ledger)


def _pair(row: Row, root: Path) -> Pair:
    prompt = (text(text_field(row, "caption")),)
    liked = LABELS.get(str(row.get("label")).strip().lower())
    if liked is None:
        raise BadField("label", "0 or 1", shown(row.get("label")))
    answer = (image_field(row, "file_path", root),)
    chosen, rejected = (answer, ()) if liked else ((), answer)
    return Pair(pair_id(prompt, chosen, rejected), prompt, chosen, rejected, group=digest(*prompt))
