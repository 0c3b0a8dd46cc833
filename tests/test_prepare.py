"""From rows to pairs that train and pairs that do not: nothing in both, nothing lost, and the same split for ever."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.formats.mmpo import write_mmpo
from mmpo.datasets.ledger import BadField
from mmpo.datasets.load import kinds_of
from mmpo.datasets.pairing import Candidate, digest
from mmpo.datasets.validate import validate
from mmpo.errors import DataError
from mmpo.judging import JudgeResult
from mmpo.pair import Block, Branch, Pair, image, text
from mmpo.prepare import Prepared, is_heldout, keep_account, pair_candidates, prepare
from mmpo.schema import Recipe


def candidates(prompts: int = 40, scores: tuple[float | None, ...] = (0.0, 1.0, 2.0)) -> list[Candidate]:
    def picture(value: int) -> Any:
        return image(np.full((4, 4, 3), value, np.uint8))

    pairs = [(p, k) for p in range(prompts) for k in range(len(scores))]
    return [Candidate((text(f"prompt {p}"),), picture(3 * p + k), scores[k], k) for p, k in pairs]


TEXT, PICTURE, CLIP = text("a"), image(np.zeros((4, 4, 3), np.uint8)), Block("video", b"")


@pytest.mark.parametrize(
    ("modality", "prompt", "answer", "field"),
    [
        ("text", (TEXT,), (TEXT,), None),
        ("text", (TEXT,), (PICTURE,), "chosen"),
        ("text", (TEXT, PICTURE), (TEXT,), "prompt"),
        ("vlm", (PICTURE, TEXT), (TEXT, PICTURE), None),
        ("vlm", (TEXT,), (PICTURE,), "chosen"),
        ("vlm", (CLIP, TEXT), (TEXT,), "prompt"),
        ("diffusion", (TEXT,), (PICTURE,), None),
        ("diffusion", (TEXT,), (TEXT,), "chosen"),
        ("diffusion", (TEXT,), (TEXT, PICTURE), "chosen"),
        ("diffusion", (PICTURE,), (PICTURE,), "prompt"),
    ],
)
def test_rows_of_another_modality_are_bad_rows(
    modality: str, prompt: tuple[Block, ...], answer: tuple[Block, ...], field: str | None
) -> None:
    """By side, and in a branch as in the pair. A pair of one side has nothing wrong with the other."""
    check = kinds_of(modality)
    for pair in (Pair("i", prompt, answer), Pair("i", (TEXT,), branches={"chosen": Branch(prompt, answer)})):
        if field is None:
            check(pair)
        else:
            with pytest.raises(BadField, match=f"field '{field}': expected .*modality {modality}"):
                check(pair)


def test_candidates_of_another_modality_are_bad_rows() -> None:
    kinds_of("diffusion")(Candidate((TEXT,), PICTURE))
    with pytest.raises(BadField, match="field 'answer': expected image"):
        kinds_of("diffusion")(Candidate((TEXT,), TEXT))


def test_pairs_of_one_group_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    """Three questions about each image, by different prompts, and one prompt that two groups share."""
    made = [
        Pair(f"{i}-{k}", (text(f"question {k} about image {i}"),), (text("yes"),), (text("no"),), group=f"image {i}")
        for i in range(60)
        for k in range(3)
    ]
    shared = [Pair(f"shared-{i}", (text("the same"),), (text("a"),), (text(f"b{i}"),), group=f"image {i}") for i in (50, 51)]
    write_mmpo([*made, *shared], tmp_path / "pairs")
    data = prepare(recipe(tmp_path / "pairs", "text", heldout=0.3), "", None)
    sides = [{p.group for p in part if not p.id.startswith("shared")} for part in (data.train, data.heldout)]
    assert sides[0] | sides[1] == {f"image {i}" for i in range(60)} and not sides[0] & sides[1]
    assert 8 < len(sides[1]) < 30
    assert not {p.caption for p in data.train} & {p.caption for p in data.heldout}
    assert {p[0].data for p in data.select + data.test} <= {p.caption for p in data.heldout}


def test_questions_asked_in_two_ways_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    """As `annotate` writes them: plain, and with the values that the answer shall have, in the group of the plain question."""
    made = []
    for i in range(60):
        plain, told = text(f"question {i}"), text(f"question {i}, helpfulness 4")
        group = digest(plain)
        made += [Pair(f"{i}-{k}", (ask,), (text("yes"),), (text("no"),), group=group) for k, ask in enumerate((plain, told))]
    write_mmpo(made, tmp_path / "pairs")
    data = prepare(recipe(tmp_path / "pairs", "text", heldout=0.3), "", None)
    sides = [{p.group for p in part} for part in (data.train, data.heldout)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_run_names_the_row_that_is_of_another_modality(path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.parquet:row 0 field 'answer': expected text \(modality text\), found image"):
        prepare(recipe(path, "text"), "", None)


def test_validation_for_a_modality_lists_them_all(path: Path) -> None:
    assert validate(path).bad == 0
    report = validate(path, modality="text")
    assert (report.bad, report.pairs) == (120, 0)
    assert report.ledger.refused == {"answer of another modality": 120}


def recipe(path: Path, modality: str = "diffusion", **data: Any) -> Recipe:
    pairing = data.pop("pairing", {"strategy": "all"})
    given = {"path": str(path), "heldout": 0.3, "pairing": pairing, **data}
    return Recipe.model_validate(
        {"modality": modality, "data": given, "eval": {"prompts": 3, "test_prompts": 4, "pairs": 1000}}
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("rows") / "rows.parquet"
    write_candidates(candidates(), found)
    return found


def captions(found: Prepared) -> tuple[set[str], set[str]]:
    return {p.caption for p in found.train}, {p.caption for p in found.heldout}


def test_every_pair_is_on_one_side_and_prompts_are_disjoint(path: Path) -> None:
    found = prepare(recipe(path), "", None)
    train, heldout = captions(found)
    assert len(found.train) + len(found.heldout) == 40 * 3 == found.account["pairs"] and not train & heldout
    assert found.account["heldout"] == len(found.heldout) and "120 rows" in found.account["rows"]
    select, test = ({str(b.data) for p in prompts for b in p} for prompts in (found.select, found.test))
    assert len(select) == 3 and len(test) == 4 and not select & test and select | test <= heldout
    assert {str(b.data) for p in found.train_prompts for b in p} == train


def test_the_split_survives_new_rows_other_orders_and_other_seeds(path: Path, tmp_path: Path) -> None:
    before = captions(prepare(recipe(path), "", None))
    write_candidates([*candidates(60)[::-1]], tmp_path / "more.parquet")
    changed = recipe(tmp_path / "more.parquet").model_copy(update={"seed": 9})
    after = captions(prepare(changed, "", None))
    assert before[0] <= after[0] and before[1] <= after[1] and len(after[0] | after[1]) == 60


@given(st.floats(0, 1), st.floats(0, 1), st.text(min_size=1))
def test_a_larger_share_holds_out_the_same_prompts_and_more(one: float, other: float, prompt: str) -> None:
    low, high = sorted((one, other))
    assert is_heldout((text(prompt),), low) <= is_heldout((text(prompt),), high)
    assert not is_heldout((text(prompt),), 0) and is_heldout((text(prompt),), 1)


def test_the_share_is_about_what_was_asked_for() -> None:
    share = np.mean([is_heldout((text(str(i)),), 0.2) for i in range(4000)])
    assert abs(share - 0.2) < 0.025  # four standard errors


def test_only_unscored_candidates_are_judged() -> None:
    asked: list[int] = []

    def judge(prompts: Any, answers: Any) -> JudgeResult:
        asked.append(len(answers))
        return JudgeResult(torch.tensor([float(a[0].data.mean()) for a in answers], dtype=torch.float64))

    rows = candidates(1, (5.0, None, None))  # pictures of brightness 0, 1 and 2
    pairs, dropped = pair_candidates(recipe(Path()), rows, judge)
    assert asked == [2] and {(p.scores["chosen"], p.scores["rejected"]) for p in pairs} == {(5, 1), (5, 2), (2, 1)}
    with pytest.raises(DataError, match="2 of 3 candidates carry no score, and there is no judge: set judge.name"):
        pair_candidates(recipe(Path()), rows, None)
    with pytest.raises(DataError, match="set data.pairing, e.g. pairing: {strategy: best_worst}"):
        pair_candidates(recipe(Path(), pairing=None), rows, judge)


def test_a_temperature_makes_bradley_terry_labels() -> None:
    spec = {"strategy": "best_worst", "temperature": 0.5}
    (pair,), _ = pair_candidates(recipe(Path(), pairing=spec), candidates(1), None)
    assert pair.label == pytest.approx(1 / (1 + math.exp(-2 / 0.5)))
    (pair,), _ = pair_candidates(recipe(Path(), pairing={"strategy": "best_worst"}), candidates(1), None)
    assert pair.label == 1


def test_nothing_to_train_on_is_told_with_the_reasons(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pairs to train on \(0 pairs.*dropped: \{.*margin.*\}"):
        prepare(recipe(path, pairing={"strategy": "all", "margin": 9}), "", None)
    write_candidates(candidates(1), tmp_path / "one.parquet")
    assert not is_heldout((text("prompt 0"),), 0.3)
    assert prepare(recipe(tmp_path / "one.parquet"), "", None).heldout == []


def test_prompts_of_one_question_about_different_images_are_different(tmp_path: Path) -> None:
    shades = [image(np.full((2, 2, 3), shade, np.uint8)) for shade in range(30)]
    rows = [Candidate((b, text("Which shade?")), text(w), s) for b in shades for w, s in (("dark", 1.0), ("light", 0.0))]
    write_candidates(rows, tmp_path / "c.parquet")
    data = prepare(recipe(tmp_path / "c.parquet", "vlm", heldout=0.2), "elsewhere", None)
    assert len(data.train_prompts) == len(data.train) and len(data.heldout) == 30 - len(data.train)
    assert len(data.select) + len(data.test) == len(data.heldout) > 2
    assert {p[0].digest for p in data.select + data.test}.isdisjoint({p.prompt[0].digest for p in data.train})
    assert all([b.kind for b in p.prompt] == ["image", "text"] for p in data.train)


def test_shifted_pairs_have_an_account_a_quarantine_and_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are only measured; measured on other pairs, a run that goes on would be another measurement."""

    def rows(name: str, first: str = "one") -> str:
        pairs: list[Any] = [{"prompt": f"{name}{i}", "chosen": first, "rejected": "two"} for i in range(5)]
        pairs += [{"prompt": 7, "chosen": "a", "rejected": "b"}]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in pairs))
        return str(tmp_path / name)

    def start(allow: tuple[str, ...] = ()) -> dict[str, Any]:
        keep_account(tmp_path, prepare(spec, "", None), allow)
        return json.loads((tmp_path / "data_manifest.json").read_text())

    data = {"path": rows("a.jsonl"), "heldout": 0, "on_bad": "quarantine"}
    spec = Recipe.model_validate({"modality": "text", "data": data, "eval": {"shifted": rows("b.jsonl"), "pairs": 3}})
    found = start()
    assert found["pairs"] == 5 and found["shifted"]["pairs"] == 3
    counts = json.loads((tmp_path / "ledger.json").read_text())
    assert counts["rows"] == 6 and counts["shifted"] == {k: v for k, v in counts.items() if k != "shifted"}
    assert capsys.readouterr().out.count("6 rows = 5 used + 0 skipped + 1 refused") == 2
    for name, file in (("a", "quarantine.jsonl"), ("b", "quarantine_shifted.jsonl")):
        assert json.loads((tmp_path / file).read_text())["where"] == f"{name}.jsonl:line 6"
    (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
    rows("b.jsonl", first="three")
    with pytest.raises(DataError, match=r"started with: eval.shifted: pair \d .* another chosen.*--allow-drift data"):
        start()
    (note,) = start(("data",))["drift"]
    assert note["was"] == note["now"] and note["shifted_was"] != note["shifted_now"]
    rows("b.jsonl")
    del found["shifted"]  # as an older mmpo wrote it
    (tmp_path / "data_manifest.json").write_text(json.dumps(found))
    assert start()["drift"] == []
