"""Making the embedded base, in very small: a plain diffusers pipeline and candidates that the importer reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmpo import cli
from mmpo.datasets.load import load_candidates
from mmpo.datasets.worlds import make_shapes, shapes
from mmpo.media import open_image

WORDS = sorted({w for c in shapes.captions() for w in c.split()})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> make_shapes.CLIPTokenizer:
    return make_shapes.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("word", WORDS)
def test_every_word_is_one_token(tokenizer: make_shapes.CLIPTokenizer, word: str) -> None:
    assert len(tokenizer.tokenize(word)) == 1


def test_every_caption_fits_and_is_read_back(tokenizer: make_shapes.CLIPTokenizer) -> None:
    for caption in shapes.captions():
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= make_shapes.PROMPT_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption


def test_any_other_text_falls_back_to_bytes(tokenizer: make_shapes.CLIPTokenizer) -> None:
    assert tokenizer.tokenize("zx ü") == ["z", "x</w>", "Ã", "¼</w>"]
    assert tokenizer.unk_token_id not in tokenizer("zx ü", add_special_tokens=False).input_ids


@pytest.mark.slow
def test_the_share_of_wrong_captions_is_what_was_asked_for() -> None:
    right, wrong = (make_shapes.pictures(200, np.random.default_rng(0), share) for share in (0.0, 1.0))
    assert right[0].shape == (200, 3, shapes.SIZE, shapes.SIZE)
    assert right[0].min() >= -1 and right[0].max() <= 1
    judged = [shapes.verify((p.permute(1, 2, 0) / 2 + 0.5).numpy(), c).correct for p, c in zip(*right, strict=True)]
    assert np.mean(judged) >= 0.99
    judged = [shapes.verify((p.permute(1, 2, 0) / 2 + 0.5).numpy(), c).correct for p, c in zip(*wrong, strict=True)]
    assert not any(judged)


@pytest.mark.slow
def test_specks_are_seen_by_the_verifier_and_come_in_the_share_asked_for() -> None:
    clean, dirty = (make_shapes.pictures(200, np.random.default_rng(0), speckled=share) for share in (0.0, 1.0))
    judged = [
        [shapes.verify((p.permute(1, 2, 0) / 2 + 0.5).numpy(), c).parts["clean"] for p, c in zip(*drawn, strict=True)]
        for drawn in (clean, dirty)
    ]
    assert np.mean(judged[1]) < np.mean(judged[0]) - 0.2


SMALL = {"vae_steps": 2, "steps": 3, "scraped_steps": 2, "pictures": 100, "prompts": 3, "candidates": 2}


@pytest.mark.slow
def test_make_base_writes_a_pipeline_and_candidates(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert cli.main(["make-base", "diffusion", "--out", str(tmp_path), *options]) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipe("a red circle", num_inference_steps=2, generator=generator, output_type="np").images[0]
    assert picture.shape == (shapes.SIZE, shapes.SIZE, 3) and np.isfinite(picture).all()
    groups, ledger = load_candidates(str(tmp_path / "candidates.parquet"))
    rows = [c for group in groups.values() for c in group]
    assert len(groups) == 3 and len(rows) == 6, str(ledger)
    assert all(str(c.prompt[0].data) in shapes.captions() and c.score is None for c in rows)
    assert len({c.seed for c in rows}) == 6
    assert all(open_image(c.block).size == (shapes.SIZE, shapes.SIZE) for c in rows)


def test_the_shipped_base_is_loaded_by_plain_diffusers_in_single_precision() -> None:
    from diffusers import StableDiffusionPipeline

    from mmpo.modalities.diffusion import EMBEDDED

    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, safety_checker=None)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    assert len(pipe.tokenizer.tokenize("a red triangle left of a purple square")) == 8
