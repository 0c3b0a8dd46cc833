"""What a row spells is text: the name of a special token inside of it does not become that token.

A tokenizer reads such a name wherever it stands, so a question that quotes `<|im_end|>` would end its own turn, and what
follows could speak for the assistant. Names are broken by a mark before the chat template sees them, and the tokens of the
mark are taken out again behind the tokenizer; what is left spells the name, character by character as it was given.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

Ids = list[int]
Offsets = list[tuple[int, int]]
MARK = "\ufdd0\ufdd1"  # two of Unicode's noncharacters, which no text may exchange


class PlainText:
    """The names of a tokenizer's special tokens, and how a text keeps them. kept: names that stay tokens."""

    def __init__(self, tokenizer: Any, kept: Collection[str] = ()):
        self.tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        names = {*special, *tokenizer.all_special_tokens} - set(kept)
        longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def spells(self, words: str) -> bool:
        """Whether the text holds a name."""
        return bool(self._names.search(words))

    def marked(self, words: str) -> str:
        """The text with a mark inside of every name. Raises ValueError for text that holds the mark."""
        if MARK in words:
            raise ValueError("the text holds U+FDD0 U+FDD1, which are no characters; take them out")
        while self.spells(words):  # names may overlap, and what is left of one may be another
            words = self._names.sub(lambda name: name[0][0] + MARK + name[0][1:], words)
        return words

    def tokens(self, words: str) -> tuple[Ids, Offsets]:
        """Ids and characters of a text that may hold marks; the characters are counted without them.

        Raises ValueError where the tokenizer joins a mark with what stands beside it.
        """
        found = self.tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(found.input_ids), [(int(a), int(b)) for a, b in found.offset_mapping]
        marks = [m.span() for m in re.finditer(MARK, words)]
        if not marks:
            return ids, offsets
        inside = {place for start, stop in marks for place in range(start, stop)}
        left = [(i, place) for i, place in zip(ids, offsets, strict=True) if not (place[0] < place[1] and place[0] in inside)]
        whole = [all(place in inside for place in range(*span)) for span in offsets if span[0] in inside]
        if not all(whole) or any(inside.intersection(range(*place)) for _, place in left):
            raise ValueError("this tokenizer cannot spell the name of a special token in a text; take the name out of it")
        before = [0] * (len(words) + 1)  # marked characters before each place
        for place in range(len(words)):
            before[place + 1] = before[place] + (place in inside)
        return [i for i, _ in left], [(a - before[a], b - before[b]) for _, (a, b) in left]


def length(words: str) -> int:
    """Characters of a text, its marks not counted."""
    return len(words) - len(MARK) * words.count(MARK)
