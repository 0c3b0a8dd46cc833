"""T4: every row of a file in which three of ten rows are damaged ends as used, skipped or refused, for its own reason.

The same rows are written as JSON lines, gzipped JSON lines, a JSON list, CSV and parquet, as far as each of them can hold the
damage.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from mmpo import cli, media, prepare
from mmpo.datasets import json_rows, tables
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.ledger import BadField, Ledger, Skip, import_rows
from mmpo.datasets.load import load, load_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.validate import validate
from mmpo.errors import DataError
from mmpo.pair import image, text
from mmpo.schema import Recipe
from tests.reliability.counters import FULL, counter
from tests.tiny_run import make_world, settings

ROWS = 10_000 if FULL else 1_000  # of each of the five files
KILLS = 10 if FULL else 3  # of each of the five
LINES, CSV, PARQUET = {"jsonl", "jsonl.gz"}, {"csv"}, {"parquet"}
JSON = LINES | {"json"}
ALL = JSON | CSV | PARQUET
COLUMNS = [
    "id", "caption", "jpg_0", "jpg_1", "label_0", "label_1", "are_different", "has_label", "weight", "margin", "score_0",
    "score_1",
]  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Damage:
    """reason: what the ledger has to say. change: fields that take another value. line: what becomes of the row as bytes."""

    reason: str
    kinds: set[str]
    change: Row = field(default_factory=dict)
    line: Callable[[bytes], bytes] | None = None
    skipped: bool = False


def nested(line: bytes) -> bytes:
    return b'{"caption": ' + b"[" * 1000 + b"]" * 1000 + b"}\n"


DAMAGES = {
    "key missing": Damage("missing prompt", ALL, {"caption": None}),
    "text blank": Damage("missing prompt", ALL, {"caption": " \t "}),
    "text a number": Damage("wrong type of caption", JSON, {"caption": 7}),
    "text a list": Damage("wrong type of caption", JSON, {"caption": ["a"]}),
    "text half a surrogate pair": Damage("not Unicode", JSON, {"caption": "a \ud800 b"}),
    "text over a million characters": Damage("too long", ALL, {"caption": "x" * 1_000_001}),
    "label missing": Damage("missing label_0", ALL, {"label_0": None}),
    "label a word": Damage("wrong type of label_0", JSON | CSV, {"label_0": "yes"}),
    "label a boolean": Damage("wrong type of label_0", JSON | CSV, {"label_0": True}),
    "label NaN": Damage("label_0 not finite", ALL, {"label_0": float("nan")}),
    "label infinite": Damage("label_1 not finite", ALL, {"label_1": float("-inf")}),
    "label of 400 digits": Damage("label_0 not finite", JSON | CSV, {"label_0": 10**400}),
    "label no probability": Damage("bad label_0", ALL, {"label_0": 2.0}),
    "labels that are no preference": Damage("bad label_1", ALL, {"label_0": 1.0, "label_1": 1.0}),
    "score NaN": Damage("score_0 not finite", ALL, {"score_0": float("nan")}),
    "score of one side": Damage("missing score_1", ALL, {"score_1": None}),
    "weight negative": Damage("bad weight", ALL, {"weight": -1.0}),
    "margin infinite": Damage("margin not finite", ALL, {"margin": float("inf")}),
    "flag a word": Damage("wrong type of has_label", JSON | CSV, {"has_label": "maybe"}),
    "image missing": Damage("missing image", ALL, {"jpg_0": None}),
    "image a number": Damage("wrong type of jpg_0", JSON, {"jpg_0": 3}),
    "image absent": Damage("missing file", ALL, {"jpg_0": "img/none.png"}),
    "image a folder": Damage("not a regular file", ALL, {"jpg_0": "img"}),
    "image a pipe": Damage("not a regular file", ALL, {"jpg_1": "img/pipe"}),
    "image too large": Damage("file too large", ALL, {"jpg_1": "img/large"}),
    "image cut short": Damage("undecodable image", ALL, {"jpg_0": "img/short.png"}),
    "image no image": Damage("undecodable image", ALL, {"jpg_1": "img/text.png"}),
    "path up": Damage("forbidden path", ALL, {"jpg_0": "../secret.png"}),
    "path absolute": Damage("forbidden path", ALL, {"jpg_0": "/etc/passwd"}),
    "path with NUL": Damage("forbidden path", JSON | PARQUET, {"jpg_0": "img/0.png\0"}),
    "path a link out": Damage("path leaves the root", ALL, {"jpg_0": "img/out.png"}),
    "URL": Damage("URL", ALL, {"jpg_0": "https://example.org/a.png"}),
    "URL of a file": Damage("URL", ALL, {"jpg_0": "file:img/0.png"}),
    "tie": Damage("tie", ALL, {"label_0": 0.5, "label_1": 0.5}, skipped=True),
    "sides identical": Damage("identical sides", ALL, {"jpg_0": "img/1.png", "jpg_1": "img/1.png"}, skipped=True),
    "no label": Damage("has_label is false", ALL, {"has_label": False}, skipped=True),
    "not different": Damage("are_different is false", ALL, {"are_different": False}, skipped=True),
    "id repeated": Damage("duplicate id", ALL),
    "id a list": Damage("wrong type of id", JSON, {"id": [1]}),
    "line not JSON": Damage("bad JSON", LINES, line=lambda _: b"{caption: 1}\n"),
    "line cut short": Damage("bad JSON", LINES, line=lambda line: line[: len(line) // 2] + b"\n"),
    "line a list": Damage("not an object", JSON, line=lambda line: b"[" + line.strip(b"\xef\xbb\xbf\r\n") + b"]\n"),
    "line nested 1,000 deep": Damage("nested too deep", JSON, line=nested),
    "line of 10 MB": Damage("too long", LINES | CSV, line=lambda line: b'"' + b"x" * 10_000_000 + b'"\n'),
    "key repeated": Damage("repeated key", JSON, line=lambda line: b'{"caption": "again", ' + line.lstrip(b"\xef\xbb\xbf{")),
    "bytes no UTF-8": Damage("bad UTF-8", ALL, line=lambda line: line.replace(b"row", b"r\xffw", 1)),
    "cell missing": Damage("wrong number of columns", CSV, line=lambda line: line.split(b",", 1)[1]),
    "cell too many": Damage("wrong number of columns", CSV, line=lambda line: b"0," + line),
    "quotation without end": Damage("bad CSV", CSV, line=lambda line: line.replace(b",", b',"', 1)),
}
RARE = {"line of 10 MB": 2, "text over a million characters": 2}  # at most so many of them in a file


@dataclass
class Table:
    """Rows, the damage of each, and what has to come out."""

    rows: list[tuple[Row, Damage | None]]

    def expected(self) -> tuple[int, Counter[str], Counter[str]]:
        """used, skipped, refused."""
        bad = [d for _, d in self.rows if d is not None]
        skipped, refused = (Counter(d.reason for d in bad if d.skipped is which) for which in (True, False))
        return len(self.rows) - len(bad), skipped, refused


def sound(number: int) -> Row:
    """Images by path; some captions have commas, quotes, several lines and letters of other scripts."""
    first, second = number % 8, (number + 1 + number // 8 % 7) % 8
    extra = {0: 'a "quoted", long', 1: "two\nlines", 2: "снег 雪 ❄"}.get(number % 40, "plain")
    row = {"id": f"id {number}", "caption": f"row {number}: {extra}", "label_0": 1.0, "label_1": 0.0}
    row |= {"jpg_0": f"img/{first}.png", "jpg_1": f"img/{second}.png", "are_different": True, "has_label": True}
    return row | {"weight": 0.5, "margin": 0.0, "score_0": 2.0, "score_1": -1.0}


def table(kind: str, size: int) -> Table:
    names = [name for name, damage in DAMAGES.items() if kind in damage.kinds]
    rows: list[tuple[Row, Damage | None]] = []
    for number in range(size):
        row, damage = sound(number), None
        if number % 10 in (3, 6, 9):
            count = number // 10 * 3 + number % 10 // 3 - 1
            name = names[count % len(names)]
            if count // len(names) >= RARE.get(name, size):
                name = names[0]
            damage = DAMAGES[name]
            row = {**rows[-2][0]} if name == "id repeated" else row | copy.deepcopy(damage.change)
        rows.append((row, damage))
    return Table(rows)


def write(kind: str, found: Table, path: Path) -> dict[str, str]:
    """Write the file; returns the reason of each bad row by its location."""
    if kind == "parquet":
        return write_parquet(found, path)
    if kind == "json":
        return write_list(found, path)
    head = csv_line(dict(zip(COLUMNS, COLUMNS, strict=True))) if kind == "csv" else b""
    body, line, reasons = [b"\xef\xbb\xbf" + head if head else b""], 1 + bool(head), {}
    for number, (row, damage) in enumerate(found.rows):
        written = csv_line(row) if kind == "csv" else json_line(row, number)
        if damage and damage.line:
            written = damage.line(written)
        if damage and not damage.skipped:
            reasons[f"{path.name}:line {line}"] = damage.reason
        body.append(written)
        line += written.count(b"\n")
    path.write_bytes(gzip.compress(b"".join(body), 1) if kind == "jsonl.gz" else b"".join(body))
    return reasons


def write_list(found: Table, path: Path) -> dict[str, str]:
    """The lines of JSON as the items of one list, with the line ends and blanks of any system between them."""
    reasons, items = {}, []
    for number, (row, damage) in enumerate(found.rows):
        written = json_line(row, number)
        written = (damage.line(written) if damage and damage.line else written).removeprefix(b"\xef\xbb\xbf")
        items.append(written if number % 2 else written.strip())
        if damage and not damage.skipped:
            reasons[f"{path.name}:row {number}"] = damage.reason
    path.write_bytes(b"\xef\xbb\xbf [" + b",".join(items) + b"]\r\n")
    return reasons


def json_line(row: Row, number: int) -> bytes:
    """Some lines have a byte order mark, some the line end of another system, some an unknown key."""
    known = {k: v for k, v in row.items() if v is not None or number % 2} | ({"note": float("nan")} if number % 7 == 0 else {})
    mark = b"\xef\xbb\xbf" if number % 11 == 0 else b""
    return mark + json.dumps(known).encode() + (b"\r\n" if number % 3 == 0 else b"\n")


def csv_line(row: Row) -> bytes:
    out = io.StringIO()
    csv.DictWriter(out, COLUMNS).writerow({k: row.get(k) for k in COLUMNS})
    return out.getvalue().encode()


def write_parquet(found: Table, path: Path) -> dict[str, str]:
    """Half of the images are paths, half of them bytes; captions are written without the check that text is UTF-8."""
    rows = [{**row} for row, _ in found.rows]
    captions = [None if (c := row.pop("caption")) is None else c.encode() for row in rows]
    reasons = {}
    for number, (row, (_, damage)) in enumerate(zip(rows, found.rows, strict=True)):
        if damage and damage.line and (caption := captions[number]) is not None:
            captions[number] = damage.line(caption)
        if damage and not damage.skipped:
            reasons[f"{path.name}:row {number}"] = damage.reason
        for name in ("jpg_0", "jpg_1"):
            file = path.parent / str(row[name])
            whole = number % 2 and str(row[name]).startswith("img/") and file.suffix == ".png" and file.exists()
            inside = whole and not file.is_symlink()
            row[name] = {"bytes": file.read_bytes() if inside else None, "path": None if inside else row[name]}
    columns = pa.Table.from_pylist(rows)
    columns = columns.append_column("caption", pa.array(captions, pa.binary()).view(pa.string()))
    pq.write_table(columns, path)
    return reasons


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small images, and things that are none."""
    folder = tmp_path_factory.mktemp("rows")
    images = folder / "root" / "img"
    images.mkdir(parents=True)
    for value in range(8):
        (images / f"{value}.png").write_bytes(media.encode(np.full((4, 4, 3), 30 * value, np.uint8)))
    (images / "short.png").write_bytes((images / "1.png").read_bytes()[:50])
    (images / "text.png").write_bytes(b"not an image")
    (folder / "secret.png").write_bytes((images / "1.png").read_bytes())
    (images / "out.png").symlink_to(folder / "secret.png")
    os.mkfifo(images / "pipe")
    with open(images / "large", "wb") as file:
        file.truncate(media.MAX_BYTES + 1)  # sparse: takes no disk
    return folder / "root"


def account(ledger: Ledger) -> tuple[int, Counter[str], Counter[str]]:
    return ledger.used, +ledger.skipped, +ledger.refused


def captions_of(found: Table) -> list[str]:
    return sorted(row["caption"] for row, damage in found.rows if damage is None)


def recipe(path: Path, **data: Any) -> Recipe:
    return Recipe.model_validate({"data": {"path": str(path), "heldout": 0.1, **data}})


FILES = ("ledger.json", "quarantine.jsonl", "data_manifest.json")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


@pytest.mark.slow
def test_t4_conservation(root: Path, tmp_path: Path) -> None:
    """used + skipped + refused is the input, exact for each reason and location; so it is in other orders and after kills."""
    start, rows, pairs_lost, kills = time.monotonic(), 0, 0, 0
    for kind in ("jsonl", "jsonl.gz", "json", "csv", "parquet"):
        found, path = table(kind, ROWS), root / f"rows.{kind}"
        reasons = write(kind, found, path)
        pairs, ledger = load(path, on_bad="quarantine")
        assert account(ledger) == found.expected() and ledger.rows == len(found.rows) == ROWS, kind
        kept = [json.loads(line) for line in ledger.quarantined]
        assert {entry["where"]: entry["reason"] for entry in kept} == reasons and len(kept) == len(reasons), kind
        assert sorted(p.caption for p in pairs) == captions_of(found) and len({p.id for p in pairs}) == len(pairs)
        rows, pairs_lost = rows + ledger.rows, pairs_lost + abs(len(pairs) - found.expected()[0])
        shuffled = Table(random.Random(kind).sample(found.rows, len(found.rows)))
        write(kind, shuffled, root / f"other.{kind}")
        again, other = load(root / f"other.{kind}", on_bad="skip")
        assert account(other) == account(ledger) and sorted(p.id for p in again) == sorted(p.id for p in pairs), kind
        write(kind, Table(found.rows[:1000]), root / f"short.{kind}")
        kills += killed_and_resumed(root / f"short.{kind}", tmp_path / kind)
    assert pairs_lost == 0
    what = f"rows, 30 % damaged in {len(DAMAGES)} ways, 5 formats, shuffled, {kills} kills"
    counter("T4", what, rows, f"{rows} accounted for, 0 pairs lost or doubled", time.monotonic() - start)


def killed_and_resumed(path: Path, folder: Path) -> int:
    """Kill the reading of a run's data at random moments, then let it finish: its files are those of an undisturbed one."""
    spec = recipe(path, on_bad="quarantine")
    calm = folder / "calm"
    calm.mkdir(parents=True)
    start = time.monotonic()
    prepare.keep_account(calm, prepare.prepare(spec, "", None))
    duration, moments = time.monotonic() - start, random.Random(0)
    whole = contents(calm)
    assert set(whole) == set(FILES)
    for number in range(KILLS):
        run = folder / str(number)
        run.mkdir()
        child = os.fork()
        if child == 0:
            try:
                prepare.keep_account(run, prepare.prepare(spec, "", None))
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = contents(run)
        assert all(left[name] == whole[name] for name in left)  # whole or not there
        (run / "checkpoints" / "step-000000").mkdir(parents=True)
        prepare.keep_account(run, prepare.prepare(spec, "", None))
        assert contents(run) == whole
    return KILLS


ALONE = [
    (n, kind) for n, d in DAMAGES.items() for kind in ("jsonl", "json", "csv", "parquet") if kind in d.kinds and n not in RARE
]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in ALONE if name != "id repeated"])
def test_each_damage_alone_is_told_with_its_place(root: Path, name: str, kind: str) -> None:
    """The first row is damaged: the format is recognised all the same, and the default is to refuse."""
    damage = DAMAGES[name]
    found = Table([(sound(0) | damage.change, damage), *((sound(n), None) for n in range(1, 4))])
    path = root / f"one.{kind}"
    reasons = write(kind, found, path)
    if damage.skipped:
        assert account(load(path)[1]) == (3, Counter({damage.reason: 1}), Counter())
        return
    (where,) = reasons
    with pytest.raises(DataError, match=rf"^{where} field '.+': expected .+, found .+ \(data\.on_bad=skip, or --on"):
        load(path)
    report = validate(path)
    assert report.fatal is None and report.ledger.refused == {damage.reason: 1} and report.pairs == 3
    assert report.lines()[0].startswith(f"{where} field ")


def test_the_budget_for_bad_rows(root: Path) -> None:
    path = root / "budget.jsonl"
    rows: list[tuple[Row, Damage | None]] = [(sound(n), None) for n in range(100)]
    rows[50] = ({**rows[50][0], "caption": None}, DAMAGES["key missing"])
    write("jsonl", Table(rows), path)
    for policy in ("skip", "quarantine"):
        assert len(load(path, on_bad=policy, bad_budget=0.01)[0]) == 99
        with pytest.raises(DataError, match=r"(?s)1 of 100 rows are bad \(1.000%\), data.bad_budget allows 0.900%.*missing p"):
            load(path, on_bad=policy, bad_budget=0.009)
    with pytest.raises(DataError, match="data.bad_budget allows 0.000%"):
        prepare.prepare(recipe(path, on_bad="skip", bad_budget=0.0), "", None)
    assert len(load(path, on_bad="skip", bad_budget=0.0, limit=40)[0]) == 40  # rows behind the limit are not read


def test_quarantine_says_why_and_where_and_keeps_no_megabytes(root: Path) -> None:
    path = root / "kept.jsonl"
    path.write_bytes(json_line(sound(1), 1) + b'{"caption": "' + b"x" * 99_999 + b'", "label_0": 2}\n\xff\xfe\n')
    _, ledger = load(path, on_bad="quarantine", format="pick_a_pic")
    first, second = (json.loads(line) for line in ledger.quarantine().splitlines())
    assert first["where"] == "kept.jsonl:line 2" and first["reason"] == "missing label_1"
    assert first["row"]["caption"].endswith("(99999 characters)") and len(ledger.quarantine()) < 10_000
    assert second["where"] == "kept.jsonl:line 3" and second["reason"] == "bad UTF-8" and second["row"]["bytes"] == 3


def test_candidates_and_ranks_of_every_format(root: Path) -> None:
    """The same scored candidates as JSON lines, CSV and parquet are the same; ranks tell three apart or are bad."""
    rows = [{"prompt": "p", "image": f"img/{i}.png", "score": i / 2, "seed": i} for i in range(3)]
    (root / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "c.csv").write_text("prompt,image,score,seed\n" + "".join(f"p,img/{i}.png,{i / 2},{i}\n" for i in range(3)))
    pq.write_table(pa.Table.from_pylist(rows), root / "c.parquet")
    first, *others = (load_candidates(root / f"c.{kind}")[0] for kind in ("jsonl", "csv", "parquet"))
    assert [c.score for group in first.values() for c in group] == [0.0, 0.5, 1.0] and all(o == first for o in others)
    (root / "bad.csv").write_text("prompt,image,score,seed\np,img/0.png,nan,1\np,img/0.png,1,1.5\np,img/0.png,1,9e99\n")
    assert load_candidates(root / "bad.csv", on_bad="skip")[1].refused == {"score not finite": 1, "bad seed": 2}
    names = [f"img/{i}.png" for i in range(3)]
    ranks: list[Any] = [[2, 1, 3], [1, 1, 2], [1, 2], [1, None, 2], [0, 1, 2], [1, 2, float("nan")], "1, 2, 3", None, [2, 2, 2]]
    lines = [{"prompt": "p", "generations": names, "ranking": r} for r in ranks]
    (root / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs, ledger = load(root / "r.jsonl", on_bad="skip")
    assert len(pairs) == 5 and ledger.used == 2 and ledger.skipped.total() == 1 and ledger.rows == 9
    wrong = {"bad ranking": 3, "wrong type of ranking": 1, "ranking not finite": 1, "missing ranking": 1}
    assert ledger.refused == wrong and ledger.notes["pairs of equal rank dropped"] == 4


@pytest.mark.parametrize("rows", [3, 300])
def test_a_quotation_without_end_spoils_its_own_line_only(tmp_path: Path, rows: int) -> None:
    """Whether the file ends, or 100 lines go by, before anything closes it."""
    body = 'a,b\n1,"x\n' + "".join(f"{n},y\n" for n in range(rows)) + '7,"two\nlines"\n8,"\n9,z'
    (tmp_path / "q.csv").write_text(body)
    found = list(tables.csv_rows(tmp_path / "q.csv"))
    bad = {where: row.reason for where, row in found if isinstance(row, BadField)}
    assert bad == {"q.csv:line 2": "bad CSV", f"q.csv:line {rows + 5}": "bad CSV"}
    assert [row["a"] for _, row in found if not isinstance(row, BadField)] == [*map(str, range(rows)), "7", "9"]


@pytest.mark.parametrize(
    "text", ["", "[", "[1", "[1,", "[1,]", "[1] 2", "[,1]", "[1 2]", '[{"a": 1]', "[" * 100_000, "{}", "[nil]"]
)
def test_a_broken_list_is_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="a.json: not readable JSON: "):
        list(tables.json_rows(tmp_path / "a.json"))


def test_items_of_a_list_are_read_one_by_one(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.json").write_text(f' [ {{"a": "]}}"}} , {{"a": {deep}}},\n{{"a": {{"b": 1, "b": 2}}}}, 7, [], {{}} ] ')
    found = [row.reason if isinstance(row, BadField) else row for _, row in tables.json_rows(tmp_path / "a.json")]
    assert found == [{"a": "]}"}, "nested too deep", "repeated key", "not an object", "not an object", {}]
    (tmp_path / "a.json").write_text("[ ]\n")
    assert list(tables.json_rows(tmp_path / "a.json")) == []
    rows = ['{"a": 1}', '{"a": -%s}' % ("9" * 5000), '{"a": "x\ty"}', '{"a": 1.%s}' % ("9" * 5000), '{"a": 2}']
    for name, written in (("a.json", f"[{','.join(rows)}]"), ("a.jsonl", "\n".join(rows))):
        (tmp_path / name).write_text(written)
        found = [row.reason if isinstance(row, BadField) else row["a"] for _, row in tables.rows_of(tmp_path / name)]
        assert found == [1, "bad JSON", "bad JSON", 2.0, 2], name


def test_what_was_noted_of_a_bad_row_is_taken_back() -> None:
    def parse(row: Any) -> list[Any]:
        ledger.notes["odd"] += 1
        ledger.remark("a", "strange")
        if row["a"] is None:
            raise Skip("nothing", "a")
        return [row]

    ledger = Ledger("skip")
    rows: list[dict[str, Any]] = [{"id": 1, "a": 1}, {"id": 1, "a": 2}, {"id": 2, "a": None}]
    ledger.notes["earlier"] = 1
    assert list(import_rows([(f"f:row {i}", row) for i, row in enumerate(rows)], parse, ledger)) == rows[:1]
    assert ledger.refused == {"duplicate id": 1} and ledger.skipped == {"nothing": 1}
    assert ledger.notes == {"earlier": 1, "odd": 2, "strange": 2}, "of the used row and of the skipped one"
    assert [remark.split(" field")[0] for remark in ledger.remarks] == ["f:row 0", "f:row 2", "f:row 2"]


def test_a_string_full_of_brackets_is_not_deep_and_quotes_do_not_slow_it_down() -> None:
    assert json_rows.depth(json.dumps({"a": "[" * 5000 + '\\"' + "{" * 5000})) == 1
    assert json_rows.depth("[" * 70 + "]" * 70) == 70
    start = time.monotonic()
    json_rows.depth("[" * 100 + '"' + '\\"' * 200_000)  # a string that never ends
    assert time.monotonic() - start < 1


def test_a_changed_row_or_media_byte_is_named_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What differs is refused by name once a run has checkpoints; with `--allow-drift data` it is noted and goes on."""

    def picture(value: int) -> bytes:
        return media.encode(np.full((4, 4, 3), value, np.uint8))

    def start(allow: tuple[str, ...] = ()) -> None:
        prepare.keep_account(run, prepare.prepare(recipe(rows, on_bad="skip"), "", None), allow)

    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    run.mkdir()
    for value in range(20):
        (tmp_path / f"{value}.png").write_bytes(picture(value))
    sound_row = {"label_0": 1, "label_1": 0}
    lines = [sound_row | {"caption": f"c{n}", "jpg_0": f"{2 * n}.png", "jpg_1": f"{2 * n + 1}.png"} for n in range(10)]

    def put(changed: list[dict[str, Any]]) -> None:
        rows.write_text("\n".join(map(json.dumps, changed)))

    put(lines)
    start()
    put(lines[:9])
    start()  # nothing is lost yet: no checkpoint
    put(lines)
    start()
    (run / "checkpoints" / "step-000000").mkdir(parents=True)
    start()
    whole = contents(run)
    capsys.readouterr()
    cases: list[tuple[list[dict[str, Any]], str]] = [
        (lines[:3] + [lines[3] | {"caption": "other"}] + lines[4:], r"pair 3 \(\w+\) has another prompt\."),
        (lines[:3] + [lines[3] | {"weight": 2}] + lines[4:], r"pair 3 \(\w+\) has another label, weight, margin"),
        (lines[:3] + [lines[3] | {"jpg_1": "9.png"}] + lines[4:], r"pair 3 \(\w+\) has another rejected \(9.png\)"),
        (lines[:9], "10 pairs then, 9 now; gone: "),
        (lines[::-1], "the same pairs in another order"),
    ]
    for changed, said in cases:
        put(changed)
        with pytest.raises(DataError, match=said + ".*--allow-drift data"):
            start()
    put(lines)
    (tmp_path / "7.png").write_bytes(picture(7)[:-1] + b"\x83")  # in the last checksum: the picture is the same, a byte is not
    with pytest.raises(DataError, match=r"pair 3 \(\w+\) has another rejected \(7.png\)"):
        start()
    assert contents(run) == whole
    start(("data",))
    assert "continued, as allowed" in capsys.readouterr().out
    (note,) = json.loads((run / "data_manifest.json").read_text())["drift"]
    assert note["was"] != note["now"] and "7.png" in note["changes"][0]
    start()  # what was allowed once is the data from now on
    (run / "data_manifest.json").write_bytes((run / "data_manifest.json").read_bytes().replace(b'"digest": "', b'"digest": "0'))
    with pytest.raises(DataError, match="data_manifest.json: damaged"):
        start()


def test_the_account_is_in_the_folder_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Candidate((text(f"p{n // 2}"),), image(np.full((4, 4, 3), n, np.uint8)), float(n), n) for n in range(20)]
    write_candidates(rows, tmp_path / "c.parquet")
    spec = recipe(tmp_path / "c.parquet", pairing={"strategy": "all"})
    prepare.keep_account(tmp_path, prepare.prepare(spec, "", None))
    assert "20 rows = 20 used + 0 skipped + 0 refused" in capsys.readouterr().out
    assert json.loads((tmp_path / "ledger.json").read_text()) == {
        "rows": 20, "used": 20, "skipped": {}, "refused": {}, "notes": {}
    }  # fmt: skip
    found = json.loads((tmp_path / "data_manifest.json").read_text())
    assert found["pairs"] == len(found["rows"]) == 10 and not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_data_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T12, data: one byte of one picture and one score changed under a run that has begun: exit 3, and the run untouched."""
    world, state = make_world(tmp_path / "world"), tmp_path / "run"
    words = ["train", "--modality", "diffusion", *settings(world, state, "train.steps=1", "train.save_every=1")]
    assert cli.main(words) == 0 and "36 rows = 36 used" in capsys.readouterr().out
    (state / "summary.json").unlink()  # as if it had been interrupted
    kept, rows = (state / "data_manifest.json").read_bytes(), pq.read_table(world / "rows.parquet").to_pylist()
    for change in ({"image": rows[0]["image"][:-1] + b"\x83"}, {"score": 9.0}):
        pq.write_table(pa.Table.from_pylist([rows[0] | change, *rows[1:]]), world / "rows.parquet")
        _fresh_accelerate()
        assert cli.main(words) == 3
        said = capsys.readouterr().err
        assert "not the data that the run" in said and "has another" in said and "--allow-drift data" in said
        assert (state / "data_manifest.json").read_bytes() == kept
    _fresh_accelerate()
    assert cli.main([*words, "--allow-drift", "data"]) == 0
    assert len(json.loads((state / "data_manifest.json").read_text())["drift"]) == 1
    _fresh_accelerate()


def _fresh_accelerate() -> None:
    """accelerate keeps the first run's settings for the whole process."""
    for shared in (AcceleratorState, PartialState, GradientState):
        shared._shared_state.clear()


@pytest.mark.parametrize("begun", [False, True])
def test_a_refused_dataset_leaves_its_account_and_its_bad_rows(root: Path, tmp_path: Path, begun: bool) -> None:
    """In a run that has begun the account stays that of what it was trained on."""
    path = root / f"refused-{begun}.jsonl"
    rows: list[tuple[Row, Damage | None]] = [(sound(n), None) for n in range(20)]
    rows[5] = ({**rows[5][0], "caption": None}, DAMAGES["key missing"])
    write("jsonl", Table(rows), path)
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-000000" if begun else folder).mkdir(parents=True)
    with pytest.raises(DataError, match="data.bad_budget allows"), prepare.refusal_accounted(folder):
        prepare.prepare(recipe(path, on_bad="quarantine", bad_budget=0.0), "", None)
    if begun:
        assert [p.name for p in folder.iterdir()] == ["checkpoints"]
    else:
        counts = json.loads((folder / "ledger.json").read_text())
        assert (counts["rows"], sum(counts["refused"].values())) == (20, 1)
        (kept,) = (folder / "quarantine.jsonl").read_text().splitlines()
        assert json.loads(kept)["where"].endswith("line 6")


def test_bad_rows_of_another_distribution_are_not_put_on_the_training_data(root: Path, tmp_path: Path) -> None:
    good, shifted = root / "good.jsonl", root / "shifted.jsonl"
    rows: list[tuple[Row, Damage | None]] = [(sound(n), None) for n in range(20)]
    write("jsonl", Table(rows), good)
    rows[5] = ({**rows[5][0], "caption": None}, DAMAGES["key missing"])
    write("jsonl", Table(rows), shifted)
    data = {"path": str(good), "heldout": 0.1, "on_bad": "quarantine", "bad_budget": 0.01}
    spec = Recipe.model_validate({"data": data, "eval": {"shifted": str(shifted)}})
    with (
        pytest.raises(DataError, match=r"(?s)data.bad_budget allows 1.000%.*shifted.jsonl:line 6"),
        prepare.refusal_accounted(tmp_path),
    ):
        prepare.prepare(spec, "", None)
    assert json.loads((tmp_path / "ledger.json").read_text())["shifted"]["rows"] == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.json", "quarantine_shifted.jsonl"]
