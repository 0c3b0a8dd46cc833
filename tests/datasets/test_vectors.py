"""The neighbour index against brute force, with faiss and without; embedders against their models asked directly."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmpo import media
from mmpo.datasets.embedders.sentence import sentence
from mmpo.datasets.vectors import Index, cosines, in_batches
from mmpo.errors import MissingExtra
from mmpo.find import find
from mmpo.pair import Block, image, text
from tests.datasets.picture_tools import by_words, picture


def unit(count: int, size: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@given(count=st.integers(1, 40), size=st.integers(1, 6), queries=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_neighbours_are_those_of_brute_force(count: int, size: int, queries: int, seed: int, data: st.DataObject) -> None:
    vectors, asked = unit(count, size, seed), unit(queries, size, seed + 1)
    k = data.draw(st.integers(1, count))
    scores, rows = Index(vectors).nearest(asked, k)
    exact = asked.astype(float) @ vectors.astype(float).T
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=-1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, -1), scores, atol=1e-6)
    assert all(len(set(found)) == k for found in rows.tolist())


def test_without_faiss_it_says_so_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, asked = unit(3000, 16, 0), unit(2500, 16, 1)  # more queries than numpy takes at once
    with_faiss = Index(vectors).nearest(asked, 7)
    missing = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else missing(name))
    with pytest.warns(UserWarning, match=r"faiss is not installed.*mmpo\[retrieval\]"):
        index = Index(vectors)
    scores, rows = index.nearest(asked, 7)
    assert np.array_equal(rows, with_faiss[1])
    np.testing.assert_allclose(scores, with_faiss[0], atol=1e-6)


def test_equal_vectors_come_by_their_row() -> None:
    vectors = np.tile(unit(1, 4, 0), (5, 1))
    assert Index(vectors).nearest(vectors[:1], 5)[1].tolist() == [[0, 1, 2, 3, 4]]


def test_more_neighbours_than_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to 2, the number of vectors, found 3"):
        Index(unit(2, 3, 0)).nearest(unit(1, 3, 0), 3)


def test_batches_change_nothing_and_no_vector_is_zero() -> None:
    def encode(blocks: list[Block]) -> Tensor:
        return torch.tensor([[len(str(b.data)), 1.0] for b in blocks])

    blocks = [text("a" * n) for n in range(5)]
    whole, parts = (in_batches(encode, size)(blocks) for size in (5, 2))  # type: ignore[arg-type]
    assert np.array_equal(whole, parts) and np.allclose(np.linalg.norm(whole, axis=-1), 1)
    assert in_batches(encode, 2)([]).shape[0] == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"block 0 \(text\) has length 0"):
        in_batches(lambda some: torch.zeros(len(some), 3), 2)(blocks)


def test_cosines_of_counterparts() -> None:
    found = cosines(by_words, [text("a cat"), text("a dog")], [text("a cat"), text("one bird")])
    np.testing.assert_allclose(found, [1, 0], atol=1e-6)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a vocabulary of letters, as sentence-transformers lays it out."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    pooling(folder, "mean_tokens")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    return folder


def pooling(folder: Path, mode: str, *further: str) -> None:
    parts = [("Transformer", ""), ("Pooling", "1_Pooling"), *((name, "2_") for name in further)]
    modules = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in parts]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({f"pooling_mode_{mode}": True, "word_embedding_dimension": 16})
    )


def test_sentences_are_means_of_token_states(encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    said = ["a b c", "d", "e f g h i j"]
    with torch.no_grad():
        means = [model(**tokenizer(s, return_tensors="pt")).last_hidden_state[0].mean(0) for s in said]
    expected = torch.stack([m / m.norm() for m in means]).numpy()
    found = sentence(encoder, batch_size=2)([text(s) for s in said])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_text_that_is_cut_is_told(encoder: Path) -> None:
    embed = sentence(encoder)
    with pytest.warns(UserWarning, match="1 texts have over 12 tokens"):
        long = embed([text("a " * 20), text("b")])
    assert np.allclose(long[0], embed([text("a " * 10)])[0], atol=1e-6)  # ten and the two at the ends


def test_other_poolings_and_layers_are_refused(encoder: Path) -> None:
    try:
        pooling(encoder, "cls_token")
        with pytest.raises(ValueError, match="mean over tokens and nothing else, found pooling_mode_cls_token"):
            sentence(encoder)
        pooling(encoder, "mean_tokens", "Dense")
        with pytest.raises(ValueError, match="found Dense"):
            sentence(encoder)
    finally:
        pooling(encoder, "mean_tokens")


def test_sentence_says_what_is_missing(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights; set path to"):
        sentence()
    with pytest.raises(ValueError, match="is not a directory"):
        sentence(tmp_path / "none")
    with pytest.raises(ValueError, match="expected texts, found image"):
        sentence(encoder)([picture("red")])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    words = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": words}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def test_clip_embeds_images_and_texts_in_their_order(clip_folder: Path) -> None:
    from mmpo.clip import load_clip

    blocks = [text("a cat"), picture("red"), text("a dog"), picture("blue")]
    model = load_clip(clip_folder, "", "cpu", "test")
    with torch.no_grad():
        words, pictures = model.texts(["a cat", "a dog"]), model.images([media.open_image(b) for b in blocks[1::2]])
    found = find("datasets.embedders", "clip")(clip_folder)(blocks)
    np.testing.assert_allclose(found[::2], words.numpy(), atol=1e-6)
    np.testing.assert_allclose(found[1::2], pictures.numpy(), atol=1e-6)


def test_clip_without_weights_is_no_judge() -> None:
    with pytest.raises(ValueError, match="embedder clip: no weights; set path to"):
        find("datasets.embedders", "clip")()


def test_efficientnet_names_the_extra_that_brings_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mmpo\[efficientnet\]"):
        from mmpo.datasets.embedders.efficientnet_lite0 import network

        network()


def test_efficientnet_refuses_another_network(tmp_path: Path) -> None:
    from mmpo.datasets.embedders.efficientnet_lite0 import network

    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected EfficientNet-lite0.*shapes are not those"):
        network(tmp_path / "other.pth")


@pytest.mark.slow
def test_efficientnet_knows_photographs() -> None:
    """A photograph is nearest to its own copies, far from others, and classified as what it shows."""
    skimage_data: Any = pytest.importorskip("skimage.data")
    from timm.data import ImageNetInfo, create_transform, resolve_data_config

    from mmpo.datasets.embedders.efficientnet_lite0 import network

    photos = [np.ascontiguousarray(getattr(skimage_data, name)()) for name in ("chelsea", "coffee", "astronaut")]
    copies = [media.encode(photo, "JPEG", quality=50) for photo in photos]
    found = find("datasets.embedders", "efficientnet_lite0")()([*map(image, photos), *map(image, copies)])
    alike = found[:3] @ found[3:].T
    assert alike.diagonal().min() > 0.85 and (alike - np.eye(3)).max() < 0.5
    model = network()
    prepare = create_transform(**resolve_data_config({}, model=model))
    best = int(model(prepare(media.open_image(copies[0])).unsqueeze(0)).argmax())
    assert "Egyptian cat" in ImageNetInfo().index_to_description(best)
