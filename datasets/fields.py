"""Reads one field of a row into a checked value. Whatever is wrong is a BadField: which field, expected, found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpo import media
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip
from mmpo.datasets.pairing import pair_id
from mmpo.errors import DataError
from mmpo.pair import Block, Pair, image, text


def shown(value: Any) -> str:
    """A value for an error message: short, and never a megabyte of bytes."""
    if value is None:
        return "nothing"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    written = repr(value)
    return written if len(written) <= 60 else written[:57] + "..."


def text_field(row: Row, *names: str) -> str:
    """The first of the named fields that the row has: text that is not blank."""
    value = next((row[n] for n in names if row.get(n) is not None), None)
    if not isinstance(value, str) or not value.strip():
        raise BadField(names[0], "text that is not empty", shown(value), "missing prompt")
    return value


def number_field(row: Row, name: str, default: float | None = None, least: float = -math.inf) -> float:
    """A finite number, at least `least`; `default` when the row has none (an error without a default)."""
    value = row.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadField(name, "a finite number", shown(value))
    if value < least:
        raise BadField(name, f"at least {least:g}", shown(value))
    return float(value)


def image_field(row: Row, name: str, root: Path) -> Block:
    """An image given as bytes, as Hugging Face's {"bytes", "path"}, or as a path under `root`; decoded once to check it."""
    value = row.get(name)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return image_block(value, name, root)


def image_block(value: Any, name: str, root: Path) -> Block:
    """The Block of image bytes or of a path under `root`. Raises BadField when there is no decodable image."""
    if not value or not isinstance(value, (bytes, str)):
        raise BadField(name, "an image (bytes, or a path under the dataset root)", shown(value), "missing image")
    if isinstance(value, str):
        try:
            block = image(media.read(root, value), value)
        except DataError as error:
            raise BadField(name, "a file under the dataset root", str(error), "missing or forbidden path") from error
    else:
        block = image(value)
    try:
        media.open_image(block)
    except DataError as error:
        raise BadField(name, "a whole still image", str(error), "undecodable image") from error
    return block


def image_pair(caption: str, chosen: Block, rejected: Block, ledger: Ledger, **rest: Any) -> Pair:
    """A Pair with a content-derived id; identical sides are skipped, sides of different size are noted."""
    if chosen.digest == rejected.digest:
        raise Skip("identical sides")
    if media.size(chosen) != media.size(rejected):
        ledger.notes["sides of different size (kept)"] += 1
    prompt = (text(caption),)
    return Pair(
        pair_id(prompt, (chosen,), (rejected,)), prompt, (chosen,), (rejected,), group=text(caption).digest[:20], **rest
    )


def list_field(row: Row, name: str, length: int | None = None) -> Sequence[Any]:
    """A list, of the given length when one is given."""
    value = row.get(name)
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        expected = "a list" if length is None else f"a list of {length}"
        raise BadField(name, expected, shown(value) if not isinstance(value, (list, tuple)) else f"a list of {len(value)}")
    return value
