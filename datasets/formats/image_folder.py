"""A folder of images: chosen/ and rejected/ matched by file name, or Hugging Face's imagefolder with a metadata.jsonl.

    root/chosen/17.png  root/rejected/17.webp  root/17.txt                                captions one file each, or
    root/captions.jsonl or root/metadata.jsonl: {"file_name": "chosen/17.png", "text": "a red circle"}
    root/metadata.jsonl: {"chosen_file_name": "a.png", "rejected_file_name": "b.png", "text": "a red circle"}

A caption is called text, caption or prompt; a caption file may also lie in chosen/, rejected/ or captions/.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from mmpo import media
from mmpo.datasets.fields import image_block, image_field, image_pair, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.tables import Located, jsonl_rows
from mmpo.errors import DataError
from mmpo.pair import Pair

CAPTION = ("text", "caption", "prompt")
LISTS = ("captions.jsonl", "metadata.jsonl")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind == "folder" and (columns >= {"chosen", "rejected"} or "metadata.jsonl" in columns)


def image_folder(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Pair]:
    """One Pair for each file name that chosen/ or rejected/ holds, or for each line of metadata.jsonl.

    ties: not used, a folder has none. root: where the names of metadata.jsonl lead, the folder itself by default.
    A name without its partner, with two files on one side, or without a caption is a bad row.
    """
    base = root or path
    if (path / "chosen").is_dir() and (path / "rejected").is_dir():
        return import_rows(_stems(path, ledger), lambda row: [_matched(row, path, ledger)], ledger)
    if not (path / "metadata.jsonl").is_file():
        raise DataError(f"{path}: expected the folders chosen and rejected, or a metadata.jsonl")
    return import_rows(jsonl_rows(path / "metadata.jsonl"), lambda row: [_listed(row, base, ledger)], ledger)


def _listed(row: Row, root: Path, ledger: Ledger) -> Pair:
    chosen, rejected = (image_field(row, f"{side}_file_name", root) for side in ("chosen", "rejected"))
    return image_pair(text_field(row, *CAPTION), chosen, rejected, ledger)


def _stems(root: Path, ledger: Ledger) -> Iterator[Located]:
    """One row per file name without suffix: {"stem", "chosen": names, "rejected": names, "text"}; other files are noted."""
    files: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"chosen": [], "rejected": []})
    for side in ("chosen", "rejected"):
        for file in sorted((root / side).iterdir()):
            if file.suffix.lower() in SUFFIXES:
                files[file.stem][side].append(f"{side}/{file.name}")
            elif file.suffix.lower() != ".txt":
                ledger.notes[f"entries of {side}/ that are no image file (ignored)"] += 1
    captions = _captions(root)
    for number, (stem, sides) in enumerate(sorted(files.items())):
        yield f"{root.name}:row {number} ({stem})", {"stem": stem, **sides, "text": captions.get(stem)}


def _captions(root: Path) -> dict[str, str]:
    """Captions by stem. Raises DataError for an unreadable line and for two different captions of one stem."""
    found: dict[str, str] = {}
    for where, row in ((w, r) for name in LISTS if (root / name).is_file() for w, r in jsonl_rows(root / name)):
        try:
            if isinstance(row, BadField):
                raise row
            stem, caption = PurePosixPath(text_field(row, "file_name", "stem")).stem, text_field(row, *CAPTION)
        except BadField as problem:
            raise DataError(f"{root / where} {problem}") from problem
        if found.setdefault(stem, caption) != caption:
            raise DataError(f"{root / where}: a second, different caption for {stem!r}")
    return found


def _matched(row: Row, root: Path, ledger: Ledger) -> Pair:
    for side in ("chosen", "rejected"):
        if len(row[side]) != 1:
            reason = "missing image" if not row[side] else "two files of one name"
            raise BadField(side, f"one file {side}/{row['stem']}.*", f"{len(row[side])}", reason)
    caption = row["text"] or _caption_file(root, row["stem"])
    chosen, rejected = (image_block(row[side][0], side, root) for side in ("chosen", "rejected"))
    return image_pair(text_field({"text": caption}, "text"), chosen, rejected, ledger)


def _caption_file(root: Path, stem: str) -> str | None:
    """The first `<stem>.txt` there is, as one line."""
    for folder in ("", "captions/", "chosen/", "rejected/"):
        if (root / f"{folder}{stem}.txt").is_file():
            try:
                return media.read(root, f"{folder}{stem}.txt").decode("utf-8-sig").strip()
            except (DataError, UnicodeDecodeError) as error:
                raise BadField("text", f"UTF-8 text in {folder}{stem}.txt", str(error), "missing prompt") from error
    return None
