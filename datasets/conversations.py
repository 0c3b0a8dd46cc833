"""Text of preference rows: conversations to blocks and back, prompts that both sides share, and columns beside them.

A conversation is several text blocks, each with the role of its speaker. A prompt or an answer given as one text is one
block without a role.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmpo.datasets.fields import checked_text, finite, number_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip
from mmpo.datasets.pairing import digest, pair_id
from mmpo.pair import Block, Pair, Role, Span, text

TABLES = ("json", "jsonl", "parquet", "csv")
OPENAI: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT: dict[str, Role] = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool"}
MEDIA = ("images", "image", "videos", "audios")
EXTRAS = ("weight", "margin", "chosen_probability", "score_chosen", "score_rejected", "spans", "meta")
Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Dialect:
    """How a message is written: its keys, and the names of the roles."""

    speaker: str = "role"
    words: str = "content"
    roles: Mapping[str, Role] = field(default_factory=lambda: OPENAI)
    pictures: bool = False  # content may be a list with {"type": "image"} where a picture stands; it becomes a blank

    def blocks(self, value: Any, name: str) -> Blocks:
        """The messages of a list, or of a single one. Raises BadField for an unknown role, calls of tools and media."""
        messages = [value] if isinstance(value, dict) else value
        if not isinstance(messages, (list, tuple)) or not messages:
            raise BadField(name, "a list of messages", shown(value), f"missing {name}" if value is None else f"bad {name}")
        return tuple(block for i, message in enumerate(messages) for block in self._said(message, f"{name}[{i}]"))

    def _said(self, message: Any, name: str) -> Blocks:
        expected = f"a message with {self.speaker} and {self.words}"
        if not isinstance(message, dict) or self.speaker not in message:
            raise BadField(name, expected, shown(message), f"bad {name.partition('[')[0]}")
        role = self.roles.get(message[self.speaker]) if isinstance(message[self.speaker], str) else None
        if role is None:
            raise BadField(f"{name}.{self.speaker}", " or ".join(self.roles), shown(message[self.speaker]), "unknown role")
        if more := {k for k, v in message.items() if k not in (self.speaker, self.words) and v not in (None, "", [])}:
            raise BadField(name, expected, f"also {', '.join(sorted(more))}", "message with more than text")
        parts = _parts(message.get(self.words), f"{name}.{self.words}", self.pictures)
        return tuple(Block("image", b"", role=role) if part is None else text(part, role) for part in parts)

    def messages(self, blocks: Iterable[Block]) -> list[dict[str, str]]:
        """The blocks as messages; all of them need a role."""
        named = {role: name for name, role in self.roles.items()}
        return [{self.speaker: named[b.role], self.words: str(b.data)} for b in blocks if b.role]


def _parts(value: Any, name: str, pictures: bool) -> list[str | None]:
    """What a message says, given as text or as a list of parts: text, and None where a picture stands."""
    if not isinstance(value, (list, tuple)):
        return [checked_text(value, name)]
    found: list[str | None] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image" and pictures and part.get("image") is None:
            found.append(None)
        elif kind != "text":
            expected = "parts of text, and {'type': 'image'} for what is in images" if pictures else "parts of text"
            raise BadField(name, expected, shown(part), "message with more than text")
        elif found and found[-1] is not None:
            found[-1] += checked_text(part.get("text"), name)
        else:
            found.append(checked_text(part.get("text"), name))
    return found or [""]


def answer(value: Any, name: str, role: Role | None = None) -> Blocks:
    """An answer given as one text. Raises Skip when it is blank, BadField when there is none."""
    if value is None:
        raise BadField(name, "text", "nothing", f"missing {name}")
    if not checked_text(value, name).strip():
        raise Skip("empty answer", name)
    return (text(value, role),)


def shared_prompt(chosen: Blocks, rejected: Blocks, names: str = "chosen, rejected") -> tuple[Blocks, Blocks, Blocks]:
    """Two whole conversations as their common first turns, which are the prompt, and what follows on each side.

    Equal conversations part before their last turn. Raises BadField when no prompt or no answer is left.
    """
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
    if same < 1:
        raise BadField(names, "the same first turns on both sides", "none in common", "no common prompt")
    return chosen[:same], chosen[same:], rejected[same:]


def text_pair(prompt: Blocks, chosen: Blocks, rejected: Blocks, **rest: Any) -> Pair:
    """A Pair of text, or of text and pictures, with a content-derived id. Identical sides, a blank prompt and a blank answer
    are no pairs.

    Where the data name roles, an answer starts with an assistant's turn, and its last turn is the assistant's, too.
    """
    if not any(map(says, prompt)):
        raise BadField("prompt", "text that is not empty", "nothing", "missing prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        for turn in side[:1] + side[-1:]:
            if turn.role not in (None, "assistant"):
                raise BadField(name, "an answer by the assistant", f"a turn of {turn.role}", "answer by somebody else")
        if side and not says(side[-1]):
            raise Skip("empty answer", name)
    if digest(*chosen) == digest(*rejected):
        raise Skip("identical sides", "chosen, rejected")
    return Pair(pair_id(prompt, chosen, rejected), prompt, chosen, rejected, group=digest(*prompt), **rest)


def says(block: Block) -> bool:
    """Whether there is anything in a block: a medium, or text that is not blank."""
    return block.kind != "text" or bool(str(block.data).strip())


def unpaired(prompt: Blocks, completion: Blocks, liked: bool, **rest: Any) -> Pair:
    """A Pair with one side only, `chosen` where it was liked and `rejected` where it was not."""
    return text_pair(prompt, completion if liked else (), () if liked else completion, **rest)


def refuse_media(row: Row, names: Iterable[str] = MEDIA) -> None:
    """Raises BadField for a row that shows pictures, video or sound: leaving them out would change what it asks."""
    for name in names:
        if row.get(name):
            raise BadField(name, "text only", shown(row[name]), "row with media")


def note_others(row: Row, known: Iterable[str], ledger: Ledger) -> None:
    """Count the columns that are read by nobody, so that none is left out silently."""
    for name in row.keys() - set(known) - set(MEDIA) - {"id"}:
        if row[name] is not None:
            ledger.notes[f"column {name!r} left out"] += 1


def described(row: Row, names: Iterable[str]) -> dict[str, str]:
    """Columns that say where a row came from, as text; whatever is no text there as JSON."""
    found = {name: row[name] for name in names if row.get(name) is not None}
    return {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in found.items()}


def extras(row: Row, ties: str) -> dict[str, Any]:
    """What the columns in EXTRAS say of a pair, as arguments of Pair. Raises Skip for a tie that is to be dropped."""
    found: dict[str, Any] = {"label": number_field(row, "chosen_probability", 1.0, least=0.0)}
    if found["label"] > 1:
        raise BadField("chosen_probability", "a number from 0 to 1", shown(row["chosen_probability"]))
    if found["label"] == 0.5 and ties == "drop":
        raise Skip("tie")
    found |= {"weight": number_field(row, "weight", 1.0, least=0.0), "margin": number_field(row, "margin", 0.0)}
    scores = {s: number_field(row, f"score_{s}") for s in ("chosen", "rejected") if row.get(f"score_{s}") is not None}
    meta = _unpacked(row, "meta")
    if meta is not None and not isinstance(meta, dict):
        raise BadField("meta", "an object", shown(meta))
    return found | {"scores": scores, "spans": _spans(_unpacked(row, "spans")), "meta": meta or {}}


def _unpacked(row: Row, name: str) -> Any:
    """A value that may be JSON in text, as in tables whose columns have one type."""
    try:
        return json.loads(row[name]) if isinstance(row.get(name), str) else row.get(name)
    except ValueError as error:
        raise BadField(name, "an object", shown(row[name])) from error


def _spans(value: Any) -> dict[str, tuple[Span, ...]]:
    """{"chosen": [[start, end, weight], ...], ...} as Spans."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not value.keys() <= {"chosen", "rejected"}:
        raise BadField("spans", "an object with chosen and rejected", shown(value))
    return {side: tuple(_span(s, f"spans.{side}") for s in spans) for side, spans in value.items() if spans is not None}


def _span(value: Any, name: str) -> Span:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise BadField(name, "[start, end, weight]", shown(value), "bad spans")
    start, end, weight = (finite(v, name) for v in value)
    try:
        return Span(int(start), int(end), weight)
    except ValueError as error:
        raise BadField(name, "a range of characters and its weight", str(error), "bad spans") from error


def joined(row: Row, instruction: str, more: str) -> str:
    """An instruction with the input it speaks of below it, as LLaMA-Factory joins the two."""
    first, second = text_field(row, instruction), row.get(more)
    return first if not second else f"{first}\n{checked_text(second, more)}"


def judged(prompt: Blocks, answers: tuple[Blocks, Blocks], second: float, ties: str, meta: Mapping[str, Any]) -> Pair:
    """Two answers as a pair, given the probability that the second is the better one; a tie keeps their order."""
    if second == 0.5 and ties == "drop":
        raise Skip("tie")
    better = int(second > 0.5)
    told = {"position": better + 1} | {name: value for name, value in meta.items() if value is not None}
    return text_pair(prompt, answers[better], answers[1 - better], label=float(max(second, 1 - second)), meta=told)
