"""Stages: every record is accounted for, and no pair depends on order, batches or neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpo import media
from mmpo.datasets.answer_filters import edit_distance, holds_box, length_ratio
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.media_store import MediaStore
from mmpo.datasets.sources import about_one_image
from mmpo.datasets.stages import Dropped, Record, Result, Stage, each, execute, random_of
from mmpo.datasets.tools import Unanswerable
from mmpo.errors import DataError
from mmpo.pair import Block, image, text

PIXEL = media.encode(np.zeros((2, 3, 3), np.uint8))


def records(count: int) -> list[Record]:
    return [Record(f"r{i}", (text(f"question {i}"),), "yes") for i in range(count)]


def drawn(batch: int) -> Stage:
    def run(items: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        return [item.having(number=int(r.integers(2**31))) for item, r in zip(items, randoms, strict=True)]

    return Stage("draw", batch, run)


def test_random_numbers_depend_on_seed_stage_and_record_alone() -> None:
    first = {r.id: r.fields["number"] for r in execute(records(7), [drawn(3)], seed=1, ledger=Ledger())}
    second = {r.id: r.fields["number"] for r in execute(records(7)[::-1], [drawn(5)], seed=1, ledger=Ledger())}
    other = {r.id: r.fields["number"] for r in execute(records(7), [drawn(3)], seed=2, ledger=Ledger())}
    assert first == second and len(set(first.values())) == 7
    assert not set(first.values()) & set(other.values())
    assert random_of(0, "a", "b").random() != random_of(0, "b", "a").random()


def test_every_record_ends_used_or_skipped_with_a_reason() -> None:
    def odd(record: Record, random: np.random.Generator) -> Record:
        if int(record.id[1:]) % 2:
            raise Dropped("odd number")
        return record.having({"kept": True})

    def damaged(record: Record, random: np.random.Generator) -> Record:
        media.open_image(PIXEL[: 30 if record.id == "r4" else None])
        return record

    ledger = Ledger("skip")
    kept = list(execute(records(6), [each("odd", odd), each("open", damaged)], seed=0, ledger=ledger))
    assert [r.id for r in kept] == ["r0", "r2"]
    assert ledger.skipped == {"odd: odd number": 3, "open: unreadable media": 1} and ledger.used == 2
    assert kept[0].provenance == ({"stage": "odd", "kept": True}, {"stage": "open"})


def test_a_record_may_become_several() -> None:
    def twice(record: Record, random: np.random.Generator) -> list[Record]:
        return [Record(f"{record.id}/{i}", record.prompt, record.answer) for i in range(2)]

    made = list(execute(records(2), [each("twice", twice), drawn(3)], seed=0, ledger=Ledger()))
    assert [r.id for r in made] == ["r0/0", "r0/1", "r1/0", "r1/1"] and len({r.fields["number"] for r in made}) == 4
    with pytest.raises(ValueError, match="an id of its own for each of 2"):
        list(execute(records(1), [each("twice", lambda r, g: [r, r])], seed=0, ledger=Ledger()))


def test_broken_contracts_are_told() -> None:
    with pytest.raises(ValueError, match="expected 2 results, one per record, found 0"):
        list(execute(records(2), [Stage("none", 4, lambda items, randoms: [])], seed=0, ledger=Ledger()))
    with pytest.raises(ValueError, match="different names, found draw twice"):
        list(execute(records(2), [drawn(1), drawn(1)], seed=0, ledger=Ledger()))


def test_no_more_records_are_read_than_a_batch_needs() -> None:
    read = []

    def source() -> object:
        for record in records(100):
            read.append(record.id)
            yield record

    flow = execute(source(), [drawn(4), drawn_again()], seed=0, ledger=Ledger())  # type: ignore[arg-type]
    next(flow)
    assert len(read) == 4


def drawn_again() -> Stage:
    return Stage("again", 2, drawn(2).run)


def test_the_store_keeps_files_by_name_and_others_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PIXEL)
    other = media.encode(np.full((2, 2, 3), 7, np.uint8))
    store = MediaStore(tmp_path / "kept", tmp_path)
    by_name, by_content = store.keep(image(PIXEL, "a.png")), store.keep(image(other, "gone.png"))
    assert store.load(by_name).data == PIXEL and store.load(by_name).path == "a.png"
    assert store.load(by_content).data == other and store.load(by_content).path == "gone.png"
    assert store.keep(Block("image", PIXEL, "a.png", "user")) == by_name
    assert sum(f.stat().st_size for f in (tmp_path / "kept").rglob("*") if f.is_file()) == len(other + b"gone.png" + b"a.png")
    (tmp_path / "a.png").write_bytes(other)
    with pytest.raises(DataError, match="not what it was"):
        store.load(by_name)


def test_a_question_is_told_from_its_image_wherever_that_stands() -> None:
    picture = Block("image", PIXEL, role="user")
    turns = (text("Be brief.", "system"), text("Look: ", "user"), picture, text(" what?", "user"), text("This.", "assistant"))
    found = about_one_image(Record("r", (*turns, text("And now?", "user"))))
    assert found.text == "Look: what?" and [b.data for b in found.before] == ["Be brief."]
    assert [b.data for b in found.turns[1:]] == ["This.", "And now?"]
    for prompt, reason in (((picture, picture, text("?")), "not exactly one image"), ((picture, text(" ")), "no question")):
        with pytest.raises(Dropped, match=reason):
            about_one_image(Record("r", prompt))


@pytest.mark.parametrize(
    ("answer", "found"),
    [("at [0.1, 0.25, 0.5, 1]", True), ("[12,30,99,140]", True), ("(.1, .2, .3, .4)", True), ("[1, 2, 3]", False),
     ("1, 2, 3, 4", False)],
)  # fmt: skip
def test_boxes_in_answers(answer: str, found: bool) -> None:
    assert holds_box(answer) is found


def test_distances_of_answers() -> None:
    assert edit_distance("kitten", "sitting") == 3 / 7 and edit_distance("", "") == 0 and edit_distance("", "ab") == 1
    assert length_ratio("ab", "abcd") == 2 and length_ratio("", "a") == float("inf") and length_ratio("", "") == 1


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: expected at least 1 record, found 0"):
        Stage("none", 0, lambda records, randoms: records)


def test_what_a_tool_cannot_take_costs_its_own_record_alone() -> None:
    """The others of its batch have the random numbers that they would have had without it."""

    def run(records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Record]:
        drawn = [float(g.random()) for g in randoms]
        if any(r.id == "r2" for r in records):
            raise Unanswerable("prompt too long for the model", "9000 tokens")
        return [r.having(drawn=x) for r, x in zip(records, drawn, strict=True)]

    ledger = Ledger("skip")
    found = list(execute(records(6), [Stage("ask", 4, run)], seed=0, ledger=ledger))
    assert ledger.skipped == {"ask: prompt too long for the model": 1} and ledger.used == 5
    whole = execute([r for r in records(6) if r.id != "r2"], [Stage("ask", 4, run)], seed=0, ledger=Ledger())
    assert [(r.id, r.fields["drawn"]) for r in found] == [(r.id, r.fields["drawn"]) for r in whole]


@pytest.mark.parametrize(("kind", "batch", "who"), [(ValueError, 2, "one of 2 records, a to b"), (DataError, 1, "record a")])
def test_what_a_tool_refuses_is_told_with_stage_and_records(kind: type[ValueError], batch: int, who: str) -> None:
    def refuse(records: Any, randoms: Any) -> Any:
        raise kind("expected a collage")

    records = [Record("a", ()), Record("b", ())]
    with pytest.raises(kind, match=f"^stage judge, {who}: expected a collage$"):
        list(execute(records, [Stage("judge", batch, refuse)], seed=0, ledger=Ledger("skip")))
