"""The table of five grades, and what the three kinds of rows make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmpo import prepare
from mmpo.datasets.builders.annotate import METRICS, TABLES, annotate, score, whole, with_grades
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import pairs
from mmpo.datasets.tools import Tools
from mmpo.datasets.validate import validate
from mmpo.pair import Pair, image, text
from mmpo.schema import Recipe
from tests.datasets.judged import Grades, Says, built, merged, record, told, words

GRADES = {  # helpfulness, correctness, coherence, complexity, verbosity
    "best": (4, 4, 4, 0, 1), "near": (4, 4, 3, 4, 4), "fair": (3, 4, 3, 2, 2), "poor": (1, 0, 2, 4, 3),
    "bare": (4, None, 4, 2, 1), "loud": (4, 5, 4, 2, 1), "half": (4, 3.5, 4, 2, 1),
}  # fmt: skip


def judge() -> Grades:
    return Grades(lambda answer, metric: GRADES[answer][METRICS.index(metric)])


def rows(kind: str, *answers: str, **options: int) -> tuple[list, dict[str, int]]:
    return built(annotate(Tools(point_judge=judge()), rows=kind, **options), record("r", *answers))  # type: ignore[arg-type]


def test_the_best_meets_one_that_is_two_points_below() -> None:
    """12 against 10 or 3, never against 11; which of them is drawn, and every one in turn."""
    seen = set()
    for seed in range(20):
        stages = annotate(Tools(point_judge=judge()))
        found, _ = built(stages, record("r", "near", "poor", "best", "fair"), seed=seed)
        assert len(found) == 1 and words(found[0])[0] == "best"
        seen.add(words(found[0])[1])
        pair = found[0].fields["pair"]
        assert pair.scores == {"chosen": 12, "rejected": {"fair": 10, "poor": 3}[words(found[0])[1]]}
        assert pair.meta["answers"]["chosen"] == dict(zip(METRICS, GRADES["best"], strict=True))
    assert seen == {"fair", "poor"}


def test_complexity_and_verbosity_do_not_count() -> None:
    table = dict(zip(METRICS, (1, 2, 3, 4, 4), strict=True))
    assert score(table) == 6


def test_an_answer_without_five_whole_grades_is_not_in_the_table() -> None:
    found, drops = rows("steer", "bare", "loud", "half", "best", "poor")
    assert [told(r.fields["pair"].chosen) for r in found] == ["best", "poor"] and not drops
    assert found[0].provenance[1] == {"stage": "grades", "table": [[4, 4, 4, 0, 1], [1, 0, 2, 4, 3]], "not_graded": 3}
    assert rows("steer", "bare", "loud") == ([], {"grades: no answer with all five grades": 1})
    assert [whole(v) for v in (0, 4.0, np.float64(2), None, -1, 5, 2.5, float("nan"))] == [
        0,
        4,
        2,
        None,
        None,
        None,
        None,
        None,
    ]
    with pytest.raises(ValueError, match="expected a number or None from the judge, found str '4'"):
        whole("4")


def test_too_close_answers_give_no_pair() -> None:
    assert rows("pairs", "best", "near") == ([], {"rows: no two answers far enough apart": 1})
    assert [words(r) for r in rows("pairs", "best", "near", min_gap=1)[0]] == [("best", "near")]
    assert rows("pairs", "best", "bare")[1] == {"rows: no two answers far enough apart": 1}


def test_the_best_answer_alone() -> None:
    found, _ = rows("best", "near", "best", "poor")
    pair = found[0].fields["pair"]
    assert told(pair.chosen) == "best" and pair.rejected == () and pair.scores == {"chosen": 12} and len(found) == 1
    assert rows("best", "near", "poor", best_at_least=12) == ([], {"rows: no answer good enough": 1})
    assert len(rows("best", "near", "best", best_at_least=12)[0]) == 1


def test_steered_rows_tell_the_grades_in_the_prompt() -> None:
    found, _ = rows("steer", "best", "poor")
    assert [told(r.fields["pair"].prompt) for r in found] == [
        "What is there?\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:0,Verbosity:1",
        "What is there?\nHelpfulness:1,Correctness:0,Coherence:2,Complexity:4,Verbosity:3",
    ]
    assert len({r.fields["pair"].id for r in found}) == 2
    groups = {r.fields["pair"].group for kind in ("pairs", "best", "steer") for r in rows(kind, "best", "poor")[0]}
    assert len(groups) == 1, "no split divides the rows of one question"
    photo, best = image(np.zeros((1, 1, 3), np.uint8)), dict(zip(METRICS, (4, 4, 4, 2, 1), strict=True))
    asked = with_grades((text("Be kind.", "system"), text("Look:", "user"), photo), best)
    assert [b.kind for b in asked] == ["text", "text", "image"] and asked[0].data == "Be kind." and asked[1].role == "user"
    assert str(asked[1].data).startswith("Look:\nHelpfulness:4")
    with pytest.raises(ValueError, match="expected a prompt with text"):
        with_grades((photo,), best)


def test_all_three_come_from_one_table() -> None:
    """Each answer is judged once for each metric, whatever is made of the grades."""
    grades = judge()
    found, _ = built(annotate(Tools(point_judge=grades), rows="all"), record("r", "best", "fair", "poor"))
    assert [r.id for r in found] == ["r/pairs-0", "r/best-0", "r/steer-0", "r/steer-1", "r/steer-2"]
    assert [r.fields["pair"].meta["table"] for r in found] == ["pairs", "best", "steer", "steer", "steer"]
    assert len(grades.asked) == 15 and len(set(grades.asked)) == 15
    for kind in ("best", "steer"):
        alone = [r.fields["pair"] for r in rows(kind, "best", "fair", "poor")[0]]
        assert alone == [without_table(r.fields["pair"]) for r in found if r.fields["pair"].meta["table"] == kind]


def without_table(pair: Pair) -> Pair:
    return replace(pair, meta={k: v for k, v in pair.meta.items() if k != "table"})


def test_each_kind_has_a_table_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a build of all three: pairs.parquet is what the folder's name loads, the others load by theirs."""
    other = record("s", "near", "best", question="And what is here?")
    found, _ = built(annotate(Tools(point_judge=judge()), rows="all"), record("r", "best", "fair"), other)
    merged(tmp_path, [r.fields["pair"] for r in found], TABLES)
    read = {name: list(pairs(tmp_path / name, Ledger("refuse"))) for name in ("", "best.parquet", "steer.parquet")}
    assert {name: [told(p.chosen) for p in table] for name, table in read.items()} == {
        "": ["best"], "best.parquet": ["best", "best"], "steer.parquet": ["best", "fair", "near", "best"],
    }  # fmt: skip
    assert told(read[""][0].rejected) == "fair" and all(p.rejected == () for p in read["best.parquet"])
    said = [
        f"{tmp_path}: reads 1 parquet file: pairs.parquet",
        f"{tmp_path}: leaves out 2 with tables of their own: best.parquet, steer.parquet",
    ]
    assert validate(tmp_path).files == said and validate(tmp_path / "best.parquet").files == []
    spec = Recipe.model_validate({"modality": "vlm", "data": {"path": str(tmp_path), "heldout": 0}})
    (tmp_path / "run").mkdir()
    prepare.keep_account(tmp_path / "run", prepare.prepare(spec, "", None))
    assert capsys.readouterr().out.splitlines()[:2] == said


def test_tables_without_rows_are_not_written(tmp_path: Path) -> None:
    found, _ = built(annotate(Tools(point_judge=judge()), rows="best"), record("r", "best", "fair"))
    merged(tmp_path, [r.fields["pair"] for r in found], TABLES)
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["pairs.parquet"]
    assert [told(p.chosen) for p in pairs(tmp_path, Ledger("refuse"))] == ["best"]


def test_answers_are_sampled_where_the_source_has_none() -> None:
    names = list(GRADES)
    model = Says(lambda asked, seed: names[seed % 4])
    found, _ = built(annotate(Tools(generator=model, point_judge=judge()), rows="steer", answers=12), record("r"))
    assert len(model.asked) == 12 and {told(r.fields["pair"].chosen) for r in found} <= set(names[:4]) and len(found) > 1
    with pytest.raises(ValueError, match="no candidates, and there is no generator"):
        built(annotate(Tools(point_judge=judge())), record("r"))
    for wrong in ({"answers": 1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="at least 2 at a temperature above 0"):
            annotate(Tools(point_judge=judge()), **wrong)  # type: ignore[arg-type]
