"""Reads one field of a row into a checked value. Whatever is wrong is a BadField: which field, expected, found."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpo import media
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, TextRow
from mmpo.datasets.pairing import digest, pair_id
from mmpo.errors import DataError
from mmpo.pair import Block, Pair, image, text

MAX_TEXT = 1_000_000  # characters of a prompt or an answer


def shown(value: Any) -> str:
    """A value for an error message: short, and never a megabyte of bytes."""
    if value is None:
        return "nothing"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    written = repr(value)
    return written if len(written) <= 60 else written[:57] + "..."


def text_field(row: Row, *names: str) -> str:
    """The first of the named fields that the row has: text that is not blank, and that UTF-8 can hold."""
    name, value = next(((n, row[n]) for n in names if row.get(n) is not None), (names[0], None))
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadField(name, "text that is not empty", shown(value), "missing prompt")
    return checked_text(value, name)


def checked_text(value: Any, name: str) -> str:
    """Text, blank or not, that UTF-8 can hold and that is no book."""
    if not isinstance(value, str):
        raise BadField(name, "text", shown(value), f"wrong type of {name.partition('[')[0]}")
    if len(value) > MAX_TEXT:
        raise BadField(name, f"at most {MAX_TEXT} characters", f"{len(value)}", "too long")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadField(name, "Unicode text", f"half a surrogate pair at character {error.start}", "not Unicode") from None
    return value


def number_field(row: Row, name: str, default: float | None = None, least: float = -math.inf) -> float:
    """A finite number, at least `least`; `default` when the row has none (an error without a default)."""
    value = row.get(name)
    if value is None:
        if default is None:
            raise BadField(name, "a finite number", "nothing", f"missing {name}")
        return default
    found = finite(value, name, isinstance(row, TextRow))
    if found < least:
        raise BadField(name, f"at least {least:g}", shown(value))
    return found


def finite(value: Any, name: str, written: bool = False) -> float:
    """A value that has to be a finite number; written: as text, as the cells of CSV are."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str) if written else (int, float)):
        raise BadField(name, "a finite number", shown(value), f"wrong type of {name}")
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    except ValueError:
        raise BadField(name, "a finite number", shown(value), f"wrong type of {name}") from None
    if not math.isfinite(found):
        raise BadField(name, "a finite number", shown(value), f"{name} not finite")
    return found


def whole_field(row: Row, name: str, default: int) -> int:
    """A whole number of 64 bits; `default` when the row has none."""
    value = row.get(name)
    if isinstance(row, TextRow) and value is not None and re.fullmatch(r"[+-]?\d{1,19}", value):
        value = int(value)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise BadField(name, "a whole number of 64 bits", shown(value))
    return value


def flag_field(row: Row, name: str) -> bool | None:
    """True, false, or None when the row does not say."""
    value = row.get(name)
    if isinstance(row, TextRow) and isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    if value is not None and not isinstance(value, bool):
        raise BadField(name, "true or false", shown(value), f"wrong type of {name}")
    return value


def image_field(row: Row, name: str, root: Path) -> Block:
    """An image given as bytes, as Hugging Face's {"bytes", "path"}, or as a path under `root`; decoded once to check it."""
    value = row.get(name)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return image_block(value, name, root)


def image_block(value: Any, name: str, root: Path) -> Block:
    """The Block of image bytes or of a path under `root`. Raises BadField when there is no decodable image."""
    if value is not None and not isinstance(value, (bytes, str)):
        raise BadField(name, "an image", shown(value), f"wrong type of {name.partition('[')[0]}")
    if not value:
        raise BadField(name, "an image (bytes, or a path under the dataset root)", shown(value), "missing image")
    if isinstance(value, str):
        try:
            block = image(media.read(root, value), value)
        except media.ForbiddenPath as error:
            raise BadField(name, "a file under the dataset root", str(error), error.reason) from error
    else:
        block = image(value)
    try:
        media.open_image(block)
    except DataError as error:
        raise undecodable(name, error) from error
    return block


def undecodable(name: str, error: DataError) -> BadField:
    """What is to be said of an image that media.open_image refused."""
    reason = "animated image" if isinstance(error, media.Animated) else "undecodable image"
    return BadField(name, "a whole still image", str(error), reason)


def image_pair(caption: str, chosen: Block, rejected: Block, ledger: Ledger, **rest: Any) -> Pair:
    """A Pair with a content-derived id; identical sides are skipped, sides of different size are noted."""
    if chosen.digest == rejected.digest:
        raise Skip("identical sides", "chosen, rejected")
    if media.size(chosen) != media.size(rejected):
        ledger.notes["sides of different size (kept)"] += 1
    prompt = (text(caption),)
    return Pair(pair_id(prompt, (chosen,), (rejected,)), prompt, (chosen,), (rejected,), group=digest(*prompt), **rest)


def list_field(row: Row, name: str, length: int | None = None) -> Sequence[Any]:
    """A list, of the given length when one is given."""
    value = row.get(name)
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        expected = "a list" if length is None else f"a list of {length}"
        found = f"a list of {len(value)}" if isinstance(value, (list, tuple)) else shown(value)
        raise BadField(name, expected, found, f"missing {name}" if value is None else None)
    return value
