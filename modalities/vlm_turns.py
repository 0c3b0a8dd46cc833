"""From blocks of text and images to token ids: messages, the processor's placeholders, response masks, and limits.

Rows are those of the text modality (`text_tokens`), with what a processor makes of images in the place of what the chat
template writes for them, and the positions of every image's tokens. A row is never cut inside an image: images are made
smaller, or the row is left out, as `model.images.too_long` says.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from jinja2 import TemplateError
from torch import Tensor

from mmpo import media
from mmpo.cache import key
from mmpo.modalities import text_tokens
from mmpo.modalities.plain_text import PlainText
from mmpo.modalities.text_tokens import SENTINEL, Tokens, Unusable
from mmpo.modalities.vlm_images import Known, Picture, Processed, picture
from mmpo.pair import Block, Branch

LEAST_PIXELS = 28 * 28  # below which an image is not made smaller to fit
Positions = Callable[[Tensor, Tensor, Tensor], Tensor]  # of ids (L,), which are images (L,), grids (I, 3): (3, L)


@dataclass(frozen=True)
class Rows(Tokens):
    """A row with images. images: in the order of the row. image_spans: the places of each one's tokens in it, (k,) int64.

    positions: (3, L) int64 where the model numbers image tokens by rows and columns; None where tokens are numbered in order.
    """

    images: tuple[Picture, ...] = ()
    image_spans: tuple[Tensor, ...] = ()
    positions: Tensor | None = None

    @property
    def asked(self) -> bytes:
        return key(super().asked, *(p.name for p in self.within(0, self.prompt_length)))

    def within(self, start: int, stop: int) -> list[Picture]:
        """The images whose tokens stand from `start` to `stop`."""
        return [p for p, span in zip(self.images, self.image_spans, strict=True) if start <= int(span[0]) < stop]

    def keep(self, places: Tensor) -> Self:
        kept = super().keep(places)
        moved = places.cumsum(0) - 1
        left = [(p, moved[span]) for p, span in zip(self.images, self.image_spans, strict=True) if bool(places[span].all())]
        positions = None if self.positions is None else self.positions[:, places]
        return replace(kept, images=tuple(p for p, _ in left), image_spans=tuple(s for _, s in left), positions=positions)


class Turns(text_tokens.Turns):
    """A processor with its chat template and the limits of a recipe. positions: how the model numbers tokens, or None."""

    KINDS = frozenset({"text", "image"})
    STARTS = True

    def __init__(self, processor: Any, processed: Processed, spec: Any, context: int | None, positions: Positions | None):
        super().__init__(processor.tokenizer, spec, context)
        self.processor, self.processed, self._positions = processor, processed, positions

    @property
    def has_template(self) -> bool:
        return bool(self.processor.chat_template)

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.tokenizer, kept={self.processed.token})  # a picture that is missing is told, not spelt

    @property
    def digest(self) -> str:
        images = (self.processed.digest, self.processor.chat_template, self.spec.images.model_dump(exclude={"store"}))
        return hashlib.sha256(f"{super().digest}{images}".encode()).hexdigest()

    # ---- rows

    def row(self, prompt: Sequence[Block], answer: Sequence[Block], max_pixels: int | None = None) -> Tokens:
        """The row of a prompt and an answer, its images at most `max_pixels` large."""
        prompt, answer = self.shown(prompt, answer, max_pixels or self.spec.images.max_pixels)
        return super().row(prompt, answer)

    def shown(
        self, prompt: Sequence[Block], answer: Sequence[Block], max_pixels: int | None
    ) -> tuple[list[Block], list[Block]]:
        """The same blocks, with images as this row shows them."""
        among = self.processed.counts_images and sum(b.kind == "image" for b in (*prompt, *answer)) > 1
        sides = ([picture(b, among, max_pixels) if b.kind == "image" else b for b in side] for side in (prompt, answer))
        first, second = sides
        return first, second

    def _fitted(self, branches: dict[str, Branch]) -> dict[str, Tokens]:
        """Rows within the limit: those without images as in the text modality, others as `model.images.too_long` says."""
        images = [b for branch in branches.values() for b in (*branch.prompt, *branch.response) if b.kind == "image"]
        if not images:
            return super()._fitted(branches)

        def made(max_pixels: int | None) -> dict[str, Tokens]:
            return {n: self.row(b.prompt, b.response, max_pixels) for n, b in branches.items()}

        rows, smaller = self._shrunk(made, images, self.limit)
        if smaller:
            self.counts["pairs whose images were made smaller to fit max_length"] += 1
        return rows

    def _shrunk(
        self, made: Callable[[int | None], dict[str, Tokens]], images: Sequence[Block], limit: int | None
    ) -> tuple[dict[str, Tokens], bool]:
        """Rows of at most `limit` tokens, by halving the pixels of the images, and whether that was needed.

        made: the rows with images of at most so many pixels. Raises Unusable where the recipe does not want that, or where
        images that are smaller take no fewer tokens.
        """
        rows = made(None)
        before = longest = _longest(rows)
        if limit is None or before <= limit:
            return rows, False
        budget = min(max(w * h for w, h in map(media.size, images)), self.spec.images.max_pixels or media.MAX_PIXELS)
        kept = 0  # halvings that changed nothing, one after the other
        while self.spec.images.too_long == "resize" and budget >= 2 * LEAST_PIXELS and kept < 3:
            budget //= 2
            rows = made(budget)
            kept = kept + 1 if _longest(rows) == longest else 0
            longest = _longest(rows)
            if longest <= limit:
                return rows, True
        told = "" if longest == before else f", and {longest} with images of {budget} pixels"
        raise Unusable("longer than max_length", f"{before} tokens{told}; the limit is {limit}")

    def _complete(self, row: Tokens, blocks: Sequence[Block]) -> Tokens:
        """The row with its images' places: the first k ids of image tokens are the first image's, and so on."""
        images = [b for b in blocks if isinstance(b, Picture)]
        places = (row.ids == self.processed.soft).nonzero()[:, 0]
        known = [self.processed.known(p) for p in images]
        counts = [k.tokens for k in known]
        if sum(counts) != len(places):
            raise ValueError(f"{len(places)} image tokens for {len(images)} images, which have {sum(counts)}")
        spans = tuple(places.split(counts)) if images else ()
        positions = self._numbered(row.ids, known)
        return Rows(row.ids, row.supervised, row.offsets, row.prompt_length, tuple(images), spans, positions)

    def _numbered(self, ids: Tensor, known: Sequence[Known]) -> Tensor | None:
        grids = [k.grid for k in known if k.grid is not None]
        if self._positions is None or not grids:
            return None
        return self._positions(ids, ids == self.processed.soft, torch.cat(grids))

    def _cut(self, row: Tokens) -> Tokens:
        """The answer cut at its limit, or before the image that stands there."""
        assert isinstance(row, Rows)
        limit, start = self.spec.max_response, row.prompt_length
        inside = [s for s in row.image_spans if limit is not None and int(s[0]) < start + limit <= int(s[-1])]
        if inside:
            row = row.keep(torch.arange(len(row.ids)) < int(inside[0][0]))  # type: ignore[assignment]
            self.counts["answers cut at max_response, without their end of turn"] += 1
        return super()._cut(row)

    # ---- messages

    def _turns(self, blocks: Sequence[Block]) -> list[Block]:
        loose = [b for b in blocks if b.role is None]
        if len(loose) == len(blocks) and any(b.kind == "image" for b in blocks):
            return [replace(b, role="user") for b in blocks]
        return super()._turns(blocks)

    def _check_answer(self, blocks: Sequence[Block]) -> None:
        roles, media_given = [b.role for b in blocks], any(b.kind == "image" for b in blocks)
        several = len(roles) > 1 and None in roles and (set(roles) != {None} or not media_given)
        if not blocks or {b.kind for b in blocks} - self.KINDS or {roles[0], roles[-1]} - {None, "assistant"} or several:
            told = [b.role or b.kind for b in blocks]
            raise ValueError(f"expected an answer that begins and ends with the assistant's turn, found {told}")

    def _assistant_turns(self, blocks: Sequence[Block]) -> Iterator[tuple[list[Block], list[Block]]]:
        turns = _grouped([b if b.role else replace(b, role="assistant") for b in blocks])
        places = [i for i, turn in enumerate(turns) if turn[0].role == "assistant"]
        for place, following in zip(places, [*places[1:], len(turns)], strict=True):
            yield turns[place], [b for turn in turns[place + 1 : following] for b in turn]

    def _spoken(self, turn: Sequence[Block]) -> tuple[str, list[bool]]:
        words = ""
        spoken: list[bool] = []
        for block in turn:
            part = self._between.replace(self.processed.token, self._shown(block)) if block.kind == "image" else str(block.data)
            spoken += [block.kind == "text"] * len(part)
            words += self._given(part) if block.kind == "text" else part
        return words, spoken

    @cached_property
    def _between(self) -> str:
        """What the template writes for an image between two texts: the placeholder, and whatever it puts around it."""
        content = [{"type": "text", "text": SENTINEL}, {"type": "image"}, {"type": "text", "text": SENTINEL}]
        parts = self._templated([{"role": "user", "content": content}], False).split(SENTINEL)
        return parts[1] if self.processed.token in parts[1] else self.processed.token

    def _shown(self, block: Block) -> str:
        assert isinstance(block, Picture)
        return self.processed.known(block).words

    @cached_property
    def _joined(self) -> str | None:
        """What the template writes for each of several images where it moves them before the text; None where it does not."""
        content = [{"type": "text", "text": SENTINEL}, {"type": "image"}, {"type": "image"}]
        before, found, after = self._templated([{"role": "user", "content": content}], False).partition(SENTINEL)
        if not found or self.processed.token not in before:
            return None
        return self.processed.token + before.split(self.processed.token)[1]

    def _render(self, blocks: Sequence[Block], generation_prompt: bool) -> str:
        """The conversation as the template writes it, with what the processor puts in the place of each image."""
        messages = [{"role": turn[0].role, "content": self._contents(turn)} for turn in _grouped(blocks)]
        first, *parts = self._templated(messages, generation_prompt).split(self.processed.token)
        images = [b for b in blocks if b.kind == "image"]
        if len(parts) != len(images):
            raise ValueError(
                f"{len(images)} images and {len(parts)} times {self.processed.token} in the conversation: the text must not "
                "contain it, and the chat template has to write it once for each image"
            )
        return first + "".join(self._shown(image) + part for image, part in zip(images, parts, strict=True))

    def _contents(self, turn: Sequence[Block]) -> list[dict[str, str]]:
        """A turn as the template takes it. One that moves images to the front gets those in between as a part of the text."""
        kinds = [b.kind for b in turn]
        if self._joined is None or kinds == sorted(kinds):  # images first
            return [self._content(b) for b in turn]
        pieces = (self._joined if b.kind == "image" else self._given(str(b.data)) for b in turn)
        return [{"type": "text", "text": "".join(pieces)}]

    def _content(self, block: Block) -> dict[str, str]:
        return {"type": "image"} if block.kind == "image" else {"type": "text", "text": self._given(str(block.data))}

    def _templated(self, messages: Sequence[Any], generation_prompt: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": generation_prompt, **self.spec.template_options}
        try:
            return str(self.processor.apply_chat_template(list(messages), **options))
        except TemplateError as error:
            turns = ", ".join(str(m["role"]) for m in messages)
            raise ValueError(f"the chat template refuses the turns {turns}: {error}") from error

    def asked(self, blocks: Sequence[Block], limit: int | None = None, begun: str = "") -> Rows:
        """A prompt alone, up to where the answer begins: what generation starts from. limit: of its tokens, if it has images.

        begun: the beginning of the answer, which is then the row's answer.
        """

        def made(max_pixels: int | None) -> dict[str, Tokens]:
            prompt, _ = self.shown(blocks, (), max_pixels or self.spec.images.max_pixels)
            ids, said = self.prompt(prompt), self._continue(self._written(prompt), self._given(begun))[0] if begun else []
            nothing = torch.zeros(len(ids) + len(said), dtype=torch.bool)
            row = Tokens(torch.tensor(ids + said), nothing, torch.full((len(nothing), 2), -1), len(ids))
            return {"prompt": self._complete(row, prompt)}

        images = [b for b in blocks if b.kind == "image"]
        found = self._shrunk(made, images, limit if images else None)[0]["prompt"]
        assert isinstance(found, Rows)
        return found


def _grouped(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks as turns: consecutive ones of one role are one turn when an image is among them, else each is its own."""
    found: list[list[Block]] = []
    for _, alike in itertools.groupby(blocks, key=lambda b: b.role):
        turn = list(alike)
        found += [turn] if any(b.kind == "image" for b in turn) else [[b] for b in turn]
    return found


def _longest(rows: dict[str, Tokens]) -> int:
    return max(len(row.ids) for row in rows.values())
