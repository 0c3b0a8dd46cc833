"""The mass that tokens put on images equals the sums of transformers' own eager attention weights, in every family."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as T

from mmpo.kernels.attention_mass import attention_mass, attention_rows, middle_layer
from mmpo.kernels.key_mask import hidden_keys
from tests.vlm_families import CASES, ask, go_on, photo

QUESTION = ([photo(0), photo(1)], "Who jumps over the lazy dog? What is the capital of France?")  # longer than Gemma3's window


@pytest.mark.parametrize("family", CASES)
def test_mass_equals_eager_attention_and_that_of_decoding(family: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(family)
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    eager = T.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    inputs = ask(T.AutoProcessor.from_pretrained(folder), [QUESTION])
    spans = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].chunk(2)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        said = eager.generate(
            **_known(eager, inputs), max_new_tokens=5, min_new_tokens=5, do_sample=False, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        longer = go_on(inputs, said.sequences[:, length:])
        whole = eager(**longer, output_attentions=True).attentions
    before = model(**longer).logits
    for layer in range(2):
        queries = torch.arange(0, length + 4)
        weights = whole[layer][0].mean(0)[queries]  # (R, L)
        expected = torch.stack([weights[:, span].sum(-1) for span in spans], 1)
        assert (attention_mass(model, longer, layer, queries, spans) - expected).abs().max() <= 1e-6
        assert (attention_rows(model, longer, layer, queries) - weights).abs().max() <= 1e-6
    decoded = torch.stack([step[1][0, :, 0, spans[1]].sum(-1).mean() for step in said.attentions[1:]])
    mass = attention_mass(model, longer, 1, torch.arange(length, length + 4), spans)
    assert (mass[:, 1] - decoded).abs().max() <= 1e-6
    assert (mass > 0).all()
    assert torch.equal(model(**longer).logits, before)  # the model is as it was


def test_mass_under_hidden_keys_is_zero_where_they_are_hidden(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("qwen2_5_vl")
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    inputs = ask(T.AutoProcessor.from_pretrained(folder), [QUESTION])
    spans = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].chunk(2)
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    keep[0, spans[0]] = False
    last = torch.tensor([inputs["input_ids"].shape[1] - 1])
    with hidden_keys(model, keep):
        mass = attention_mass(model, inputs, 1, last, spans)
    assert mass[0, 0] == 0
    assert mass[0, 1] > 0


def test_middle_layer_sees_the_whole_row(family_folder: Callable[[str], Path]) -> None:
    model = T.AutoModelForImageTextToText.from_pretrained(family_folder("gemma3"))
    text = model.config.text_config
    assert middle_layer(model) == 1
    text.num_hidden_layers, text.layer_types = 32, None
    assert middle_layer(model) == 16  # LLaVA-1.5-7B in MIA-DPO
    window = ["sliding_attention"]
    text.num_hidden_layers, text.layer_types = 34, (window * 5 + ["full_attention"]) * 5 + window * 4
    assert middle_layer(model) == 17  # Gemma3-4b: layers 5, 11, 17, 23, 29 are global


def test_errors_say_what_is_wrong(family_folder: Callable[[str], Path]) -> None:
    model = T.AutoModelForImageTextToText.from_pretrained(family_folder("llava"))
    row = torch.arange(3)[None]
    with pytest.raises(ValueError, match="one row at a time, received 2"):
        attention_mass(model, {"input_ids": row.repeat(2, 1)}, 0, row[0], [])
    with pytest.raises(ValueError, match="layer 2: the model has layers 0 to 1"):
        attention_mass(model, {"input_ids": row}, 2, row[0], [])
    assert attention_mass(model, {"input_ids": row}, 1, row[0], []).shape == (3, 0)


def _known(model: T.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """generate() refuses what the model's forward does not name."""
    return {name: value for name, value in inputs.items() if name in inspect.signature(model.forward).parameters}
