"""Re-Align's rows (JSON): image, retrieved_image, and chosen and rejected as whole conversations of role and content.

The retrieved image takes the place of the first in the branch `chosen@retrieved`, which the method's second term compares
with the chosen answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, Dialect, note_others, shared_prompt, text_pair
from mmpo.datasets.ledger import Ledger, Row, import_rows
from mmpo.datasets.media_files import write_pictured
from mmpo.datasets.pictures import Album, one_picture, root_of
from mmpo.datasets.placeholders import LLAVA, pictures_of, tagged
from mmpo.datasets.tables import rows_of
from mmpo.datasets.wording import Unsayable, check_boundary, check_sayable, with_roles
from mmpo.pair import Block, Branch, Pair

OPENAI = Dialect()
RETRIEVED = "chosen@retrieved"


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and columns >= {"image", "retrieved_image", "chosen", "rejected"}


def realign(path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger) -> Iterator[Pair]:
    """One Pair a row, with the branch `chosen@retrieved`; what both conversations share is the prompt.

    root: where paths start from. ties: not used, there are none.
    """
    album = Album(root_of(path, root), ledger)
    return import_rows(rows_of(path), lambda row: [_pair(row, album)], ledger)


def _pair(row: Row, album: Album) -> Pair:
    pictures, others = album.named(row, "image"), album.named(row, "retrieved_image")
    one_picture(row, pictures)
    one_picture(row, others)
    good, bad = (OPENAI.blocks(row.get(side), side) for side in ("chosen", "rejected"))
    prompt, chosen, rejected = (LLAVA.blanks(side) for side in shared_prompt(good, bad))
    pair = text_pair(*album.placed((prompt, chosen, rejected), pictures))
    note_others(row, ("chosen", "rejected", "retrieved_image"), album.ledger)
    return replace(pair, branches={RETRIEVED: Branch(album.shown(prompt, others), pair.chosen)})


def write_realign(pairs: Iterable[Pair], path: Path, ledger: Ledger | None = None) -> int:
    """Write pairs that have the branch `chosen@retrieved` as one list (or JSON lines); returns the number of rows.

    Text without roles becomes a user's turn and the assistant's answer, and is counted. Raises DataError for pairs without
    that branch, or with more than one image, and for what Re-Align cannot say.
    """
    return write_pictured(pairs, path, ledger, _row)


def _row(pair: Pair, ledger: Ledger | None, put: Callable[[Block], Any]) -> dict[str, Any]:
    check_sayable(pair, "realign", ledger, can=("branches",), meta=(), pictures="prompt")
    branch = pair.branches.get(RETRIEVED)
    told = tagged(with_roles(pair, ledger), LLAVA)
    check_boundary(told, "realign")
    shown, others = (pictures_of(prompt) for prompt in (pair.prompt, branch.prompt if branch else ()))
    if len(pair.branches) != 1 or branch is None or branch.response != pair.chosen or len(shown) != 1 or len(others) != 1:
        raise Unsayable(pair.id, f"Re-Align's rows have one image, and another in {RETRIEVED}")
    chosen, rejected = (OPENAI.messages(told.prompt + side) for side in (told.chosen, told.rejected))
    return {"image": put(shown[0]), "retrieved_image": put(others[0]), "chosen": chosen, "rejected": rejected}
