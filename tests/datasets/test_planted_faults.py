"""A thousand rows of text alone, one picture and several, a hundred of them spoilt: each is named, and the rest trains."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmpo import cli, media
from mmpo.datasets.load import load
from mmpo.datasets.validate import validate

ROWS, FAULTS, PHOTOS = 1000, 100, 40
NOISE = np.random.default_rng(0).integers(0, 256, (PHOTOS, 28, 28, 3), np.uint8)
Row = dict[str, Any]
Fault = tuple[str, str]  # the field that the report has to name, and what it has to say of it

CMYK = "CMYK picture (its colours converted to RGB)"
SAYS = {
    "missing file": "expected a file under the dataset root, found .*No such file",
    "placeholder count": "expected as many pictures as the text has places for them, [0-9], found [0-9]",
    "truncated JPEG": "expected a whole still image, found image .*truncated",
    "animated GIF": "expected a whole still image, found image .*animated; expected one still image",
    "CMYK": re.escape(CMYK),
    "outside the root": "expected a file under the dataset root, found .*(contains '..'|is absolute|leads out of|is a URL)",
    "empty answer": r"empty answer \(skipped\)",
    "identical sides": r"identical sides \(skipped\)",
}
REFUSED = ("missing file", "placeholder count", "truncated JPEG", "animated GIF", "outside the root")


def spoiler(name: str) -> Callable[[Row, int], Fault]:
    """What spoils a row (with pictures, where the fault is one of them) for the n-th time, as name and position vary."""

    def other_file(*files: str) -> Callable[[Row, int], Fault]:
        def spoil(row: Row, n: int) -> Fault:
            at = n % len(row["images"])
            row["images"][at] = files[n % len(files)]
            return f"images[{at}]", SAYS[name]

        return spoil

    def miscount(row: Row, n: int) -> Fault:
        if n % 2:
            row["images"] = row["images"][1:]
        else:
            row["prompt"][0]["content"].insert(0, {"type": "image"})
        return "images", SAYS[name]

    def blank_answer(row: Row, n: int) -> Fault:
        side = ("chosen", "rejected")[n % 2]
        row[side][0]["content"] = ("", " \n")[n // 2 % 2]
        return side, SAYS[name]

    def same(row: Row, n: int) -> Fault:
        row["rejected"] = row["chosen"]
        return "chosen, rejected", SAYS[name]

    return {
        "missing file": other_file("photos/gone.png", "nowhere/1.png"),
        "placeholder count": miscount,
        "truncated JPEG": other_file("photos/cut.jpg"),
        "animated GIF": other_file("photos/moving.gif"),
        "CMYK": other_file("photos/print.jpg"),
        "outside the root": other_file("../secret.png", "photos/link.png", "/etc/hostname", "file:///etc/hostname"),
        "empty answer": blank_answer,
        "identical sides": same,
    }[name]


def row_of(i: int) -> Row:
    """Text alone, one picture, or two to four; the answer names a colour, so that no two rows are the same pair."""
    count = (0, 1, 2 + i // 3 % 3)[i % 3]
    shown = [f"photos/{(i * 7 + k) % PHOTOS}.{'jpg' if (i * 7 + k) % 2 else 'png'}" for k in range(count)]
    words = f"Question {i}: what is it?"
    parts: Any = [{"type": "image"}] * count + [{"type": "text", "text": words}] if count else words
    prompt = [{"role": "user", "content": parts}]
    chosen, rejected = ([{"role": "assistant", "content": f"{answer} {i}"}] for answer in ("a red fox", "a blue dog"))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": shown}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Fault], Counter[str]]:
    """The data set, the faults by row, and how many of each kind."""
    top = tmp_path_factory.mktemp("planted")
    folder = top / "data"
    (folder / "photos").mkdir(parents=True)
    for i in range(PHOTOS):
        kind = ("PNG", "JPEG")[i % 2]
        (folder / "photos" / f"{i}.{'jpg' if i % 2 else 'png'}").write_bytes(media.encode(NOISE[i], kind))
    spoil(folder / "photos")
    (top / "secret.png").write_bytes(media.encode(NOISE[0]))
    (folder / "photos" / "link.png").symlink_to(top / "secret.png")
    rows, random = [row_of(i) for i in range(ROWS)], np.random.default_rng(5)
    pictured = [i for i in range(ROWS) if rows[i]["images"]]
    places = random.choice(pictured, FAULTS, replace=False).tolist()
    faults, kinds = {}, Counter[str]()
    for n, i in enumerate(places):
        name = list(SAYS)[n % len(SAYS)]
        rows[i] = json.loads(json.dumps(rows[i]))  # no list shared with others
        faults[i], kinds[name] = spoiler(name)(rows[i], kinds[name]), kinds[name] + 1
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl", faults, kinds


def spoil(photos: Path) -> None:
    """A JPEG without its end, a GIF of two frames, and a JPEG for print."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = media.encode(noise, "JPEG", quality=90)
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name, picture, more in (
        ("moving.gif", frames[0], {"format": "GIF", "save_all": True, "append_images": frames[1:]}),
        ("print.jpg", Image.fromarray(noise).convert("CMYK"), {"format": "JPEG"}),
    ):
        buffer = io.BytesIO()
        picture.save(buffer, **more)
        (photos / name).write_bytes(buffer.getvalue())


def test_exactly_the_planted_faults_are_reported(planted: Any) -> None:
    """By row, field and reason, on the command line's own report; nothing else is, and every other row is used."""
    path, faults, kinds = planted
    report = validate(path)
    named = [re.fullmatch(r"pairs\.jsonl:line (\d+) field '([^']+)': (.*)", line) for line in report.lines()]
    found = {int(m[1]) - 1: (m[2], m[3]) for m in named if m}
    assert len(faults) == FAULTS and sum(m is not None for m in named) == FAULTS
    assert found.keys() == faults.keys()
    for row, (field, says) in faults.items():
        assert found[row][0] == field and re.search(says, found[row][1]), (row, found[row], says)
    ledger = report.ledger
    assert kinds == Counter({name: 13 if n < 4 else 12 for n, name in enumerate(SAYS)})
    assert ledger.refused.total() == sum(kinds[name] for name in REFUSED)
    assert ledger.skipped == {name: kinds[name] for name in ("empty answer", "identical sides")}
    assert ledger.notes == {CMYK: kinds["CMYK"]}
    assert ledger.used == report.pairs == ROWS - FAULTS + kinds["CMYK"]
    assert (
        ledger.refused["animated image"] == kinds["animated GIF"]
        and ledger.refused["undecodable image"] == kinds["truncated JPEG"]
    )
    assert ledger.refused["missing file"] == kinds["missing file"]
    assert ledger.refused["placeholder count"] == kinds["placeholder count"]


def test_the_rest_loads_and_is_what_was_written(planted: Any) -> None:
    path, faults, _ = planted
    pairs, _ = load(path, on_bad="skip")
    whole = [i for i in range(ROWS) if i not in faults or CMYK in faults[i][1].replace("\\", "")]
    assert len(pairs) == len(whole)
    for pair, i in zip(pairs, whole, strict=True):
        row = json.loads(path.read_text().splitlines()[i]) if i % 100 == 0 else row_of(i)
        shown = [b for b in pair.prompt if b.kind == "image"]
        assert len(shown) == len(row["images"]) and str(pair.chosen[0].data).endswith(f" {i}")
        assert i in faults or [b.path for b in shown] == row["images"]
    distinct = {b.digest for p in pairs for b in p.prompt if b.kind == "image"}
    assert len(distinct) == PHOTOS + 1
    held = {id(b.data) for p in pairs for b in p.prompt if b.kind == "image"}
    assert len(held) == len(distinct)  # each file is in memory once


@pytest.mark.slow
def test_the_rest_trains(planted: Any, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two steps of the tiny LLaVA; the run accounts for all thousand rows."""
    path, _, kinds = planted
    settings = ["train.steps=2", "train.batch_size=4", "train.warmup=0", "eval.every=2", "eval.pairs=4", "eval.draws=1"]
    settings += ["model.adapter=lora", "model.lora.rank=2", "model.sample.max_new_tokens=4", "data.pairing=null"]
    settings += [f"model.path={family_folder('llava')}", f"data.path={path}", "data.heldout=0.02", "data.on_bad=skip"]
    assert cli.main(["train", "--modality", "vlm", *settings, f"out={tmp_path / 'run'}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    used = ROWS - FAULTS + kinds["CMYK"]
    assert summary["data"]["rows"].startswith(f"{ROWS} rows = {used} used + 24 skipped + 64 refused")
    assert summary["data"]["pairs"] == used == summary["pairs"]["train"] + summary["data"]["heldout"]
