"""From a prompt and its answers to token ids: chat turns, the exact mask of what is scored, and truncation.

A row is what the model would see while it generates: the prompt as the chat template writes it up to the place where the
assistant begins to speak, then the answer, then the token that ends the turn. Prompt and answer are tokenised together,
and apart wherever a token would cross the border between them, because generation cannot cross it either.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from jinja2 import TemplateError
from torch import Tensor

from mmpo.errors import DataError
from mmpo.modalities.plain_text import Ids, Offsets, PlainText, length
from mmpo.pair import Block, Branch, Pair, Span, text

SIDES = ("chosen", "rejected")
SENTINEL = "Xq7ZkV"  # stands for an answer where the template is asked what it writes around one
NOWHERE = (-1, -1)


@dataclass(frozen=True)
class Tokens:
    """One row: a prompt and one answer to it, L tokens.

    ids: (L,) int64. supervised: (L,) bool, the tokens whose likelihood counts, none of them in the prompt. offsets: (L, 2)
    int64, the characters of the answer's text that a token spells, -1 where it spells none. prompt_length: tokens up to the
    answer's first.
    """

    ids: Tensor
    supervised: Tensor
    offsets: Tensor
    prompt_length: int

    @property
    def prompt(self) -> Tensor:
        return self.ids[: self.prompt_length]

    @property
    def answer(self) -> Tensor:
        """Everything after the prompt, (L - prompt_length,)."""
        return self.ids[self.prompt_length :]

    @property
    def units(self) -> Tensor:
        """Places of the scored tokens in the row, (U,)."""
        return self.supervised.nonzero()[:, 0]

    @property
    def asked(self) -> bytes:
        """Names the prompt: rows of one name can share it."""
        return self.prompt.numpy().tobytes()

    def keep(self, places: Tensor) -> Self:
        """The row's tokens at `places` (L,) bool."""
        length = int(places[: self.prompt_length].sum())
        ids, supervised, offsets = self.ids[places], self.supervised[places], self.offsets[places]
        return replace(self, ids=ids, supervised=supervised, offsets=offsets, prompt_length=length)


class Unusable(DataError):
    """A row of which nothing can be scored under the limits. reason: what it is counted as where such rows are skipped."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Turns:
    """A tokenizer with its chat template and the limits of a recipe.

    tokenizer: a fast one, for its offsets; ValueError for any other. spec: the `model:` section of a text recipe.
    context: tokens the model can read. counts: what happened to rows that were not taken as they are, by reason.
    """

    KINDS: frozenset[str] = frozenset({"text"})
    STARTS = False  # whether the tokenizer's own start goes before what a template wrote too

    def __init__(self, tokenizer: Any, spec: Any, context: int | None = None):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__}: expected a fast tokenizer (tokenizer.json), which knows the characters of a token"
            )
        self.tokenizer, self.spec = tokenizer, spec
        self.limit = min((n for n in (spec.max_length, context) if n), default=None)
        self.counts: Counter[str] = Counter()

    # ---- what the tokenizer and its template do

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.tokenizer)

    @cached_property
    def start(self) -> Ids:
        """What the tokenizer puts before a text of its own accord: the start-of-text token, or nothing."""
        plain, full = self._raw(SENTINEL)[0], self.tokenizer(SENTINEL).input_ids
        places = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        return list(full[: places[0]]) if places else []

    @cached_property
    def opening(self) -> str:
        """White space that the template writes between its generation prompt and the answer, e.g. Mistral's."""
        if not self.has_template:
            return ""
        question = [text("?", "user")]
        before, prompt = self._around(question)[0], self._render(question, True)
        written = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return written if written.isspace() else ""

    @cached_property
    def end(self) -> int | None:
        """The token that ends a turn: the special one the template writes after an answer, else the end of text, else none."""
        if self.has_template:
            first = self._raw(self._around([text("?", "user")])[1])[0][:1]
            if first and first[0] in self._special:
                return int(first[0])
        return self.tokenizer.eos_token_id

    @cached_property
    def _special(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder
        return {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def stops(self, generation: Sequence[int] = ()) -> frozenset[int]:
        """The tokens at which generation stops. generation: those of the model's own generation settings."""
        known = (self.end, self.tokenizer.eos_token_id, *generation)
        return frozenset(int(i) for i in known if i is not None)

    @property
    def digest(self) -> str:
        """Names the tokenizer, its template and the settings: rows of equal digests have equal tokens."""
        spec, backend = self.spec, self.tokenizer.backend_tokenizer.to_str()
        limits = (self.limit, spec.max_response, spec.too_long, spec.end_of_turn)
        settings = (*limits, spec.chat_markup, sorted(spec.template_options.items()))
        return hashlib.sha256("\0".join([backend, str(self.tokenizer.chat_template), repr(settings)]).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens and without the template's own white space before it."""
        written = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return written.removeprefix(self.opening)

    def _raw(self, words: str) -> tuple[Ids, Offsets]:
        return self._plain.tokens(words)

    def _given(self, words: str) -> str:
        """A row's own text, as it goes into a template or before a tokenizer."""
        return self._plain.marked(words) if self.spec.chat_markup == "as_text" else words

    def _render(self, blocks: Sequence[Block], generation_prompt: bool) -> str:
        messages = [{"role": b.role, "content": self._given(str(b.data))} for b in blocks]
        options = {"tokenize": False, "add_generation_prompt": generation_prompt, **self.spec.template_options}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            turns = ", ".join(str(m["role"]) for m in messages)
            raise ValueError(f"the chat template refuses the turns {turns}: {error}") from error

    def _around(self, blocks: Sequence[Block], more: Sequence[Block] = ()) -> tuple[str, str]:
        """What the template writes before and after an answer to `blocks`; more: turns that follow, up to the next answer."""
        turns = [*blocks, text(SENTINEL, "assistant"), *more]
        before, found, after = self._render(turns, bool(more)).rpartition(SENTINEL)
        if not found:
            raise ValueError("the chat template leaves the assistant's answer out; choose another with model.chat_template")
        return before, after

    # ---- rows

    def rows(self, pair: Pair, branches: Sequence[str] = SIDES, dropped: bool = False) -> dict[str, Tokens]:
        """The rows of a pair's branches, by name, of those that it has; dropped: under the empty prompt.

        Raises DataError, naming the pair, for what cannot be read, and Unusable for what breaks the limits.
        """
        found = {n: replace(b, prompt=() if dropped else b.prompt) for n in branches if (b := pair.branch(n))}
        if not dropped and self.spec.chat_markup == "as_text" and any(map(self._spells, found.values())):
            self.counts["pairs that spell special tokens, read as text (model.chat_markup)"] += 1
        try:
            return self._fitted(found)
        except Unusable as error:
            raise Unusable(error.reason, f"pair {pair.id}: {error}") from error
        except ValueError as error:
            raise DataError(f"pair {pair.id}: {error}") from error

    def _spells(self, branch: Branch) -> bool:
        return any(self._plain.spells(str(b.data)) for b in (*branch.prompt, *branch.response) if b.kind == "text")

    def _fitted(self, branches: dict[str, Branch]) -> dict[str, Tokens]:
        """A row for each branch, within the limits."""
        return self._fit({n: self.row(b.prompt, b.response) for n, b in branches.items()})

    def prompt(self, blocks: Sequence[Block]) -> Ids:
        """The prompt's tokens, up to where the answer begins: what generation starts from."""
        ids = self._raw(self._written(blocks))[0]
        if (self.STARTS or not self.has_template) and ids[: len(self.start)] != self.start:
            ids = self.start + ids
        if not ids:
            raise Unusable("empty prompt", "the prompt is empty, and this tokenizer puts no token before a text")
        return ids

    def row(self, prompt: Sequence[Block], answer: Sequence[Block]) -> Tokens:
        """The row of a prompt and an answer of one or more turns; only the assistant's turns are scored."""
        self._check_answer(answer)
        ids, said = self.prompt(prompt), self._turns(prompt)
        length = len(ids)
        scored, offsets = [False] * length, [NOWHERE] * length
        for turn, others in self._assistant_turns(answer):
            words, spoken = self._spoken(turn)
            found, places = self._continue(self._written(said), words)
            own = [all(spoken[a:b]) for a, b in places]
            ids, scored, offsets = ids + found, scored + own, offsets + places
            after = self._raw(self._around(said, others)[1])[0] if others else self._ending
            said = [*said, *(replace(block, role="assistant") for block in turn), *others]
            ends = [i == 0 and token == self.end and self.spec.end_of_turn == "supervise" for i, token in enumerate(after)]
            ids, scored, offsets = ids + after, scored + ends, offsets + [NOWHERE] * len(after)
        row = Tokens(torch.tensor(ids), torch.tensor(scored), torch.tensor(offsets).view(-1, 2), length)
        return self._cut(self._complete(row, [*prompt, *answer]))

    def _written(self, blocks: Sequence[Block]) -> str:
        """The prompt as text, as the template writes it with its generation prompt, or as it is without a template."""
        if media := {b.kind for b in blocks} - self.KINDS:
            raise ValueError(f"expected blocks of {' and '.join(sorted(self.KINDS))}, found {', '.join(sorted(media))}")
        turns = self._turns(blocks)
        if turns[-1].role == "assistant":
            raise ValueError("the prompt ends with the assistant's turn, and an answer begins with one: a user has to speak")
        if self.has_template:
            return self._render(turns, True)
        if len(turns) > 1 or turns[0].role != "user" or turns[0].kind != "text":
            raise ValueError("a conversation, and the tokenizer has no chat template: name a file in model.chat_template")
        return self._given(str(turns[0].data))

    def _continue(self, before: str, answer: str) -> tuple[Ids, Offsets]:
        """An answer's tokens and their characters, as it follows the text before it."""
        opening = "" if answer.startswith(self.opening) else self.opening
        prompt = self._raw(before)[0]
        ids, offsets = self._raw(before + opening + answer)
        skipped = length(before + opening)
        if ids[: len(prompt)] == prompt:
            ids, offsets = ids[len(prompt) :], offsets[len(prompt) :]
        else:
            self.counts["answers tokenised apart from their prompt, with which they would share a token"] += 1
            ids, offsets = self._raw(opening + answer)
            skipped = len(opening)
        return ids, [(max(a - skipped, 0), max(b - skipped, 0)) for a, b in offsets]

    @property
    def _ending(self) -> Ids:
        return [] if self.end is None else [self.end]

    # ---- limits

    def _cut(self, row: Tokens) -> Tokens:
        """The answer cut at its own limit, with which it loses its end of turn."""
        limit = self.spec.max_response
        if limit is not None and len(row.answer) > limit:
            self.counts["answers cut at max_response, without their end of turn"] += 1
            row = row.keep(torch.arange(len(row.ids)) < row.prompt_length + limit)
        if not bool(row.supervised.any()):
            raise Unusable("empty answer", "an answer is empty: there is no token to score")
        return row

    def fixed(self, prompt: Ids) -> int:
        """How many tokens at a prompt's start stay where it loses its start: the one that starts a text."""
        return int(prompt[0] == self.tokenizer.bos_token_id)

    def _fit(self, rows: dict[str, Tokens]) -> dict[str, Tokens]:
        """Rows within the limit, by dropping the start of their prompt where the recipe says so: the same for all of them."""
        longest = max((len(r.ids) for r in rows.values()), default=0)
        if self.limit is None or longest <= self.limit:
            return rows
        if self.spec.too_long != "keep_end":
            told = f"{longest} tokens, the limit is {self.limit}; raise model.max_length, or set model.too_long"
            raise Unusable("longer than max_length", told)
        prompt = next(iter(rows.values())).prompt.tolist()
        first, excess = self.fixed(prompt), longest - self.limit
        if len(prompt) - first - excess < 1:
            told = f"an answer leaves no room for the prompt within {self.limit} tokens; set model.max_response"
            raise Unusable("answer as long as max_length", told)
        self.counts["prompts cut at their start"] += 1
        where = {name: torch.arange(len(row.ids)) for name, row in rows.items()}
        return {n: row.keep((where[n] < first) | (where[n] >= first + excess)) for n, row in rows.items()}

    # ---- blocks as turns

    def _turns(self, blocks: Sequence[Block]) -> list[Block]:
        """Blocks as turns of a conversation: each one with a role is a turn, those without are one turn of the user's."""
        loose = [b for b in blocks if b.role is None]
        if loose and len(loose) < len(blocks):
            raise ValueError("some blocks of the prompt have a role and some have none")
        return list(blocks) if blocks and not loose else [text(" ".join(str(b.data) for b in loose), "user")]

    def _check_answer(self, blocks: Sequence[Block]) -> None:
        found = [b.role if b.kind == "text" else b.kind for b in blocks]
        if not blocks or {found[0], found[-1]} - {None, "assistant"} or (None in found and len(found) > 1):
            raise ValueError(f"expected an answer of text that begins and ends with the assistant's turn, found {found}")

    def _assistant_turns(self, blocks: Sequence[Block]) -> Iterator[tuple[list[Block], list[Block]]]:
        """Each turn of the assistant's in an answer, with the turns of others that follow it."""
        places = [i for i, b in enumerate(blocks) if b.role in (None, "assistant")]
        for place, following in zip(places, [*places[1:], len(blocks)], strict=True):
            yield [blocks[place]], list(blocks[place + 1 : following])

    def _spoken(self, turn: Sequence[Block]) -> tuple[str, list[bool]]:
        """What the assistant says in a turn, with marks where it spells special tokens, and which of its characters count."""
        words = "".join(str(block.data) for block in turn)
        return self._given(words), [True] * len(words)

    def _complete(self, row: Tokens, blocks: Sequence[Block]) -> Tokens:
        """The row with what else is known of its blocks."""
        return row


def span_weights(row: Tokens, answer: Sequence[Block], spans: Sequence[Span]) -> Tensor:
    """(U,) fp32: the mean weight of the characters that a scored token spells; 1 outside the spans and for an end of turn.

    The blank that a token brings along before its word does not count, because a span begins with the word. Raises
    ValueError for spans beyond the text, or of an answer of several turns, whose characters nobody has numbered.
    """
    if len(answer) != 1 and spans:
        raise ValueError(f"spans number the characters of one text, and this answer has {len(answer)} turns")
    words = str(answer[0].data)
    weight = [1.0] * len(words)
    for span in spans:
        if span.end > len(words):
            raise ValueError(f"span {span.start} to {span.end} ends beyond its text of {len(words)} characters")
        weight[span.start : span.end] = [span.weight] * (span.end - span.start)
    found = []
    for start, end in row.offsets[row.supervised].tolist():
        places = [i for i in range(start, end) if not words[i].isspace()] or range(start, end)
        found.append(sum(weight[i] for i in places) / len(places) if places else 1.0)
    return torch.tensor(found, dtype=torch.float32)
