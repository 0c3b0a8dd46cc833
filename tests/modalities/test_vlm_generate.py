"""Answers of vision-language models: those of plain transformers, each a function of its prompt and seed alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as T

from mmpo.datasets.tools import Unanswerable
from mmpo.modalities import vlm_model
from mmpo.modalities.vlm_generate import Answers, _keep, generator
from mmpo.modalities.vlm_turns import Rows
from mmpo.pair import image, text
from tests.vlm_families import CASES, ask, photo

QUESTIONS = [([photo(0), photo(1)], "Who jumps over the lazy dog?"), ([photo(2, (40, 56))], "12+30="), ([photo(3)], "Paris?")]
PROMPTS = [(*map(image, pictures), text(words)) for pictures, words in QUESTIONS]
SEEDS = [5, 6, 7]


def plain(folder: Path, question: Any, begun: str = "") -> tuple[Any, Any, torch.Tensor]:
    """Greedy generation by transformers alone: the model, what generate() returns, and the row it started from."""
    model = T.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    processor = T.AutoProcessor.from_pretrained(folder)
    inputs = ask(processor, [question])
    start = processor.tokenizer("").input_ids  # what the tokenizer puts before every text, which the template may have written
    if start and inputs["input_ids"][0, : len(start)].tolist() != start:
        inputs = {n: torch.cat([torch.tensor([start]), x], 1) if n == "input_ids" else x for n, x in inputs.items()}
    ids = torch.cat([inputs["input_ids"], torch.tensor([processor.tokenizer(begun, add_special_tokens=False).input_ids])], 1)
    is_image = (ids == model.config.image_token_id).long()
    inputs |= {"input_ids": ids.long(), "attention_mask": torch.ones_like(ids), "token_type_ids": is_image}
    inputs |= {"mm_token_type_ids": is_image}
    known = {name: value for name, value in inputs.items() if name in inspect.signature(model.forward).parameters}
    model.generation_config = T.GenerationConfig(max_new_tokens=6, eos_token_id=model.generation_config.eos_token_id)
    said = model.generate(
        **known, output_logits=True, output_attentions=True, return_dict_in_generate=True, pad_token_id=0, do_sample=False
    )
    return processor.tokenizer, said, ids[0]


@pytest.mark.parametrize("family", CASES)
def test_answers_are_those_of_plain_transformers_in_any_batch(family: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(family)
    answers = generator(folder)
    alone = answers(PROMPTS, SEEDS, max_new_tokens=6, attention=True)
    answers.batch_size = 3
    together = answers(PROMPTS, SEEDS, max_new_tokens=6, attention=True)
    for question, one, other in zip(QUESTIONS[:2], alone, together, strict=False):
        tokenizer, said, ids = plain(folder, question)
        written = said.sequences[0, len(ids) :]
        assert one.text == answers.turns.decode(written.tolist())
        sure = torch.cat(said.logits).log_softmax(-1).amax(-1).mean()
        assert one.perplexity == pytest.approx(math.exp(-sure), rel=1e-5)

        places = (ids == answers.turns.processed.soft).nonzero()[:, 0].chunk(len(question[0]))
        looked = torch.stack([step[1][0, :, 0].mean(0)[: len(ids)] for step in said.attentions[1:]]).mean(0)
        assert one.image_mass == pytest.approx([float(looked[span].sum()) for span in places], abs=1e-6)
        assert one.image_tokens == tuple(map(len, places))

        assert other.text == one.text
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)
        assert other.image_mass == pytest.approx(one.image_mass, abs=1e-6)
    assert alone[0].region_mass is None
    region, mass = alone[1].region_mass, alone[1].image_mass
    assert region is not None and mass is not None
    assert 0 < region.sum() <= mass[0] + 1e-9


def test_seeds_hidden_images_and_beginnings(family_folder: Callable[[str], Path]) -> None:
    answers = generator(family_folder("qwen2_5_vl"))
    drawn = answers(PROMPTS, SEEDS, max_new_tokens=8, temperature=1.0)
    again = answers(PROMPTS[::-1], SEEDS[::-1], max_new_tokens=8, temperature=1.0)
    assert [a.text for a in drawn] == [a.text for a in again[::-1]]
    assert [a.text for a in answers(PROMPTS, [8, 9, 10], max_new_tokens=8, temperature=1.0)] != [a.text for a in drawn]
    assert [a.image_mass for a in drawn] == [None] * 3

    other = [(image(photo(8)), image(photo(9)), PROMPTS[0][-1]), *PROMPTS[1:]]
    seen, blind, blind_other = (
        answers(p, SEEDS, max_new_tokens=8, hide_images=share, attention=True)[0]
        for p, share in ((PROMPTS, 0.0), (PROMPTS, 1.0), (other, 1.0))
    )
    assert blind == blind_other
    assert blind.image_mass == (0, 0)
    assert seen.perplexity != blind.perplexity
    assert answers(other, SEEDS, max_new_tokens=8)[0].perplexity != seen.perplexity

    tokenizer, said, ids = plain(family_folder("qwen2_5_vl"), QUESTIONS[1], "The dog")
    begun = answers(PROMPTS, SEEDS, max_new_tokens=6, prefixes=["", "The dog", "No"])
    assert begun[1].text == "The dog" + tokenizer.decode(said.sequences[0, len(ids) :], skip_special_tokens=True)
    assert begun[0].text == answers(PROMPTS[:1], [0], max_new_tokens=6)[0].text
    assert begun[2].text.startswith("No") and len(begun[2].text) > 2


def test_text_alone_and_answers_of_one_token(family_folder: Callable[[str], Path]) -> None:
    answers = generator(family_folder("llava"), batch_size=2)
    worded, pictured = answers([(text("12+30="),), PROMPTS[2]], [0, 0], max_new_tokens=4, attention=True)
    assert worded.image_mass is None and pictured.image_mass is not None
    (short,) = answers(PROMPTS[2:], [0], max_new_tokens=1, attention=True)
    assert short.text and short.image_mass is None and short.region_mass is None


def test_an_adapter_that_a_run_has_trained(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder("llava")
    torch.manual_seed(0)
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    spec = peft.LoraConfig(r=2, lora_alpha=2, target_modules=vlm_model.targets(model, None), init_lora_weights=False)
    trained = peft.get_peft_model(model, spec)
    trained.save_pretrained(tmp_path)
    aligned, base = generator(folder, lora={"path": str(tmp_path), "rank": 2}), generator(folder)
    theirs = Answers(trained, base.turns, 1)
    said = aligned(PROMPTS, SEEDS, max_new_tokens=4, attention=True)
    assert said[0] == theirs(PROMPTS, SEEDS, max_new_tokens=4, attention=True)[0]
    assert said[0].perplexity != base(PROMPTS[:1], SEEDS[:1], max_new_tokens=4)[0].perplexity


def test_the_model_stays_as_it_was_and_its_own_settings_out(family_folder: Callable[[str], Path]) -> None:
    answers = generator(family_folder("qwen2_vl"))
    before = answers(PROMPTS[:1], [0], max_new_tokens=6)
    model: Any = answers.model
    model.train()
    own = T.GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=list(range(200)))
    model.generation_config = own
    assert answers(PROMPTS[:1], [0], max_new_tokens=6) == before
    assert model.training and model.generation_config is own and model.model.rope_deltas is None


def test_a_share_of_image_keys_is_hidden() -> None:
    ids, span = torch.arange(30_000), torch.arange(100, 20_100)
    row = Rows(ids, torch.zeros(30_000, dtype=torch.bool), ids[:, None].repeat(1, 2), 30_000, (), (span,))
    row = Rows(row.ids, row.supervised, row.offsets, row.prompt_length, (object(),), (span,))  # type: ignore[arg-type]
    keep = _keep(row, 3, 0.99)
    assert keep[:100].all() and keep[20_100:].all()
    assert keep[span].float().mean().item() == pytest.approx(0.01, abs=0.003)
    assert torch.equal(keep, _keep(row, 3, 0.99)) and not torch.equal(keep, _keep(row, 4, 0.99))
    assert _keep(row, 3, 0.0).all() and not _keep(row, 3, 1.0)[span].any()
    assert np.all(_keep(row, 3, 0.5)[keep].numpy())  # what is seen at 0.99 is seen at 0.5


def test_errors_and_room(family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("llava")
    answers = generator(folder, max_length=60)
    with pytest.raises(ValueError, match="1 prompts, 2 seeds and 1 prefixes"):
        answers(PROMPTS[:1], [0, 1])
    with pytest.raises(ValueError, match="hide_images 1.5"):
        answers(PROMPTS[:1], [0], hide_images=1.5)
    with pytest.raises(ValueError, match="leaves no room for an answer: .* the model reads 60") as problem:
        answers([(*PROMPTS[0], text("and what is the capital of France?"))], [0])
    assert isinstance(problem.value, Unanswerable) and problem.value.reason == "prompt too long for the model"
    (said,) = answers([(*PROMPTS[2][:1], text("12+30=12+30="))], [0], max_new_tokens=50)
    used = len(answers.turns.asked((*PROMPTS[2][:1], text("12+30=12+30="))).ids)
    assert 0 < len(answers.turns.tokenizer(said.text, add_special_tokens=False).input_ids) <= 3 * (60 - used)
    assert isinstance(answers, Answers)
