"""Several answers to each prompt (parquet, JSON lines or CSV), to be paired by their scores: prompt, image, score, seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa

from mmpo.datasets.fields import image_field, number_field, text_field, whole_field
from mmpo.datasets.formats.pick_a_pic import file_bytes
from mmpo.datasets.ledger import Ledger, Row, import_rows
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.tables import rows_of, write_parquet
from mmpo.errors import DataError
from mmpo.pair import text

SCHEMA = pa.schema([("prompt", pa.string()), ("image", pa.binary()), ("score", pa.float64()), ("seed", pa.int64())])


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in ("parquet", "jsonl", "csv") and columns >= {"prompt", "image"}


def candidates(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Candidate]:
    """One Candidate a row. image: bytes, Hugging Face's {"bytes", "path"}, or a path under `root`.

    `score` may be absent (a judge is then needed before pairing) and `seed` is 0 when absent. ties: not used here;
    equal scores are the business of the pairing strategy.
    """
    base = root or (path if path.is_dir() else path.parent)
    return import_rows(rows_of(path), lambda row: [_candidate(row, base)], ledger)


def _candidate(row: Row, root: Path) -> Candidate:
    prompt = (text(text_field(row, "prompt")),)
    score = None if row.get("score") is None else number_field(row, "score")
    return Candidate(prompt, image_field(row, "image", root), score, whole_field(row, "seed", 0))


def write_candidates(rows: Iterable[Candidate], path: Path) -> int:
    """Write candidates as one parquet file, replaced as a whole; returns the number of rows. Arrays become PNG.

    Raises DataError when a prompt is not one text or an answer is not an image.
    """
    return write_parquet(path, SCHEMA, (_cells(row, i) for i, row in enumerate(rows)))


def _cells(row: Candidate, place: int) -> dict[str, object]:
    if [b.kind for b in (*row.prompt, row.block)] != ["text", "image"]:
        raise DataError(f"candidate {place}: expected a prompt of one text and one image")
    return {"prompt": row.prompt[0].data, "image": file_bytes(row.block), "score": row.score, "seed": row.seed}
