"""Pictures of rows about pictures: opened under their root, and put where the text has places for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from mmpo import media
from mmpo.datasets.fields import image_block, shown
from mmpo.datasets.ledger import BadField, Ledger, Row
from mmpo.datasets.placeholders import Tag, blank, blanks_in, filled, is_blank
from mmpo.pair import Block, Role

Blocks = tuple[Block, ...]
Sides = tuple[Blocks, Blocks, Blocks]  # prompt, chosen, rejected
Named = tuple[str, list[tuple[str, Any]]]  # a column of pictures, and each with the name of its field
CMYK = "CMYK picture (its colours converted to RGB)"


class Album:
    """The pictures of one dataset, each opened once while a row in use has it.

    root: the folder that paths start from. ledger: told of what is used although something is odd about it.
    """

    def __init__(self, root: Path, ledger: Ledger) -> None:
        self.root, self.ledger = root, ledger
        self._open: WeakValueDictionary[tuple[str, Role | None], Block] = WeakValueDictionary()

    def picture(self, value: Any, name: str, role: Role | None = None) -> Block:
        """The image of a path under the root, of bytes, or of Hugging Face's {"bytes", "path"}.

        Raises BadField when there is no such file, or no whole still image in it.
        """
        path = value.get("path") if isinstance(value, dict) else None
        given = (value.get("bytes") or path) if isinstance(value, dict) else value
        block = self._open.get((given, role)) if isinstance(given, str) else None
        if block is None:
            found = image_block(given, name, self.root)
            block = Block("image", found.data, found.path or (path if isinstance(path, str) else None), role)
            if isinstance(given, str):
                self._open[given, role] = block
        if media.mode(block) == "CMYK":
            self.ledger.remark(name, CMYK)
        return block

    def named(self, row: Row, *columns: str) -> Named:
        """The first of the columns that the row has, and its pictures: several in a list, or a single one."""
        column = next((c for c in columns if row.get(c) is not None), columns[0])
        value = row.get(column)
        if isinstance(value, (list, tuple)):
            return column, [(f"{column}[{i}]", picture) for i, picture in enumerate(value)]
        return column, [] if value is None or value == "" else [(column, value)]

    def _for(self, places: Blocks, pictures: Named) -> Blocks:
        """The pictures of as many blanks, in their order and with their roles."""
        roles = [b.role for b in places if is_blank(b)]
        return tuple(self.picture(value, name, role) for (name, value), role in zip(pictures[1], roles, strict=True))

    def shown(self, blocks: Blocks, pictures: Named) -> Blocks:
        """The blocks with all of the pictures in their places. Raises BadField when there are more or fewer."""
        check_places(blocks, pictures)
        return filled(blocks, self._for(blocks, pictures))

    def placed(self, sides: Sides, pictures: Named) -> Sides:
        """Prompt and answers with the pictures in their places; each answer goes on where the prompt's pictures end."""
        prompt, chosen, rejected = sides
        whole = [prompt + answer for answer in (chosen, rejected) if answer] or [prompt]
        for conversation in whole:
            check_places(conversation, pictures)
        given, first = self._for(whole[0], pictures), blanks_in(prompt)
        return filled(prompt, given[:first]), filled(chosen, given[first:]), filled(rejected, given[first:])


def check_places(blocks: Blocks, pictures: Named) -> None:
    column, values = pictures
    if (places := blanks_in(blocks)) != len(values):
        expected = f"as many pictures as the text has places for them, {places}"
        raise BadField(column, expected, f"{len(values)}", "placeholder count")


def about(question: Blocks, pictures: Named, tag: Tag) -> Blocks:
    """A question with a blank at each tag; where it has none, blanks before the first turn of the user's for all pictures."""
    found = tag.blanks(question)
    if blanks_in(found) or not pictures[1]:
        return found
    first = next((i for i, b in enumerate(found) if b.role in (None, "user")), 0)
    role = found[first].role if found else None
    return (*found[:first], *([blank(role)] * len(pictures[1])), *found[first:])


def one_picture(row: Row, pictures: Named) -> None:
    """Raises BadField for a row of a format with one picture each that has none, or several."""
    column, values = pictures
    if len(values) != 1:
        found = f"{len(values)} pictures" if values else shown(row.get(column))
        raise BadField(column, "one picture", found, "missing image" if not values else f"bad {column}")


def root_of(path: Path, root: Path | None) -> Path:
    """Where a dataset's paths start from: the folder it is in, where nothing else is said."""
    return root or (path if path.is_dir() else path.parent)
