"""Re-Align: which neighbours are looked up, what counts as a mask, and which candidate becomes the rejected answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpo.datasets.builders.retrieval import Neighbourhood, prepare, retrieval
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.masks import FUNCTION_WORDS, MASK, content_segments, fill, masked, segments_of
from mmpo.datasets.media_store import MediaStore
from mmpo.datasets.stages import Record, execute
from mmpo.datasets.tools import Prompt, Tools
from mmpo.pair import Block, Pair, image, text
from tests.datasets.picture_tools import Scripted, by_colour, by_words, picture, record

SEEN = {picture(colour).digest: colour for colour in ("red", "orange", "darkorange", "blue", "navy")}


def told(block: Block) -> str:
    return SEEN[block.digest]


def obedient(prompt: Prompt, seed: int, prefix: str) -> str:
    """Masks colours, and fills a mask with the colour it sees; asked to continue, it names that colour."""
    words = str(prompt[-1].data)
    if "Replace every word" in words:
        answer = words.rpartition("Answer: ")[2]
        return " ".join(MASK if w in SEEN.values() else w for w in answer.split(" "))
    if "Fill in each" in words:
        return words.rpartition("Answer: ")[2].replace(MASK, told(prompt[0]))
    return f" {told(prompt[0])} square on the"


def built(
    records: Sequence[Record], folder: Path, generator: Any, ledger: Ledger | None = None, seed: int = 0, **options: Any
) -> list[Pair]:
    tools = Tools(generator=generator, image_embedder=by_colour, text_embedder=by_words)
    pool = prepare(records, tools, media=MediaStore(folder, folder), seed=seed, **options)
    stages = retrieval(tools, pool=pool, **options)
    return [r.fields["pair"] for r in execute(records, stages, seed=seed, ledger=ledger or Ledger())]


ORANGES = ("orange", "darkorange")  # to the colour embedder nearly the same picture


def colours(*names: str) -> list[Record]:
    return [record(name, name, f"A {name} square on the {name} ground .") for name in names]


def test_a_pair_is_what_the_sheet_says(tmp_path: Path) -> None:
    pairs = {p.id: p for p in built(colours("red", "orange", "blue"), tmp_path, Scripted(obedient), duplicate=0.999)}
    red = pairs["red"]
    assert red.chosen == (text("A red square on the red ground ."),)
    assert red.rejected == (text("A orange square on the orange ground ."),)  # orange is nearer to red than blue is
    branch = red.branches["chosen@retrieved"]
    assert branch.response == red.chosen and branch.prompt[0].digest == picture("orange").digest
    assert branch.prompt[1:] == red.prompt[1:] and red.prompt[0].digest == picture("red").digest
    assert red.meta["rank"] == 1 and red.meta["neighbour"] == picture("orange").digest
    assert len(pairs) == 3


def test_neither_itself_nor_a_near_copy_is_a_neighbour(tmp_path: Path) -> None:
    again = Record("red again", (picture("red"), text("Where?")), "There .")
    near = Record("red, re-encoded", (picture("red", shade=-2), text("What?")), "A red one .")
    records = [*colours("red", *ORANGES, "blue"), again, near]
    tools = Tools(image_embedder=by_colour)
    pool = prepare(records, tools, media=MediaStore(tmp_path, tmp_path), seed=0, duplicate=0.995, neighbours=10)
    assert len(pool.near) == 5  # "again" shows the same file
    near_red = [SEEN.get(key) for key, _ in pool.near[picture("red").digest]]
    assert near_red == ["darkorange", "orange", "blue"]
    cosines = [c for _, c in pool.near[picture("red").digest]]
    assert cosines == sorted(cosines, reverse=True) and max(cosines) < 0.995
    strict = prepare(records, tools, media=MediaStore(tmp_path, tmp_path), seed=0, duplicate=0.9, neighbours=10)
    found = [SEEN.get(key) for key, _ in strict.near[picture("orange").digest]]
    assert "red" in found and "blue" in found and "darkorange" not in found


def test_duplicates_do_not_use_up_the_neighbours(tmp_path: Path) -> None:
    """Thirty near copies of one picture, and still the three others are found."""
    copies = [Record(f"r{n}", (picture("red", shade=-n), text("?")), "x") for n in range(30)]
    records = [*copies, *colours("blue", "navy", "orange")]
    pool = prepare(
        records, Tools(image_embedder=by_colour), media=MediaStore(tmp_path, tmp_path), seed=0, neighbours=3, duplicate=0.98
    )
    found = [SEEN[key] for key, _ in pool.near[picture("red").digest]]
    assert found[0] == "orange" and sorted(found[1:]) == ["blue", "navy"]


def test_the_pool_holds_keys_and_no_pictures(tmp_path: Path) -> None:
    records = colours("red", "orange", "blue")
    pool = prepare(records, Tools(image_embedder=by_colour), media=MediaStore(tmp_path, tmp_path), seed=0)
    assert isinstance(pool, Neighbourhood)
    assert all(len(key) == 64 and type(c) is float for near in pool.near.values() for key, c in near)


def test_the_next_neighbour_where_the_first_says_too_much_alike(tmp_path: Path) -> None:
    def stubborn(prompt: Prompt, seed: int, prefix: str) -> str:
        said = obedient(prompt, seed, prefix)
        return said if "Replace" in str(prompt[-1].data) or told(prompt[0]) == "blue" else said.replace(told(prompt[0]), "red")

    generator = Scripted(stubborn)
    (pair,) = [p for p in built(colours("red", "orange", "blue"), tmp_path, generator, duplicate=0.999) if p.id == "red"]
    assert "blue" in str(pair.rejected[0].data) and pair.meta["rank"] == 2
    assert pair.meta["text_cosines"][0] == 1.0 and pair.meta["text_cosines"][1] < 0.95
    assert pair.branches["chosen@retrieved"].prompt[0].digest == picture("blue").digest


@pytest.mark.parametrize(("threshold", "count"), [(0.6, 0), (0.7, 1)])
def test_the_threshold_is_excluded(threshold: float, count: int, tmp_path: Path) -> None:
    """Two of three words stay: the cosine is 2/3, taken below the threshold only."""
    records = [record("red", "red", "A red square"), record("blue", "blue", None)]
    assert len(built(records, tmp_path, Scripted(obedient), similarity=threshold)) == count
    exactly = float(by_words([text("A red square"), text("A blue square")]).prod(0).sum())
    assert built(records, tmp_path, Scripted(obedient), similarity=exactly) == []


def test_masking_that_changes_the_answer_is_dropped(tmp_path: Path) -> None:
    def careless(prompt: Prompt, seed: int, prefix: str) -> str:
        return f"A {MASK} circle on the {MASK} ground ."

    ledger = Ledger()
    assert not built(colours("red", "blue"), tmp_path, Scripted(careless), ledger)
    assert ledger.skipped == {"mask: masking changed the answer": 2}
    ledger = Ledger()
    assert not built(colours("red", "blue"), tmp_path, Scripted(lambda *_: "I cannot."), ledger)
    assert ledger.skipped == {"mask: nothing was masked": 2}


def test_every_other_loss_is_counted(tmp_path: Path) -> None:
    def mute(prompt: Prompt, seed: int, prefix: str) -> str:
        return obedient(prompt, seed, prefix) if "Replace" in str(prompt[-1].data) else str(prompt[-1].data)[-20:]

    broken = Record("broken", (image(b"\x89PNG no"), text("What?")), "A red square")
    records = [*colours("red", "blue"), record("none", "navy", None), broken, Record("blind", (text("What?"),), "a")]
    ledger = Ledger()
    assert not built(records, tmp_path, Scripted(mute), ledger)
    assert ledger.skipped == {
        "refill: no neighbour gave a different answer": 2,  # each still holds a mask
        "retrieve: no answer": 1,
        "retrieve: unreadable media": 1,
        "retrieve: not exactly one image": 1,
    }
    ledger = Ledger()
    assert not built(colours("red"), tmp_path, Scripted(obedient), ledger)
    assert ledger.skipped == {"retrieve: no neighbour that is not a duplicate": 1}


def test_holes_are_continued_one_after_the_other(tmp_path: Path) -> None:
    """A model that follows no instructions: it is only ever asked the question, and continues the answer."""
    generator = Scripted(obedient)
    options: dict[str, Any] = {"masking": "words", "refilling": "continue"}
    records = [record("red", "red", "A red square on the red ground ."), record("blue", "blue", None)]
    (pair,) = built(records, tmp_path, generator, **options)
    assert str(pair.rejected[0].data) == "A blue square on the blue square ."  # "on" and "the" stayed
    first, second = generator.calls
    assert first["prefixes"] == ["A"] and second["prefixes"] == ["A blue square on the"]
    assert all(call["prompts"][0][1:] == (text("What is it?"),) for call in generator.calls)


def test_in_a_conversation_the_picture_and_the_answers_have_their_roles(tmp_path: Path) -> None:
    turns = [tuple(replace(b, role="user") for b in r.prompt) for r in colours("red", "blue")]
    records = [replace(r, prompt=prompt) for r, prompt in zip(colours("red", "blue"), turns, strict=True)]
    pairs = built(records, tmp_path, Scripted(obedient))
    assert len(pairs) == 2
    for pair in pairs:
        assert pair.chosen[0].role == pair.rejected[0].role == "assistant"
        assert [b.role for b in pair.branches["chosen@retrieved"].prompt] == ["user", "user"]


def test_batches_and_order_change_no_pair(tmp_path: Path) -> None:
    records = colours("red", "orange", "darkorange", "blue", "navy")
    generator = Scripted(lambda prompt, seed, prefix: obedient(prompt, seed, prefix) + f" {seed % 97}")
    options: dict[str, Any] = {"masking": "words", "share": 0.5, "duplicate": 0.999}
    whole = {p.id: p for p in built(records, tmp_path, generator, **options, batch=16)}
    parts = {p.id: p for p in built(records[::-1], tmp_path, generator, **options, batch=2)}
    assert whole == parts and len(whole) == 5


ANSWERS = st.text(alphabet="ab c.,", min_size=1, max_size=30)


@given(answer=ANSWERS, data=st.data())
def test_segments_are_found_again(answer: str, data: st.DataObject) -> None:
    """Whatever is masked, the ranges that come back give the same masked text."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), min_size=2, max_size=6)))
    segments = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if b > a]
    template = masked(answer, segments)
    found = segments_of(template, answer)
    assert found is not None and masked(answer, found) == template


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("no mask", "no mask"),
        (f"A {MASK}.", "A ."),  # nothing stood there
        (f"{MASK} cat", "a dog"),
        (f"the {MASK} cat", "a red cat"),
        (f"a {MASK} b {MASK}", "a b c"),
    ],
)
def test_what_is_no_masking(template: str, answer: str) -> None:
    assert segments_of(template, answer) is None


def test_words_that_are_masked() -> None:
    said = "There is a red fire-truck, parked on the left side. It's not moving."
    random = np.random.default_rng(0)
    runs = [said[a:b] for a, b in content_segments(said, 1.0, random)]
    assert runs == ["red fire-truck", "parked", "left side", "moving"]
    assert len(content_segments(said, 0.5, random)) == 2 and len(content_segments(said, 0.01, random)) == 1
    assert content_segments("It is not.", 1.0, random) == [] and "left" not in FUNCTION_WORDS


@pytest.mark.parametrize(
    ("continuation", "literal", "words", "expected"),
    [
        (" blue car is on a road", " is on the ", 2, "blue car"),  # up to the words that follow
        (" blue car on a road", " with the ", 1, "blue"),  # as many as there were
        (" a very blue car", ".", 1, "a very blue"),  # of words that tell something
        (" blue car, and with a", " the ", 3, "blue car"),  # and none that tell nothing at the end
        (" and the other is", ".", 2, ""),
        (" blue car. It is", ".", 3, "blue car"),  # no further than the sentence
        (" this old car parks", " is on ", 2, "this old car"),  # "is" inside "this" is not the word
        (" b c d e f g h is", " is ", 2, "b c"),  # too much stands before it
        ("", " is ", 2, ""),
    ],
)
def test_what_fills_a_hole(continuation: str, literal: str, words: int, expected: str) -> None:
    assert fill(continuation, literal, words) == expected


def test_missing_tools_and_wrong_shares_are_refused(tmp_path: Path) -> None:
    pool = Neighbourhood(MediaStore(tmp_path, tmp_path), {})
    with pytest.raises(ValueError, match="expected a generator"):
        retrieval(Tools(), pool=pool)
    with pytest.raises(ValueError, match="expected a share"):
        retrieval(Tools(), pool=pool, share=0.0)
    with pytest.raises(ValueError, match="the model masks as it will"):
        retrieval(Tools(), pool=pool, share=0.5)


def test_the_question_of_an_answer_is_the_last_one(tmp_path: Path) -> None:
    """Of a conversation: the first question has another answer."""
    asked: list[str] = []

    def notes(prompt: Prompt, seed: int, prefix: str) -> str:
        asked.append(str(prompt[-1].data))
        return obedient(prompt, seed, prefix)

    items = []
    for r in colours("red", "orange", "blue"):
        talk = (*(replace(b, role="user") for b in r.prompt), text("[0.1, 0.2]", "assistant"), text("Which colour?", "user"))
        items.append(replace(r, prompt=talk))
    assert built(items, tmp_path, Scripted(notes), duplicate=0.999)
    assert asked and all("Question: Which colour?" in words for words in asked)
