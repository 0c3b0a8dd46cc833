"""The run report: complete, self-contained, safe against what prompts contain, and the same bytes every time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpo.curves import POINTS, series, thin
from mmpo.report import (
    answer_pairs,
    duration,
    environment,
    headline,
    heldout_rows,
    ledger_rows,
    number,
    picture_pairs,
    provenance_rows,
    read_log,
    score_rows,
    timestep_rows,
    write_report,
)

ATTACK = "</figcaption><script>alert(1)</script> \"onerror='x' {{ 7*7 }} & a red circle"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest; collects tags, identifiers and every reference to something else."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v or "" for k, v in attrs if k == "id"]
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")], attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def synthetic_run(run: Path, steps: int = 40) -> Path:
    """A run folder that over-optimises after half of its steps."""
    rng = np.random.default_rng(0)
    for side in ("base", "aligned"):
        (run / "samples" / side).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((64, 64, 3), 245, np.uint8)
            pixels[16:48, 16:48] = rng.integers(0, 255, 3) if side == "base" else (200, 40, 40)
            Image.fromarray(pixels).save(run / "samples" / side / f"{i:03d}.png")
    records: list[dict[str, object]] = [{"event": "start", "step": 0}]
    for step in range(1, steps + 1):
        x = step / steps
        records.append(
            {"event": "train", "step": step, "loss": 0.693 - 0.3 * x + 0.03 * rng.normal(), "rewards/chosen": 0.4 * x}
            | {"rewards/rejected": -0.9 * x, "rewards/accuracies": 0.5 + 0.4 * x}
            | {f"t{i}/accuracies": 0.5 + 0.1 * i * x for i in range(4)}
        )
        if step % (steps // 8) == 0:
            judge = 0.5 + 0.8 * x * (1 - x)
            values = {"judge": judge, "pair_accuracy": 0.5 + 0.45 * x, "diversity": 0.9, "correct": judge}
            values |= {"margin": 0.3 * x, "drift_chosen": 0.2 * x - 0.1, "drift_rejected": 0.5 * x}
            values |= {"win_rate": judge, "win_low": judge - 0.08, "win_high": judge + 0.08}
            records.append({"event": "eval", "step": step} | {f"eval/{name}": value for name, value in values.items()})
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"event": "train", "st')
    summary = {
        "modality": "diffusion",
        "judge": "exact verifier",
        "base": {"score": 0.5, "correct": 0.4, "diversity": 0.9},
        "aligned": {"score": 0.7, "correct": 0.55, "diversity": 0.88},
        "win_rate": {"value": 0.71, "low": 0.63, "high": 0.78, "n": 128},
        "heldout_pair_accuracy": 0.83,
        "pairs": {"train": 1500, "heldout": 200},
        "data": {"used": 1700, "skipped": {"tie": 41}},
        "steps": steps,
        "best_step": steps // 2,
        "seconds": 117.4,
        "seed": 7,
        "verdict": "Better: the aligned model wins 71 % of 128 comparisons (95 % interval 63 to 78 %).",
        "flags": [{"name": "over-optimisation", "text": "The judge fell while pair accuracy rose.", "advice": "a larger beta"}],
        "by_timestep": [{"bucket": "0-250", "accuracy": 0.61, "margin": 0.0021}],
        "command": "mmpo train --modality diffusion seed=7",
        "prompts": [ATTACK, "two green squares", "a blue cross above a yellow triangle"],
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "recipe.yaml").write_text("seed: 7  # <command line>\n")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = synthetic_run(tmp_path_factory.mktemp("run"))
    write_report(run)
    return run


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_report_answers_in_order(html: str) -> None:
    sections = [
        "<h1>Better.</h1>",
        "The aligned model wins 71",
        "Base and aligned",
        "What changed",
        "How it went",
        "By timestep",
    ]
    sections += ["What to look at", "Reproduce", "Data ledger"]
    places = [html.index(words, html.index("<body>")) for words in sections]
    assert places == sorted(places)
    expected = [
        "+0.150",
        "0.630 to 0.780",
        "exact verifier",
        "a larger beta",
        "1 min 57 s",
        "seed=7",
        "The judge fell while pair accuracy rose.",
        "skipped, tie",
        "step 20",
    ]
    assert [words for words in expected if words not in html] == []
    assert "log lines that could not be read" in html


def test_report_is_self_contained_and_well_formed(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert [r for r in page.references if not r.startswith(("data:image/png;base64,", "#"))] == []
    assert page.tags.count("svg") == 9
    assert len(page.ids) == len(set(page.ids))
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert not re.search(r"url\((?!#)", html)
    assert not re.search(r"#00000\d", html), "a placeholder colour was left in a curve"


def test_prompts_are_text_and_nothing_else(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7*7 }}" in html
    assert Page(html).tags.count("figure") == 3 + 9


def test_report_is_deterministic(run: Path, html: str) -> None:
    write_report(run)
    assert (run / "report.html").read_text(encoding="utf-8") == html


@pytest.mark.parametrize("missing", ["samples", "summary.json", "log.jsonl", "recipe.yaml", "everything"])
@pytest.mark.slow
def test_report_survives_missing_pieces(tmp_path: Path, missing: str) -> None:
    run = tmp_path / "run"
    if missing == "everything":
        run.mkdir()
    else:
        path = synthetic_run(run) / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(run).read_text(encoding="utf-8"))


def test_sheet_is_shown_when_there_are_no_single_pictures(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run")
    (run / "samples" / "base").rename(run / "samples" / "sheet_only")
    Image.new("RGB", (32, 32)).save(run / "samples" / "sheet.png")
    assert "Sheet of generations" in write_report(run).read_text(encoding="utf-8")


def written_run(run: Path) -> Path:
    """A run whose samples are words."""
    synthetic_run(run)
    shutil.rmtree(run / "samples")
    (run / "samples").mkdir()
    prompts = ["1+1=", "1+1=", ATTACK]
    for side, said in (("base", ["3", "2", ""]), ("aligned", ["2", "2", "</td><script>alert(2)</script>"])):
        lines = [
            {"prompt": p, "text": t, "score": float(t == "2"), "correct": t == "2"} for p, t in zip(prompts, said, strict=True)
        ]
        lines = [line | {"log_ratio": -1.25} for line in lines]
        (run / "samples" / f"{side}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"aligned": {"score": 0.7, "kl": 1.5, "length": 3.25}}))
    return run


def test_answers_in_words_are_a_table_of_text_and_nothing_else(tmp_path: Path) -> None:
    html = write_report(written_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "&lt;script&gt;alert(2)" in html and "&lt;script&gt;alert(1)" in html
    table = html[html.index('<table class="answers">') : html.index("What changed")]
    cells = [re.sub(r"<[^>]*>|\s+", " ", row).split() for row in table.split("<tr>")[2:]]
    minus = "\N{MINUS SIGN}1.25"
    assert [row[0] for row in cells] == ["1+1=", "&lt;/figcaption&gt;&lt;script&gt;alert(1)&lt;/script&gt;", "1+1="]
    assert cells[0][1:] == ["3", "wrong", "0.000", minus, "2", "right", "1.000", minus]
    assert "(nothing)" in table
    assert "KL from the reference" in html and "1.500" in html


def test_held_out_pairs_are_told_at_the_kept_checkpoint() -> None:
    records = [{"event": "start", "ln_ches": -1.5}]
    records += [{"event": "eval", "step": s, "eval/margin": float(s), "eval/length_correlation": None} for s in (0, 5, 10)]
    told = [("margin, nats", 5.0), ("ln-CHES under the model at the start", -1.5)]
    assert heldout_rows({"best_step": 5}, records) == told
    assert heldout_rows({}, records)[0] == ("margin, nats", 10.0) and heldout_rows({}, []) == []


def test_answers_that_nobody_judged_have_no_columns_for_it(tmp_path: Path) -> None:
    for side in ("base", "aligned"):
        (tmp_path / f"{side}.jsonl").write_text('{"prompt": "p", "text": "a", "score": null}\n{"prompt": "q", "text": "b"}\n')
    shown, count = answer_pairs(tmp_path)
    assert count == 2 and shown[0] == {"prompt": "p", "pictures": [], "base": {"text": "a"}, "aligned": {"text": "a"}}


def test_summary_that_is_no_object_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"summary\.json: expected a JSON object, got list"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text('{"a": 1,\n nope}')
    with pytest.raises(ValueError, match=r"summary\.json:2: not valid JSON"):
        write_report(tmp_path)


def test_log_counts_what_it_cannot_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "train", "step": 1}\n[1]\n{"torn')
    records, unreadable = read_log(log)
    assert len(records) == 1 and unreadable == 2


def test_thin_keeps_the_mean_and_the_limit() -> None:
    steps, values = thin((np.arange(10.0 * POINTS), np.arange(10.0 * POINTS) ** 2))
    assert len(steps) == POINTS
    assert np.isclose(values.mean(), np.mean(np.arange(10.0 * POINTS) ** 2))
    assert [len(a) for a in thin((np.array([]), np.array([])))] == [0, 0]


def test_series_leaves_out_what_is_not_finite() -> None:
    records = [{"event": "train", "step": i, "loss": v} for i, v in enumerate([0.5, "NaN", float("inf"), None, True, 0.25])]
    steps, values = series([*records, {"event": "eval", "step": 9, "loss": 1.0}], "train", "loss")
    assert steps.tolist() == [0, 5] and values.tolist() == [0.5, 0.25]


def test_a_run_without_summary_shows_the_newest_evaluation() -> None:
    records = [{"event": "eval", "eval/by_time": [{"bucket": "t0", "accuracy": v}]} for v in (0.5, 0.6)]
    assert timestep_rows({}, records)[0]["accuracy"] == 0.6
    assert timestep_rows({"by_timestep": [{"bucket": "t1"}]}, records)[0]["bucket"] == "t1"


def test_ledger_is_flat_and_complete() -> None:
    summary = {"pairs": {"train": 3}, "data": {"rows": {"used": 3, "skipped": {"tie": 1}}, "examples": ["row 7", "row 9"]}}
    rows = [("rows, used", 3), ("rows, skipped, tie", 1), ("examples", "row 7, row 9"), ("pairs trained on", 3)]
    assert ledger_rows(summary, [], 0) == [*rows, ("log records", 0)]


def test_other_prompts_come_before_other_seeds(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "run")
    shown, count = picture_pairs(run / "samples", {"prompts": ["two circles", "two circles", "a cross"]})
    assert [item["prompt"] for item in shown] == ["two circles", "a cross", "two circles"] and count == 3


def test_captions_are_those_of_the_numbers(tmp_path: Path) -> None:
    """Of pictures of which one was deleted, and where as text 1000 comes before 101."""
    for side in ("base", "aligned"):
        (tmp_path / side).mkdir()
        for place in (0, 2, 101, 1000):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / side / f"{place:03d}.png")
    shown, _ = picture_pairs(tmp_path, {"prompts": [f"prompt {i}" for i in range(1001)]})
    assert [item["prompt"] for item in shown] == ["prompt 0", "prompt 2", "prompt 101", "prompt 1000"]
    shown, _ = picture_pairs(tmp_path, {"prompts": {"002": "by its name"}})
    assert [item["prompt"] for item in shown] == ["000", "by its name", "101", "1000"]


def test_provenance_names_what_it_knows(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    (tmp_path / "CURRENT").write_text("step-1\n")
    (checkpoint / "MANIFEST.json").write_text('{"environment": {"torch": "2.12.1"}}')
    assert environment(tmp_path) == {"torch": "2.12.1"} and environment(tmp_path / "none") == {}
    recipe = {"model": {"path": "embedded"}, "objective": [{"loss": "dpo"}, {"loss": "nll"}], "seed": 7}
    rows = [("model", "embedded"), ("objective", "dpo + nll"), ("seed", "7"), ("ran with", "torch 2.12.1")]
    assert provenance_rows({}, recipe, environment(tmp_path)) == rows


def test_words_and_numbers() -> None:
    assert [number(v) for v in (0.12345, 3, None, float("nan"), "tie")] == ["0.123", "3", "not measured", "not finite", "tie"]
    assert [duration(s) for s in (9.4, 117.4, 7260)] == ["9 s", "1 min 57 s", "2 h 1 min"]
    rate = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 9}
    assert headline({"win_rate": rate})[0].startswith("The aligned model wins 70\N{NO-BREAK SPACE}% of 9")
    assert [number(v) for v in (-0.5, 1849108)] == ["\N{MINUS SIGN}0.500", "1,849,108"]
    assert score_rows({"base": {"score": 0.5}, "aligned": {"score": None}})[0]["change"] == ""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_report_renders_in_a_browser(run: Path, tmp_path: Path) -> None:
    for width in (500, 1920):  # headless chromium opens no window narrower than 500
        picture = tmp_path / f"{width}.png"
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        command += [f"--window-size={width},3000", f"--screenshot={picture}", (run / "report.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert pixels.shape[1] == width
        assert (pixels < 128).mean() > 0.005, "the page came out empty"
