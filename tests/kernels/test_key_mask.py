"""Hidden image keys: nothing changes while none is hidden, and nothing of an image reaches other tokens when all are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from mmpo.kernels.key_mask import attending, hidden_keys
from tests.vlm_families import CASES, ask, photo

WORDS = ("Who jumps over the lazy dog? What is the capital of France?", "12+30=")


def batches(processor: Any) -> list[dict[str, Any]]:
    """Two rows, of two images and one, thrice: the second time other pixels everywhere, then only in the very first image."""
    seeds = ((0, 1, 2), (3, 4, 5), (3, 1, 2))
    return [ask(processor, [([photo(a), photo(b)], WORDS[0]), ([photo(c)], WORDS[1])]) for a, b, c in seeds]


def generated(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits (2, 4, V) of four greedy steps."""
    known = {name: value for name, value in inputs.items() if name in inspect.signature(model.forward).parameters}
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**known, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options).logits, 1)


@pytest.mark.parametrize("family", CASES)
def test_hidden_keys_in_forward_and_generation(family: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(family)
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    one, other, first = batches(T.AutoProcessor.from_pretrained(folder))
    is_image = one["input_ids"] == model.config.image_token_id
    shown = ~is_image & one["attention_mask"].bool()

    with torch.no_grad():
        plain, plain_steps = model(**one).logits, generated(model, one)
        with hidden_keys(model, None):
            assert torch.equal(model(**one).logits, plain)
            assert torch.equal(generated(model, one), plain_steps)
        with hidden_keys(model, torch.ones_like(is_image)):
            assert (model(**one).logits - plain)[shown].abs().max() < 1e-5
            assert (generated(model, one) - plain_steps).abs().max() < 1e-5
        with hidden_keys(model, ~is_image):
            blind, blind_steps = model(**one).logits, generated(model, one)
            assert torch.equal(model(**other).logits[shown], blind[shown])
            assert torch.equal(generated(model, other), blind_steps)
        half = ~is_image
        half[0, is_image[0].nonzero()[:, 0].chunk(2)[1]] = True  # the first row's second image is seen
        half[1] = True
        with hidden_keys(model, half):
            assert torch.equal(generated(model, first), generated(model, one))
            assert (generated(model, other) - generated(model, one)).abs().amax((1, 2)).min() > 1e-3
        assert torch.equal(model(**one).logits, plain)  # and afterwards as before
    assert (plain - blind)[shown].abs().max() > 1e-2
    assert (blind_steps[:, 0] - blind[:, -1]).abs().max() < 1e-5


def test_a_row_is_the_same_alone_and_in_a_batch(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("gemma3")  # window of 32, rows of 49 and more: keys have left the cache when the last token is made
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    processor = T.AutoProcessor.from_pretrained(folder)
    questions = [([photo(0), photo(1)], WORDS[0]), ([photo(2)], WORDS[1])]
    rows: list[torch.Tensor] = []
    for batch in (questions, questions[:1], questions[1:]):
        inputs = ask(processor, batch)
        keep = (inputs["input_ids"] != model.config.image_token_id) | (torch.arange(inputs["input_ids"].shape[1]) % 3 == 0)
        if len(batch) == 2:  # the same keys in the shorter row, which starts later
            alone = ask(processor, questions[1:])["input_ids"]
            keep[1, -alone.shape[1] :] = (alone[0] != model.config.image_token_id) | (torch.arange(alone.shape[1]) % 3 == 0)
        with hidden_keys(model, keep):
            rows += generated(model, inputs)
    assert (torch.stack(rows[:2]) - torch.stack(rows[2:])).abs().max() < 1e-5


def test_errors(family_folder: Callable[[str], Path]) -> None:
    model = T.AutoModelForImageTextToText.from_pretrained(family_folder("llava"))
    row = torch.arange(3)[None]
    with pytest.raises(ValueError, match="hidden in 2 rows, the call has 1"), hidden_keys(model, row.repeat(2, 1) > 0):
        model(input_ids=row)
    with pytest.raises(ValueError, match="expected bool of"), hidden_keys(model, row[0] > 0):
        pass
    with pytest.raises(ValueError, match="no packed rows in here"), hidden_keys(model, row > 0):
        model.config.get_text_config()._attn_implementation = "eager"
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    model._supports_attention_backend = False
    with pytest.raises(ValueError, match="takes no other attention implementation"), attending(model, "x"):
        pass
