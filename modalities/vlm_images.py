"""What a processor and a vision tower make of images: placeholders, and features, of each distinct image once.

Everything is kept by content: the words that stand for an image in a prompt (and with them how many tokens it takes), its
grid, and the features behind tower and projector. Both branches of a pair, policy and reference read the same features, which
do not depend on anything that trains.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmpo import media
from mmpo.cache import Cache, key
from mmpo.checkpoint import digest_tensors
from mmpo.kernels.prefix import causal
from mmpo.pair import Block

WORDS = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets"}
HELD = 256 << 20  # bytes of processed pixels kept between tokenising and encoding
TOWER_BATCH = 16  # images of one call of the tower
CHUNK = 64  # images whose features are stored together


@dataclass(frozen=True)
class Picture(Block):
    """An image as one row shows it. content: names its pixels, whoever shows it.

    among: it is not the row's only image, and that matters to the processor. max_pixels: it is made smaller than this before
    its processor sees it; None: as it is.
    """

    content: str = ""
    among: bool = False
    max_pixels: int | None = None

    @cached_property
    def name(self) -> bytes:
        return key("picture", self.content, self.among, self.max_pixels)


def picture(block: Block, among: bool, max_pixels: int | None) -> Picture:
    """The block as a row shows it."""
    content = block.content if isinstance(block, Picture) else (replace(block, role=None) if block.role else block).digest
    return Picture(block.kind, block.data, block.path, block.role, content, among, max_pixels)


class Known(NamedTuple):
    """words: what stands for an image in a prompt. tokens: how many of them are the image's own. grid: (1, 3), or None."""

    words: str
    tokens: int
    grid: Tensor | None


class Processed:
    """A processor's view of images. token: what a chat template writes for one; soft: the id of the tokens it becomes."""

    def __init__(self, processor: Any, soft: int, cache: Cache):
        self.processor, self.cache, self.soft = processor, cache, soft
        self.token = str(processor.image_token)
        # whether an image among others is shown otherwise than alone
        self.counts_images = "batch_num_images" in processor.image_processor.model_input_names
        told = {k: v for k, v in processor.to_dict().items() if k not in ("_name_or_path", "chat_template", "tokenizer")}
        self.digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        self._known: dict[bytes, Known] = {}
        self._words: dict[str, str] = {}  # most images have the same ones
        self._held: OrderedDict[bytes, dict[str, Tensor]] = OrderedDict()

    def known(self, shown: Picture) -> Known:
        """What is known of a picture without its pixels."""
        if shown.name not in self._known:
            name = key("image", self.digest, self.soft, shown.name)
            (entry,) = self.cache.get_many([name])
            if entry is None:
                entry = self._measured(shown)
                self.cache.put_many([(name, entry)])
            words = entry["words"].numpy().tobytes().decode()
            grid = entry.get("grid")
            self._known[shown.name] = Known(self._words.setdefault(words, words), int(entry["tokens"]), grid)
        return self._known[shown.name]

    def _measured(self, shown: Picture) -> dict[str, Tensor]:
        words, inputs = self._process(shown)
        self._hold(shown, inputs)
        ids = self.processor.tokenizer(words, add_special_tokens=False).input_ids
        entry = {
            "words": torch.from_numpy(np.frombuffer(words.encode(), np.uint8).copy()),
            "tokens": torch.tensor(ids.count(self.soft)),
        }
        return entry | ({"grid": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {})

    def inputs(self, shown: Picture) -> dict[str, Tensor]:
        """What the tower takes of a picture."""
        if shown.name not in self._held:
            self._hold(shown, self._process(shown)[1])
        return self._held[shown.name]

    def _hold(self, shown: Picture, inputs: dict[str, Tensor]) -> None:
        self._held[shown.name] = inputs
        while len(self._held) > 1 and sum(map(_bytes, self._held.values())) > HELD:
            self._held.popitem(last=False)

    def open(self, shown: Picture) -> Image.Image:
        """The picture as the processor gets it."""
        return _within(media.open_image(shown), shown.max_pixels)

    def _process(self, shown: Picture) -> tuple[str, dict[str, Tensor]]:
        image = self.open(shown)
        words, inputs = self._run([image])
        if shown.among:
            words, several = self._run([image, image])
            inputs = {name: value[:1] for name, value in several.items()}
        return words, inputs

    def _run(self, images: list[Image.Image]) -> tuple[str, dict[str, Tensor]]:
        options = {"add_special_tokens": False, "return_text_replacement_offsets": True, "return_tensors": "pt"}
        found = self.processor(images=[images], text=[self.token * len(images)], **options)
        words = found["text_replacement_offsets"][0][0]["replacement"]
        return words, {name: value for name, value in found.items() if name not in WORDS}


def _bytes(inputs: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in inputs.values())


def _within(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image with at most so many pixels, its aspect kept."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = (max_pixels / (width * height)) ** 0.5
    return image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)


Features = dict[str, Tensor]  # of one image: features (k, D); where the model has them, deepstack (layers, k, D); listed


class Tower:
    """The frozen vision part of one model. digest: of its weights and settings. encodes: images it has run on."""

    def __init__(self, model: nn.Module, processed: Processed, cache: Cache, stores: bool = True):
        self.processed, self.cache, self.stores = processed, cache, stores
        self._met: set[bytes] = set()
        self.encodes = 0
        inner = causal(model)
        seen = {n: t for n, t in inner.state_dict().items() if not _is_language(inner, n)}
        config = json.dumps(inner.config.to_dict().get("vision_config"), sort_keys=True, default=str)
        self.digest = digest_tensors(seen) + hashlib.sha256(config.encode()).hexdigest()

    def features(self, model: nn.Module, shown: Sequence[Picture]) -> list[Features]:
        """Features of pictures, on the CPU; those that the cache does not know are computed, each once."""
        names = [self._name(p) for p in shown]
        wanted = dict(zip(names, shown, strict=True))
        found: dict[bytes, Features | None] = dict.fromkeys(wanted)
        if self.stores:
            found |= zip(wanted, self.cache.get_many(list(wanted)), strict=True)
        missing = [n for n in wanted if found[n] is None]
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            with torch.no_grad():
                values = encode(model, self.processed, [wanted[n] for n in part])
            fresh = {n: {k: v.cpu().contiguous() for k, v in x.items()} for n, x in zip(part, values, strict=True)}
            self.encodes += len(part)
            found |= fresh
            if self.stores:
                self.cache.put_many(list(fresh.items()))
        return [found[n] for n in names]  # type: ignore[misc]

    def store(self, model: nn.Module, shown: Sequence[Picture]) -> None:
        """Compute and store the features of pictures that this process has not met; others are in the cache."""
        fresh = [p for p in shown if p.name not in self._met]
        for start in range(0, len(fresh), CHUNK):
            self.features(model, fresh[start : start + CHUNK])
        self._met |= {p.name for p in fresh}

    def _name(self, shown: Picture) -> bytes:
        return key("features", self.digest, self.processed.digest, shown.name)


def _is_language(inner: Any, name: str) -> bool:
    return name.startswith((f"{decoder_name(inner)}.", "lm_head."))


def decoder_name(inner: Any) -> str:
    """Where the language model is within a vision-language model, e.g. model.language_model."""
    decoder = inner.get_decoder()
    return next(name for name, module in inner.named_modules() if module is decoder)


def encode(model: nn.Module, processed: Processed, shown: Sequence[Picture]) -> list[Features]:
    """Tower and projector on pictures, in batches of those whose tensors can be put end to end; with gradient as may be."""
    found: dict[int, Features] = {}
    for group in _alike([processed.inputs(p) for p in shown]):
        counts = [processed.known(shown[i]).tokens for i, _ in group]
        found |= dict(zip([i for i, _ in group], _run(model, [x for _, x in group], counts), strict=True))
    return [found[i] for i in range(len(shown))]


Group = list[tuple[int, dict[str, Tensor]]]


def _alike(images: Sequence[dict[str, Tensor]]) -> list[Group]:
    """Images by number, in batches of at most TOWER_BATCH whose tensors can be put end to end."""
    groups: dict[Any, list[Group]] = {}
    for number, inputs in enumerate(images):
        company = inputs["batch_num_images"].tolist() if "batch_num_images" in inputs else []
        alike = groups.setdefault((*company, *((k, tuple(v.shape[1:])) for k, v in sorted(inputs.items()))), [[]])
        if len(alike[-1]) == TOWER_BATCH:
            alike.append([])
        alike[-1].append((number, inputs))
    return [group for alike in groups.values() for group in alike]


def _run(model: nn.Module, images: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> list[Features]:
    """One call of tower and projector. counts: tokens of each image."""
    inner: Any = causal(model)
    together = {name: torch.cat([x[name] for x in images]).to(inner.device) for name in images[0]}
    taken = inspect.signature(inner.get_image_features).parameters
    output = inner.get_image_features(**{n: v for n, v in together.items() if n in taken}, return_dict=True)
    pooled = output.pooler_output
    parts: dict[str, list[Tensor]] = {"features": list(_flat(pooled).split(list(counts)))}
    if (deep := getattr(output, "deepstack_features", None)) is not None:
        parts["deepstack"] = list(torch.stack([_flat(layer) for layer in deep]).split(list(counts), dim=1))
    listed = torch.tensor(not isinstance(pooled, Tensor))
    return [dict(zip(parts, values, strict=True)) | {"listed": listed} for values in zip(*parts.values(), strict=True)]


def _flat(found: Any) -> Tensor:
    """(K, D) of a tensor (..., D) or a list of such."""
    return torch.cat([x.flatten(0, -2) for x in ([found] if isinstance(found, Tensor) else found)])


def encoder_outputs(features: Sequence[Features], order: Sequence[int]) -> dict[str, Any]:
    """The argument of a forward call that takes the place of pixels: images' features, in the order of the row."""
    if not order:
        return {}
    together = torch.cat([features[i]["features"] for i in order])
    deep = torch.cat([features[i]["deepstack"] for i in order], 1) if "deepstack" in features[0] else None
    output = SimpleNamespace(
        pooler_output=[together] if bool(features[0]["listed"]) else together,
        deepstack_features=None if deep is None else [[layer] for layer in deep],
    )
    return {"mm_encoder_outputs": {"image": output}}
