"""Pick-a-Pic v1/v2 (parquet, or JSON, JSON lines and CSV with paths): a caption, two images, and the label of each.

A label is 1 (won), 0 (lost) or 0.5 (tied). Labels in between are soft: the probability that this image is the better one.
SmPO's rescored copy adds the PickScore of both images (ps_score_0, ps_score_1: cosines, plain or as lists of one); the soft
label they give (`soft_labels`) takes the place of what people said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmpo.datasets.fields import finite, flag_field, image_field, image_pair, number_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.media_files import file_bytes
from mmpo.datasets.tables import rows_of, write_parquet
from mmpo.errors import DataError
from mmpo.pair import Pair

KEEP = {"caption", "jpg_0", "jpg_1", "label_0", "label_1"}
OPTIONAL = ["id", "are_different", "has_label", "weight", "margin", "score_0", "score_1", "ps_score_0", "ps_score_1"]
PS_RANGE = 0.28201571106910706 - 0.11543526500463486  # greatest and least cosine of Pick-a-Pic v2, from SmPO's train.py
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
    return kind in ("parquet", "json", "jsonl", "csv") and columns >= KEEP


def pick_a_pic(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Pair]:
    """Pairs of a parquet file, of all parquet files of a folder, or of JSON lines or CSV, where images are paths.

    A soft label becomes the pair's `label`, and is noted in the ledger; the likelier image is chosen. ties: "drop" skips
    rows that people labelled 0.5, "soft" keeps them with `label` 0.5 (image 0 as chosen). Rows with `are_different` or
    `has_label` false are skipped, as the dataset's authors do. root: where images given as paths lie, the file's folder by
    default. Raises DataError at the first bad row unless ledger.on_bad is "skip".
    """
    base = root or (path if path.is_dir() else path.parent)
    rows = rows_of(path, [*sorted(KEEP), *OPTIONAL])
    return import_rows(rows, lambda row: [_pair(row, base, ties, ledger)], ledger)


def _pair(row: Row, root: Path, ties: str, ledger: Ledger) -> Pair:
    caption = text_field(row, "caption")
    for name in ("has_label", "are_different"):
        if flag_field(row, name) is False:
            raise Skip(f"{name} is false")
    labels = _labels(row)
    if 0.5 in labels and ties == "drop":
        raise Skip("tie")
    scores, cosines = _two(row, "score", number_field), _two(row, "ps_score", _cosine)
    if cosines:
        labels = soft_labels(*cosines)
    winner = 0 if labels[0] >= labels[1] else 1
    images = [image_field(row, f"jpg_{i}", root) for i in (0, 1)]
    judged = scores or cosines
    pair = image_pair(
        caption, images[winner], images[1 - winner], ledger, label=labels[winner],
        weight=number_field(row, "weight", 1.0, least=0.0), margin=number_field(row, "margin", 0.0),
        scores={"chosen": judged[winner], "rejected": judged[1 - winner]} if judged else {},
    )  # fmt: skip
    if pair.label not in (0.5, 1):
        ledger.notes["soft labels"] += 1
    return pair


def _labels(row: Row) -> tuple[float, float]:
    """Both labels, after checking that they are probabilities and add up to 1."""
    first, second = (number_field(row, name) for name in ("label_0", "label_1"))
    for name, label in (("label_0", first), ("label_1", second)):
        if not 0 <= label <= 1:
            raise BadField(name, "a number from 0 to 1", shown(row[name]))
    if not math.isclose(first + second, 1, abs_tol=1e-6):
        raise BadField("label_1", f"{1 - first:g}, as label_0 is {first:g}", shown(row["label_1"]))
    return first, second


def soft_labels(first: float, second: float) -> tuple[float, float]:
    """SmPO's probability that each image is the better one: the softmax of both PickScores over their range in the data."""
    p = 1 / (1 + math.exp((second - first) / PS_RANGE))
    return p, 1 - p


def _cosine(row: Row, name: str) -> float:
    value = row.get(name)
    found = finite(value[0], name) if isinstance(value, list) and len(value) == 1 else number_field(row, name)
    if abs(found) > 1:
        raise BadField(name, "a cosine from -1 to 1 (PickScore without its logit scale)", shown(found))
    return found


def _two(row: Row, name: str, read: Callable[[Row, str], float]) -> list[float]:
    """Both images' values of a field that the row may not have."""
    return [] if row.get(f"{name}_0") is None else [read(row, f"{name}_{i}") for i in (0, 1)]


def write_pick_a_pic(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write image pairs as one parquet file, replaced as a whole; returns the number of rows.

    Which side is image 0 follows from the pair's id, so that position tells nothing about preference. Arrays become PNG.
    `weight`, `margin` and `scores` are kept as columns of ours; `meta` is left out and counted. Raises
    DataError for what the format cannot hold: rows without two images, a prompt that is not one text, a chosen side that is
    the less likely one.
    """
    return write_parquet(path, SCHEMA, (_row(pair, ledger) for pair in pairs))


def _row(pair: Pair, ledger: Ledger | None) -> dict[str, Any]:
    if pair.meta and ledger is not None:
        ledger.notes["meta left out: pick_a_pic has no place for it"] += 1
    if [b.kind for b in (*pair.prompt, *pair.chosen, *pair.rejected)] != ["text", "image", "image"]:
        raise DataError(f"pair {pair.id}: Pick-a-Pic holds one text and two images, not this pair's blocks")
    if not 0.5 <= pair.label <= 1:
        raise DataError(f"pair {pair.id}: Pick-a-Pic's winner has a label from 0.5 to 1, found {pair.label}")
    sides, labels = [("chosen", pair.chosen[0]), ("rejected", pair.rejected[0])], [pair.label, 1 - pair.label]
    if pair.label != 0.5 and sum(pair.id.encode()) % 2:  # a tie keeps its order: nothing else tells its sides apart
        sides, labels = sides[::-1], labels[::-1]
    row: dict[str, Any] = {"caption": pair.caption, "are_different": True, "has_label": True}
    row |= {"weight": pair.weight, "margin": pair.margin}
    for i, (name, block) in enumerate(sides):
        row |= {f"jpg_{i}": file_bytes(block), f"label_{i}": labels[i], f"score_{i}": pair.scores.get(name)}
    return row
