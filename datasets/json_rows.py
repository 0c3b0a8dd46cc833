"""Rows of JSON that may be hostile: a row whose keys repeat, or that is nested too deep, is bad, and spoils no other."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from mmpo.datasets.ledger import BadField, Row

MAX_DEPTH = 64  # of nested lists and objects in a row
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
BLANK = re.compile(r"[ \t\r\n]*")
# Says where a value ends, also of one that `parsed` finds to be bad: a number too long for Python, a tab inside of a string.
ENDS = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)


def parsed(raw: bytes, name: str = "(line)") -> Row | BadField:
    """The row that a line, or an item of a list, holds; name: what it is called where it is bad."""
    try:
        written = raw.decode("utf-8-sig")
        if (found := depth(written)) > MAX_DEPTH:
            raise BadField(name, f"JSON at most {MAX_DEPTH} deep", f"{found}", "nested too deep")
        item = json.loads(written, object_pairs_hook=functools.partial(_unique, name))
        return item if isinstance(item, dict) else BadField("(row)", "a JSON object", type(item).__name__, "not an object")
    except UnicodeDecodeError as error:
        problem = BadField(name, "text in UTF-8", str(error)[:200], "bad UTF-8")
    except ValueError as error:
        problem = BadField(name, "a JSON object", f"{type(error).__name__}: {error}"[:200], "bad JSON")
    except BadField as error:
        problem = error
    problem.raw = raw
    return problem


def list_items(raw: bytes) -> Iterator[bytes]:
    """The items of a JSON list as they are written. Raises ValueError where it is not a list, or not whole."""
    text = raw.decode("utf-8-sig", "surrogateescape")  # bytes that are no UTF-8 spoil the item they are in, and no other
    at = _expected("[", text, 0)
    if text[at : at + 1] == "]":
        _expected("", text, at + 1)
        return
    while True:
        end = _end(text, at)
        yield text[at:end].encode("utf-8", "surrogateescape")
        at = BLANK.match(text, end).end()  # type: ignore[union-attr]  # it matches nothing as well
        if text[at : at + 1] == "]":
            break
        at = _expected(",", text, at)
    _expected("", text, at + 1)


def _expected(sign: str, text: str, at: int) -> int:
    """The place behind a sign, or the end of the text, and the blanks around it. Raises JSONDecodeError at anything else."""
    at = BLANK.match(text, at).end()  # type: ignore[union-attr]
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"a JSON list of objects has {repr(sign) if sign else 'nothing more'} here", text, at)
    return BLANK.match(text, at + len(sign)).end()  # type: ignore[union-attr]


def _end(text: str, at: int) -> int:
    """Where a value ends. One that is too deep for the parser is passed over by its brackets."""
    try:
        return ENDS.raw_decode(text, at)[1]
    except RecursionError:
        level = 0
        for token in TOKENS.finditer(text, at):
            level += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
            if level == 0:
                return token.end()
        raise ValueError("the list ends inside of an item") from None


def depth(written: str) -> int:
    """How deep lists and objects are nested; 0 without counting where they cannot be too deep."""
    if written.count("[") + written.count("{") <= MAX_DEPTH:
        return 0
    level = deepest = 0
    for token in TOKENS.findall(written):  # strings are tokens, so that brackets inside them do not count
        level += (token in ("[", "{")) - (token in ("]", "}"))
        deepest = max(deepest, level)
    return deepest


def _unique(name: str, items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        twice = next(key for i, (key, _) in enumerate(items) if any(key == other for other, _ in items[:i]))
        raise BadField(name, "each key once", f"{twice[:60]!r} again", "repeated key")
    return found
