"""Pick-a-Pic v1/v2 (parquet): a caption, two images as bytes, and the label of each: 1 won, 0 lost, 0.5 tied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmpo import media
from mmpo.datasets.fields import image_field, image_pair, number_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.tables import parquet_rows, write_parquet
from mmpo.errors import DataError
from mmpo.pair import Block, Pair

KEEP = {"caption", "jpg_0", "jpg_1", "label_0", "label_1"}
SCORES = ("score_{}", "ps_score_{}")  # ours and that of SmPO's rescored copy
OPTIONAL = ["are_different", "has_label", "weight", "margin", *(s.format(i) for s in SCORES for i in (0, 1))]
SCHEMA = pa.schema(
    [
        ("caption", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
    ]
    + [("are_different", pa.bool_()), ("has_label", pa.bool_()), ("weight", pa.float64()), ("margin", pa.float64())]
    + [("score_0", pa.float64()), ("score_1", pa.float64())]
)


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind == "parquet" and columns >= KEEP


def pick_a_pic(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Pair]:
    """Pairs of a parquet file, or of all parquet files of a folder.

    ties: "drop" skips rows labelled 0.5, "soft" keeps them with `label` 0.5 (image 0 as chosen). Rows with
    `are_different` or `has_label` false are skipped, as the dataset's authors do. root: where images given as paths lie,
    the file's folder by default. Raises DataError at the first bad row unless ledger.on_bad is "skip".
    """
    base = root or (path if path.is_dir() else path.parent)
    rows = parquet_rows(path, [*sorted(KEEP), *OPTIONAL])
    return import_rows(rows, lambda row: [_pair(row, base, ties, ledger)], ledger)


def _pair(row: Row, root: Path, ties: str, ledger: Ledger) -> Pair:
    caption = text_field(row, "caption")
    if row.get("has_label") is False:
        raise Skip("has_label is false")
    if row.get("are_different") is False:
        raise Skip("are_different is false")
    label = _label(row)
    if label == 0.5 and ties == "drop":
        raise Skip("tie")
    images = [image_field(row, f"jpg_{i}", root) for i in (0, 1)]
    winner = 0 if label >= 0.5 else 1
    scores = _scores(row, winner)
    rest = {"weight": number_field(row, "weight", 1.0), "margin": number_field(row, "margin", 0.0), "scores": scores}
    return image_pair(caption, images[winner], images[1 - winner], ledger, label=max(label, 1 - label), **rest)


def _label(row: Row) -> float:
    """label_0, after checking that both labels are 0, 0.5 or 1 and add up to 1."""
    for name in ("label_0", "label_1"):
        value = row.get(name)
        if isinstance(value, bool) or value not in (0, 0.5, 1):
            raise BadField(name, "0, 0.5 or 1", shown(value))
    if row["label_0"] + row["label_1"] != 1:
        raise BadField("label_1", f"{1 - row['label_0']:g}, as label_0 is {row['label_0']:g}", shown(row["label_1"]))
    return float(row["label_0"])


def _scores(row: Row, winner: int) -> dict[str, float]:
    for name in SCORES:
        if row.get(name.format(0)) is not None:
            values = [number_field(row, name.format(i)) for i in (0, 1)]
            return {"chosen": values[winner], "rejected": values[1 - winner]}
    return {}


def write_pick_a_pic(pairs: Iterable[Pair], path: Path) -> int:
    """Write image pairs as one parquet file, replaced as a whole; returns the number of rows.

    Which side is image 0 follows from the pair's id, so that position tells nothing about preference. Arrays become PNG.
    `weight`, `margin` and `scores` are kept as columns of ours. Raises DataError for what the format cannot hold: rows
    without two images, a prompt that is not one text, labels other than 1 and 0.5.
    """
    return write_parquet(path, SCHEMA, (_row(pair) for pair in pairs))


def _row(pair: Pair) -> dict[str, Any]:
    if [b.kind for b in (*pair.prompt, *pair.chosen, *pair.rejected)] != ["text", "image", "image"]:
        raise DataError(f"pair {pair.id}: Pick-a-Pic holds one text and two images, not this pair's blocks")
    if pair.label not in (0.5, 1.0):
        raise DataError(f"pair {pair.id}: Pick-a-Pic labels are 0, 0.5 or 1, found label {pair.label}")
    sides, labels = [("chosen", pair.chosen[0]), ("rejected", pair.rejected[0])], [pair.label, 1 - pair.label]
    if pair.label == 1 and sum(pair.id.encode()) % 2:  # a tie keeps its order: nothing else tells its sides apart
        sides, labels = sides[::-1], labels[::-1]
    row: dict[str, Any] = {"caption": pair.caption, "are_different": True, "has_label": True}
    row |= {"weight": pair.weight, "margin": pair.margin}
    for i, (name, block) in enumerate(sides):
        row |= {f"jpg_{i}": file_bytes(block), f"label_{i}": labels[i], f"score_{i}": pair.scores.get(name)}
    return row


def file_bytes(block: Block) -> bytes:
    """The image file of a block: its own bytes, or its array as PNG."""
    return block.data if isinstance(block.data, bytes) else media.encode(block.data)  # type: ignore[arg-type]
