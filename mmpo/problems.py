"""What is wrong with a recipe, in words: `file:line:column field: problem (got ..., expected ...)`, and what may be meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from mmpo import yaml_source
from mmpo.find import nearest
from mmpo.masking import masked
from mmpo.schema import Section, section_at
from mmpo.yaml_source import Keys, Mark

Marks = dict[Keys, Mark]

COMMAND_LINE = "command line"
_BARE = re.compile(r"[A-Za-z_][\w./@-]*")


def line(marks: Marks, keys: Keys, problem: str) -> str:
    """`place field: problem`; the place of a key that was not written is that of the nearest section that was.

    Of a section, it is the command line where that set one of the keys that the problem names: it came last.
    """
    below = (k for k, mark in marks.items() if mark.file == COMMAND_LINE and k[: len(keys)] == keys and len(k) > len(keys))
    named = next((k for k in below if re.search(rf"\b{re.escape(str(k[-1]))}\b", problem)), None)
    above = (keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in marks)
    place = marks[named] if named is not None else next((marks[k] for k in above), "default")
    return f"{place} {yaml_source.dotted(keys)}: {problem}"


def problems_of(
    error: ValidationError, schema: type[Section], marks: Marks, at: Keys = (), also: Sequence[str] = ()
) -> list[str]:
    """pydantic's errors in this project's form. also: keys that are taken beside those of the schema."""
    found: dict[Keys, str] = {}
    for e in error.errors(include_url=False):
        keys = (*at, *e["loc"])
        if e["type"] not in ("missing", "extra_forbidden"):
            keys = next((keys[:n] for n in range(len(keys), len(at), -1) if keys[:n] in marks), keys)  # less a union's branch
        found.setdefault(keys, _problem(e, schema, also))
    return [line(marks, keys, problem) for keys, problem in found.items()]


def _problem(error: Any, schema: type[Section], also: Sequence[str]) -> str:
    *section, key = error["loc"]
    message, given = error["msg"], error["input"]
    shown = got(masked(key, given))
    if error["type"] == "missing":
        return "missing, and it has no default"
    if error["type"] == "extra_forbidden":
        known = [*getattr(section_at(schema, section), "model_fields", ()), *also]
        expected = f"one of {', '.join(known)}" if known else "none: it takes none"
        return f"unknown key (got {key!r}, expected {expected}){_meant(str(key), known, schema)}"
    if error["type"] == "value_error":
        problem = str(error["ctx"]["error"])
        return problem if "(got" in problem else f"{problem} (got {shown})"
    if not message.startswith("Input should be "):
        return f"{message[0].lower()}{message[1:]} (got {shown})"
    expected = re.split(", unable|, got", message.removeprefix("Input should be "))[0].replace("valid tuple", "valid list")
    expected = "a mapping of settings" if error["type"] == "model_type" else expected
    advice = "; to make it text, quote it" if error["type"] == "string_type" and isinstance(given, int | float) else ""
    choices = re.findall("'(.*?)'", expected)
    return f"wrong value (got {shown}, expected {expected}){nearest(str(given), choices)}{advice}"


def got(given: Any) -> str:
    """A value as a message shows it, in YAML's words."""
    if nests(given):
        return "a mapping" if isinstance(given, dict) else "a list"
    return flow(given)


def _meant(key: str, known: Sequence[str], schema: type[Section]) -> str:
    """What somebody may have meant who wrote a key that there is not."""
    for name in known:
        if re.match(rf"{re.escape(name)}[:=]", key):
            return f"; a space is missing behind '{name}:'"
    others = [name for name in schema.model_fields if key in getattr(section_at(schema, [name]), "model_fields", ())]
    return nearest(key, known) + (f"; there is {' and '.join(f'{name}.{key}' for name in others)}" if others else "")


def flow(value: Any) -> str:
    """A leaf in YAML's one-line form; text is left bare only where YAML 1.1 and 1.2 agree that it is text."""
    if isinstance(value, list):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, str) and not (_BARE.fullmatch(value) and value == yaml_source.scalar(value) == yaml.safe_load(value)):
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**31).strip()
    return yaml.safe_dump(value).splitlines()[0]  # 1.0e-05: a float to YAML 1.1 as well


def nests(value: Any) -> bool:
    """Whether a value is written over several lines: a mapping, or a list that is not only scalars."""
    return bool(value) and (
        isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
    )
