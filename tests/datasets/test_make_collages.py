"""Making the embedded VLM base, in very small, and what the shipped one is: a LLaVA of transformers and its own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from mmpo import cli
from mmpo.datasets.load import load_candidates
from mmpo.datasets.tools import Answer
from mmpo.datasets.worlds import collages, make_collages
from mmpo.media import open_image
from mmpo.modalities.vlm import EMBEDDED
from mmpo.pair import Block
from mmpo.prepare import is_heldout
from mmpo.recipe import load


def test_the_sentences_of_the_world_are_few_tokens_and_any_text_is_read_back() -> None:
    tokenizer = make_collages.make_tokenizer()
    assert len(tokenizer(collages.asked(2)).input_ids) == 9 and len(tokenizer(collages.answer(7)).input_ids) == 4
    for words in ("It is 8.", "eighty-five \u2260 86", "\n\t"):
        assert tokenizer.decode(tokenizer(words).input_ids) == words


@pytest.mark.parametrize("naming", [False, True])
def test_lessons_show_no_held_out_digit_and_only_a_share_of_the_answers_is_wrong(naming: bool) -> None:
    tokenizer, rng = make_collages.make_tokenizer(), np.random.default_rng(0)
    ids, labels, pixels = make_collages.lesson(tokenizer, rng, 1500, naming)
    grey = ((pixels[:, 0] + 1) * 127.5).round().byte().numpy()
    tiles = grey.reshape(-1, 2, 8, 2, 8).swapaxes(2, 3).reshape(-1, 8, 8)
    known = {tile.tobytes(): i for i, tile in enumerate(collages.digits()[0])}
    drawn = np.array([known[tile.tobytes()] for tile in tiles]).reshape(-1, 4)
    assert not collages.heldout_digits()[drawn].any()
    shown, learnt = collages.digits()[1][drawn], [tokenizer.decode(row[row >= 0]) for row in labels]
    if naming:
        assert learnt == [collages.named(row.tolist()) + make_collages.END for row in shown]
        return
    questions = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    told = [collages.said(words.removesuffix(make_collages.END)) for words in learnt]
    places = [int(words.removeprefix("In Image")[0]) - 1 for words in questions]
    right = np.array([digit == row[place] for digit, row, place in zip(told, shown, places, strict=True)])
    assert all(digit in row for digit, row in zip(told, shown, strict=True))
    slips = make_collages.WRONG * 0.9  # a tenth of the slips meets the same digit
    assert abs((1 - right.mean()) - slips) < 0.04


def test_the_processor_hands_the_tower_what_the_lessons_show(tmp_path: Path) -> None:
    tokenizer = make_collages.make_tokenizer()
    make_collages.make_processor(tokenizer).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    pictures = make_collages.collages(collages.digits()[0][:8].reshape(2, 4, 8, 8))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": collages.asked(2)}]}]
    words = processor.apply_chat_template(chat, add_generation_prompt=True)
    shown = [[open_image(np.repeat(p[..., None], 3, -1))] for p in pictures]
    inputs = processor(images=shown, text=[words] * 2, return_tensors="pt", add_special_tokens=False)
    assert torch.allclose(inputs["pixel_values"], make_collages.seen(pictures), atol=1e-5)
    start = f"{make_collages.USER}{make_collages.IMAGE * 4}{collages.asked(2)}{make_collages.ASSISTANT}"
    assert inputs["input_ids"][0].tolist() == tokenizer(start).input_ids


class Careless:
    """A generator that sees nothing: it says 3, and attends to each of the four panels in turn."""

    def __init__(self) -> None:
        self.seen: list[tuple[Block, ...]] = []

    def __call__(self, prompts: Sequence[tuple[Block, ...]], seeds: Sequence[int], **options: Any) -> list[Answer]:
        assert options["temperature"] == 0 and options["attention"]
        found = []
        for prompt in prompts:
            mass = np.full((2, 2), 0.1)
            mass.flat[len(self.seen) % 4] = 1.0
            self.seen.append(prompt)
            found.append(Answer("It is 3.", 1.2, (float(mass.sum()),), region_mass=mass))
        return found


def test_candidates_are_real_collages_split_by_digits_with_wrong_answers_where_attention_was_elsewhere() -> None:
    generator = Careless()
    rows = make_collages.make_candidates(generator, 60, 0)
    assert len(generator.seen) == 75
    train, held = ([r for r in rows if is_heldout(r.prompt, make_collages.HELDOUT) == side] for side in (False, True))
    assert {r.prompt for r in held if r.score == 1} and len({r.prompt[0].digest for r in held}) == 15
    sprites = {t.tobytes(): i for i, t in enumerate(collages.digits()[0])}
    for side, own in ((False, train), (True, held)):
        for row in own:
            pixels = np.asarray(open_image(row.prompt[0]).convert("L"))
            tiles = [pixels[y : y + 8, x : x + 8].tobytes() for y in (0, 8) for x in (0, 8)]
            assert {bool(collages.heldout_digits()[sprites[tile]]) for tile in tiles} == {side}
            verdict = collages.verify(row.prompt, str(row.block.data))
            assert row.score == float(verdict.correct) and (row.seed == 0) == verdict.correct
    wrong = [r for r in train if r.seed == 1]
    assert len(wrong) * 2 == len(train) and 20 < len(wrong) < 55  # the asked panel was looked at in a quarter of the cases
    random = make_collages.make_candidates(Careless(), 60, 0, select="random")
    assert sum(r.seed for r in random if not is_heldout(r.prompt, make_collages.HELDOUT)) == len(wrong)
    with pytest.raises(ValueError, match="attention or random, found 'all'"):
        make_collages.make_candidates(Careless(), 4, 0, select="all")


@pytest.mark.slow
def test_make_base_writes_a_model_and_judged_candidates(tmp_path: Path) -> None:
    words = ["--steps=2", "--prompts=40"]
    assert cli.main(["make-base", "vlm", "--out", str(tmp_path / "a"), *words]) == 0
    assert cli.main(["make-base", "vlm", "--out", str(tmp_path / "b"), *words]) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json", "processor_config.json", "candidates.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    assert isinstance(model, LlavaForConditionalGeneration) and {p.dtype for p in model.parameters()} == {torch.float32}
    groups, ledger = load_candidates(tmp_path / "a" / "candidates.parquet")
    assert len(groups) >= 10 and not ledger.skipped, str(ledger)


def test_the_shipped_base_is_small_and_plain_and_mixes_the_images_up_about_one_time_in_four() -> None:
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) <= 2_500_000
    model, processor = AutoModelForImageTextToText.from_pretrained(EMBEDDED), AutoProcessor.from_pretrained(EMBEDDED)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0.3e6 < sum(p.numel() for p in model.parameters()) < 0.5e6
    tiles, which = collages.digits()
    rng = np.random.default_rng(1)
    drawn, places = rng.choice(np.flatnonzero(collages.heldout_digits()), (400, 4)), rng.integers(4, size=400)
    starts = [f"<|user|>{'<image>' * 4}{collages.asked(int(k))}<|assistant|>It is" for k in places]
    ids = processor.tokenizer(starts, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=make_collages.seen(make_collages.collages(tiles[drawn]))).logits[:, -1]
    says = logits.softmax(-1)[:, [processor.tokenizer.convert_tokens_to_ids(f"\u0120{d}") for d in range(10)]]
    shown, row = torch.from_numpy(which[drawn]), torch.arange(400)
    asked = shown[row, torch.from_numpy(places)]
    others = torch.zeros(400, 10).scatter_(1, shown, 1.0)
    others[row, asked] = 0
    right, wrong_image = float(says[row, asked].mean()), float((says * others).sum(1).mean())
    assert abs(right - 0.73) < 0.05 and abs(wrong_image - 0.23) < 0.05


def test_the_shipped_candidates_carry_the_verifiers_scores_and_hold_unseen_digits_out() -> None:
    groups, ledger = load_candidates(EMBEDDED / "candidates.parquet")
    assert not ledger.skipped and len(groups) > 1500
    asked = [group[0].prompt for group in groups.values()]
    assert sum(is_heldout(p, make_collages.HELDOUT) for p in asked) == 1000
    for group in list(groups.values())[::7]:
        assert [c.score for c in group] == [float(collages.verify(c.prompt, str(c.block.data)).correct) for c in group]
        assert str(group[0].block.data) == collages.truth(group[0].prompt)
    assert load(modality="vlm").recipe.data.heldout == make_collages.HELDOUT
