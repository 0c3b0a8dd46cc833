"""Diffusion-KTO's CSV, single images, each liked or not: file_path (or file_name), caption, label (or split).

label: 1 or 0, true or false. split: whether the image won all of its comparisons (exclusive_win), lost all (exclusive_lose)
or some (intersections), which counts as liked, as in the authors' own runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mmpo.datasets.fields import image_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.pairing import digest, pair_id
from mmpo.datasets.tables import rows_of
from mmpo.pair import Pair, text

LIKED = {"1", "1.0", "true", "exclusive_win", "intersections"}
DISLIKED = {"0", "0.0", "false", "exclusive_lose"}


def recognises(kind: str, columns: frozenset[str]) -> bool:
    named = [{"file_path", "file_name"} & columns, {"label", "split"} & columns, {"caption"} & columns]
    return kind in ("csv", "json", "jsonl", "parquet") and all(named)


def unpaired_csv(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Pair]:
    """One Pair a row with one side only: `chosen` where the image was liked, `rejected` where it was not.

    ties: not used, a single image cannot tie. root: where the paths lead, the file's folder by default.
    """
    base = root or path.parent
    return import_rows(rows_of(path), lambda row: [_pair(row, base)], ledger)


def _pair(row: Row, root: Path) -> Pair:
    prompt = (text(text_field(row, "caption")),)
    column = "split" if row.get("label") is None and "split" in row else "label"
    word = str(row.get(column)).strip().lower()
    if word not in LIKED | DISLIKED:
        raise BadField(column, "0 or 1, or Diffusion-KTO's split", shown(row.get(column)))
    answer = (image_field(row, "file_path" if "file_path" in row else "file_name", root),)
    chosen, rejected = (answer, ()) if word in LIKED else ((), answer)
    return Pair(pair_id(prompt, chosen, rejected), prompt, chosen, rejected, group=digest(*prompt))
