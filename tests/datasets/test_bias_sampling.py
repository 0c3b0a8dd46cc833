"""BDHS: what the model is asked to continue, when an attempt is taken, and the yes or no that is turned round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpo.datasets.builders.bias_sampling import bias_sampling, flipped, heads
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.sentences import first_sentence, sentences
from mmpo.datasets.stages import Record, execute
from mmpo.datasets.tools import Prompt, Tools
from mmpo.pair import Pair, image, text
from tests.datasets.picture_tools import Scripted, by_words, picture, record

REFERENCE = "A red car stands on a road. It is old! Nobody is in it."


def built(
    records: Sequence[Record], say: Any, ledger: Ledger | None = None, seed: int = 0, judge: Any = None, **options: Any
) -> tuple[list[Pair], Scripted]:
    generator = say if isinstance(say, Scripted) else Scripted(say)
    tools = Tools(generator=generator, text_embedder=by_words, pair_judge=judge)
    done = execute(records, bias_sampling(tools, **options), seed=seed, ledger=ledger or Ledger())
    return [r.fields["pair"] for r in done], generator


def invents(prompt: Prompt, seed: int, prefix: str) -> str:
    return " giraffe sings. And more."


def cars(count: int) -> list[Record]:
    return [record(f"r{n}", "red", REFERENCE) for n in range(count)]


def test_heads_are_true_and_tails_are_the_models() -> None:
    """Of every sentence the beginning is the reference's, the rest what the model said, no further than its first stop."""
    pairs, generator = built(cars(40), invents, flip=0.0, batch=7)
    assert len(pairs) == 40
    true = [s.split() for s in sentences(REFERENCE)]
    for pair in pairs:
        assert pair.chosen == (text(REFERENCE),) and pair.meta["attempt"] == 1
        said = [s.split() for s in sentences(str(pair.rejected[0].data))]
        assert len(said) == 3
        for sentence, reference in zip(said, true, strict=True):
            head = sentence[: sentence.index("giraffe")]
            assert head == reference[: len(head)] and len(head) < len(reference)
            assert sentence[len(head) :] == ["giraffe", "sings."]
    for call in generator.calls:
        assert call["hide_images"] == 0.99 and all(REFERENCE.startswith(p) and p == p.rstrip() for p in call["prefixes"])


def test_split_points_reach_every_word_but_the_end() -> None:
    random = np.random.default_rng(0)
    found = Counter(h.own for _ in range(600) for h in heads("One two three. Four five.", random))
    assert set(found) == {"", "One ", "One two ", "Four "}
    assert min(found.values()) > 150


def test_one_answer_sees_one_set_of_hidden_tokens_and_attempts_see_others() -> None:
    def repeats(prompt: Prompt, seed: int, prefix: str) -> str:
        return next(REFERENCE[len(prefix) :] for _ in [0])

    pairs, generator = built(cars(1), repeats, flip=0.0)
    assert not pairs  # what it says is the answer itself, also when free
    hidden = [set(call.get("hide_seeds") or call["seeds"]) for call in generator.calls]
    assert [len(seeds) for seeds in hidden] == [1] * 5 and len(set.union(*hidden)) == 5
    guided = [call["seeds"] for call in generator.calls if call["prefixes"] is not None]
    assert all(len(set(seeds)) == len(seeds) > 1 for seeds in guided)  # sentences are independent


def test_an_answer_is_flipped_in_all_attempts_or_in_none() -> None:
    """Drawn anew in each, those that come out different enough would nearly all be flipped."""

    def agrees(prompt: Prompt, seed: int, prefix: str) -> str:
        return " it is red." if prefix.startswith("No") else "Yes, it is red."[len(prefix) :]

    yes = [replace(r, id=f"r{i}", answer="Yes, it is red.") for i, r in enumerate(cars(1) * 60)]
    pairs, _ = built(yes, agrees)
    assert 18 <= len(pairs) <= 42 and all(str(p.rejected[0].data).startswith("No") for p in pairs)


def test_five_attempts_the_last_free_and_taken_as_it_is() -> None:
    """Guided attempts come out too alike; the free one is taken though it is alike as well."""

    def alike(prompt: Prompt, seed: int, prefix: str) -> str:
        return REFERENCE[len(prefix) :] if prefix or seed < 0 else REFERENCE + " Really."

    def guided_alike(prompt: Prompt, seed: int, prefix: str) -> str:
        return REFERENCE[len(prefix) :]

    class Free(Scripted):
        def __call__(self, prompts: Any, seeds: Any, *, prefixes: Any = None, **options: Any) -> Any:
            self.say = guided_alike if prefixes is not None else lambda *_: REFERENCE + " Really."
            return super().__call__(prompts, seeds, prefixes=prefixes, **options)

    (pair,), generator = built(cars(1), Free(alike), flip=0.0, max_new_tokens=200, tail_tokens=30)
    assert [call["prefixes"] is None for call in generator.calls] == [False] * 4 + [True]
    assert [call["max_new_tokens"] for call in generator.calls] == [30] * 4 + [200]
    assert str(pair.rejected[0].data) == REFERENCE + " Really."
    assert pair.meta["attempt"] == 5 and pair.meta["guided"] is False and pair.meta["text_cosines"][-1] >= 0.9
    (only,) = [c for c in [built(cars(1), Free(alike), flip=0.0, tries=1)]]
    assert only[0] == []  # a single attempt is guided, and has to pass the filter


@pytest.mark.parametrize(("at", "count"), [(0.0, 0), (1e-6, 1)])
def test_the_similarity_is_excluded(at: float, count: int) -> None:
    said = "A blue car"
    exactly = float(by_words([text("A red car"), text(said)]).prod(0).sum())
    options: dict[str, Any] = {"tries": 1, "guided": False, "similarity": exactly + at}
    pairs, _ = built([record("r", "red", "A red car")], lambda *_: said, **options)
    assert len(pairs) == count


def test_a_sentence_that_broke_off_is_no_attempt() -> None:
    pairs, generator = built(cars(1), lambda prompt, seed, prefix: " giraffe without" if prefix else "A free answer.", flip=0.0)
    assert [str(p.rejected[0].data) for p in pairs] == ["A free answer."] and len(generator.calls) == 5
    bare, _ = built([record("r", "red", "a red car")], lambda *_: " giraffe without", flip=0.0)
    assert str(bare[0].rejected[0].data).endswith("giraffe without")  # the known answer has no stop either


def test_yes_and_no_are_turned_round_half_of_the_time() -> None:
    records = [record(f"r{n}", "red", "Yes, there is a red car.") for n in range(200)]
    pairs, _ = built(records, invents)
    begins = Counter(str(p.rejected[0].data).split()[0] for p in pairs)
    assert 70 < begins["No,"] < 130 and all(p.chosen == (text("Yes, there is a red car."),) for p in pairs)
    pairs, _ = built(records[:20], invents, flip=0.0)
    assert not any("No" in str(p.rejected[0].data) for p in pairs)


def test_a_bare_yes_becomes_a_bare_no_without_asking_the_model() -> None:
    (pair,), generator = built([record("r", "red", "Yes.")], invents, flip=1.0)
    assert str(pair.rejected[0].data) == "No." and not generator.calls


@pytest.mark.parametrize(
    ("answer", "other"),
    [("Yes.", "No."), ("  no, not", "  yes, not"), ("No", "Yes"), ("Nobody", None), ("A yes", None), ("YES", None)],
)
def test_which_words_are_turned_round(answer: str, other: str | None) -> None:
    assert flipped(answer) == other


def test_the_online_mix_ranks_two_answers_of_the_model_that_sees() -> None:
    def said(prompt: Prompt, seed: int, prefix: str) -> str:
        return f"answer {seed}" if not prefix else " giraffe."

    def judge(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[str]:
        return ["first" if int(a.split()[1]) > int(b.split()[1]) else "second" for a, b in zip(first, second, strict=True)]

    pairs, generator = built(cars(200), said, judge=judge, on_policy=0.5, flip=0.0)
    ranked = [p for p in pairs if p.meta.get("on_policy")]
    assert len(pairs) == 200 and 70 < len(ranked) < 130
    for pair in ranked:
        high, low = (int(str(side[0].data).split()[1]) for side in (pair.chosen, pair.rejected))
        assert high > low
    assert {call["hide_images"] for call in generator.calls if call["prefixes"] is None} == {0.0}
    assert all(p.chosen == (text(REFERENCE),) for p in pairs if not p.meta.get("on_policy"))


def test_judges_that_do_not_hold_and_equal_answers_are_counted() -> None:
    def always_first(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[str]:
        return ["first"] * len(prompts)

    ledger = Ledger()
    built(cars(3), lambda prompt, seed, prefix: f"{seed}", ledger, judge=always_first, on_policy=1.0)
    assert ledger.skipped == {"rank: no verdict that holds in both orders": 3}
    ledger = Ledger()
    built(cars(2), lambda *_: "same", ledger, judge=always_first, on_policy=1.0)
    assert ledger.skipped == {"rank: not two different answers": 2}


def test_what_cannot_be_sampled_is_counted() -> None:
    ledger = Ledger()
    broken = Record("d", (image(b"\x89PNG no"), text("What?")), "A cat.")
    blank = Record("b", (picture("red"), text("?")), " ")
    records = [Record("a", (text("What?"),), "x"), blank, record("c", "red", "Red."), broken]
    built(records, lambda prompt, seed, prefix: "Red."[len(prefix) :], ledger)
    assert ledger.skipped == {
        "check: no image in the prompt": 1,
        "check: no answer": 1,
        "check: unreadable media": 1,
        "sample: no attempt differs from the answer": 1,
    }


def test_batches_and_order_change_no_pair() -> None:
    def said(prompt: Prompt, seed: int, prefix: str) -> str:
        return f" giraffe {seed}."

    whole, _ = built(cars(9), said, batch=9)
    parts, _ = built(cars(9)[::-1], said, batch=2)
    assert {p.id: p for p in whole} == {p.id: p for p in parts}
    other, _ = built(cars(9), said, seed=1)
    assert whole != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hide_images": 1.5}, "hide_images: expected a share"),
        ({"tries": 0}, "tries: expected at least 1"),
        ({"on_policy": 0.5}, "expected a pair_judge"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    tools = Tools(generator=Scripted(invents), text_embedder=by_words)
    with pytest.raises(ValueError, match=message):
        bias_sampling(tools, **options)


def test_missing_tools_are_named() -> None:
    with pytest.raises(ValueError, match="expected a generator and a text_embedder"):
        bias_sampling(Tools())


@given(st.text(alphabet='ab AB.!?\n"1', max_size=60))
def test_sentences_joined_are_the_text(written: str) -> None:
    found = sentences(written)
    assert "".join(found) == written and len(found) >= 1
    assert len(found) == 1 or all(s.strip() for s in found)


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("One. Two? Three!", 3),
        ("Mr. Smith is 1.80 m. He smiles.", 2),
        ("1. A cat\n2. A dog", 2),
        ("No. There is none.", 2),
        ('He said "stop." Then left.', 2),
        ("Wait... what", 2),
        ("no end", 1),
        ("", 1),
    ],
)
def test_where_sentences_end(written: str, count: int) -> None:
    assert len(sentences(written)) == count
    assert first_sentence(written) == sentences(written)[0].rstrip()
