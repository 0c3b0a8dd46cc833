"""Sentences and words of a text, as pieces that give the text back when they are joined."""

from __future__ import annotations

import re

# A sentence ends at a stop, question or exclamation mark, with what closes after it, before white space; or at a line's end.
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。!?]|\n")
_SHORT = re.compile(r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|vs|etc|approx|e\.g|i\.e|a\.m|p\.m)|^\s*\d+)\.$")
_SPACE = re.compile(r"\s*")


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it; joined they are the text.

    A stop after an initial, a common abbreviation or the number that opens a line of a list ends no sentence.
    """
    found, start = [], 0
    for end in _END.finditer(text):
        if end.start() < start or _SHORT.search(text[start : end.end()]):
            continue
        cut = _SPACE.match(text, end.end()).end()  # type: ignore[union-attr]  # matches the empty string at least
        if text[start:cut].strip():
            found.append(text[start:cut])
            start = cut
    return [*found, text[start:]] if text[start:].strip() else found or [text]


def is_ended(sentence: str) -> bool:
    """Whether a sentence has its end: not one that broke off."""
    return bool(re.search(r"[.!?。!?][\"')\]]*$", sentence.rstrip()))


def first_sentence(text: str) -> str:
    """A text up to its first sentence's end, without the white space after it."""
    return sentences(text)[0].rstrip()


def word_starts(text: str) -> list[int]:
    """Where words begin, in characters."""
    return [match.start() for match in re.finditer(r"\S+", text)]
