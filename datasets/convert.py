"""Rewrites a dataset in another format, its pictures inside the file or beside it, with an account of every row."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

from mmpo.checkpoint import write_atomic
from mmpo.datasets.ledger import Ledger, Policy
from mmpo.datasets.load import ROOM, detect, holds_candidates, pairs, rows
from mmpo.errors import DataError, RecipeError
from mmpo.find import names, nearest


def convert(
    path: str | Path,
    to: str,
    out: str | Path,
    *,
    format: str | None = None,
    root: str | Path | None = None,
    ties: Literal["drop", "soft"] = "drop",
    aspect: str | None = None,
    on_bad: Policy = "refuse",
) -> tuple[int, Ledger]:
    """Write the rows of `path` to `out` in the format `to`; returns the number of rows written and the ledger.

    `out` is a file, and pictures that the format does not have inside are in the folder media/ beside it; for the format
    mmpo it is a folder.

    Pairs go to any format of pairs; scored candidates as well, the best against the worst of each prompt. The other way
    there is none: a format of candidates takes candidates only. format, root, ties, aspect, on_bad: see `load.load`.
    What a format of text cannot say of a pair is counted in the ledger's notes where it merely describes (scores, meta).
    Where it matters in training (sides, weight, margin, label, spans) the pair is refused as a bad row is, or left out and
    noted. Raises RecipeError for a format that nothing writes, DataError for rows it cannot hold, and at the first bad row
    where on_bad is "refuse"; `out` is then left as it was. "quarantine" writes the bad rows to `<out>.quarantine.jsonl`.
    """
    found = {name: writer for name in names(ROOM) if (writer := _writer(name))}
    if to not in found:
        raise RecipeError(f"no writer for {to!r} (there are: {', '.join(found)}){nearest(to, found)}")
    if Path(out).exists() and Path(out).samefile(path):
        raise DataError(f"{out}: would be replaced while it is read; give another file")
    ledger, source = Ledger(on_bad), format or detect(path)
    if not holds_candidates(to):
        items = pairs(path, ledger, format=source, root=root, ties=ties, aspect=aspect)
    elif holds_candidates(source):
        items = rows(path, ledger, format=source, root=root, aspect=aspect)
    else:
        raise DataError(f"{path}: pairs of format {source} do not say what one answer is worth, as candidates have to")
    count = found[to](items, Path(out), ledger)
    if ledger.quarantined:
        write_atomic(Path(f"{out}.quarantine.jsonl"), ledger.quarantine())
    return count, ledger


def _writer(name: str) -> Any:
    """`write_<name>` of a format's file, if it has one."""
    return getattr(importlib.import_module(f"mmpo.{ROOM}.{name}"), f"write_{name}", None)
