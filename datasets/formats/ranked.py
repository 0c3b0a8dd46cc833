"""Ranked generations, as ImageReward publishes them (JSON): prompt, generations (paths) and ranking, 1 being the best."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mmpo.datasets.fields import finite, image_block, image_pair, list_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.tables import rows_of
from mmpo.pair import Pair


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in ("json", "jsonl", "parquet") and columns >= {"prompt", "generations", "ranking"}


def ranked(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """Every two generations of different rank make a pair; the lower rank number is chosen.

    ties: two of equal rank are dropped and noted in the ledger, or kept with `label` 0.5 by "soft". `meta` carries both
    ranks. root: where the paths lead, the file's folder by default. Raises DataError at the first bad row unless
    ledger.on_bad is "skip".
    """
    base = root or path.parent
    return import_rows(rows_of(path), lambda row: _pairs(row, base, ties, ledger), ledger)


def _pairs(row: Row, root: Path, ties: str, ledger: Ledger) -> list[Pair]:
    prompt = text_field(row, "prompt")
    names = list_field(row, "generations")
    ranks = list_field(row, "ranking", len(names))
    if not all(finite(rank, "ranking") > 0 for rank in ranks):
        raise BadField("ranking", "ranks from 1 (the best)", shown(list(ranks)))
    images = [image_block(name, f"generations[{i}]", root) for i, name in enumerate(names)]
    pairs = []
    for (rank, chosen), (other, rejected) in itertools.combinations(
        sorted(zip(ranks, images, strict=True), key=lambda x: x[0]), 2
    ):
        if rank == other and ties == "drop":
            ledger.notes["pairs of equal rank dropped"] += 1
        elif chosen.digest == rejected.digest:
            ledger.notes["pairs of identical images dropped"] += 1
        else:
            meta = {"ranks": {"chosen": rank, "rejected": other}}
            pairs.append(image_pair(prompt, chosen, rejected, ledger, label=0.5 if rank == other else 1.0, meta=meta))
    if not pairs:
        raise Skip("no two generations that differ in rank and content")
    return pairs
