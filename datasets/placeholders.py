"""Where pictures stand in text: the tags that formats write there, to blocks and back.

A place whose picture is not known yet is a blank: an image block without content. Reading is in two steps, text to blanks
and blanks to pictures, so that the number of places can be compared with the number of pictures before one is opened.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from mmpo.datasets.ledger import Ledger
from mmpo.datasets.wording import Unsayable, single_texts
from mmpo.pair import Block, Pair, Role, text

Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Tag:
    """How a format writes the place of a picture in text.

    written: what is written. also: other spellings that are read. line: the end of the line after a tag, and the one before
    tags at the very end, are part of the tag, as in LLaVA's "<image>\\nWhat is this?".
    """

    written: str = "<image>"
    also: tuple[str, ...] = ()
    line: bool = False

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = "|".join(map(re.escape, (self.written, *self.also)))
        return re.compile(rf"(?:{names})\n?" if self.line else names)

    @cached_property
    def _last(self) -> re.Pattern[str]:
        names = "|".join(map(re.escape, (self.written, *self.also)))
        return re.compile(rf"\n((?:(?:{names})\n)*(?:{names}))\Z")

    def blanks(self, blocks: Blocks) -> Blocks:
        """The blocks with a blank, of the same role, in the place of every tag in their text."""
        return tuple(piece for block in blocks for piece in (self._pieces(block) if block.kind == "text" else [block]))

    def _pieces(self, block: Block) -> Iterator[Block]:
        words = str(block.data)
        if not self._pattern.search(words):
            yield block
            return
        if self.line:
            words = self._last.sub(r"\1", words)
        for i, piece in enumerate(self._pattern.split(words)):
            if i:
                yield blank(block.role)
            if piece:
                yield text(piece, block.role)

    def words(self, blocks: Blocks, id: str) -> str:
        """The text of one turn with a tag for every picture. id: of the pair, for errors.

        Raises Unsayable for text that holds a tag itself, two texts in a row, and what is neither text nor picture.
        """
        for block in blocks:
            if block.kind == "text" and self._pattern.search(str(block.data)):
                raise Unsayable(id, f"its text holds {self.written}, which stands for a picture")
        if other := {b.kind for b in blocks} - {"text", "image"}:
            raise Unsayable(id, f"expected text and pictures, found {', '.join(sorted(other))}")
        if any(a.kind == b.kind == "text" for a, b in itertools.pairwise(blocks)):
            raise Unsayable(id, "two texts in a row of one turn would become one")
        if not self.line:
            return "".join(str(b.data) if b.kind == "text" else self.written for b in blocks)
        runs = [(kind, list(run)) for kind, run in itertools.groupby(blocks, key=lambda b: b.kind)]
        pieces = [str(run[0].data) if kind == "text" else "\n".join([self.written] * len(run)) for kind, run in runs]
        parts = [
            p + "\n" if kind == "image" and i < len(runs) - 1 else p
            for i, ((kind, _), p) in enumerate(zip(runs, pieces, strict=True))
        ]
        if len(runs) > 1 and runs[-1][0] == "image":
            parts[-1] = "\n" + parts[-1]
        return "".join(parts)


PLAIN = Tag()
LLAVA = Tag("<image>", ("<image-placeholder>",), line=True)
MIA = Tag("<image-placeholder>", ("<image>",), line=True)


def blank(role: Role | None = None) -> Block:
    """The place of a picture that is not known yet."""
    return Block("image", b"", role=role)


def is_blank(block: Block) -> bool:
    return block.kind == "image" and isinstance(block.data, bytes) and not block.data


def blanks_in(blocks: Iterable[Block]) -> int:
    return sum(map(is_blank, blocks))


def filled(blocks: Blocks, pictures: Iterable[Block]) -> Blocks:
    """The blocks with the pictures in the places of their blanks, in order. The pictures have the blanks' roles."""
    supply = iter(pictures)
    return tuple(next(supply) if is_blank(b) else b for b in blocks)


def turns(blocks: Blocks) -> list[Blocks]:
    """Blocks as turns: neighbours of one role are one turn where one of them is a picture, otherwise each is its own."""
    found: list[Blocks] = []
    for _, group in itertools.groupby(blocks, key=lambda b: b.role):
        run = tuple(group)
        found += [run] if any(b.kind != "text" for b in run) else [(b,) for b in run]
    return found


def pictures_of(blocks: Blocks) -> Blocks:
    return tuple(b for b in blocks if b.kind == "image")


def tagged(pair: Pair, tag: Tag) -> Pair:
    """The pair in text alone, one block a turn, with a tag for every picture. Raises Unsayable as `Tag.words` does."""
    prompt, chosen, rejected = (
        tuple(text(tag.words(turn, pair.id), turn[0].role) for turn in turns(side))
        for side in (pair.prompt, pair.chosen, pair.rejected)
    )
    return dataclasses.replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def question_about_one(pair: Pair, format: str, ledger: Ledger | None) -> tuple[Block, str, str | None, str | None]:
    """The picture, the question and the answers of a pair, for a format whose rows have one picture before the question.

    Raises Unsayable for pairs with more or fewer pictures, or with one elsewhere.
    """
    picture, rest = pair.prompt[:1], pair.prompt[1:]
    if not pictures_of(picture) or pictures_of(rest) or not rest:
        raise Unsayable(pair.id, f"{format} holds questions with one picture before them; mmpo holds all pairs")
    return picture[0], *single_texts(tagged(dataclasses.replace(pair, prompt=rest), LLAVA), format, ledger)
