"""VLFeedback: an image, a prompt and its completions, each with a model's response and ratings by aspect.

completions is a list of objects, or, as Hugging Face's datasets give it, an object of lists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, note_others
from mmpo.datasets.fields import shown, text_field
from mmpo.datasets.formats.ultrafeedback import IMAGES, rated, scored
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.media_files import write_pictured
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.pictures import Album, about, root_of
from mmpo.datasets.placeholders import LLAVA, pictures_of
from mmpo.datasets.tables import rows_of
from mmpo.errors import DataError
from mmpo.pair import Block, text

CANDIDATES = ASPECTS = True  # what this format holds are candidates, with scores by aspect
COLUMNS = ("prompt", "completions", "models", "img_path")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= {"prompt", "completions"} and bool(columns & IMAGES)


def vlfeedback(
    path: Path,
    *,
    root: Path | None = None,
    ties: Literal["drop", "soft"] = "drop",
    aspect: str | None = None,
    ledger: Ledger,
) -> Iterator[Candidate]:
    """One Candidate a completion, the image before the prompt; `meta` keeps its model and its ratings by aspect.

    The score is the mean of the ratings, as in the authors' pairs, or the rating `aspect` alone, e.g. "Helpfulness".
    Completions without that score are left out and noted. root: where paths of images start from. ties: not used here.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: _candidates(row, aspect, album), ledger)


def _candidates(row: Row, aspect: str | None, album: Album) -> list[Candidate]:
    pictures = album.named(row, "image", "img_path", "images")
    prompt = album.shown(about((text(text_field(row, "prompt")),), pictures, LLAVA), pictures)
    found = scored({"completions": _listed(row.get("completions"))}, prompt, aspect, album.ledger)
    note_others(row, COLUMNS, album.ledger)
    return found


def _listed(value: Any) -> Any:
    """An object of lists as a list of objects; anything else as it is."""
    if not isinstance(value, dict):
        return value
    lengths = {len(v) if isinstance(v, (list, tuple)) else -1 for v in value.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise BadField("completions", "lists of one length", shown(value), "bad completions")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def write_vlfeedback(rows: Iterable[Candidate], path: Path, ledger: Ledger | None = None) -> int:
    """Write candidates as JSON lines (or one list, by the name), images beside them; returns the number of rows.

    Candidates of one prompt have to follow each other to share a row. Seeds other than 0 are left out and counted. Raises
    DataError for prompts that are not an image and a text, and for answers that are no text.
    """
    grouped = itertools.groupby(rows, key=lambda c: tuple(b.digest for b in c.prompt))
    return write_pictured((list(group) for _, group in grouped), path, ledger, _row)


def _row(group: list[Candidate], ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    kinds, words = [b.kind for b in group[0].prompt], [b for b in group[0].prompt if b.kind == "text"]
    if kinds != ["image", "text"] or any(b.role for b in words) or any(c.block.kind != "text" for c in group):
        found = ", ".join(kinds)
        raise DataError(f"prompt of {found}: VLFeedback holds an image, one text without role, and answers in text")
    completions = rated(group, "vlfeedback", ledger)
    for candidate, completion in zip(group, completions, strict=True):
        if "overall_score" not in candidate.meta and completion["annotations"]:
            del completion["overall_score"]  # it is the mean of the ratings
    row = {"image": put(pictures_of(group[0].prompt)[0]), "prompt": words[0].data}
    return row | {"models": [c["model"] for c in completions if "model" in c], "completions": completions}
