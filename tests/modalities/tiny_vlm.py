"""The vision-language adapter on the tiny checkpoints of tests/vlm_families.py, and plain transformers beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from mmpo import media
from mmpo.cache import Cache
from mmpo.modalities.vlm import Adapter, Batch
from mmpo.modalities.vlm_config import ModelConfig
from mmpo.modality import DrawKey
from mmpo.pair import Block, Pair, image, text
from mmpo.reference import trainable
from mmpo.schema import DrawConfig
from tests.vlm_families import photo

SIZES = ((28, 28), (28, 40), (56, 28))


def adapter(folder: Path, cache: Cache | None = None, **model: Any) -> Adapter:
    """The adapter on a checkpoint, with a LoRA of rank 2 unless `model` says otherwise."""
    torch.manual_seed(0)  # of the LoRA's A
    config = ModelConfig(path=str(folder), **({"lora": {"rank": 2}, "sample": {"max_new_tokens": 6}} | model))
    return Adapter(config, DrawConfig(), cache or Cache(None), torch.device("cpu"))


def changed(folder: Path, target: Path, **text_config: Any) -> Path:
    """A copy of a checkpoint with other settings of its language model."""
    shutil.copytree(folder, target)
    told = json.loads((target / "config.json").read_text())
    told["text_config"] |= text_config
    (target / "config.json").write_text(json.dumps(told))
    return target


def shot(seed: int) -> Block:
    return image(photo(seed, SIZES[seed % len(SIZES)]))


def asked(*images: Block) -> tuple[Block, ...]:
    return (*images, text("In Image1, who jumps?"))


def pair(count: int, name: str = "p", first: int = 0) -> Pair:
    """A question about so many different images, and two answers of different lengths."""
    return Pair(name, asked(*map(shot, range(first, first + count))), (text("the red dog"),), (text("a fox, a fox"),))


def drawn(ours: Adapter, pairs: Sequence[Pair]) -> Batch:
    return ours.draw(ours.encode(pairs), [DrawKey(0, p.id, 0) for p in pairs], ours.model)


def moved(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def conversation(pair: Pair, answer: Sequence[Block] = ()) -> list[dict[str, Any]]:
    """The chat of a pair in transformers' own words, with its images in it."""
    turns = [{"role": "user", "content": [_content(b) for b in pair.prompt]}]
    return turns + ([{"role": "assistant", "content": [_content(b) for b in answer]}] if answer else [])


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.data}
    return {"type": "image", "image": Image.fromarray(media.pixels(block))}


def plain(model: Any, folder: Path, pair: Pair, side: str) -> list[Tensor]:
    """Log-probabilities of both answers' tokens and the one that ends the turn, by one plain call on padded chats."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    answers = [pair.chosen, pair.rejected]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asks = processor.apply_chat_template(conversation(pair), add_generation_prompt=True, **options)
    full = processor.apply_chat_template(
        [conversation(pair, answer) for answer in answers], **options, processor_kwargs={"padding": True, "padding_side": side}
    )
    with torch.no_grad():
        logits = model(**full).logits.double().log_softmax(-1)
    found = []
    for ids, log_p, mask in zip(full["input_ids"], logits, full["attention_mask"].bool(), strict=True):
        own, log_p = ids[mask], log_p[mask]
        start = asks["input_ids"].shape[1]
        assert own[:start].tolist() == asks["input_ids"][0].tolist()
        stop = start + own[start:].tolist().index(processor.tokenizer.eos_token_id) + 1
        found.append(log_p[start - 1 : stop - 1].gather(-1, own[start:stop, None])[:, 0])
    return found
