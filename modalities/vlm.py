"""Vision-language models: any of transformers that reads images and writes text, with exact likelihoods of the answer.

Everything is as in the text modality, and every distinct image of a call is encoded once: its features serve both branches,
every other branch that shows it, policy and reference, and are kept on disk. No model code is edited; features enter by
`mm_encoder_outputs`, and rows are packed as those of text (`mmpo.kernels.prefix`), with positions by row and column where
the model has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from mmpo.cache import Cache, key
from mmpo.evaluate import Samples
from mmpo.kernels.prefix import causal, evaluating, forward_hidden, forward_padded, padded_mask
from mmpo.modalities import text, text_model, text_rows, text_sample, vlm_model, vlm_sheet
from mmpo.modalities.text import Encoded
from mmpo.modalities.text_rows import Group
from mmpo.modalities.text_tokens import Tokens
from mmpo.modalities.vlm_blind import blinded
from mmpo.modalities.vlm_config import ModelConfig
from mmpo.modalities.vlm_images import TOWER_BATCH, Features, Picture, Processed, Tower, encode, encoder_outputs
from mmpo.modalities.vlm_turns import Rows, Turns
from mmpo.modality import DrawKey, Watch
from mmpo.pair import Block, Pair, image
from mmpo.pair import text as words
from mmpo.prepare import ASSETS
from mmpo.schema import DrawConfig

SAMPLE_TOKENS = 1 << 15  # of the prompts of a batch of generation
EMBEDDED = ASSETS / "collages"


@dataclass(frozen=True)
class Batch(text.Batch):
    """A packed row with images. pictures: each distinct one. order: which of them stands where, in the order of the row.

    features: of each distinct one, on the device; None where the projector trains. tower: names what made them. blocks:
    stretches of image tokens that see each other in both directions.
    """

    pictures: tuple[Picture, ...]
    order: tuple[int, ...]
    features: tuple[Features, ...] | None
    tower: str
    blocks: tuple[range, ...]


class Adapter(text.Adapter):
    """The vision-language modality (see `mmpo.modality.Modality`)."""

    NAME = "vlm"
    AUTO = "AutoModelForImageTextToText"
    READER = "AutoProcessor"
    KEPT = 1 << 12
    embedded_data = EMBEDDED / "candidates.parquet"
    embedded_judge = "collages"
    embedded_model = EMBEDDED
    config: ModelConfig
    turns: Turns

    def __init__(self, config: ModelConfig, draw: DrawConfig, cache: Cache, device: torch.device, prompt_dropout: float = 0.0):
        self._cache = cache
        self._direct = 0
        self._towers: WeakKeyDictionary[nn.Module, Tower] = WeakKeyDictionary()
        super().__init__(config, draw, cache, device, prompt_dropout)

    def _reader(self, model: Any, cache: Cache) -> Turns:
        config = self.config
        options = {"allow_download": config.allow_download, "pad_to_square": config.images.pad_to_square}
        processor = vlm_model.load_processor(self._path, config.chat_template, **options)
        self.processed = Processed(processor, vlm_model.image_token(model), cache)
        return Turns(processor, self.processed, config, self._context, vlm_model.rope_index(model))

    def _trainable(self, model: Any) -> nn.Module:
        found = vlm_model.trainable(model, self.config)
        vlm_model.freeze_check(found, self._trains_projector)
        return found

    @property
    def _trains_projector(self) -> bool:
        return self.config.train == "language+projector"

    def _why_not(self, longest: int) -> str | None:
        return super()._why_not(longest) or self._why_not_images

    def draw(self, encoded: Sequence[Encoded], keys: Sequence[DrawKey], model: nn.Module) -> Batch:
        groups = self._groups(encoded, keys)
        layout = self._possible(max(len(row.ids) for group in groups for row in group.values()))
        if vlm_model.bidirectional(self.model) and any(p for row, a, b in _parts(groups, True) if a for p in row.within(a, b)):
            self._say("layout: padded for pairs with images in an answer, because this model's image tokens see both ways")
            layout = "padded"
        return self._packed(encoded, groups, layout)

    @cached_property
    def _why_not_images(self) -> str | None:
        """Whether rows with images can be packed: two of them, packed and padded, have to give the same states."""
        branches = [{n: b for n in ("chosen", "rejected") if (b := pair.branch(n))} for pair in self.dummy()]
        rows = [{n: self.turns.row(b.prompt, b.response) for n, b in found.items()} for found in branches]
        encoded = [Encoded(found, {}, {}) for found in rows]
        groups = self._groups(encoded, [DrawKey(0, "trial", 0)] * len(encoded))
        with evaluating(self.model), torch.no_grad():
            try:
                packed, padded = (
                    self._hidden(self.model, self._packed(encoded, groups, layout)).float() for layout in ("shared", "padded")
                )
            except (ValueError, TypeError, RuntimeError, AttributeError) as error:
                return f"a trial row with images failed: {error}"
        away = float((packed - padded).norm() / padded.norm())
        return None if away < 0.05 else f"a packed row with images gives other states than rows of their own, {away:.0%} away"

    # ---- images

    @property
    def encodes(self) -> int:
        """Images that towers have run on so far."""
        return self._direct + sum(tower.encodes for tower in self._towers.values())

    def _tower(self, model: nn.Module) -> Tower:
        inner = causal(model)
        if inner not in self._towers:
            self._towers[inner] = Tower(inner, self.processed, self._cache, self.config.images.store)
        return self._towers[inner]

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """The tokens of each pair; features of images that are new are computed, and kept on disk if the recipe says so."""
        found = super().encode(pairs)
        if self.config.images.store and not self._trains_projector:
            rows = [row for e in found for row in e.rows.values()]
            pictures = {p.name: p for row in rows if isinstance(row, Rows) for p in row.images}
            self._tower(self.model).store(self.model, list(pictures.values()))
        return found

    def admit(self, pairs: Sequence[Pair]) -> tuple[list[Pair], Counter[str]]:
        """As for text; images are encoded as their pixels are met, so that these are processed once."""
        found: list[Pair] = []
        counts: Counter[str] = Counter()
        for start in range(0, len(pairs), TOWER_BATCH):
            kept, more = super().admit(pairs[start : start + TOWER_BATCH])
            self.encode(kept)
            found, counts = found + kept, counts + more
        return found, counts

    def _refuses(self, pair: Pair) -> bool:
        blocks = [b for name in self.branches if (x := pair.branch(name)) for b in (*x.prompt, *x.response)]
        if any(b.kind == "image" for b in blocks):
            return self.config.images.too_long == "error"
        return super()._refuses(pair)

    def plan(self, pairs: Sequence[Pair], batch_size: int, reference: bool, shards: int = 1) -> str:
        """As for text, and what the images of these pairs take on disk."""
        told = super().plan(pairs, batch_size, reference, shards)
        rows = [row for pair in pairs[: text.PLANNED] for row in self._of(pair).rows.values()]
        pictures = {p.name: p for row in rows if isinstance(row, Rows) for p in row.images}
        if not pictures or not self.config.images.store or self._trains_projector:
            return told
        tokens = sum(self.processed.known(p).tokens for p in pictures.values())
        size = tokens * causal(self.model).config.get_text_config().hidden_size * self._dtype.itemsize
        more = f" of the first {text.PLANNED} pairs" if len(pairs) > text.PLANNED else ""
        return f"{told}\nimages: {len(pictures)} distinct ones{more}, {size / 2**20:.1f} MiB of features kept (images.store)"

    # ---- draw

    def _packed(self, encoded: Sequence[Encoded], groups: Sequence[Group], layout: str) -> Batch:
        base = super()._packed(encoded, groups, layout)
        parts = list(_parts(groups, layout == "shared"))
        shown = [p for row, start, stop in parts for p in row.within(start, stop)]
        pictures = {p.name: p for p in shown}
        places = {name: i for i, name in enumerate(pictures)}
        order, distinct = tuple(places[p.name] for p in shown), tuple(pictures.values())
        features = None if self._trains_projector else self._placed_features(self.model, distinct)
        positions = base.position_ids
        if any(row.positions is not None for row, _, _ in parts):
            positions = torch.cat([_numbered(row, start, stop) for row, start, stop in parts], 1)[:, None].to(self.device)
        fields = vars(base) | {"position_ids": positions}
        digest = "" if self._trains_projector else self._tower(self.model).digest
        blocks = self._blocks(base.input_ids[0]) if vlm_model.bidirectional(self.model) else ()
        return Batch(**fields, pictures=distinct, order=order, features=features, tower=digest, blocks=blocks)

    def _blocks(self, ids: Tensor) -> tuple[range, ...]:
        """Stretches of image tokens in a row, (L,)."""
        places = set((ids == self.processed.soft).nonzero()[:, 0].tolist())
        starts, stops = sorted(places - {i + 1 for i in places}), sorted({i + 1 for i in places} - places)
        return tuple(range(*ends) for ends in zip(starts, stops, strict=True))

    def _placed_features(self, model: nn.Module, pictures: Sequence[Picture]) -> tuple[Features, ...]:
        found = self._tower(model).features(model, pictures) if pictures else []
        return tuple({name: value.to(self.device) for name, value in x.items()} for x in found)

    def _key(self, layout: str, rows: Mapping[str, Tokens]) -> bytes:
        """As for text, and the images and what makes features of them."""
        names = [p.name for row in rows.values() if isinstance(row, Rows) for p in row.images]
        tower = "" if self._trains_projector or not names else self._tower(self.model).digest
        return key(super()._key(layout, rows), self.processed.digest, tower, *names)

    # ---- score

    def _hidden(self, model: nn.Module, batch: text.Batch) -> Tensor:
        assert isinstance(batch, Batch)
        inputs = encoder_outputs(self._features(model, batch), batch.order)
        ids, positions, segments = batch.input_ids, batch.position_ids, batch.segments
        if batch.layout != "padded":
            states = forward_hidden(model, ids, positions, segments, blocks=batch.blocks, **inputs)[batch.states]
            return self._with_projector(model, batch, states)
        mask = padded_mask(segments).to(self.device)
        if positions.ndim == 3:
            spread = positions.new_zeros(len(positions), *mask.shape)
            inputs["position_ids"] = spread.masked_scatter(mask.expand_as(spread), positions)
        if vlm_model.bidirectional(model):
            images = (ids[0] == self.processed.soft).long()
            inputs["token_type_ids"] = images.new_zeros(mask.shape).masked_scatter(mask, images)
        return self._with_projector(model, batch, forward_padded(model, ids, segments, **inputs)[batch.states])

    def _with_projector(self, model: nn.Module, batch: Batch, states: Tensor) -> Tensor:
        """The states, on which a projector that trains and saw no image depends too, with gradient 0: DDP expects one."""
        if not self._trains_projector or batch.pictures:
            return states
        return states + 0 * sum(p.sum() for p in vlm_model.projector_parameters(model))

    def _features(self, model: nn.Module, batch: Batch) -> Sequence[Features]:
        """The batch's own where this model's tower is the one that made them, as the policy's and its references' are."""
        if batch.features is None:
            self._direct += len(batch.pictures)
            return encode(model, self.processed, batch.pictures)
        if not batch.pictures or self._tower(model).digest == batch.tower:
            return batch.features
        return self._placed_features(model, batch.pictures)

    # ---- sample, export

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[Block, ...]],
        seeds: Sequence[int],
        watch: Watch | None = None,
        steps: int | None = None,
    ) -> list[Block]:
        spec = text_sample.limited(self._sampling, steps)
        room = None if self._context is None else self._context - self._sampling.max_new_tokens
        rows = [self._asked_row(prompt, room) for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        blocks: dict[int, Block] = {}
        size = min(text.SAMPLE_BATCH, max(1, SAMPLE_TOKENS // max((len(row.ids) for row in rows), default=1)))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            first, ahead = self._prefill(model, [rows[i] for i in part])
            given = ([rows[i].ids.tolist() for i in part], [seeds[i] for i in part], self._stop, spec)
            found = text_sample.generate(model, *given, first, ahead, self._telling(watch, part, spec))
            blocks |= {i: words(self.turns.decode(tokens)) for i, tokens in zip(part, found, strict=True)}
        return [blocks[i] for i in range(len(rows))]

    def _asked_row(self, prompt: tuple[Block, ...], room: int | None) -> Rows:
        """A prompt with images, made smaller where it leaves no room for an answer; one without as in the text modality."""
        if any(b.kind == "image" for b in prompt):
            return self.turns.asked(prompt, room)
        ids = torch.tensor(self._asked(prompt))
        return Rows(ids, torch.zeros_like(ids, dtype=torch.bool), torch.full((len(ids), 2), -1), len(ids))

    def _prefill(self, model: nn.Module, rows: Sequence[Rows]) -> tuple[dict[str, Any], Tensor | None]:
        """What the first call of generation takes beside ids, padded on the left, and how far positions are ahead then."""
        shown = [p for row in rows for p in row.images]
        found = self._own_features(model, shown)
        inputs = encoder_outputs(found, range(len(found)))
        width = max(len(row.ids) for row in rows)
        if vlm_model.bidirectional(model):
            padded = [nn.functional.pad((row.ids == self.processed.soft).long(), (width - len(row.ids), 0)) for row in rows]
            inputs["token_type_ids"] = torch.stack(padded).to(self.device)
        if all(row.positions is None for row in rows):
            return inputs, None
        numbered = [_numbered(row, 0, len(row.ids)) for row in rows]
        padded = [nn.functional.pad(p, (width - p.shape[1], 0)) for p in numbered]
        inputs["position_ids"] = torch.stack(padded, 1).to(self.device)
        return inputs, torch.tensor([int(p.max()) + 1 - p.shape[1] for p in numbered])

    def _own_features(self, model: nn.Module, shown: Sequence[Picture]) -> Sequence[Features]:
        """Features by a model's own tower and projector, each distinct image once."""
        if not self._trains_projector:
            return self._placed_features(model, shown)
        distinct = {p.name: p for p in shown}
        self._direct += len(distinct)
        found = dict(zip(distinct, encode(model, self.processed, list(distinct.values())), strict=True))
        return [found[p.name] for p in shown]

    def _dummy_logits(self, model: nn.Module) -> Iterator[Tensor]:
        """Logits by plain calls of the model, with its own tower on the pixels."""
        inner = causal(model)
        for encoded in self.encode(self.dummy()):
            for row in encoded.rows.values():
                assert isinstance(row, Rows)
                inputs, _ = self._prefill(model, [row])
                yield inner(input_ids=row.ids[None].to(self.device), **inputs, use_cache=False).logits.float()

    def save(self, model: nn.Module, folder: Path, merge: bool = False) -> None:
        """Write what plain transformers and peft load: an adapter, or the whole model (full, or merged), and the processor."""
        text_model.save(model, self.turns.processor, folder, merge)

    def blinded(self, prompt: tuple[Block, ...]) -> tuple[Block, ...] | None:
        """The prompt with its images hidden, None where it has none: what is still right then was not read off them."""
        return blinded(prompt)

    def write_samples(self, folder: Path, prompts: Sequence[tuple[Block, ...]], base: Samples, aligned: Samples) -> None:
        """As text's, with what the model saw (`mmpo.modalities.vlm_sheet`)."""
        vlm_sheet.write(folder, prompts, base, aligned)

    def dummy(self) -> list[Pair]:
        found = []
        for i, (colour, other) in enumerate((("red", "green"), ("green", "red"))):
            pixels = np.zeros((56, 56, 3), np.uint8)
            pixels[..., i] = np.linspace(0, 255, 56, dtype=np.uint8)
            asked = (image(pixels), words("Which colour?"))
            found.append(Pair(f"dummy{i}", asked, (words(colour),), (words(other),)))
        return found


def _parts(groups: Sequence[Group], share: bool) -> Iterator[tuple[Rows, int, int]]:
    """The parts of a packed row in its order, each as what of which row it is."""
    for group in groups:
        for number, row in enumerate(group.values()):
            assert isinstance(row, Rows)
            if not number or not share:
                yield row, 0, row.prompt_length
            yield row, row.prompt_length, row.prompt_length + len(text_rows.read(row))


def _numbered(row: Rows, start: int, stop: int) -> Tensor:
    """Positions (3, stop - start)."""
    return torch.arange(start, stop).expand(3, -1) if row.positions is None else row.positions[:, start:stop]
