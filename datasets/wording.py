"""Pairs of text to rows: what a format can say of a pair, and what it cannot is refused or counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from mmpo.datasets.ledger import Ledger
from mmpo.errors import DataError
from mmpo.pair import Pair, Role

T = TypeVar("T")
ALL = ("unpaired", "weight", "margin", "label", "spans", "scores")  # what the columns of `extra_cells` can say


class Unsayable(DataError):
    """A pair that a format cannot hold; the reason is the same for all pairs of that kind."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"pair {id}: {reason}")
        self.reason = reason


def written(
    pairs: Iterable[T], row: Callable[[T, Ledger | None], dict[str, Any]], ledger: Ledger | None
) -> Iterator[dict[str, Any]]:
    """The pairs as rows. One that the format cannot hold stops the writing, or is counted where bad rows are skipped."""
    for pair in pairs:
        try:
            yield row(pair, ledger)
        except Unsayable as error:
            if ledger is None or ledger.on_bad == "refuse":
                raise
            ledger.notes[f"pairs not written: {error.reason}"] += 1


def check_sayable(
    pair: Pair,
    format: str,
    ledger: Ledger | None,
    can: Iterable[str] = ALL,
    meta: Iterable[str] | None = None,
    pictures: Literal["none", "prompt", "all"] = "none",
) -> None:
    """Refuse a pair of which the format cannot say what matters in training; count what merely describes it.

    can: what of "unpaired", "weight", "margin", "label", "spans", "scores" and "branches" the format can say. meta: which
    keys of `Pair.meta`, None for all. pictures: where it holds some. Raises DataError for what is refused, and for other media.
    """
    answers = {b.kind for b in (*pair.chosen, *pair.rejected)}
    if pictures == "none" and ({b.kind for b in pair.prompt} | answers) - {"text"}:
        raise Unsayable(pair.id, f"{format} is written from text, and this pair holds {_kinds(pair)}")
    if pictures == "prompt" and "image" in answers:
        raise Unsayable(pair.id, f"{format} has pictures in the prompt only; mmpo holds all pairs")
    if not pair.chosen and not pair.rejected:
        raise Unsayable(pair.id, "no answer on either side")
    told = {
        "unpaired": not (pair.chosen and pair.rejected), "weight": pair.weight != 1, "margin": pair.margin != 0,
        "label": pair.label != 1, "spans": bool(pair.spans), "branches": bool(pair.branches),
    }  # fmt: skip
    if missing := sorted(name for name, says in told.items() if says and name not in can):
        raise Unsayable(pair.id, f"{format} cannot say {' and '.join(missing)} of a pair; trl can say most, mmpo all")
    left = ["scores"] if pair.scores and "scores" not in can else []
    left += [] if meta is None else [f"meta {key!r}" for key in pair.meta.keys() - set(meta)]
    for name in left:
        _count(ledger, f"{name} left out: no place for it in {format}")


def _kinds(pair: Pair) -> str:
    return ", ".join(sorted({b.kind for b in (*pair.prompt, *pair.chosen, *pair.rejected)}))


def has_roles(pair: Pair) -> bool:
    """Whether a pair is a conversation. Raises DataError when only some of its blocks have a role."""
    roles = {b.role is not None for b in (*pair.prompt, *pair.chosen, *pair.rejected)}
    if len(roles) > 1:
        raise Unsayable(pair.id, "some of its blocks have a role and some have none")
    return roles == {True}


def with_roles(pair: Pair, ledger: Ledger | None) -> Pair:
    """The pair as a conversation: one without roles becomes a user's turn and an assistant's answer, and is counted."""
    if has_roles(pair):
        return pair
    _count(ledger, "text without roles written as a user's turn and the assistant's answer")
    if all(b.kind == "text" for b in (*pair.prompt, *pair.chosen, *pair.rejected)):
        single_texts(pair, "a conversation", ledger)
    roles: dict[str, Role] = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    said: dict[str, Any] = {
        side: tuple(dataclasses.replace(b, role=role) for b in getattr(pair, side)) for side, role in roles.items()
    }
    return dataclasses.replace(pair, **said)


def check_boundary(pair: Pair, format: str) -> None:
    """Refuse a pair whose prompt would have another end when it is read again from whole conversations."""
    first = [side[:1] for side in (pair.chosen, pair.rejected) if len(side) > 1]
    if (len(first) == 2 and first[0] == first[1]) or (first and not (pair.chosen and pair.rejected)):
        raise Unsayable(pair.id, f"{format} would take the first turns of these answers for a part of the prompt; trl does not")


def single_texts(pair: Pair, format: str, ledger: Ledger | None) -> tuple[str, str | None, str | None]:
    """Prompt, chosen and rejected (None where absent) for a format that holds one text each.

    The roles of a single user's turn and its answers are left out, and counted. Raises DataError for longer conversations.
    """
    sides = (pair.prompt, pair.chosen, pair.rejected)
    roles = [b.role for side in sides for b in side]
    if max(map(len, sides)) > 1 or not {None, "user", "assistant"} >= set(roles) or pair.prompt[0].role == "assistant":
        turns = ", ".join(role or "text" for role in roles)
        raise Unsayable(pair.id, f"{format} holds one prompt and its answers, found {turns}")
    if any(roles):
        _count(ledger, f"roles of a single turn left out: {format} does not name them")
    prompt, chosen, rejected = (str(side[0].data) if side else None for side in sides)
    return str(prompt), chosen, rejected


def _count(ledger: Ledger | None, note: str) -> None:
    if ledger is not None:
        ledger.notes[note] += 1


def extra_cells(pair: Pair) -> dict[str, Any]:
    """The columns in EXTRAS that say something of this pair."""
    cells: dict[str, Any] = {}
    for name, value, usual in (("weight", pair.weight, 1), ("margin", pair.margin, 0), ("chosen_probability", pair.label, 1)):
        cells |= {} if value == usual else {name: value}
    cells |= {f"score_{side}": score for side, score in pair.scores.items() if side in ("chosen", "rejected")}
    spans = {side: [[s.start, s.end, s.weight] for s in given] for side, given in pair.spans.items()}
    return cells | ({"spans": spans} if spans else {}) | ({"meta": dict(pair.meta)} if pair.meta else {})


def sided(pair: Pair, sides: Sequence[Any]) -> tuple[list[Any], int]:
    """The two sides in the order of the file they came from (`meta["position"]` of chosen, 1 or 2), and that position.

    Where nothing tells it, the pair's id does, so that position says nothing about preference; a tie keeps its order.
    """
    usual = 1 if pair.label == 0.5 else 1 + sum(pair.id.encode()) % 2
    position = pair.meta.get("position", usual)
    return (list(sides) if position == 1 else list(sides)[::-1]), position
