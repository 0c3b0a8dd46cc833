"""What a command line can name to be compared, and what it is told when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmpo import find
from mmpo.demos import cards, heat, history, markup
from mmpo.demos.systems import Model, Source, lora_shape, of_models, open_source, parse, recipe_of
from mmpo.errors import DataError, RecipeError
from tests.demos.sample_folders import picture_samples, text_samples, write_prompts


def peft_adapter(folder: Path, **more: object) -> Path:
    folder.mkdir(parents=True)
    told = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **more}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def a_run(folder: Path, modality: str = "text") -> Path:
    (folder / "best").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"modality: {modality}\n")
    (folder / "best" / "policy.safetensors").touch()
    return folder


def test_every_modality_says_what_its_answers_are() -> None:
    found = {name: find.answers(name) for name in find.names("modalities")}
    assert found | {"diffusion": "image", "text": "text", "vlm": "text"} == found
    assert set(found.values()) <= set(cards.SHOWN)
    assert all(find.model_config(name)().steps[0] > 0 for name in found)


def test_a_run_is_base_and_aligned(tmp_path: Path) -> None:
    source = open_source(a_run(tmp_path / "mine", "diffusion"))
    assert source == Source("mine", "image", ("base", "aligned"), (20, "denoiser steps"), run=tmp_path / "mine")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no run"):
        open_source(tmp_path)
    (a_run(tmp_path / "begun") / "best" / "policy.safetensors").unlink()
    with pytest.raises(RecipeError, match="first evaluation"):
        open_source(tmp_path / "begun")


def test_one_source_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="received none"):
        open_source()
    with pytest.raises(RecipeError, match="received RUN and --model"):
        open_source(tmp_path, ["a=text:x"])


def test_models_are_named(tmp_path: Path) -> None:
    odd, adapter = tmp_path / "with:colon", peft_adapter(tmp_path / "adapter")
    odd.mkdir()
    assert parse("a=text:org/name") == Model("a", "text", "org/name")
    assert parse("a=text:asset:smollm2") == Model("a", "text", "asset:smollm2")
    assert parse(f"a=text:asset:smollm2:{adapter}") == Model("a", "text", "asset:smollm2", str(adapter))
    assert parse(f"b=vlm:{odd}") == Model("b", "vlm", str(odd))
    assert parse(f"b=diffusion:{tmp_path}:{adapter}") == Model("b", "diffusion", str(tmp_path), str(adapter))


@pytest.mark.parametrize("words", ["text:x", "a=text", "=text:x", "a=text:", "a=:x", "a=txt:x", "a=text:x:nowhere"])
def test_misspelt_models_are_refused(words: str) -> None:
    with pytest.raises(RecipeError):
        parse(words)


def test_models_have_to_answer_alike() -> None:
    source = of_models([Model("a", "text", "x"), Model("b", "vlm", "y")])
    assert (source.kind, source.systems) == ("text", ("a", "b"))
    with pytest.raises(RecipeError, match="image and text"):
        of_models([Model("a", "text", "x"), Model("b", "diffusion", "y")])
    with pytest.raises(RecipeError, match="have to differ"):
        of_models([Model("a", "text", "x"), Model("a", "text", "y")])
    with pytest.raises(RecipeError, match="at most 4"):
        of_models([Model(str(i), "text", "x") for i in range(5)])


def test_an_adapter_sets_the_recipe(tmp_path: Path) -> None:
    recipe = recipe_of(Model("a", "text", "base: [x", str(peft_adapter(tmp_path / "a")))).recipe
    assert (recipe.model.path, recipe.model.adapter) == ("base: [x", "lora")
    lora = recipe.model.lora
    assert (lora.rank, lora.alpha, lora.targets, lora.path) == (3, 6.0, ["q_proj", "v_proj"], str(tmp_path / "a"))
    assert recipe_of(Model("a", "text", "x")).recipe.model.adapter == "full"


def test_adapters_of_both_libraries_tell_their_shape(tmp_path: Path) -> None:
    expression = peft_adapter(tmp_path / "expression", target_modules=r"model\..*")
    assert lora_shape(expression) == {"rank": 3, "alpha": 6}
    (tmp_path / "d").mkdir()
    weights = {"unet.to_q.lora_A.weight": np.zeros((5, 8), np.float32), "unet.to_q.lora_B.weight": np.zeros((8, 5), np.float32)}
    save_file(weights, tmp_path / "d" / "pytorch_lora_weights.safetensors")
    assert lora_shape(tmp_path / "d") == {"rank": 5}
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 5, "unet.lora_alpha": 10, "unet.target_modules": ["to_q"]})}
    save_file(weights, tmp_path / "d" / "pytorch_lora_weights.safetensors", metadata=told)
    assert lora_shape(tmp_path / "d") == {"rank": 5, "alpha": 10, "targets": ["to_q"]}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_damaged_adapters_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(RecipeError):
        lora_shape(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(content)
    with pytest.raises(RecipeError):
        lora_shape(tmp_path)


def test_samples_of_one_kind(tmp_path: Path) -> None:
    source = open_source(samples=picture_samples(tmp_path / "p", systems=("one", "two", "three")))
    assert (source.kind, set(source.systems)) == ("image", {"one", "two", "three"}) and source.pool is not None
    mixed = text_samples(tmp_path / "m", [("t", "q", {"one": "a", "two": "b"})])
    picture_samples(tmp_path / "other", systems=("one", "two"))
    write_prompts(mixed, [("t", "q"), ("item0", "a picture")])
    for name in ("one", "two"):
        (mixed / name / "item0.png").write_bytes((tmp_path / "other" / name / "item0.png").read_bytes())
    with pytest.raises(DataError, match="image and text"):
        open_source(samples=mixed)
    with pytest.raises(DataError, match="2 to 4"):
        open_source(samples=picture_samples(tmp_path / "five", systems=tuple("abcde")))


def test_a_source_imports_no_torch(tmp_path: Path) -> None:
    opening = f"compare.open_source(pathlib.Path({str(a_run(tmp_path / 'r'))!r}))"
    code = f"import sys, pathlib\nfrom mmpo.demos import compare\n{opening}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Heat


def test_labels_are_in_words() -> None:
    values = {-5.0: "much less likely", -1.0: "less likely", 1.0: "more likely", 2.0: "much more likely"}
    assert {value: heat.label(value) for value in values} == values
    assert set(values.values()) == set(heat.COLOURS)
    assert heat.label(0.1) is None and heat.label(-0.1) is None


def test_pieces_are_the_text() -> None:
    words = "ab\N{GRINNING FACE} c"
    tokens = [(-1, -1, 9.0), (0, 2, 1.0), (2, 3, 1.5), (2, 3, 1.0), (4, 5, -3.0), (4, 99, 1.0)]
    pieces = heat.spans(words, tokens)
    assert "".join(piece for piece, _ in pieces) == words
    assert pieces == [
        ("ab", "more likely"), ("\N{GRINNING FACE}", "much more likely"), (" ", None), ("c", "much less likely"),
    ]  # fmt: skip
    assert heat.spans("plain", []) == [("plain", None)] and heat.spans("", []) == []


def test_a_map_is_blue_where_more_is_likely() -> None:
    from mmpo import media

    picture, regions = np.full((32, 32, 3), 128, np.uint8), np.zeros((4, 4))
    regions[0, 0], regions[3, 3] = 2.0, -2.0
    pixels = media.pixels(heat.overlay(picture, regions, heat.scale_of([regions])))
    assert pixels.shape == (512, 512, 3)
    red, _, blue = (int(v) for v in pixels[10, 10])
    assert blue > red + 50
    red, _, blue = (int(v) for v in pixels[-10, -10])
    assert red > blue + 50
    assert len({int(v) for v in pixels[256, 256]}) == 1  # grey where nothing has moved


def test_the_strip_has_a_bar_for_each_part_of_the_schedule() -> None:
    bars = heat.by_time([(0.0, 1.0), (0.05, 3.0), (0.99, -4.0)])
    assert bars == [2.0, *[None] * 8, -4.0]
    drawn = heat.strip(bars, 4.0).decode()
    assert drawn.count("<rect") == 2 and 'y="14.00"' in drawn and 'height="28.00"' in drawn


# Markup


@pytest.mark.parametrize(
    "words", ["<script>alert(1)</script>", "[a](javascript:x)", "**b** $$x$$ `c`", "\n\n# h", '" onerror=x']
)
def test_words_of_others_are_only_words(words: str) -> None:
    shown = markup.plain(words)
    assert not set(shown) & set("<>[]()*$`\n\"'=_!\\|~")
    assert " ".join(words.split()) == __import__("html").unescape(shown)


def test_numbers_have_a_sign() -> None:
    assert [markup.signed(v) for v in (1.234, -0.5, 0.0, 0.00123)] == ["+1.23", "\N{MINUS SIGN}0.50", "+0.00", "+0.0012"]


def test_curves_stand_alone(tmp_path: Path) -> None:
    import xml.etree.ElementTree as tree

    lines = [{"event": "eval", "step": s, "eval/judge": 0.1 * s, "eval/pair_accuracy": 0.5} for s in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = history.drawn(tmp_path, tmp_path)
    assert [d.title for d in found] == ["Is it getting better, or only better at the pairs?"]
    drawn = (tmp_path / found[0].file.removeprefix("/shown/")).read_text()
    assert tree.fromstring(drawn).tag.endswith("svg")
    assert "prefers-color-scheme: dark" in drawn and "--green:" in drawn and "var(--green)" in drawn
    assert "judged" in history.verdict(tmp_path)
