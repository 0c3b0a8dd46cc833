"""`mmpo pairs`: options, resuming after a kill to the byte, what became of every row, executors, and the page."""

from __future__ import annotations

import hashlib
import html.parser
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmpo import cli, find, media
from mmpo.datasets import build as building
from mmpo.datasets import builder_options
from mmpo.datasets.build import Order, build
from mmpo.datasets.builder_options import ToolChoice, module_of
from mmpo.datasets.formats.mmpo import write_mmpo
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import load
from mmpo.datasets.preview import write_preview
from mmpo.datasets.stages import Record, execute
from mmpo.datasets.tools import Tools
from mmpo.errors import DataError, MissingExtra, RecipeError
from mmpo.pair import Branch, Pair, Span, image, text
from tests.datasets.photos import Guess, crops, write_llava

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = "tests.datasets.photos:guess"
TOOLS = ToolChoice(generator=GENERATOR, plugins=("tests.datasets.photos",))
SMALL = ("tile=32", "margin=12", "label=8", "every_kind=true")


@pytest.fixture(autouse=True)
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "PLUGINS", {"tests.datasets.photos"})


def order(data: Path, out: Path, *words: str, **rest: Any) -> Order:
    return Order("collage", data, out, (*SMALL, *words), **{"tools": TOOLS, **rest})


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder with the sha256 of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_build_writes_pairs_that_load_and_accounts_for_every_row(tmp_path: Path) -> None:
    data = write_llava(tmp_path / "in", crops(12, 48))
    broken = data.parent / "photos" / "00003.png"
    broken.write_bytes(broken.read_bytes()[:100])
    story = build(order(data, tmp_path / "out"))
    pairs, ledger = load(tmp_path / "out")
    assert ledger.used == len(pairs) == story["pairs"]
    assert story["source"]["rows"] == 12 and story["source"]["used"] == 11
    assert story["source"]["refused"] == {"undecodable image": 1}, "the damaged image, counted with its reason"
    assert "row 3" in str(story["examples"]["source"]["undecodable image"])
    made = story["records"]
    assert made["rows"] == made["used"] + sum(made["skipped"].values()) and made["used"] == len(pairs) > 25
    assert "undecodable image" in "\n".join(building.lines(story))
    stages = [entry["stage"] for entry in pairs[0].meta["provenance"]]
    assert stages == ["plan", "compose", "answer", "select", "pair"]
    assert set(contents(tmp_path / "out")) == {
        "pairs.parquet",
        "build.json",
        *(n for n in contents(tmp_path / "out") if "media/" in n),
    }


def test_the_same_order_gives_the_same_bytes_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_llava(tmp_path / "in", crops(6, 48))
    build(order(data, tmp_path / "a"))
    build(order(data, tmp_path / "b"))
    build(order(data, tmp_path / "c", seed=1))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a["pairs.parquet"] != c["pairs.parquet"]
    monkeypatch.setattr(building.Shards, "write", None)  # nothing is made again
    assert build(order(data, tmp_path / "a"))["pairs"] and contents(tmp_path / "a") == a
    with pytest.raises(RecipeError, match="(?s)made with other settings.*seed was 0, is 1"):
        build(order(data, tmp_path / "a", seed=1))
    with pytest.raises(RecipeError, match="holds something else"):
        build(order(data, tmp_path / "in"))


@pytest.mark.slow
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_llava(tmp_path / "in", crops(70, 32))
    whole = build(order(data, tmp_path / "whole", "kinds={grid: 1}"))
    write, made = building.Shards.write, []

    def stopping(shards: Any, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        made.append(number)
        write(shards, number, *rest)

    monkeypatch.setattr(building.Shards, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(order(data, tmp_path / "cut", "kinds={grid: 1}"))
    assert made == [0, 1] and not (tmp_path / "cut" / "pairs.parquet").exists()
    damaged = sorted((tmp_path / "cut" / "media").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])  # as after a crash of the machine
    (tmp_path / "cut" / "media" / ".half.png.tmp-1").write_bytes(b"")
    with pytest.raises(RecipeError, match="kinds"):
        build(order(data, tmp_path / "cut"))

    def noting(shards: Any, number: int, *rest: Any) -> None:
        made.append(number)
        write(shards, number, *rest)

    monkeypatch.setattr(building.Shards, "write", noting)
    damaged.unlink()
    assert build(order(data, tmp_path / "cut", "kinds={grid: 1}")) == whole
    assert made[2:] in ([0, 2], [1, 2]) and contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_command_repeated_gives_the_same_bytes(tmp_path: Path) -> None:
    data = write_llava(tmp_path / "in", crops(100, 40))
    build(order(data, tmp_path / "whole"))
    command = [sys.executable, "-m", "mmpo", "pairs", "collage", *SMALL, "--data", str(data), "--out", str(tmp_path / "cut")]
    command += ["--generator", GENERATOR, "--plugin", "tests.datasets.photos"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "cut" / ".building").glob("0*.json"))) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "cut" / "pairs.parquet").exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tyle=3"], "collage tyle: unknown option (there are: kinds, every_kind,"),
        (["tile=big"], "collage tile: input should be a valid integer"),
        (["grid_counts={2: 1, 5: 1}"], "expected numbers of images out of"),
        (["tile"], "not an option (got 'tile', expected key=value)"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_wrong_options_are_usage_errors(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_llava(tmp_path / "in", crops(2, 32))
    arguments = ["pairs", "collage", *words, "--data", str(data), "--out", str(tmp_path / "out"), "--generator", GENERATOR]
    assert cli.main(arguments) == cli.USAGE
    said = capsys.readouterr().err
    assert message in said and ("did you mean 'tile'?" in said or words != ["tyle=3"])


@pytest.mark.parametrize("words", [["collage", "--help"], ["--data", "x", "collage", "--help"]])
def test_help_of_a_builder_has_its_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pairs", *words]) == cli.OK
    said = capsys.readouterr().out
    assert (
        "--judge-set" in said and "Options of collage" in said and "min_perplexity=1.1" in said and "Pairs of MIA-DPO" in said
    )
    assert "grid_noise" not in (cli.main(["pairs", "--help"]), capsys.readouterr().out)[1]


def test_builders_and_their_tools_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_llava(tmp_path / "in", crops(2, 32))
    assert cli.main(["pairs", "colage", "--data", str(data), "--out", str(tmp_path / "out")]) == cli.USAGE
    assert "did you mean 'collage'?" in capsys.readouterr().err
    assert cli.main(["pairs", "collage", "--data", str(data), "--out", str(tmp_path / "out")]) == cli.USAGE
    assert "collage: needs --generator" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for builder, aspect in (("annotate", "coherence"), ("claims", "holds")):
        asked = module_of(builder)
        with pytest.raises(RecipeError, match=f"--judge sentiment scores whole answers, and this builder asks for .*{aspect}"):
            ToolChoice("DIR", judge="sentiment").check(builder, asked.NEEDS, asked.ASPECTS)
    with pytest.raises(RecipeError, match="needs --judge"):
        ToolChoice().check("x", {"pair_judge", "point_judge"})


def test_a_plugins_generator_that_lacks_a_keyword_is_refused_before_any_record() -> None:
    spec = "tests.datasets.photos:outdated"
    with pytest.raises(RecipeError, match=f"{spec}: .* does not take hide_images, prefixes, attention, hide_seeds;"):
        ToolChoice(generator=spec).make()


@pytest.mark.parametrize(
    ("choice", "problems"),
    [
        (
            ToolChoice("DIR", settings=("dtype=bfloat16", "batch_sise=2")),
            ["--set dtype: wrong value (got bfloat16, expected 'fp32', 'bf16' or", "--set batch_sise: unknown key"],
        ),
        (ToolChoice("DIR", settings=("batch_size=0",)), ["--set batch_size: wrong value (got 0, expected greater than 0)"]),
        (ToolChoice("DIR", settings=("images={pad: true}",)), ["--set images.pad: unknown key"]),
        (ToolChoice("DIR", settings=("path=other",)), ["--set path: is what --generator says"]),
        (ToolChoice("DIR", settings=("dtype",)), ["--set: not an option (got 'dtype', expected key=value)"]),
        (ToolChoice(GENERATOR, settings=("dtype=bf16",)), ["--set dtype: is for --generator DIR, a model's directory"]),
        (ToolChoice(judge="DIR", judge_settings=("dtype=half",)), ["--judge-set dtype: wrong value"]),
        (ToolChoice("DIR", "generator", judge_settings=("dtype=bf16",)), ["--judge-set dtype: is for --judge DIR"]),
        (ToolChoice("DIR", "sentiment=X", judge_settings=("dtype=bf16",)), ["--judge-set dtype: is for --judge DIR"]),
    ],
)  # fmt: skip
def test_settings_that_a_model_does_not_have_are_named(choice: ToolChoice, problems: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        choice.check("x", set())
    assert all(problem in str(error.value) for problem in problems) and "pydantic" not in str(error.value), error.value


def test_a_judges_directory_is_loaded_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: dict[str, Any] = {}
    made = types.SimpleNamespace(generator=lambda path, device, **settings: loaded.update({path: settings}))
    monkeypatch.setitem(sys.modules, "mmpo.modalities.vlm_generate", made)
    ToolChoice("G", "J", settings=("dtype=bf16",), judge_settings=("quantize=4bit", "batch_size=2")).make()
    assert loaded == {"G": {"dtype": "bf16"}, "J": {"quantize": "4bit", "batch_size": 2}}


def test_settings_in_the_guide_and_the_help_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pairs", "--help"]) == cli.OK
    helped = re.findall(r"generator, e\.g\.\s+(\w+=\w+)", capsys.readouterr().out)
    guide = (ROOT / "docs" / "pairs.md").read_text(encoding="utf-8")
    told = re.findall(r"`(\w+=\w+)`", next(line for line in guide.splitlines() if line.startswith("| `--set ")))
    assert helped == ["dtype=bf16"] and told == ["dtype=bf16", "batch_size=16"]
    ToolChoice("DIR", settings=(*helped, *told)).check("x", set())


@pytest.mark.parametrize("home", ["benchmarks.photo_pairs:Looking", "mmpo.modalities.vlm_generate:Answers"])
def test_generators_of_ours_take_what_builders_say(home: str) -> None:
    module, _, name = home.partition(":")
    assert builder_options._lacking(getattr(importlib.import_module(module), name).__call__) == []


def test_every_builder_has_options_with_defaults_and_known_needs() -> None:
    for name in find.names("datasets.builders"):
        assert builder_options.options_of(name, []) is not None, name
        ToolChoice("g", "j", "i", "t").check(name, builder_options.module_of(name).NEEDS)


def test_the_guide_names_every_builder_with_what_it_needs() -> None:
    guide = (ROOT / "docs" / "pairs.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", guide, flags=re.M))
    needs = {name: builder_options.module_of(name).NEEDS for name in find.names("datasets.builders")}
    assert {name: set(re.findall(r"`(\w+)`", said)) for name, said in rows.items()} == {n: set(v) for n, v in needs.items()}


def test_the_how_to_of_a_new_builder_works(tmp_path: Path) -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a builder of pairs")[1]
    code = textwrap.dedent(re.findall(r"^ +```python\n(.*?)^ +```", guide, flags=re.M | re.S)[0])
    module = types.ModuleType("blind")
    exec(compile(code, "blind.py", "exec"), module.__dict__)
    stages = module.blind(Tools(generator=Guess()))
    records = [Record(f"r{i}", (text(f"what {i}?"),), "this" if i else None) for i in range(3)]
    ledger = Ledger("skip")
    made = list(execute(records, stages, seed=0, ledger=ledger))
    assert len(made) == 2 and ledger.skipped == {"pair: right without seeing": 1}
    assert all(isinstance(record.fields["pair"], Pair) for record in made)


@pytest.mark.parametrize(
    ("builder", "choice"),
    [("collage", ToolChoice("D")), ("bias_sampling", ToolChoice("D", text_embedder="letters")),
     ("retrieval", ToolChoice("D", None, "pixels", "letters")), ("claims", ToolChoice("D", "generator")),
     ("annotate", ToolChoice("D", "generator")), ("rank_and_sift", ToolChoice("D", "generator"))],
)  # fmt: skip
def test_answers_without_tokens_are_refused_by_name(builder: str, choice: ToolChoice) -> None:
    options = builder_options.options_of(builder, ["max_new_tokens=0"])
    with pytest.raises(ValueError, match="^max_new_tokens: expected at least 1, found 0$"):
        builder_options.check_options(builder, options, choice)


def test_a_build_without_a_pair_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_llava(tmp_path / "in", crops(3, 32))
    words = ["pairs", "collage", *SMALL, "max_answer=1", "--data", str(data), "--out", str(tmp_path / "out"), "--generator"]
    for _ in range(2):  # also where it was made before
        assert cli.main([*words, GENERATOR, "--plugin", "tests.datasets.photos"]) == cli.DATA
        said = capsys.readouterr()
        assert "skipped 3: plan: answer too long" in said.out and "no pair was made of" in said.err


def test_a_palette_with_transparency_is_no_news(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = write_llava(tmp_path / "in", crops(3, 32))
    picture = Image.fromarray(crops(1, 32)[0]).quantize(8)
    picture.save(data.parent / "photos" / "00001.png", transparency=bytes(range(8)))
    build(order(data, tmp_path / "out"))
    assert not [w for w in recwarn if "Palette" in str(w.message)]


def test_options_are_read_as_yaml() -> None:
    found = builder_options.options_of("collage", ["grid_ratios={2: 1e-1}", "openings=[a, 'b, ']", "reference=In Image{k}, "])
    assert found["grid_ratios"] == {2: 0.1} and found["openings"] == ("a", "b, ") and found["reference"] == "In Image{k}, "


def test_the_command_prints_the_account_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_llava(tmp_path / "in", crops(12, 48))
    (data.parent / "photos" / "00002.png").unlink()
    arguments = ["pairs", "collage", *SMALL, "--data", str(data), "--out", str(tmp_path / "out"), "--generator", GENERATOR]
    arguments += ["--plugin", "tests.datasets.photos", "--preview", str(tmp_path / "page.html"), "--seed", "3"]
    assert cli.main(arguments) == cli.OK
    said = capsys.readouterr().out
    assert "source: 12 = 11 used + 0 skipped + 1 refused" in said and "refused 1: missing file" in said
    assert "24 of them to look at" in said
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags.count("article") == 24 and "missing file" in page.words and "In Image" in page.words


class Page(html.parser.HTMLParser):
    """The tags, attributes and words of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.words = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_shows_boxes_spans_and_branches_and_escapes_what_people_wrote(tmp_path: Path) -> None:
    picture, other = (image(media.encode(p)) for p in crops(2, 60))
    evil = "<script>alert(1)</script> & <img src=x onerror=alert(2)>"
    pair = Pair(
        f"id {evil}", (picture, text(evil)), (text(f"yes {evil}"),), (text("no, a red cat"),),
        scores={"chosen": 0.75}, weight=2.0, spans={"rejected": (Span(6, 9, 5.0),)},
        branches={"chosen@retrieved": Branch((other, text("q")), (text("yes"),))},
        meta={"regions": [{"image": 0, "label": evil, "box": [1, 2, 11, 22], "target": True}], "provenance": [{"stage": evil}]},
    )  # fmt: skip
    write_mmpo([pair], tmp_path / "pairs")
    assert write_preview(tmp_path / "pairs", tmp_path / "page.html") == 1
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags and "img" not in page.tags and not any(name.startswith("on") for name, _ in page.values)
    assert page.words.count(evil) >= 4, "as words"
    assert {("x", "1"), ("y", "2"), ("width", "10"), ("height", "20")} <= set(page.values)
    assert re.search(r"<mark[^>]*>red</mark>", source) and "chosen@retrieved" in page.words and "0.75" in page.words
    links = [value for name, value in page.values if name in ("href", "src")]
    assert len(links) == 2 and all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "default-src 'none'" in source and "width=device-width" in source and "prefers-color-scheme: dark" in source


def test_a_builder_without_a_pair_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = building.Maker("collage", {}, TOOLS, 0)
    maker.__dict__["stages"] = []
    with pytest.raises(ValueError, match="its last stage left no Pair"):
        list(maker.pairs([Record("r", ())], Ledger()))


def test_ray_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_llava(tmp_path / "in", crops(2, 32))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"mmpo\[ray\]"):
        build(order(data, tmp_path / "out", executor="ray"))
    with pytest.raises(RecipeError, match="executor: expected local or ray, found 'spark'"):
        order(data, tmp_path / "out", executor="spark")


@pytest.mark.slow
def test_a_real_model_answers_and_its_attention_selects(tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    data = write_llava(tmp_path / "in", crops(8, 48))
    tools = ToolChoice(generator=str(family_folder("llava")), settings=("images={max_pixels: 50000}",))
    words = ("max_new_tokens=6", "min_perplexity=1", "sequence_counts={2: 1}", "grid_counts={2: 1}")
    story = build(order(data, tmp_path / "out", *words, tools=tools))
    pairs, _ = load(tmp_path / "out")
    assert story["records"]["rows"] == 24 and set(story["records"]["skipped"]) <= {
        "select: model was looking at the asked image", "select: empty answer",
    }  # fmt: skip
    assert pairs and all(0 <= pair.meta["ratio"] <= 1 and pair.meta["perplexity"] > 1 for pair in pairs)
    assert {pair.meta["kind"] for pair in pairs} == {"sequence", "grid", "inset"}


@pytest.fixture(scope="module")
def _ray() -> Iterator[Any]:
    """One Ray for all tests here; the executor leaves one alone that it did not start."""
    ray = pytest.importorskip("ray")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path, _ray: Any) -> None:
    data = write_llava(tmp_path / "in", crops(100, 40))
    build(order(data, tmp_path / "local"))
    for workers in (1, 2, 3):
        build(order(data, tmp_path / str(workers), executor="ray", workers=workers))
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "local"), workers
    assert json.loads((tmp_path / "3" / "build.json").read_text(encoding="utf-8"))["pairs"] > 200


def test_a_wrong_source_does_not_spoil_the_folder(tmp_path: Path) -> None:
    data = write_llava(tmp_path / "in", crops(3, 32))
    with pytest.raises(DataError, match="no such file or folder"):
        build(order(tmp_path / "in" / "question.json", tmp_path / "out"))
    assert build(order(data, tmp_path / "out"))["pairs"] > 0
