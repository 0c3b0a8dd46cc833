"""The tiny vision-language checkpoints are what their families are: they load in plain transformers, and images matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as T
from PIL import Image

from tests.vlm_families import CASES, photo

TOKENS = {  # image tokens of one photo of 28 pixels alone, and of two
    "llava": (16, 32), "llava_onevision": (36, 34), "qwen2_vl": (4, 8), "qwen2_5_vl": (4, 8), "qwen3_vl": (4, 8),
    "internvl": (4, 8), "idefics3": (20, 40), "smolvlm": (20, 40), "gemma3": (4, 8),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_checkpoint_is_read_by_plain_transformers_and_sees_its_images(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder(family)
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    processor = T.AutoProcessor.from_pretrained(folder)
    assert model.config.model_type == family
    assert model.dtype == torch.float32
    assert 1e5 < model.num_parameters() < 2.5e5

    pictures = [Image.fromarray(photo(seed)) for seed in (0, 1)]
    last = []
    for images in (pictures[:1], pictures, pictures[::-1]):
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "Who jumps?"}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[images], text=[chat], add_special_tokens=False, return_tensors="pt")
        count = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert count == TOKENS[family][len(images) - 1]
        with torch.no_grad():
            last.append(model(**inputs).logits[0, -1])
    assert (last[1] - last[2]).abs().max() > 0.1  # the same two images in another order
