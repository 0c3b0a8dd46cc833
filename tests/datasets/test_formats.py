"""Importers and exporters, on real photographs with degraded twins and on the damage that real files have."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from mmpo import cli, media
from mmpo.datasets.convert import convert
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.formats.pick_a_pic import write_pick_a_pic
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, load, load_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.validate import validate
from mmpo.errors import DataError, RecipeError
from mmpo.pair import Pair, image, text

SHARED = Path(os.environ.get("MMPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "prompts" / "imagereward_test.json").is_file(), reason="the shared test data (MMPO_TEST_DATA) is not here"
)


def picture(value: int, width: int = 4) -> bytes:
    return media.encode(np.full((4, width, 3), (value % 256, value // 256, 7), np.uint8))


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    """Real photographs by caption, 160 pixels wide."""
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    china, flower = datasets.load_sample_images().images
    full = {
        "a portrait of an astronaut": data.astronaut(),
        "a cup of coffee": data.coffee(),
        "a cat looking at the camera": data.chelsea(),
        "a rocket on its launch pad": data.rocket(),
        "a Chinese temple": china,
        "a flower": flower,
    }
    return {caption: np.asarray(Image.fromarray(p).resize((160, 120))) for caption, p in full.items()}


def degraded(photo: np.ndarray) -> list[bytes]:
    """Three worse twins: blurred, compressed to death, noisy."""
    blurred = np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(4)))
    noise = np.random.default_rng(0).normal(0, 40, photo.shape)
    noisy = np.clip(photo + noise, 0, 255).astype(np.uint8)
    return [media.encode(blurred, "JPEG", quality=90), media.encode(photo, "JPEG", quality=5), media.encode(noisy)]


@pytest.fixture
def pick(tmp_path: Path, photos: dict[str, np.ndarray]) -> Path:
    """Pick-a-Pic of 18 good rows, then 5 to be skipped and 13 bad ones."""
    rows: list[dict[str, Any]] = []
    side = 0
    for caption, photo in photos.items():
        for twin in degraded(photo):
            good, side = media.encode(photo, "JPEG", quality=95), 1 - side
            jpgs = (good, twin) if side else (twin, good)
            rows.append({"caption": caption, "jpg_0": jpgs[0], "jpg_1": jpgs[1], "label_0": float(side), "label_1": 1.0 - side})
    photo = next(iter(photos.values()))
    best, worst = media.encode(photo), degraded(photo)[0]
    row: dict[str, Any] = {"caption": "x", "jpg_0": best, "jpg_1": worst, "label_0": 1.0, "label_1": 0.0}
    tie = {"label_0": 0.5, "label_1": 0.5}
    skipped: list[dict[str, Any]] = [tie, tie, {"jpg_1": best}, {"are_different": False}, {"has_label": False}]
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    bad: list[dict[str, Any]] = [
        {"caption": None}, {"caption": "  "}, {"label_0": 2.0}, {"label_0": None}, {"label_1": 1.0}, {"label_0": 0.5},
        {"jpg_0": None}, {"jpg_1": b""}, {"jpg_0": b"not an image"}, {"jpg_1": best[: len(best) // 2]},
        {"jpg_0": gif.getvalue()}, {"label_0": float("nan")}, {"weight": -1.0},
    ]  # fmt: skip
    rows += [{**row, **change} for change in (*skipped, *bad)]
    columns = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "are_different", "has_label", "weight"]
    path = tmp_path / "pick.parquet"
    pq.write_table(pa.Table.from_pylist([{c: r.get(c) for c in columns} for r in rows]), path)
    return path


SKIPPED = {"tie": 2, "identical sides": 1, "are_different is false": 1, "has_label is false": 1}
REFUSED = {
    "missing prompt": 2, "bad label_0": 1, "missing label_0": 1, "label_0 not finite": 1, "bad label_1": 2, "missing image": 2,
    "undecodable image": 2, "animated image": 1, "bad weight": 1,
}  # fmt: skip


def test_pick_a_pic_counts_every_row(pick: Path, photos: dict[str, np.ndarray]) -> None:
    pairs, ledger = load(pick, on_bad="skip")
    assert ledger.rows == 18 + 5 + 13 and ledger.used == len(pairs) == 18
    assert ledger.skipped == SKIPPED and ledger.refused == REFUSED
    assert ledger.examples["tie"] == ["pick.parquet:row 18", "pick.parquet:row 19"]
    for pair in pairs:  # the photograph is always the chosen one
        chosen, rejected = (media.pixels(b).astype(int) for b in (pair.chosen[0], pair.rejected[0]))
        assert abs(chosen - photos[pair.caption]).mean() < abs(rejected - photos[pair.caption]).mean()
        assert isinstance(pair.chosen[0].data, bytes)  # the file's bytes: pictures are opened one at a time, when needed
    assert "36 rows = 18 used + 5 skipped + 13 refused" in str(ledger)


def test_pick_a_pic_soft_ties(pick: Path) -> None:
    pairs, ledger = load(pick, on_bad="skip", ties="soft")
    assert [p.label for p in pairs].count(0.5) == 2 and ledger.used == 20 and "tie" not in ledger.skipped
    assert pairs[-1].id == pairs[-2].id + "#2" and ledger.notes["repeated pairs (kept)"] == 1


def test_pick_a_pic_refuses_with_file_row_field_expected_and_found(pick: Path) -> None:
    with pytest.raises(DataError, match=r"pick.parquet:row 23 field 'caption': expected text that is not empty, found nothing"):
        load(pick)
    assert len(load(pick, limit=18)[0]) == 18  # nothing behind the limit is read


def test_validate_lists_everything(pick: Path) -> None:
    report = validate(pick)
    assert report.format == "pick_a_pic" and report.bad == 13 and report.pairs == 18 and report.prompts == 6
    lines = report.lines()
    assert lines[2] == "pick.parquet:row 25 field 'label_0': expected a number from 0 to 1, found 2.0"
    assert lines[4] == "pick.parquet:row 27 field 'label_1': expected 0, as label_0 is 1, found 1.0"
    assert "refused 2: undecodable image" in str(report) and "animated" in str(report)
    assert report.ledger.skipped == SKIPPED and report.ledger.refused == REFUSED


def test_folder_of_parquets_and_paths_in_cells(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    row = {"caption": "c", "jpg_0": {"bytes": None, "path": "a.png"}, "jpg_1": {"bytes": picture(2), "path": None}}
    for shard in range(2):
        table = pa.Table.from_pylist([{**row, "caption": f"c{shard}", "label_0": 0, "label_1": 1}])
        pq.write_table(table, tmp_path / f"{shard}.parquet")
    pairs, _ = load(tmp_path)
    assert [p.caption for p in pairs] == ["c0", "c1"] and pairs[0].rejected[0].path == "a.png"


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        (
            "a.jsonl",
            "{bad\n" * 100 + GOOD,
            "the first 100 rows are all bad: a.jsonl:line 1 field '.line.': expected a JSON object",
        ),
        ("a.jsonl", "{bad\n" * 3, "no row can be read: a.jsonl:line 1 "),
        ("a.jsonl", GOOD.encode("utf-16"), "expected text in UTF-8; found UTF-16"),
        ("a.jsonl", GOOD.encode("utf-16-be"), "expected text in UTF-8; found UTF-16"),
        ("a.csv", "prompt,chosen,rejected\np,a,b\n".encode("utf-16"), "expected text in UTF-8; found UTF-16"),
        ("a.json", '{\n "prompt": "p",\n "chosen": "a"\n}\n', "or one JSON object a line; found one object over many lines"),
        (
            "a.csv",
            "prompt;chosen;rejected\np;a;b\n",
            "separated by commas .*; found the header prompt;chosen;rejected, with ';'",
        ),
        ("a.csv", "prompt,chosen,rejected\n", "there is nothing to read in it: no rows"),
        ("a.jsonl", "", "there is nothing to read"),
    ],
)
def test_a_file_with_a_bad_head_is_told_what_is_wrong_with_it(tmp_path: Path, name: str, raw: str | bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    report = validate(tmp_path / name)
    assert report.bad and re.search(said, report.fatal or ""), report.fatal
    if "set the format" in str(report.fatal) and GOOD in str(raw):
        found = validate(tmp_path / name, format="trl")
        assert found.pairs == 1 and found.ledger.refused == {"bad JSON": 100}


def test_splits_side_by_side_are_refused_and_hidden_files_left_out(tmp_path: Path) -> None:
    """Read as one table, the test split would train."""
    data, table = tmp_path / "data", pa.Table.from_pylist([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    data.mkdir()
    for name in ("train_sft-00000-of-00002", "train_sft-00001-of-00002", ".tmp-123"):
        pq.write_table(table, data / f"{name}.parquet")
    assert len(load(tmp_path)[0]) == 2
    told = validate(tmp_path).lines()
    files = "data/train_sft-00000-of-00002.parquet, data/train_sft-00001-of-00002.parquet"
    assert f"{tmp_path}: reads 2 parquet files: {files}" in told
    assert f"{tmp_path}: leaves out 1 with a hidden name: data/.tmp-123.parquet" in told
    for other in ("data/test-00000-of-00001", "validation/0000", "dev"):
        path = tmp_path / f"{other}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path)
        with pytest.raises(DataError, match=rf"2 splits: .*{other}.parquet.*; name one file, or a folder of one split"):
            load(tmp_path)
        assert len(load(path)[0]) == 1
        path.unlink()
    for name in ("train_sft-00000-of-00002", "train_sft-00001-of-00002"):
        (data / f"{name}.parquet").rename(data / f"pairs-{name[-14:]}.parquet")
    assert len(load(tmp_path)[0]) == 2
    pq.write_table(table, data / "train.parquet")
    assert len(load(tmp_path)[0]) == 3, "what names no split is taken for training data"
    (data / "train.parquet").rename(data / "pairs_test.parquet")
    with pytest.raises(DataError, match=r"2 splits: test \(data/pairs_test.parquet\), unnamed \(data/pairs-00000-of-00002"):
        load(tmp_path)


def photo_pairs(photos: dict[str, np.ndarray]) -> list[Pair]:
    rows = []
    for i, (caption, photo) in enumerate(photos.items()):
        sides = ((image(media.encode(photo)),), (image(degraded(photo)[1]),))
        scores = {"chosen": 0.25 + i, "rejected": -1.0}
        rows.append(Pair(f"id{i}", (text(caption),), *sides, weight=0.5, margin=float(i), scores=scores))
    return rows


def test_written_pairs_come_back(tmp_path: Path, photos: dict[str, np.ndarray]) -> None:
    pairs = photo_pairs(photos)
    assert write_pick_a_pic(pairs, tmp_path / "out.parquet") == 6
    back, ledger = load(tmp_path / "out.parquet")
    for a, b in zip(pairs, back, strict=True):
        assert (a.prompt, a.chosen, a.rejected) == (b.prompt, b.chosen, b.rejected)
        assert (a.weight, a.margin, dict(a.scores), a.label) == (b.weight, b.margin, dict(b.scores), b.label)
    labels = pq.read_table(tmp_path / "out.parquet")["label_0"].to_pylist()
    assert set(labels) == {0.0, 1.0}  # the winner is not always image 0
    again, _ = load(tmp_path / "out.parquet")
    assert [p.id for p in again] == [p.id for p in back] and not list(tmp_path.glob("*.partial"))


def test_pick_a_pic_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    one = image(picture(1))
    for pair in (
        Pair("u", (text("c"),), (one,)),
        Pair("s", (text("c"),), (one,), (image(picture(2)),), label=0.3),
        Pair("t", (one,), (one,), (one,)),
    ):
        with pytest.raises(DataError, match=f"pair {pair.id}"):
            write_pick_a_pic([pair], tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())


def rescored(**changes: Any) -> dict[str, Any]:
    """A row as SmPO's copy of Pick-a-Pic has it: PickScores as lists of one cosine. People preferred image 0."""
    row = {"caption": "c", "jpg_0": picture(1), "jpg_1": picture(2), "label_0": 1.0, "label_1": 0.0, "ps_label_0": 1}
    return row | {"ps_score_0": [0.23], "ps_score_1": [0.21]} | changes


def test_pick_scores_become_the_published_soft_labels(tmp_path: Path) -> None:
    """The softmax of both scores, each brought to [0, 1] by the least and greatest of the data, as SmPO's train.py has it."""
    turned = {"ps_score_0": [0.18], "ps_score_1": [0.24]}
    rows = [rescored(), rescored(**turned), rescored(ps_score_0=None), rescored(label_0=0.5, label_1=0.5)]
    pq.write_table(pa.Table.from_pylist([*rows, rescored(ps_score_1=[21.0])]), tmp_path / "ps.parquet")
    low, high = 0.11543526500463486, 0.28201571106910706
    normed = [math.exp((score - low) / (high - low)) for score in (0.23, 0.21, 0.24, 0.18)]
    pairs, ledger = load(tmp_path / "ps.parquet", on_bad="skip")
    wanted = [normed[0] / (normed[0] + normed[1]), normed[2] / (normed[2] + normed[3]), 1.0]
    assert [p.label for p in pairs] == pytest.approx(wanted) and wanted[0] < 0.6
    assert [p.chosen[0].data for p in pairs] == [picture(1), picture(2), picture(1)]  # PickScore overrules people
    assert [dict(p.scores) for p in pairs[:2]] == [{"chosen": 0.23, "rejected": 0.21}, {"chosen": 0.24, "rejected": 0.18}]
    assert ledger.skipped == {"tie": 1} and ledger.refused == {"bad ps_score_1": 1}
    assert "note 2: soft labels" in str(validate(tmp_path / "ps.parquet"))


def test_labels_in_between_are_soft_and_come_back(tmp_path: Path) -> None:
    rows = [rescored(ps_score_0=None, label_0=a, label_1=1 - a) for a in (0.7, 0.2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "soft.parquet")
    pairs, ledger = load(tmp_path / "soft.parquet")
    assert [(p.label, p.chosen[0].data) for p in pairs] == [(0.7, picture(1)), (0.8, picture(2))]
    assert ledger.notes == {"soft labels": 2}
    write_pick_a_pic(pairs, tmp_path / "again.parquet")
    assert load(tmp_path / "again.parquet")[0] == pairs


def test_convert_round_trip(tmp_path: Path, capsys: Any) -> None:
    """A folder and its conversion are the same pairs; candidates by path become candidates inside one file, and pairs."""
    folder(tmp_path / "f", {"chosen/1.png": 1, "rejected/1.png": 2, "chosen/2.png": 3, "rejected/2.png": 4, "chosen/3.png": 5})
    for stem in "123":
        (tmp_path / "f" / f"{stem}.txt").write_text(f"caption {stem}")
    count, ledger = convert(tmp_path / "f", "pick_a_pic", tmp_path / "p.parquet", on_bad="skip")
    assert count == 2 and ledger.refused == {"missing image": 1}

    def plain(pairs: list[Pair]) -> list[tuple[Any, ...]]:
        return [(p.id, p.caption, p.chosen[0].digest, p.rejected[0].digest, p.label) for p in pairs]

    assert plain(load(tmp_path / "p.parquet")[0]) == plain(load(tmp_path / "f", on_bad="skip")[0])
    lines = [{"prompt": "p", "image": f"chosen/{i}.png", "score": i, "seed": i} for i in (1, 2, 3)]
    (tmp_path / "f" / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["data", "convert", str(tmp_path / "f" / "c.jsonl"), "--from", "candidates", "--to"]
    assert cli.main([*words, "candidates", "--out", str(tmp_path / "c.parquet")]) == 0
    assert "3 rows of format candidates\n3 rows = 3 used" in capsys.readouterr().out
    ((one, *_),) = load_candidates(tmp_path / "c.parquet")[0].values()
    assert (one.block.data, one.score, one.seed) == (picture(1), 1.0, 1)
    assert cli.main([*words, "pick_a_pic", "--out", str(tmp_path / "best.parquet")]) == 0
    assert [p.scores for p in load(tmp_path / "best.parquet")[0]] == [{"chosen": 3.0, "rejected": 1.0}]


def test_convert_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    folder(tmp_path, {"a.png": 1})
    (tmp_path / "k.csv").write_text("file_path,caption,label\na.png,c,1\n")
    out = tmp_path / "out.parquet"
    for to, path, message in (
        ("ranked", "k.csv", r"no writer for 'ranked' \(there are: .*candidates, .*pick_a_pic"),
        ("candidates", "k.csv", "do not say what one answer is worth"),
        ("pick_a_pic", "k.csv", "holds one text and two images"),
    ):
        with pytest.raises(RecipeError if to == "ranked" else DataError, match=message):
            convert(tmp_path / path, to, out)
    write_candidates([Candidate((text("p"),), image(picture(1)), 1.0)], out)
    with pytest.raises(DataError, match="replaced while it is read"):
        convert(out, "candidates", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "k.csv", "out.parquet"]


def folder(root: Path, names: dict[str, int]) -> None:
    for name, value in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(value, 4 if value < 50 else 6))


def test_image_folder_matched_by_stem(tmp_path: Path) -> None:
    folder(tmp_path, {"chosen/1.png": 1, "rejected/1.PNG": 2, "chosen/2.png": 3, "rejected/2.webp": 60, "chosen/3.png": 5})
    folder(tmp_path, {"chosen/4.png": 6, "chosen/4.jpg": 6, "rejected/4.png": 7, "chosen/5.png": 8, "rejected/5.png": 9})
    folder(tmp_path, {"chosen/6.png": 10, "rejected/6.png": 10})
    (tmp_path / "chosen" / "7.tiff").write_bytes(b"II*")
    (tmp_path / "1.txt").write_text("one\n")
    lines = [{"file_name": "chosen/2.png", "text": "two"}, {"file_name": "rejected/6.png", "caption": "six"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert detect(tmp_path) == "image_folder"
    pairs, ledger = load(tmp_path, on_bad="skip")
    assert [p.caption for p in pairs] == ["one", "two"]
    assert ledger.refused == {"missing image": 1, "two files of one name": 1, "missing prompt": 1}
    assert ledger.skipped == {"identical sides": 1} and ledger.rows == 6
    assert ledger.notes == {"sides of different size (kept)": 1, "entries of chosen/ that are no image file (ignored)": 1}
    with pytest.raises(DataError, match=r"row 2 \(3\) field 'rejected': expected one file rejected/3"):
        load(tmp_path)


def test_image_folder_with_metadata(tmp_path: Path) -> None:
    folder(tmp_path, {"a.png": 1, "sub/b.png": 2})
    rows = [{"chosen_file_name": "a.png", "rejected_file_name": "sub/b.png", "text": "ok"}]
    rows += [{"chosen_file_name": "a.png", "rejected_file_name": n, "text": "t"} for n in ("../a.png", "/etc/passwd", "c.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\nnot json\n\n[1]\n")
    pairs, ledger = load(tmp_path, on_bad="skip")
    assert [p.caption for p in pairs] == ["ok"] and pairs[0].rejected[0].path == "sub/b.png"
    assert ledger.refused == {"forbidden path": 2, "missing file": 1, "bad JSON": 1, "not an object": 1}
    assert ledger.examples["bad JSON"] == ["metadata.jsonl:line 5"]
    assert ledger.examples["not an object"] == ["metadata.jsonl:line 7"]


def test_conflicting_captions_are_an_error(tmp_path: Path) -> None:
    folder(tmp_path, {"chosen/1.png": 1, "rejected/1.png": 2})
    lines = [{"file_name": f"{side}/1.png", "text": side} for side in ("chosen", "rejected")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="second, different caption for '1'"):
        load(tmp_path)
    assert validate(tmp_path).bad == 1


def test_ranked_makes_all_strict_pairs(tmp_path: Path) -> None:
    folder(tmp_path, {f"{i}.png": i for i in range(4)})
    names = [f"{i}.png" for i in range(4)]
    rows = [
        {"prompt": "a", "generations": names, "ranking": [2, 1, 2, 5]},
        {"prompt": "b", "generations": names[:2], "ranking": [1, 1]},
        {"prompt": "c", "generations": names, "ranking": [1, 2]},
        {"prompt": "d", "generations": names[:2], "ranking": [0, "1"]},
        {"prompt": "e", "generations": [names[0], "missing.png"], "ranking": [1, 2]},
        "row",
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    pairs, ledger = load(tmp_path / "r.json", on_bad="skip")
    got = {(p.chosen[0].path, p.rejected[0].path) for p in pairs}
    assert got == {("1.png", "0.png"), ("1.png", "2.png"), ("1.png", "3.png"), ("0.png", "3.png"), ("2.png", "3.png")}
    assert ledger.notes["pairs of equal rank dropped"] == 2  # one in each of the first two rows
    assert ledger.used == 1 and ledger.skipped.total() == 1 and ledger.refused.total() == 4 and ledger.rows == len(rows)
    soft, _ = load(tmp_path / "r.json", on_bad="skip", ties="soft")
    assert len(soft) == 7 and [p.label for p in soft].count(0.5) == 2


def test_unpaired_csv(tmp_path: Path) -> None:
    folder(tmp_path, {"a.png": 1, "b.png": 2})
    body = (
        'file_path,caption,label\r\na.png,"one, two",1\r\nb.png,b,False\r\nb.png,b,0.5\r\nb.png,,0\r\n/a.png,b,1\r\nb.png,b\r\n'
    )
    (tmp_path / "k.csv").write_bytes(b"\xef\xbb\xbf" + body.encode())
    pairs, ledger = load(tmp_path / "k.csv", on_bad="skip")
    assert [(p.caption, bool(p.chosen), bool(p.rejected)) for p in pairs] == [("one, two", True, False), ("b", False, True)]
    expected = {"bad label": 1, "missing prompt": 1, "forbidden path": 1, "wrong number of columns": 1}
    assert ledger.refused == expected and ledger.rows == 6
    with pytest.raises(DataError, match="k.csv:line 4 field 'label': expected 0 or 1, .*found '0.5'"):
        load(tmp_path / "k.csv")


def test_diffusion_kto_s_own_columns(tmp_path: Path) -> None:
    folder(tmp_path, {"a.png": 1})
    words = ["exclusive_win", "intersections", "exclusive_lose", "other"]
    body = "".join(f"a.png,a {word},{word}\n" for word in words)
    (tmp_path / "k.csv").write_text("file_name,caption,split\n" + body)
    pairs, ledger = load(tmp_path / "k.csv", on_bad="skip")
    assert [(bool(p.chosen), bool(p.rejected)) for p in pairs] == [(True, False), (True, False), (False, True)]
    assert ledger.refused == {"bad split": 1}


def test_candidates_round_trip_and_pairing(tmp_path: Path) -> None:
    rows = [Candidate((text(p),), image(picture(10 * i + j)), float(j % 3), j) for i, p in enumerate("ab") for j in range(4)]
    assert write_candidates(rows, tmp_path / "c.parquet") == 8
    groups, ledger = load_candidates(tmp_path / "c.parquet")
    assert [c for g in groups.values() for c in g] == rows and ledger.used == 8
    pairs, _ = load(tmp_path / "c.parquet")
    assert [p.scores for p in pairs] == [{"chosen": 2.0, "rejected": 0.0}] * 2
    pairs, ledger = load(tmp_path / "c.parquet", strategy="all")
    assert len(pairs) == 10 and ledger.notes == {"pairing dropped, pair: tied scores": 2}
    groups, ledger = load_candidates(tmp_path / "c.parquet", limit=3)
    assert [len(g) for g in groups.values()] == [3] and ledger.used == 3  # what is not read is not accounted for as used
    assert validate(tmp_path / "c.parquet").pairs == 8


def test_candidates_as_lines_with_paths(tmp_path: Path) -> None:
    folder(tmp_path, {"1.png": 1, "2.png": 2})
    rows = [
        {"prompt": "p", "image": "1.png", "score": 1},
        {"prompt": "p", "image": "2.png"},
        {"prompt": "p", "image": "1.png", "seed": "x"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups, ledger = load_candidates(tmp_path / "c.jsonl", on_bad="skip")
    assert [c.score for g in groups.values() for c in g] == [1.0, None] and ledger.refused == {"bad seed": 1}
    with pytest.raises(DataError, match="has no score; judge"):
        load(tmp_path / "c.jsonl", on_bad="skip")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("x.parquet", b"PAR1 and then nothing"),
        ("x.json", b"[1, 2"),
        ("x.json", b"[" * 100_000),
        ("x.json", b"\xff\xfe[]"),
        ("x.csv", b"a,b\n1,2\n"),
        ("x.csv", b"file_path,caption,label\xff\n"),
        ("x.csv", b"file_path,caption,label,label\na.png,a,1,1\n"),
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "p", "image": "a.png"}', mtime=0)[:-9]),
        ("x.json.gz", gzip.compress(b"[]", mtime=0)),
        ("x.jsonl", b"{" * 5000),
        ("x.json", b"[]"),
        ("x.bin", b"\0\1\2"),
        ("x.csv", b""),
    ],
)
def test_unreadable_files_are_data_errors(tmp_path: Path, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match="x\\."):
        load(tmp_path / name)
    report = validate(tmp_path / name)
    assert report.bad == 1 and report.fatal


def test_detect_names_the_formats(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        DataError, match=r"a csv with a, b fits no format; set format to one of: .*candidates, .*image_folder, .*pick_a_pic"
    ):
        detect(tmp_path / "x.csv")
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "missing")
    with pytest.raises(DataError, match="a folder with x.csv"):
        detect(tmp_path)


@pytest.mark.parametrize("wrong", [{"ties": "keep"}, {"on_bad": "ignore"}, {"format": "pick"}])
def test_wrong_options_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_pick_a_pic([Pair("a", (text("c"),), (image(picture(1)),), (image(picture(2)),))], tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="drop|refuse|pick"):
        load(tmp_path / "x.parquet", **wrong)


def test_an_empty_ledger_prints() -> None:
    assert str(Ledger()) == "0 rows = 0 used + 0 skipped + 0 refused"


@needs_shared
def test_imagereward_four_generations(tmp_path: Path) -> None:
    names = [f"imagereward_{i}.webp" for i in range(1, 5)]
    row = {"id": "0", "prompt": "an ocean with clouds and birds", "generations": names, "ranking": [1, 2, 3, 3]}
    (tmp_path / "r.json").write_text(json.dumps([row]))
    pairs, ledger = load(tmp_path / "r.json", root=SHARED / "image")
    assert len(pairs) == 5 and ledger.notes == {"pairs of equal rank dropped": 1}
    assert media.pixels(pairs[0].chosen[0]).shape == (512, 512, 3)
    assert write_pick_a_pic(pairs, tmp_path / "p.parquet") == 5
    assert {p.id for p in load(tmp_path / "p.parquet")[0]} == {p.id for p in pairs}


@needs_shared
@pytest.mark.slow
def test_imagereward_all_466_prompts(tmp_path: Path) -> None:
    """The real ranks with a distinct small picture for each generation: 6,399 strict pairs and 831 ties."""
    path = SHARED / "prompts" / "imagereward_test.json"
    assert detect(path) == "ranked"
    names = [name for row in json.loads(path.read_text()) for name in row["generations"]]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    pairs, ledger = load(path, root=tmp_path)
    assert len(pairs) == 6399 and ledger.notes == {"pairs of equal rank dropped": 831}
    assert ledger.used == ledger.rows == 466 and len({p.id for p in pairs}) == len(pairs)
    assert all(p.meta["ranks"]["chosen"] < p.meta["ranks"]["rejected"] for p in pairs)
    missing = validate(path, root=SHARED / "image")
    assert missing.bad == 466 and missing.ledger.refused == {"missing file": 466}
