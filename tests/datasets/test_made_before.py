"""What a build is told apart by: its source, its code, the files of its models, and what it wrote before."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmpo import find
from mmpo.datasets import build as building
from mmpo.datasets import builder_options, fingerprints, shards
from mmpo.datasets.build import Order, build
from mmpo.datasets.builder_options import ToolChoice, module_of
from mmpo.datasets.ledger import Ledger
from mmpo.errors import DataError, RecipeError
from mmpo.lock import RunBusy, RunLock
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_source_that_changes_between_its_two_readings_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out, prepare = write_llava(tmp_path / "in", crops(6, 32)), tmp_path / "out", building._prepare

    def changing(*given: Any) -> Any:
        seen = prepare(*given)
        one, other = (data.parent / "photos" / f"{name}.png" for name in ("00003", "00004"))
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        return seen

    said = "questions.json: changed while it was read; the same command begins anew"
    with monkeypatch.context() as patch, pytest.raises(DataError, match=said):
        patch.setattr(building, "_prepare", changing)
        build(order(data, out))
    assert not (out / "build.json").exists()
    assert build(order(data, out)) == build(order(data, tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole"), "no picture of the first attempt is left"


def test_a_builder_that_has_seen_enough_is_held_to_the_whole_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of("collage"), "prepare", lambda records, tools, **_: next(iter(records)) and None)
    data, made = write_llava(tmp_path / "in", crops(3, 32)), order(tmp_path / "in" / "questions.json", tmp_path / "out")
    seen = building._prepare(made, building.Maker("collage", {}, TOOLS, 0))
    whole = building._source(order(data, tmp_path / "out"), Ledger())
    assert seen is not None and len(list(whole)) == seen.count == 3 and seen.digest == whole.digest


@pytest.mark.slow
def test_media_that_are_gone_or_changed_are_not_told_as_made(tmp_path: Path) -> None:
    data, out = write_llava(tmp_path / "in", crops(8, 32)), tmp_path / "out"
    build(order(data, out))
    first, second, *rest = sorted((out / "media").iterdir())
    was = {path: path.read_bytes() for path in (first, second, *rest)}
    first.unlink()
    second.write_bytes(was[second][:-1] + b"?")
    said = f"(?s)media/{first.name} is gone.*media/{second.name} is not what was written there"
    with pytest.raises(RecipeError, match=said):
        build(order(data, out))
    for path in (second, *rest):
        path.unlink()
    with pytest.raises(RecipeError, match=f"{len(was) - building.NAMED} more media are gone or changed"):
        build(order(data, out))
    for path, content in was.items():
        path.write_bytes(content)
    assert "made" in build(order(data, out))


@pytest.mark.slow
def test_parts_of_an_order_that_nobody_knows_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_llava(tmp_path / "in", crops(4, 32))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(building.Shards, "merge", None)
        build(order(data, tmp_path / "out"))
    (tmp_path / "out" / ".building" / "settings.json").unlink()
    build(order(data, tmp_path / "out", seed=1))
    build(order(data, tmp_path / "whole", seed=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_build_that_was_killed_while_it_tidied_up_is_made_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_llava(tmp_path / "in", crops(4, 32)), tmp_path / "out"

    def killed(*_: Any) -> None:
        with pytest.raises(RunBusy):
            RunLock(out / ".building")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "prune", killed)
        build(order(data, out))
    assert (out / ".building" / "000000.table").is_file(), "its parts are still there"
    with pytest.raises(RecipeError, match="made with other settings"):
        build(order(data, out, seed=1))
    monkeypatch.setattr(building.Shards, "write", None)  # nothing is made again
    assert "made" in build(order(data, out)) and not (out / ".building").exists()


def test_the_bar_ends_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n" * 5, encoding="utf-8")
    totals = [building._total(order(tmp_path / "rows.jsonl", tmp_path / "out", limit=limit)) for limit in (None, 3, 9)]
    assert totals == [5, 3, 5]


@pytest.mark.slow
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


def test_a_chat_template_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "turns.jinja").write_text("{{ messages }}", encoding="utf-8")
    words = (f"chat_template={tmp_path / 'turns.jinja'}",)
    found = ToolChoice("embedded", "embedded", settings=words, judge_settings=words).files()
    digest = hashlib.sha256(b"{{ messages }}").hexdigest()
    assert found["chat_template"] == found["judge_chat_template"] == {"turns.jinja": digest}
    typed = ToolChoice("embedded", settings=(f"chat_template='{'{{ messages }}' * 400}'",)).files()
    assert typed["chat_template"] == {}  # as text and not as a file: refused where it is read


def test_a_tokenizer_out_of_the_hubs_cache_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "models--somebody--words"
    for name, content in (("refs/main", "abc"), ("snapshots/abc/tokenizer.json", "{}")):
        (kept / name).parent.mkdir(parents=True)
        (kept / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, files in (("somebody/words", {"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}), ("somebody/else", {})):
        options = builder_options.options_of("segments", [f"tokenizer={name}"])
        assert building._settings(Order("segments", tmp_path, tmp_path), options)["files"] == {"tokenizer": files}


@pytest.mark.parametrize("place", ["generator", "judge", "image_embedder", "text_embedder"])
def test_nothing_of_a_plugin_that_is_not_allowed_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "unasked").mkdir()
    (tmp_path / "unasked" / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    data = write_llava(tmp_path / "in", crops(2, 32))
    given: dict[str, Any] = {place: "unasked.tools:make=weights"}
    with pytest.raises(RecipeError, match=r"'unasked.tools:make' is code outside mmpo, .* --plugin unasked.tools"):
        build(order(data, tmp_path / "out", tools=replace(TOOLS, **given)))
    assert not (tmp_path / "out").exists()


def test_a_judge_that_is_to_be_the_generator_needs_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--judge generator: there is no --generator"):
        build(Order("rank_and_sift", tmp_path / "no source", tmp_path / "out", tools=ToolChoice(judge="generator")))
    assert not (tmp_path / "out").exists()


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


def test_the_code_of_a_builder_has_its_helpers_tools_and_writers_in_it() -> None:
    found = fingerprints.sources_of(building.modules_of(Order("collage", Path("d"), Path("o"), tools=ToolChoice("DIR"))))
    helpers = ("collage_images", "attention_ratio", "answer_filters", "stages")
    assert found.keys() >= {f"mmpo.datasets.{name}" for name in helpers}
    assert found.keys() >= {"mmpo.modalities.vlm_regions", "mmpo.kernels.attention_mass"}
    assert found.keys() >= {"mmpo.datasets.shards", "mmpo.datasets.formats.mmpo", "mmpo.datasets.media_files"}
    assert ToolChoice(judge="sentiment").modules() == ["mmpo.judges.sentiment", "mmpo.datasets.judge_tools"]
    assert ToolChoice(text_embedder="letters", generator=GENERATOR).modules() == [
        "tests.datasets.photos", "mmpo.datasets.embedders.letters",
    ]  # fmt: skip


def test_a_colon_in_a_path_makes_no_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPO_ASSETS", str(tmp_path))
    assert ToolChoice(text_embedder="sentence=asset:minilm").modules() == ["mmpo.datasets.embedders.sentence"]
    assert ToolChoice(image_embedder=f"{GENERATOR}=a:b").modules() == ["tests.datasets.photos"]
    ToolChoice("asset:smollm2", text_embedder="sentence=asset:minilm").check("x", set())
    with pytest.raises(RecipeError, match="asset:minilm: not in"):
        ToolChoice(text_embedder="sentence=asset:minilm").files()


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
