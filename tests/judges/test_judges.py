"""One contract for every judge of the room, on tiny random models written to disk, and each judge's own formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch import nn

from mmpo import media
from mmpo.datasets.worlds import collages
from mmpo.datasets.worlds import shapes as world
from mmpo.find import find, names
from mmpo.judges.aesthetic import load_head
from mmpo.pair import Block, image, text

TINY = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = [
    "a red circle",
    "a blue square left of a green cross",
    "three yellow triangles",
    "a purple cross above a red square",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random weights of every sort that a judge reads."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    (root / "config").mkdir()
    (root / "config" / "mmpo-tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(root / "config")
    weights = open_clip.create_model("mmpo-tiny").state_dict()
    save_file(weights, root / "clip.safetensors")
    torch.save({"state_dict": weights, "epoch": 3}, root / "hps.pt")
    (root / "directory").mkdir()
    save_file(weights, root / "directory" / "open_clip_model.safetensors")
    (root / "directory" / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    shapes = {"0": (1024, 768), "2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}
    head = {f"layers.{i}.weight": torch.randn(s) / s[1] ** 0.5 for i, s in shapes.items()}
    save_file(head | {f"layers.{i}.bias": torch.randn(s[0]) for i, s in shapes.items()}, root / "head.safetensors")
    write_transformers_clip(root / "pickscore")
    return root


def write_transformers_clip(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder.mkdir()
    alphabet = sorted(ByteLevel.alphabet())
    vocab = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=40).save_pretrained(folder)
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = len(vocab) - 1
    text_side = tiny | {"vocab_size": len(vocab), "max_position_embeddings": 40}
    text_side |= {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(text_config=text_side, vision_config=tiny | {"image_size": 32, "patch_size": 16}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def options(name: str, folder: Path) -> dict[str, Any]:
    """How the contract makes each judge. A new judge needs a line here."""
    tiny = {"architecture": "mmpo-tiny"}
    every: dict[str, dict[str, Any]] = {
        "shapes": {},
        "clip_score": {"path": folder / "clip.safetensors", **tiny},
        "hpsv2": {"path": folder / "hps.pt", **tiny},
        "aesthetic": {"path": folder / "clip.safetensors", "head": folder / "head.safetensors", **tiny},
        "pickscore": {"path": folder / "pickscore"},
        "sums": {},
        "sentiment": {},
        "collages": {},
    }
    return every[name]


OF_TEXT = {"sums", "sentiment", "collages"}  # judges of answers in words
SAID = [("12+34=", "46"), ("50+25=", " 75\n"), ("19+19=", "28, a good guess"), ("99+99=", "")]
Rows = tuple[list[tuple[Block, ...]], list[tuple[Block, ...]]]


def prompts_and_answers() -> tuple[list[tuple[Block, ...]], list[tuple[Block, ...]]]:
    rng = np.random.default_rng(0)
    pixels = [(world.render(c, rng) * 255).astype(np.uint8) for c in CAPTIONS]
    blocks = [image(p) if i % 2 else image(media.encode(p)) for i, p in enumerate(pixels)]
    return [(text(c),) for c in CAPTIONS], [(b,) for b in blocks]


def seen_digits(place: int) -> tuple[Block, ...]:
    """Pictures of a 0, a 1, a 2 and a 3, and a question about one of them."""
    tiles = (np.repeat(collages.digits()[0][i][..., None], 3, -1) for i in (0, 200, 400, 600))
    return (*map(image, tiles), text(collages.asked(place)))


@pytest.fixture(params=names("judges"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def judge(name: str, folder: Path) -> Callable:
    if name == "sentiment":
        pytest.importorskip("vaderSentiment")
    return find("judges", name)(**options(name, folder))


@pytest.fixture
def rows(name: str) -> Rows:
    if name == "collages":
        return [seen_digits(place) for place in range(4)], [(text(f"It is {d}."),) for d in (0, 0, 9, 3)]
    return ([(text(p),) for p, _ in SAID], [(text(a),) for _, a in SAID]) if name in OF_TEXT else prompts_and_answers()


def test_scores_are_finite_float64_and_deterministic(judge: Callable, rows: Rows) -> None:
    prompts, answers = rows
    result, again = judge(prompts, answers), judge(prompts, answers)
    assert result.scores.shape == (4,) and result.scores.dtype == torch.float64
    assert result.scores.isfinite().all() and not result.scores.requires_grad
    assert torch.equal(result.scores, again.scores)
    assert len(result.scores.unique()) > 1  # answers that differ are told apart
    assert result.correct is None or (result.correct.dtype == torch.bool and result.correct.shape == (4,))
    for part in result.parts.values():
        assert part.shape == (4,) and part.isfinite().all()


def test_each_row_is_judged_on_its_own(judge: Callable, rows: Rows) -> None:
    prompts, answers = rows
    together = judge(prompts, answers)
    alone = [judge([p], [a]) for p, a in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(torch.cat([r.scores for r in alone]), together.scores, atol=1e-5, rtol=1e-5)
    backwards = judge(prompts[::-1], answers[::-1]).scores.flip(0)
    torch.testing.assert_close(backwards, together.scores, atol=1e-5, rtol=1e-5)


def test_no_rows_and_wrong_rows(name: str, judge: Callable, rows: Rows) -> None:
    prompts, answers = rows
    assert judge([], []).scores.shape == (0,)
    with pytest.raises(ValueError, match="one answer per prompt"):
        judge(prompts, answers[:1])
    picture, words = (image(np.zeros((8, 8, 3), np.uint8)),), (text("no picture"),)
    with pytest.raises(ValueError, match="answer of text" if name in OF_TEXT else "one image"):
        judge(prompts[:1], [picture if name in OF_TEXT else words])
    with pytest.raises(ValueError, match="with text"):
        judge([picture], answers[:1])


def test_the_room_is_what_we_think() -> None:
    assert set(names("judges")) >= {"shapes", "clip_score", "aesthetic", "pickscore", "hpsv2"}


def test_shapes_prefers_the_right_caption() -> None:
    judge, rng = find("judges", "shapes")(), np.random.default_rng(1)
    captions = [str(c) for c in rng.choice(world.captions(), 40, replace=False)]
    wrong = [world.corrupt(c, rng) for c in captions]
    answers = [(image((world.render(c, rng) * 255).astype(np.uint8)),) for c in captions]
    right = judge([(text(c),) for c in captions], answers)
    corrupted = judge([(text(c),) for c in wrong], answers)
    assert right.correct is not None and corrupted.correct is not None
    assert right.correct.double().mean() > 0.95 and not corrupted.correct.any()
    assert (right.scores > corrupted.scores).all()
    assert set(right.parts) == {"colour", "shape", "count", "place", "clean"}


def test_shapes_resizes_and_refuses_weights() -> None:
    judge, caption = find("judges", "shapes")(), "a red circle left of a blue square"
    pixels = (world.render(caption, np.random.default_rng(2)) * 255).astype(np.uint8)
    large = np.repeat(np.repeat(pixels, 4, 0), 4, 1)
    small, big = (judge([(text(caption),)], [(image(p),)]).scores for p in (pixels, large))
    torch.testing.assert_close(small, big)
    with pytest.raises(ValueError, match="needs no weights"):
        find("judges", "shapes")(path="x")
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        judge([(text("a cat"),)], [(image(pixels),)])


def test_collages_tells_right_answers_from_those_of_another_image() -> None:
    judge = find("judges", "collages")()
    found = judge([seen_digits(place) for place in range(4)], [(text(f"It is {d}."),) for d in (0, 0, 9, 3)])
    assert found.scores.tolist() == found.correct.double().tolist() == [1, 0, 0, 1]
    assert found.rates["wrong_image"].tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="needs no weights"):
        find("judges", "collages")(path="x")


def test_sums_is_exact_and_refuses_weights() -> None:
    judge = find("judges", "sums")()
    result = judge([(text(p),) for p, _ in SAID], [(text(a),) for _, a in SAID])
    assert result.scores.tolist() == [1, 1, 0, 0] and result.correct.tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="needs no weights"):
        find("judges", "sums")(path="x")
    with pytest.raises(ValueError, match="not a prompt of the sums world"):
        judge([(text("a cat"),)], [(text("46"),)])


def test_sentiment_is_vaders_compound_of_the_answer_alone() -> None:
    vader = pytest.importorskip("vaderSentiment.vaderSentiment")
    said = ["What a wonderful day!", "What a dreadful day.", "A day."]
    scores = find("judges", "sentiment")()([(text("I hate this, it is terrible"),)] * 3, [(text(s),) for s in said]).scores
    own = vader.SentimentIntensityAnalyzer()
    assert scores.tolist() == [own.polarity_scores(s)["compound"] for s in said] and scores[0] > scores[2] == 0 > scores[1]
    with pytest.raises(ValueError, match="needs no weights"):
        find("judges", "sentiment")(path="x")


def reference_embeddings(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and image embeddings with open_clip alone."""
    model = open_clip.create_model("mmpo-tiny", pretrained=str(folder / "clip.safetensors")).eval()
    prepare = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    pixels = torch.stack([prepare(media.open_image(a[0])) for a in prompts_and_answers()[1]])
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer("mmpo-tiny")(CAPTIONS), normalize=True)
        return texts, model.encode_image(pixels, normalize=True)


@pytest.mark.parametrize("name", ["clip_score", "hpsv2"])
def test_clip_scores_are_a_hundred_times_the_cosine(folder: Path, name: str) -> None:
    texts, images = reference_embeddings(folder)
    scores = find("judges", name)(**options(name, folder))(*prompts_and_answers()).scores
    torch.testing.assert_close(scores, 100 * (texts * images).sum(-1).double(), atol=1e-4, rtol=1e-5)


def test_a_directory_gives_the_same_scores_as_the_file(folder: Path) -> None:
    clip_score = find("judges", "clip_score")
    from_file = clip_score(**options("clip_score", folder))(*prompts_and_answers()).scores
    assert torch.equal(clip_score(folder / "directory")(*prompts_and_answers()).scores, from_file)


def test_aesthetic_is_the_linear_stack_on_the_normalised_embedding(folder: Path) -> None:
    _, images = reference_embeddings(folder)
    head = load_head(folder / "head.safetensors")
    expected = images
    for layer in head.children():
        expected = expected @ layer.weight.T + layer.bias if isinstance(layer, nn.Linear) else expected
    scores = find("judges", "aesthetic")(**options("aesthetic", folder))(*prompts_and_answers()).scores
    torch.testing.assert_close(scores, expected.squeeze(-1).double(), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in head.parameters()) == 768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16 + 1233
    with pytest.raises(ValueError, match="expected LAION"):
        load_head(folder / "clip.safetensors")


def test_pickscore_is_the_diagonal_of_clips_own_logits(folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    path = folder / "pickscore"
    model, processor = CLIPModel.from_pretrained(path), CLIPProcessor.from_pretrained(path)
    prompts, answers = prompts_and_answers()
    pictures = [media.open_image(a[0]) for a in answers]
    with torch.no_grad():
        inputs = processor(text=CAPTIONS, images=pictures, padding=True, return_tensors="pt", truncation=True, max_length=40)
        expected = model(**inputs).logits_per_text.diagonal().double()
    scores = find("judges", "pickscore")(path)(prompts, answers).scores
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip_score", "hpsv2", "aesthetic", "pickscore"])
def test_without_weights_nothing_is_downloaded(folder: Path, name: str, tmp_path: Path) -> None:
    extra = {"head": folder / "head.safetensors"} if name == "aesthetic" else {}
    with pytest.raises(ValueError, match=f"judge {name}.*no weights"):
        find("judges", name)(**extra)
    with pytest.raises(ValueError, match="does not exist"):
        find("judges", name)(tmp_path / "absent", **extra)
    with pytest.raises((ValueError, OSError)):
        find("judges", name)(tmp_path, **extra)


def test_aesthetic_needs_its_head(folder: Path) -> None:
    with pytest.raises(ValueError, match="judge aesthetic: no weights; set head to LAION.*linearMSE.*pth$"):
        find("judges", "aesthetic")(folder / "clip.safetensors")


def test_a_directory_without_weights_is_an_error_and_not_a_random_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((folder / "directory" / "open_clip_config.json").read_text())
    with pytest.raises(Exception, match="(?i)weights|pretrained"):
        find("judges", "clip_score")(tmp_path)


def test_architectures_that_need_a_hub_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="from a hub"):
        find("judges", "clip_score")(folder / "clip.safetensors", architecture="xlm-roberta-base-ViT-B-32")
    with pytest.raises(ValueError, match="no architecture"):
        find("judges", "clip_score")(folder / "clip.safetensors", architecture="ViT-nothing")


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="(?i)weights"):
        find("judges", "clip_score")(tmp_path / "evil.pt", architecture="mmpo-tiny")
    assert not (tmp_path / "ran").exists()
