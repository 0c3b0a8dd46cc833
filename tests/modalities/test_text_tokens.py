"""Chat turns as tokens: what is scored, where prompt and answer meet, the limits, and spans of characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo.errors import DataError
from mmpo.modalities.text_config import ModelConfig
from mmpo.modalities.text_tokens import Tokens, Turns, Unusable, span_weights
from mmpo.pair import Block, Pair, Span, text
from tests.modalities.tiny_text import tokenizer

QUESTION = (text("What is the capital of France?"),)
ENDS = {"llama3": "<eot>", "chatml": "<stop>", "bare": "<eos>", "none": "<eos>"}


def turns(template: str = "chatml", context: int | None = None, *, words: dict[str, Any] | None = None, **spec: Any) -> Turns:
    return Turns(tokenizer(template, **(words or {})), ModelConfig(**spec), context)


def spelt(ours: Turns, ids: torch.Tensor) -> str:
    return ours.tokenizer.decode(ids.tolist())


def pair(prompt: str = "Who?", chosen: str = "the fox", rejected: str = "the lazy dog jumps") -> Pair:
    return Pair("p", (text(prompt),), (text(chosen),), (text(rejected),))


# Templates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["supervise", "leave_out"])
@pytest.mark.parametrize("template", ENDS)
def test_the_answer_and_nothing_else_is_scored(template: str, policy: Any) -> None:
    ours = turns(template, end_of_turn=policy)
    row = ours.row(QUESTION, (text("Paris"),))
    end = ENDS[template] if policy == "supervise" else ""
    assert spelt(ours, row.ids[row.supervised]) == "Paris" + end
    assert spelt(ours, row.answer) == "Paris" + ENDS[template]
    assert not row.supervised[: row.prompt_length].any()


@pytest.mark.parametrize("template", ["llama3", "chatml"])
def test_rows_are_what_transformers_makes_of_the_conversation(template: str) -> None:
    """Prompt: its generation prompt; the row: its whole conversation, less what it writes after the end of turn."""
    ours = turns(template)
    row = ours.row(QUESTION, (text("Paris is the capital"),))
    asked = [{"role": "user", "content": str(QUESTION[0].data)}]
    apply = ours.tokenizer.apply_chat_template
    assert row.prompt.tolist() == apply(asked, add_generation_prompt=True).input_ids
    whole = apply([*asked, {"role": "assistant", "content": "Paris is the capital"}]).input_ids
    assert row.ids.tolist() == whole[: len(row.ids)] and len(whole) - len(row.ids) == (template == "chatml")  # its newline


def test_roles_reach_the_template() -> None:
    ours = turns("chatml")
    blocks = (text("I do not know", "system"), text("0 1 2", "user"), text("3", "assistant"), text("4 5", "user"))
    said = [{"role": b.role, "content": b.data} for b in blocks]
    assert ours.prompt(blocks) == ours.tokenizer.apply_chat_template(said, add_generation_prompt=True).input_ids
    assert ours.prompt((text("0 1", "user"),)) == ours.prompt((text("0 1"),))


def test_options_reach_the_template() -> None:
    ours = turns("chatml", template_options={"add_generation_prompt": False})
    assert spelt(ours, torch.tensor(ours.prompt(QUESTION))).endswith("<stop>\n")


def test_an_answer_of_several_turns_scores_the_assistants() -> None:
    ours = turns("chatml")
    answer = (text("Paris", "assistant"), text("Who jumps?", "user"), text("the fox", "assistant"))
    row = ours.row(QUESTION, answer)
    said = [{"role": "user", "content": QUESTION[0].data}, *({"role": b.role, "content": b.data} for b in answer)]
    assert row.ids.tolist() == ours.tokenizer.apply_chat_template(said).input_ids[:-1]
    assert spelt(ours, row.ids[row.supervised]) == "Paris<stop>the fox<stop>"
    left = turns("chatml", end_of_turn="leave_out").row(QUESTION, answer)
    assert torch.equal(left.ids, row.ids) and spelt(ours, left.ids[left.supervised]) == "Paristhe fox"


@pytest.mark.parametrize("template", ["llama3", "none"])
def test_a_text_starts_once(template: str) -> None:
    """Neither a template that writes the start, nor a text that has it, gets the tokenizer's own on top."""
    ours = turns(template, words={"bos": True}, chat_markup="as_tokens")
    assert ours.start == [0]
    for prompt in (QUESTION, (text("<bos>Who?"),)) if template == "none" else (QUESTION,):
        assert ours.prompt(prompt)[0] == 0 and ours.prompt(prompt).count(0) == 1
    assert turns("chatml", words={"bos": True}).prompt(QUESTION)[0] != 0  # the template decides


def test_white_space_that_the_template_writes_before_an_answer_is_the_answers() -> None:
    ours = turns()
    ours.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<start>{{ m.content }}<stop>"
        "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    row = ours.row(QUESTION, (text("the dog"),))
    assert spelt(ours, row.ids[row.supervised]) == " the dog<eos>" and ours.opening == " "
    assert torch.equal(ours.row(QUESTION, (text(" the dog"),)).ids, row.ids)
    assert ours.decode(row.answer.tolist()) == "the dog"
    assert span_weights(row, (text("the dog"),), (Span(0, 3, 0.0),)).tolist() == [0.0, 1.0, 1.0]


def test_without_an_end_of_text_an_answer_has_no_end() -> None:
    ours = turns("none", words={"eos": False})
    assert ours.end is None and ours.stops() == frozenset() and ours.stops([7]) == {7}
    assert spelt(ours, ours.row(QUESTION, (text("Paris"),)).answer) == "Paris"


# Where prompt and answer meet ------------------------------------------------------------------------------------------


def test_no_token_crosses_from_the_prompt_into_the_answer() -> None:
    """`of ` + `France` is one token, ` France`, when tokenised together; generation would have had to continue the blank."""
    ours = turns("none")
    together = ours.row((text("capital of"),), (text(" France"),))
    assert not ours.counts and ours.tokenizer.convert_ids_to_tokens(together.answer.tolist())[0] == "ĠFrance"
    apart = ours.row((text("capital of "),), (text("France"),))
    assert apart.prompt.tolist() == ours.prompt((text("capital of "),))
    assert spelt(ours, apart.ids[apart.supervised]) == "France<eos>" and sum(ours.counts.values()) == 1
    assert apart.offsets[apart.prompt_length].tolist()[0] == 0


@settings(max_examples=50)
@given(st.text(max_size=20), st.text(min_size=1, max_size=30), st.sampled_from(sorted(ENDS)))
def test_any_text_survives(asked: str, answered: str, template: str) -> None:
    ours = CACHED.setdefault(template, turns(template))
    if not asked and template == "none":
        return
    row = ours.row((text(asked),), (text(answered),))
    assert ours.decode(row.ids[row.supervised].tolist()) == ours.tokenizer.decode(
        ours.tokenizer(answered, add_special_tokens=False).input_ids, skip_special_tokens=True
    )
    assert row.prompt.tolist() == ours.prompt((text(asked),))
    places = row.offsets[row.supervised]
    covered = {i for a, b in places.tolist() if a >= 0 for i in range(a, b)}
    assert {i for i, c in enumerate(answered) if not c.isspace()} <= covered and places.max() <= len(answered)


CACHED: dict[str, Turns] = {}


# Limits ----------------------------------------------------------------------------------------------------------------


def lengths(rows: dict[str, Tokens]) -> list[int]:
    return [len(rows[b].ids) for b in ("chosen", "rejected")]


def test_a_prompt_loses_its_start_for_both_sides_alike() -> None:
    whole = turns("llama3").rows(pair("What is the capital of France? Who jumps over the lazy dog?"))
    limit = max(lengths(whole)) - 5
    ours = turns("llama3", max_length=limit, too_long="keep_end")
    rows = ours.rows(pair("What is the capital of France? Who jumps over the lazy dog?"))
    assert max(lengths(rows)) == limit and ours.counts == {"prompts cut at their start": 1}
    assert torch.equal(rows["chosen"].prompt, rows["rejected"].prompt)
    for side, row in rows.items():
        assert row.ids[0] == 0  # the start of text stays
        assert row.prompt[1:].tolist() == whole[side].prompt[6:].tolist()
        assert torch.equal(row.answer, whole[side].answer) and row.supervised.sum() == whole[side].supervised.sum()
        assert len(row.offsets) == len(row.ids)


@pytest.mark.parametrize("policy", ["skip", "refuse"])
def test_a_long_pair_is_unusable_with_a_reason(policy: Any) -> None:
    with pytest.raises(Unusable, match="pair p: .* tokens, the limit is 8") as caught:
        turns("chatml", max_length=8, too_long=policy).rows(pair())
    assert caught.value.reason == "longer than max_length"


def test_the_models_context_is_a_limit() -> None:
    assert turns("chatml", 12).limit == 12 and turns("chatml", 12, max_length=9).limit == 9
    assert turns("chatml").limit is None


def test_a_prompt_is_never_emptied() -> None:
    ours = turns("none", max_length=7, too_long="keep_end")
    row = ours.rows(Pair("p", (text("0 1 2 3"),), (text("1234"),)))["chosen"]
    assert row.prompt_length == 2 and spelt(ours, row.prompt) == " 2 3"
    with pytest.raises(Unusable, match="pair p: an answer leaves no room for the prompt within 4 tokens"):
        turns("none", max_length=4, too_long="keep_end").rows(Pair("p", (text("0 1 2 3"),), (text("1234"),)))


def test_a_cut_answer_has_no_end() -> None:
    ours = turns("none", max_response=3)
    row = ours.row(QUESTION, (text("123456"),))
    assert spelt(ours, row.answer) == "123" and row.supervised.sum() == 3
    assert ours.counts == {"answers cut at max_response, without their end of turn": 1}
    assert spelt(ours, ours.row(QUESTION, (text("12"),)).answer) == "12<eos>"  # as long as the limit
    assert spelt(ours, ours.row(QUESTION, (text("123"),)).answer) == "123"


def test_empty_sides_are_refused() -> None:
    with pytest.raises(Unusable, match="pair p: an answer is empty"):
        turns("chatml", end_of_turn="leave_out").rows(pair(chosen=""))
    assert turns("chatml").rows(pair(chosen=""))["chosen"].supervised.sum() == 1  # saying nothing is an answer
    with pytest.raises(Unusable, match="the prompt is empty"):
        turns("none").rows(pair(prompt=""))
    assert turns("none", words={"bos": True}).rows(pair(), dropped=True)["chosen"].prompt.tolist() == [0]


def test_an_unpaired_row_has_the_side_it_has() -> None:
    assert set(turns().rows(Pair("p", QUESTION, (), (text("Paris"),)))) == {"rejected"}


# Refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "message"),
    [
        (
            "none",
            (text("a", "system"), text("b", "user")),
            (text("c"),),
            "a conversation, and the tokenizer has no chat template",
        ),
        ("chatml", (text("a", "user"), text("b", "assistant")), (text("c"),), "the prompt ends with the assistant's turn"),
        ("chatml", (text("a", "user"), text("b")), (text("c"),), "some blocks of the prompt have a role and some have none"),
        ("chatml", (Block("image", b"x"),), (text("c"),), "expected blocks of text, found image"),
        ("chatml", (text("a"),), (Block("image", b"x"),), "expected an answer of text .* found .*image"),
        ("chatml", (text("a"),), (text("c", "user"),), "expected an answer of text .* found .*user"),
        ("chatml", (text("a"),), (text("b"), text("c")), "expected an answer of text"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(template: str, prompt: Any, answer: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"pair p: .*{message}"):
        turns(template).rows(Pair("p", prompt, answer))


def test_a_template_that_refuses_is_quoted() -> None:
    ours = turns()
    ours.tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + "x"
    with pytest.raises(DataError, match="pair p: the chat template refuses the turns system, user: no system"):
        ours.rows(Pair("p", (text("a", "system"), text("b", "user")), (text("c"),)))
    ours.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(DataError, match="the chat template leaves the assistant's answer out"):
        ours.rows(pair())


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow: expected a fast tokenizer"):
        Turns(Slow(), ModelConfig())


# Spans -----------------------------------------------------------------------------------------------------------------


def test_a_token_weighs_what_its_characters_weigh() -> None:
    """` France` is one token: 2 of its 6 letters are in the span, and its blank is no letter."""
    ours, answer = turns("none"), (text("of France é"),)
    row = ours.row((text("capital"),), answer)
    tokens = ours.tokenizer.convert_ids_to_tokens(row.ids[row.supervised].tolist())
    assert tokens == ["o", "f", "ĠFrance", "Ġ", "Ã", "©", "<eos>"]
    weights = span_weights(row, answer, (Span(0, 2, 0.0), Span(3, 5, 0.25), Span(10, 11, 3.0)))
    inside = (2 * 0.25 + 4 * 1.0) / 6
    assert weights.tolist() == pytest.approx([0.0, 0.0, inside, 1.0, 3.0, 3.0, 1.0])  # both bytes of é; the end weighs 1
    assert span_weights(row, answer, ()).tolist() == [1.0] * 7


def test_weights_follow_the_text_and_not_the_prompt() -> None:
    """The same answer has the same weights after any prompt, in every template."""
    answer, spans = (text("I do not know, but the dog does."),), (Span(15, 32, 0.0),)
    found = []
    for template in ENDS:
        for prompt in ("Who?", "What is the capital of "):
            row = turns(template).row((text(prompt),), answer)
            found.append(span_weights(row, answer, spans).tolist())
    assert all(f == found[0] for f in found) and 0 < found[0].count(0.0) < len(found[0]) - 1


def test_spans_that_fit_no_text_are_refused() -> None:
    ours = turns("chatml")
    row = ours.row(QUESTION, (text("Paris"),))
    with pytest.raises(ValueError, match="span 2 to 9 ends beyond its text of 5 characters"):
        span_weights(row, (text("Paris"),), (Span(2, 9, 0.0),))
    several = (text("a", "assistant"), text("b", "user"), text("c", "assistant"))
    with pytest.raises(ValueError, match="this answer has 3 turns"):
        span_weights(ours.row(QUESTION, several), several, (Span(0, 1, 0.0),))


def test_digests_tell_settings_apart() -> None:
    made = [turns(), turns("llama3"), turns(end_of_turn="leave_out"), turns(max_response=3), turns(template_options={"a": 1})]
    assert len({t.digest for t in made}) == len(made) and turns().digest == made[0].digest
