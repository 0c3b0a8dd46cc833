"""Answers of a vision-language model, for the builders of pairs: with how sure it was, and what it looked at.

Prompts become tokens as in training (`vlm_turns`) and pixels as the model's own processor makes them; transformers generates.
Every prompt draws from a generator of its own, so an answer is a function of the weights, its prompt and its seed; what else
is in a batch moves nothing but the last bits of the logits, and batches of one, the default on a CPU, not even these.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from mmpo import packaged
from mmpo.cache import Cache
from mmpo.datasets.tools import Answer, Prompt, Unanswerable
from mmpo.kernels.attention_mass import attention_mass, attention_rows, middle_layer
from mmpo.kernels.key_mask import hidden_keys
from mmpo.kernels.prefix import causal, evaluating
from mmpo.modalities import text_model, vlm_model
from mmpo.modalities.text_sample import choose
from mmpo.modalities.text_tokens import Unusable
from mmpo.modalities.vlm import EMBEDDED
from mmpo.modalities.vlm_config import ModelConfig
from mmpo.modalities.vlm_images import WORDS, Processed
from mmpo.modalities.vlm_regions import over_picture
from mmpo.modalities.vlm_turns import Rows, Turns

GPU_BATCH = 16
TOO_LONG = "prompt too long for the model"


def generator(path: str | Path, device: str | torch.device = "cpu", *, batch_size: int | None = None, **model: Any) -> Answers:
    """The model of a transformers directory, hub id or asset, with its processor, as a tool of builders (`datasets/tools.py`).

    batch_size: prompts generated together; None: 1 on a CPU, 16 elsewhere. model: settings of a recipe's `model:` section, such
    as dtype, chat_template, images={"max_pixels": ...}, or lora={"path": ..., "rank": ...} for what a run has trained.
    """
    config, device = ModelConfig(path=str(path), **model), torch.device(device)
    place = str(EMBEDDED) if config.path == "embedded" else packaged.resolve(config.path)
    options: dict[str, Any] = {"quantize": config.quantize, "allow_download": config.allow_download}
    loaded = text_model.load_model(place, text_model.DTYPES[config.dtype], auto="AutoModelForImageTextToText", **options)
    if config.quantize == "none":  # bitsandbytes has put its own there already
        loaded = loaded.to(device)
    adapted = vlm_model.trainable(loaded, config) if config.lora.path else loaded
    options = {"allow_download": config.allow_download, "pad_to_square": config.images.pad_to_square}
    processor = vlm_model.load_processor(place, config.chat_template, **options)
    processed = Processed(processor, vlm_model.image_token(loaded), Cache(None))
    turns = Turns(processor, processed, config, text_model.context_of(loaded), None)
    return Answers(adapted, turns, batch_size or (1 if device.type == "cpu" else GPU_BATCH))


@dataclass(frozen=True)
class Spec:
    """How one call generates."""

    max_new_tokens: int
    temperature: float
    hide_images: float
    attention: bool


class Answers:
    """A `Generator`: a model and what makes its inputs. The model may be one that trains; it is left as it was."""

    def __init__(self, model: nn.Module, turns: Turns, batch_size: int):
        self.model, self.turns, self.batch_size = model, turns, batch_size
        self._layer = middle_layer(model)
        self._takes = set(inspect.signature(type(self._inner).forward).parameters)
        listed = self._inner.generation_config.eos_token_id
        self._stops = turns.stops(listed if isinstance(listed, list) else [] if listed is None else [listed])

    @property
    def _inner(self) -> Any:
        return causal(self.model)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, max_new_tokens: int = 512, temperature: float = 0.0,
        hide_images: float = 0.0, prefixes: Sequence[str] | None = None, attention: bool = False,
        hide_seeds: Sequence[int] | None = None,
    ) -> list[Answer]:  # fmt: skip
        """One answer a prompt (see `mmpo.datasets.tools.Generator`).

        The perplexity counts the token that ends an answer too. The masses are those of the decoding steps after the first, in
        the middle layer, so an answer of one token, or its end alone, has none (MIA-DPO, arXiv 2410.17637).
        Raises Unanswerable for a prompt that does not fit the model's context, or that its template refuses.
        """
        begun = [""] * len(prompts) if prefixes is None else list(prefixes)
        hidden = seeds if hide_seeds is None else hide_seeds
        if not len(prompts) == len(seeds) == len(begun) == len(hidden):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds and {len(begun)} prefixes: expected as many of each")
        if not 0 <= hide_images <= 1 or temperature < 0 or max_new_tokens < 1:
            told = f"hide_images {hide_images}, temperature {temperature}, max_new_tokens {max_new_tokens}"
            raise ValueError(f"expected a share from 0 to 1, a temperature from 0 on, and a token at least, received {told}")
        spec = Spec(max_new_tokens, temperature, hide_images, attention)
        asked = list(zip(prompts, seeds, begun, hidden, strict=True))
        parts = [asked[i : i + self.batch_size] for i in range(0, len(asked), self.batch_size)]
        with evaluating(self.model):
            return [answer for part in parts for answer in self._batch(part, spec)]

    def _batch(self, asked: Sequence[tuple[Prompt, int, str, int]], spec: Spec) -> list[Answer]:
        rows = [self._row(prompt, begun) for prompt, _, begun, _ in asked]
        rooms = [self._room(row, spec.max_new_tokens) for row in rows]
        seeds = [seed for _, seed, _, _ in asked]
        keeps = [_keep(row, hidden, spec.hide_images) for row, (_, _, _, hidden) in zip(rows, asked, strict=True)]
        written, surest = self._generate(rows, keeps, seeds, rooms, spec.temperature)
        found = []
        for i, (_, _, begun, _) in enumerate(asked):
            said = Answer(self._text(rows[i], written[i], begun), math.exp(-float(surest[i].mean())))
            found.append(self._looked(said, rows[i], keeps[i], written[i]) if spec.attention else said)
        return found

    def _row(self, prompt: Prompt, begun: str) -> Rows:
        """The row that is continued; its images are made smaller where it leaves no room, as `images.too_long` says."""
        limit = self.turns.limit
        try:
            return self.turns.asked(prompt, limit=None if limit is None else limit - 1, begun=begun)
        except Unusable as problem:
            if "longer" not in problem.reason:
                raise Unanswerable(problem.reason, str(problem)) from problem
            told = f"a prompt leaves no room for an answer: {problem}; the model reads {limit}"
            raise Unanswerable(TOO_LONG, told) from problem
        except ValueError as problem:
            raise Unanswerable("prompt that the model's template refuses", str(problem)) from problem

    def _room(self, row: Rows, wanted: int) -> int:
        limit = self.turns.limit
        if limit is not None and len(row.ids) >= limit:
            raise Unanswerable(
                TOO_LONG, f"a prompt of {len(row.ids)} tokens leaves no room for an answer: the model reads {limit}"
            )
        return wanted if limit is None else min(wanted, limit - len(row.ids))

    def _generate(
        self, rows: Sequence[Rows], keeps: Sequence[Tensor], seeds: Sequence[int], rooms: Sequence[int], temperature: float
    ) -> tuple[list[list[int]], list[Tensor]]:
        """What follows each row, with the token that ends it, and at each of these the log-probability of the likeliest one."""
        inner = self._inner
        inputs = self._inputs(rows)
        device, width = inputs["input_ids"].device, inputs["input_ids"].shape[1]
        keep = None if all(bool(k.all()) for k in keeps) else _padded(keeps, width, True).to(device)
        uniform = torch.stack([torch.rand(max(rooms), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        choice = _Choice(uniform.to(device), temperature)
        stops = sorted(self._stops)
        ends = {"eos_token_id": stops or None, "pad_token_id": self._pad}
        own = inner.generation_config
        try:  # what a checkpoint's own settings would add, such as penalties, is not in the probabilities it is trained by
            inner.generation_config = transformers.GenerationConfig(max_new_tokens=max(rooms), do_sample=False, **ends)
            with hidden_keys(self.model, keep):
                ids = inner.generate(**inputs, logits_processor=transformers.LogitsProcessorList([choice]))[:, width:]
        finally:
            inner.generation_config = own
            if hasattr(inner.model, "rope_deltas"):
                inner.model.rope_deltas = None  # of this batch; a later forward pass would take them for its own
        written = [_until(found, self._stops)[:room] for found, room in zip(ids.tolist(), rooms, strict=True)]
        surest = torch.stack(choice.surest, 1).cpu()
        return written, [surest[i, : len(found)] for i, found in enumerate(written)]

    @property
    def _pad(self) -> int:
        own = self.turns.tokenizer.pad_token_id
        return int(own if own is not None else min(self._stops, default=0))

    def _inputs(self, rows: Sequence[Rows]) -> dict[str, Any]:
        """What the model's forward takes for these rows, padded on the left."""
        width, device = max(len(row.ids) for row in rows), self._inner.device
        soft = self.turns.processed.soft
        ids = _padded([row.ids for row in rows], width, self._pad)
        mask = _padded([torch.ones_like(row.ids) for row in rows], width, 0)
        kinds = ((ids == soft) & mask.bool()).long()
        made = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, "token_type_ids": kinds}
        pictured = [row for row in rows if row.images]
        if pictured:
            images = [[self.turns.processed.open(picture) for picture in row.images] for row in pictured]
            words = [self.turns.processed.token * len(row.images) for row in pictured]
            found = self.turns.processor(images=images, text=words, padding=True, return_tensors="pt")
            made |= {name: value for name, value in found.items() if name not in WORDS}
        return {name: value.to(device) for name, value in made.items() if name in self._takes}

    def _text(self, row: Rows, written: Sequence[int], begun: str) -> str:
        """The whole answer; its beginning as it was given."""
        whole = self.turns.decode([*row.answer.tolist(), *written])
        return whole if whole.startswith(begun) else begun + self.turns.decode(written)

    def _looked(self, said: Answer, row: Rows, keep: Tensor, written: Sequence[int]) -> Answer:
        """The answer with where its tokens looked: a forward pass over the row gives the rows of the steps that made it."""
        if len(written) < 2 or not row.images:
            return said
        start = len(row.ids)
        longer = replace(row, ids=torch.cat([row.ids, torch.tensor(written[:-1])]))
        queries = torch.arange(start, len(longer.ids))
        given = (self.model, self._inputs([longer]), self._layer, queries)
        tokens = tuple(len(span) for span in row.image_spans)
        with hidden_keys(self.model, None if bool(keep.all()) else keep[None].to(self._inner.device)):
            if len(row.images) > 1:
                mass = attention_mass(*given, row.image_spans).mean(0).tolist()
                return replace(said, image_mass=tuple(mass), image_tokens=tokens)
            weights = attention_rows(*given).mean(0).cpu()[row.image_spans[0]].double().numpy()
        return replace(said, image_mass=(float(weights.sum()),), image_tokens=tokens, region_mass=self._region(row, weights))

    def _region(self, row: Rows, weights: np.ndarray) -> np.ndarray | None:
        processed, picture = self.turns.processed, row.images[0]
        grid = processed.known(picture).grid
        patches = None if grid is None else tuple(grid[0].tolist())
        size = processed.open(picture).size
        return over_picture(weights, self.turns.processor, self._inner.config.model_type, size, patches)  # type: ignore[arg-type]


class _Choice(transformers.LogitsProcessor):
    """Takes each row's token by the row's own random numbers, and notes how likely the likeliest one was."""

    def __init__(self, uniform: Tensor, temperature: float):
        self.uniform, self.temperature = uniform, temperature
        self.surest: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = choose(scores, self.uniform[:, len(self.surest)], self.temperature, 1.0)
        self.surest.append(scores.log_softmax(-1).amax(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def _keep(row: Rows, seed: int, share: float) -> Tensor:
    """Which of a row's keys may be seen, (L,) bool: an image's token is hidden with probability `share`, each on its own."""
    keep = torch.ones_like(row.ids, dtype=torch.bool)
    if share and row.images:
        places = torch.cat(row.image_spans)
        drawn = np.random.Generator(np.random.Philox(seed)).random(len(places))  # another stream than that of the tokens
        keep[places] = torch.from_numpy(drawn >= share)
    return keep


def _padded(rows: Sequence[Tensor], width: int, value: int) -> Tensor:
    return torch.stack([torch.cat([row.new_full((width - len(row),), value), row]) for row in rows])


def _until(ids: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Tokens up to the first that ends an answer, with it."""
    ends = [i for i, token in enumerate(ids) if token in stops]
    return list(ids[: ends[0] + 1] if ends else ids)
