"""Reads YAML that may be hostile, and remembers where every value stood.

The scalars are YAML 1.2's core schema: `1e-4` is a float and `no` is a string, where PyYAML alone says the reverse.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mmpo.errors import RecipeError

MAX_BYTES = 250_000  # half a second of the parser
MAX_NODES = 1_000
MAX_DEPTH = 32

_WORDS: dict[str, Any] = {"": None, "~": None}
for _word, _value in {"null": None, "true": True, "false": False}.items():
    _WORDS |= dict.fromkeys((_word, _word.upper(), _word.capitalize()), _value)
_WORDS |= dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan"))
for _sign in ("", "+", "-"):
    _WORDS |= dict.fromkeys((f"{_sign}.inf", f"{_sign}.Inf", f"{_sign}.INF"), float(f"{_sign}inf"))
_INTEGER = re.compile(r"[-+]?[0-9]{1,400}|0x[0-9a-fA-F]{1,300}|0o[0-7]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

Keys = tuple[str | int, ...]


class Mark(NamedTuple):
    """Where a value was written. line and column count from 1; line 0 is a place without lines, e.g. the command line."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


def dotted(keys: Keys) -> str:
    """Keys as a message names them; one that is empty, or that a terminal would obey, is quoted."""
    return ".".join(k if k and k.isprintable() else json.dumps(k) for k in map(str, keys))


def load(path: Path, name: str, problems: list[str] | None = None) -> tuple[Any, dict[Keys, Mark]]:
    """The plain data of a YAML file, and where each key path of it stands (a mapping's entry: its key).

    Refuses, with file, line and column: duplicate keys, tags, several documents, more than MAX_NODES nodes after aliases
    are expanded, nesting over MAX_DEPTH and files over MAX_BYTES. name: the file in messages. problems: takes those that
    leave the rest readable (duplicate keys), so that they are told with what else is wrong. Raises RecipeError.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(f"{name}: the file is too large (got over {MAX_BYTES} bytes, expected at most {MAX_BYTES})")
        return parse(raw.decode("utf-8-sig"), name, problems)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: byte {error.start} is not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read ({error.strerror})") from None


def parse(text: str, file: str, problems: list[str] | None = None) -> tuple[Any, dict[Keys, Mark]]:
    """As `load`, from a string; `file` is only used in messages and marks."""
    reader = None
    try:
        reader = _Composer(text, file)
        node = reader.get_single_node()
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f"{file}:{at.line + 1}:{at.column + 1}" if at else file
        raise RecipeError(f"{place}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: {' '.join(str(error).split())}") from None
    finally:
        if reader is not None:
            reader.dispose()
    plain = _Plain(file)
    data = plain.build(node, ()) if node else None
    if plain.problems and problems is None:
        raise RecipeError(plain.problems)
    if problems is not None:
        problems += plain.problems
    return data, plain.marks


def scalar(text: str) -> Any:
    """The value of an unquoted YAML 1.2 scalar: null, a boolean, an int, a float, or else the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, 0 if text[:2] in ("0x", "0o") else 10)
    return float(text) if _FLOAT.fullmatch(text) else text


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which refuses tags and stops early at the limits instead of recursing through them."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self.name, self.depth, self.nodes = file, 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem=f"tags are not allowed (got {event.tag!r})", problem_mark=event.start_mark)
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=_too_much(self.depth), problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Plain:
    """Turns composed nodes into plain data, counting every visit to a node, so that aliases pay for what they repeat."""

    def __init__(self, file: str) -> None:
        self.file, self.nodes = file, 0
        self.marks: dict[Keys, Mark] = {}
        self.problems: list[str] = []

    def build(self, node: Any, keys: Keys) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(keys) > MAX_DEPTH:
            raise RecipeError(f"{self._mark(node)}: {_too_much(len(keys))}, after aliases are expanded")
        self.marks.setdefault(keys, self._mark(node))
        if isinstance(node, yaml.ScalarNode):
            return scalar(node.value) if node.style is None else node.value
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*keys, i)) for i, item in enumerate(node.value)]
        return self._mapping(node, keys)

    def _mapping(self, node: Any, keys: Keys) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"{self._mark(key)}: a key must be a name (got a {key.id})")
            elif key.value in data:
                first = self.marks[*keys, key.value].line
                self.problems.append(f"{self._mark(key)} {dotted((*keys, key.value))}: duplicate key (first on line {first})")
            else:
                self.marks[*keys, key.value] = self._mark(key)
                data[key.value] = self.build(value, (*keys, key.value))
        return data

    def _mark(self, node: Any) -> Mark:
        return Mark(self.file, node.start_mark.line + 1, node.start_mark.column + 1)


def _too_much(depth: int) -> str:
    return f"nested too deeply (over {MAX_DEPTH})" if depth > MAX_DEPTH else f"too many values (over {MAX_NODES})"
