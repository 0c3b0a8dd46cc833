"""What a build is told apart by: its source, its code, the files of its models, and what it wrote before."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mmpo import find
from mmpo.datasets import build as building
from mmpo.datasets import builder_options, fingerprints
from mmpo.datasets.build import Order, build
from mmpo.datasets.builder_options import ToolChoice
from mmpo.errors import DataError, RecipeError
from tests.datasets.photos import crops, write_llava
from tests.datasets.test_build import GENERATOR, TOOLS, contents, order


@pytest.fixture(autouse=True)
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "PLUGINS", {"tests.datasets.photos"})


def test_what_was_made_before_is_told_with_its_day(tmp_path: Path) -> None:
    data = write_llava(tmp_path / "in", crops(4, 32))
    first = build(order(data, tmp_path / "out"))
    os.utime(tmp_path / "out" / "build.json", (0, 86400.0 * 365))
    again = build(order(data, tmp_path / "out"))
    assert again == {**first, "made": again["made"]} and again["made"].startswith("197")
    assert building.lines(again)[0].startswith(f"already made on {again['made']}") and "already" not in building.lines(first)[0]


def test_pairs_of_other_data_and_pairs_that_are_gone_are_not_told_as_made(tmp_path: Path) -> None:
    data, out = write_llava(tmp_path / "in", crops(8, 32)), tmp_path / "out"
    build(order(data, out))
    rows = data.read_text(encoding="utf-8")
    data.write_text(json.dumps(json.loads(rows)[:6]), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"(?s)changed.*questions.json has other data: was 8 = 8 used.*is 6 = 6"):
        build(order(data, out))
    data.write_text(rows, encoding="utf-8")
    picture = data.parent / "photos" / "00003.png"
    before = picture.read_bytes()
    picture.write_bytes((data.parent / "photos" / "00004.png").read_bytes())  # the rows are the same, what they show is not
    with pytest.raises(RecipeError, match="has other data: was 8 = 8 used .*, is 8 = 8 used"):
        build(order(data, out))
    picture.write_bytes(before)
    table = (out / "pairs.parquet").read_bytes()
    (out / "pairs.parquet").write_bytes(table[:-1] + b"?")
    with pytest.raises(RecipeError, match="pairs.parquet is not what was written there"):
        build(order(data, out))
    (out / "pairs.parquet").unlink()
    with pytest.raises(RecipeError, match="pairs.parquet is gone"):
        build(order(data, out))
    (out / "pairs.parquet").write_bytes(table)
    assert "made" in build(order(data, out))
    data.unlink()
    with pytest.raises(DataError, match="no such file or folder"):
        build(order(data, out))


def test_parts_are_made_anew_where_the_builder_saw_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, pictures = write_llava(tmp_path / "in", crops(70, 32)), crops(72, 32)
    write = building.Shards.write

    def stopping(shards: Any, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(shards, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building.Shards, "write", stopping)
        build(order(data, tmp_path / "cut", "kinds={grid: 1}"))
    more = write_llava(tmp_path / "more", pictures)
    data.write_text(more.read_text(encoding="utf-8"), encoding="utf-8")
    for picture in (more.parent / "photos").iterdir():
        (data.parent / "photos" / picture.name).write_bytes(picture.read_bytes())
    build(order(data, tmp_path / "cut", "kinds={grid: 1}"))
    build(order(data, tmp_path / "whole", "kinds={grid: 1}"))
    assert contents(tmp_path / "cut")["pairs.parquet"] == contents(tmp_path / "whole")["pairs.parquet"]


def test_a_model_that_changed_in_its_place_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = write_llava(tmp_path / "in", crops(4, 32)), tmp_path / "model"
    (model / ".cache").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"one")
    tools = ToolChoice(generator=f"{GENERATOR}={model}", plugins=TOOLS.plugins)
    build(order(data, tmp_path / "out", tools=tools))
    (model / ".cache" / "lock").write_bytes(b"")
    (model / "model.safetensors").write_bytes(b"one")  # written again, as by a copy
    assert "made" in build(order(data, tmp_path / "out", tools=tools))
    (model / "model.safetensors").write_bytes(b"two")
    with pytest.raises(RecipeError, match="files.generator.model.safetensors was '7692c3ad.*', is '3fc4ccfe"):
        build(order(data, tmp_path / "out", tools=tools))
    monkeypatch.setattr(building.Shards, "merge", None)
    with pytest.raises(TypeError):
        build(order(data, tmp_path / "half", tools=tools))
    (model / "model.safetensors").write_bytes(b"three")
    with pytest.raises(RecipeError, match=r"files.generator.model.safetensors was"):
        build(order(data, tmp_path / "half", tools=tools))


def test_files_of_every_tool_count(tmp_path: Path) -> None:
    for name in ("g", "j", "i", "t", "lora"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text(name, encoding="utf-8")
    g, j, i, t, lora = (str(tmp_path / name) for name in ("g", "j", "i", "t", "lora"))
    full = ToolChoice(g, j, f"clip={i}", f"sentence={t}", settings=(f"lora={{path: {lora}}}",))
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("g", "j", "i", "t", "lora")}
    tools = {"generator": "g", "judge": "j", "image_embedder": "i", "text_embedder": "t", "lora": "lora"}
    assert full.files() == {tool: {"w": digests[name]} for tool, name in tools.items()}
    assert ToolChoice(g, "generator", "pixels", "letters").files() == {"generator": {"w": digests["g"]}}
    assert "model.safetensors" in ToolChoice("embedded").files()["generator"]
    assert ToolChoice("nobody/nothing", judge="sentiment").files() == {}


def test_code_is_that_of_all_modules_of_ours_that_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tmp_path / "mmpo"
    (ours / "datasets").mkdir(parents=True)
    sources = {"one": "from mmpo.datasets.two import x", "two": "def f():\n    import mmpo.three", "other": ""}
    for name, source in sources.items():
        (ours / "datasets" / f"{name}.py").write_text(source, encoding="utf-8")
    (ours / "three.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(fingerprints, "ROOT", ours)

    def code() -> str:
        fingerprints._read.cache_clear()
        return fingerprints.code_of(["mmpo.datasets.one"])

    before = code()
    (ours / "datasets" / "other.py").write_text("y = 1", encoding="utf-8")
    assert code() == before
    for name in ("datasets/one.py", "datasets/two.py", "three.py"):
        was = (ours / name).read_text(encoding="utf-8")
        (ours / name).write_text(f"{was}\n# another", encoding="utf-8")
        assert code() != before, name
        (ours / name).write_text(was, encoding="utf-8")
    assert code() == before


def test_the_code_of_a_builder_has_its_helpers_and_tools_in_it() -> None:
    found: set[str] = set()
    waiting = ["mmpo.datasets.builders.collage", *ToolChoice("DIR").modules()]
    while waiting:
        if (path := fingerprints._path(name := waiting.pop())) and name not in found:
            found.add(name)
            waiting += fingerprints._read(path)[1]
    assert found >= {f"mmpo.datasets.{name}" for name in ("collage_images", "attention_ratio", "answer_filters", "stages")}
    assert found >= {"mmpo.modalities.vlm_regions", "mmpo.kernels.attention_mass"}
    assert ToolChoice(judge="sentiment").modules() == ["mmpo.judges.sentiment", "mmpo.datasets.judge_tools"]
    assert ToolChoice(text_embedder="letters", generator=GENERATOR).modules() == [
        "tests.datasets.photos", "mmpo.datasets.embedders.letters",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("builder", "word", "tools"),
    [
        ("collage", "grid_counts={2: 1, 5: 1}", ToolChoice("DIR")),
        ("retrieval", "share=2", ToolChoice("DIR", image_embedder="pixels", text_embedder="letters")),
        ("retrieval", "neighbours=0", ToolChoice("DIR", image_embedder="pixels", text_embedder="letters")),
        ("bias_sampling", "on_policy=0.5", ToolChoice("DIR", text_embedder="letters")),
    ],
)
def test_options_are_checked_before_anything_is_read(tmp_path: Path, builder: str, word: str, tools: ToolChoice) -> None:
    with pytest.raises(ValueError, match=word.partition("=")[0]):
        build(Order(builder, tmp_path / "no source", tmp_path / "out", (word,), tools=tools))
    assert not (tmp_path / "out").exists()


def test_a_builder_that_asks_its_tools_at_once_is_checked_when_they_are_there(tmp_path: Path) -> None:
    builder_options.check_options("tests.datasets.photos:curious", {}, TOOLS)
