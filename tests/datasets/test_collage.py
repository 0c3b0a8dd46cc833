"""MIA-DPO's collages: geometry, labels and boxes, which image is asked about, thresholds, and what is dropped."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmpo import media
from mmpo.datasets import attention_ratio
from mmpo.datasets.builders import collage as mia
from mmpo.datasets.collage_images import GRIDS, cells, fitted, grid, inset, noisy
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.media_store import MediaStore
from mmpo.datasets.stages import Dropped, Record, execute
from mmpo.datasets.tools import Answer, Tools
from mmpo.pair import Pair, image, text
from tests.datasets.photos import Guess, crops, photos

SMALL = {"tile": 48, "margin": 16, "label": 12}


@pytest.mark.parametrize(
    ("count", "size"), [(2, (936, 488)), (3, (1424, 488)), (4, (936, 976)), (6, (1424, 976)), (9, (1424, 1464))]
)
def test_canvas_and_corners_are_those_of_the_paper(count: int, size: tuple[int, int]) -> None:
    made = grid([Image.new("RGB", (448, 448), (10 * i, 99, 7)) for i in range(count)])
    assert made.picture.size == size
    _, columns = GRIDS[count]
    for k, (left, top, right, bottom) in enumerate(made.boxes):
        assert (left, top) == (k % columns * 488, k // columns * 488 + 40) and (right - left, bottom - top) == (448, 448)
        assert made.picture.getpixel((left, top)) == (10 * k, 99, 7) == made.picture.getpixel((right - 1, bottom - 1))
        strip = np.asarray(made.picture)[top - 40 : top, left : left + 448]
        assert strip.min() == 0 and (strip[:, :20] == 255).all() and (strip[:, 200:] == 255).all(), "label from x + 20 on"


def test_labels_differ_and_nothing_else_is_drawn() -> None:
    pictures = [Image.fromarray(p[:200, :300]) for p in list(photos().values())[:4]]
    made, plain = grid(pictures), np.asarray(grid(pictures, label=0).picture)
    strips = [np.asarray(made.picture)[t - 40 : t, le : le + 448] for le, t, _, _ in made.boxes]
    assert all((a != b).any() for a, b in zip(strips, strips[1:], strict=False))
    assert all((strip[-1] == 255).all() for strip in strips), "no letter is cut off by its picture"
    for left, top, right, bottom in made.boxes:
        assert (plain[top:bottom, left:right] == np.asarray(made.picture)[top:bottom, left:right]).all()
        assert (np.asarray(made.picture)[bottom : top + 448, left : left + 448] == 255).all(), "white below a wide photo"


def test_labels_too_large_for_their_strip_cover_no_picture() -> None:
    pictures = [Image.new("RGB", (48, 48), (10 * i, 99, 7)) for i in range(9)]
    made = grid(pictures, tile=48, margin=8, label=36)
    assert [made.picture.crop(box).tobytes() for box in made.boxes] == [p.tobytes() for p in pictures]


@pytest.mark.parametrize("count", sorted(GRIDS))
def test_every_pixel_of_a_photo_is_at_its_recorded_box(count: int) -> None:
    pictures = [Image.fromarray(list(photos().values())[k % 6]) for k in range(count)]
    made = grid(pictures, **SMALL)
    stored = media.open_image(media.encode(np.asarray(made.picture), compress_level=1))
    for picture, box in zip(pictures, made.boxes, strict=True):
        assert (np.asarray(stored.crop(box)) == np.asarray(fitted(picture, 48, 48))).all()
        assert max(box[2] - box[0], box[3] - box[1]) == 48, "one side fills the tile, also where the photo is small"


def test_an_inset_is_in_the_middle_and_fits_into_seven_tenths() -> None:
    outer, inner = (Image.fromarray(p) for p in list(photos().values())[:2])
    made = inset(outer, inner)
    (left, top, right, bottom) = made.boxes[0]
    assert made.picture.size == outer.size
    assert abs(left - (outer.width - right)) <= 1 and abs(top - (outer.height - bottom)) <= 1
    assert max((right - left) / outer.width, (bottom - top) / outer.height) == pytest.approx(0.7, abs=0.005)
    assert (right - left) / (bottom - top) == pytest.approx(inner.width / inner.height, rel=0.02)
    assert (
        np.asarray(made.picture.crop(made.boxes[0])) == np.asarray(fitted(inner, 0.7 * outer.width, 0.7 * outer.height))
    ).all()
    around = np.asarray(made.picture).copy()
    around[top:bottom, left:right] = np.asarray(outer)[top:bottom, left:right]
    assert (around == np.asarray(outer)).all()


def test_noise_stays_in_its_cell_and_is_clipped_not_wrapped() -> None:
    white = Image.new("RGB", (90, 60), (250, 250, 250))
    box = cells(white.size, 2, 3)[4]
    assert box == (30, 30, 60, 60)
    spoilt = noisy(white, box, 49, np.random.default_rng(0))
    changed = (spoilt != np.asarray(white)).any(-1)
    assert changed[30:60, 30:60].mean() > 0.9 and not changed[:30].any() and not changed[:, 60:].any()
    inside = spoilt[30:60, 30:60].astype(float)
    assert (inside == 255).mean() == pytest.approx(0.455, abs=0.05), "P(250 + 49 z >= 254.5)"
    assert inside.min() > 20, "a wrap would leave values near 0"


def source(count: int = 12) -> list[Record]:
    return [
        Record(f"q{i}", (image(media.encode(p), f"set/{i}.png"), text(f"What is in photo {i}?")), f"This is photo {i}.")
        for i, p in enumerate(crops(count, 80))
    ]


def built(
    folder: Path, seed: int = 0, generator: Any = None, items: list[Record] | None = None, **options: Any
) -> tuple[list[Pair], Ledger]:
    items, tools, ledger = items or source(), Tools(generator=generator or Guess()), Ledger("skip")
    pool = mia.prepare(items, tools, media=MediaStore(folder, folder), seed=seed)
    stages = mia.collage(tools, pool=pool, **{"every_kind": True, **SMALL, **options})
    return [r.fields["pair"] for r in execute(items, stages, seed=seed, ledger=ledger)], ledger


def test_the_question_names_the_panel_that_holds_its_image(tmp_path: Path) -> None:
    items = {r.id: r for r in source()}
    pairs, _ = built(tmp_path)
    assert {p.meta["kind"] for p in pairs} == {"sequence", "grid", "inset"} and len(pairs) > 30
    targets = set()
    for pair in pairs:
        asked, target = items[pair.meta["source"]].prompt[0], pair.meta["target"]
        targets.add((pair.meta["kind"], target))
        question, shown = str(pair.prompt[-1].data), [b for b in pair.prompt if b.kind == "image"]
        assert (
            question.endswith(f"what is in photo {pair.meta['source'][1:]}?")
            and pair.chosen[0].data == items[pair.meta["source"]].answer
        )
        (region,) = [r for r in pair.meta["regions"] if r["target"]]
        if pair.meta["kind"] == "sequence":
            assert question.startswith(f"In Image{target}, ") and shown[target - 1].data == asked.data
            assert [b.data for b in pair.prompt[:-1:2]] == [f"Image{k + 1}:" for k in range(len(shown))]
            assert len({b.digest for b in shown}) == len(shown)
            continue
        box = region["box"]
        pasted = np.asarray(media.open_image(shown[0]).crop(box))
        limits = (48, 48) if pair.meta["kind"] == "grid" else [0.7 * s for s in media.open_image(shown[0]).size]
        assert (pasted == np.asarray(fitted(media.open_image(asked), *limits))).all(), "clean, whatever the model was shown"
        assert question.startswith(f"In Image{target}, " if pair.meta["kind"] == "grid" else tuple(mia.OPENINGS))
    assert {("sequence", 1), ("sequence", 2), ("inset", 2)} <= targets and sum(kind == "grid" for kind, _ in targets) > 2


def test_the_model_is_shown_noise_where_the_paper_has_it(tmp_path: Path) -> None:
    shown: list[Any] = []

    def answers(prompts: Any, seeds: Any, **options: Any) -> list[Answer]:
        assert options == {"max_new_tokens": 512, "temperature": 0.0, "attention": True}
        shown.extend(prompts)
        return Guess()(prompts, seeds)

    pairs, _ = built(tmp_path, generator=answers, items=source(4), grid_counts={4: 1})
    assert len(shown) == len(pairs)
    for prompt, pair in zip(shown, pairs, strict=True):
        if pair.meta["kind"] == "sequence":
            assert prompt == pair.prompt
            continue
        noisy_one, clean = (media.pixels(next(b for b in blocks if b.kind == "image")) for blocks in (prompt, pair.prompt))
        changed = (noisy_one != clean).any(-1)
        if pair.meta["kind"] == "inset":
            assert changed.mean() > 0.9
        else:
            (rows, columns), target = GRIDS[4], pair.meta["target"] - 1
            left, top, right, bottom = cells((clean.shape[1], clean.shape[0]), rows, columns)[target]
            assert changed[top:bottom, left:right].mean() > 0.9
            assert not np.delete(changed.ravel(), np.flatnonzero(_mask(changed.shape, (left, top, right, bottom)))).any()


def _mask(shape: tuple[int, ...], box: tuple[int, int, int, int]) -> np.ndarray:
    found = np.zeros(shape, bool)
    found[box[1] : box[3], box[0] : box[2]] = True
    return found


def test_one_seed_gives_the_same_bytes_and_another_others(tmp_path: Path) -> None:
    (first, _), (again, _), (other, _) = (
        built(tmp_path, 3),
        built(tmp_path, 3, items=source()[::-1], batch=3),
        built(tmp_path, 4),
    )
    assert {p.id: p for p in first} == {p.id: p for p in again} and first
    assert not {p.id for p in first} & {p.id for p in other}


def test_others_come_from_the_same_set_and_are_never_the_image_itself(tmp_path: Path) -> None:
    items = [
        dataclasses.replace(r, prompt=(dataclasses.replace(r.prompt[0], path=f"{'ab'[i % 2]}/{i}.png"), *r.prompt[1:]))
        for i, r in enumerate(source(14))
    ]
    pairs, ledger = built(tmp_path, items=items)
    for pair in pairs:
        names = pair.meta["images"]
        assert len(set(names)) == len(names) and len({n[0] for n in names}) == 1
    assert ledger.skipped.get("compose: too few other images in its sub-set", 0) == ledger.skipped.total(), "grids of nine"
    alone, ledger = built(tmp_path / "alone", items=source(1))
    assert alone == [] and ledger.skipped == {"compose: too few other images in its sub-set": 3}


def test_turns_keep_their_speakers_and_later_questions_name_the_image_too(tmp_path: Path) -> None:
    items = source(6)
    block = dataclasses.replace(items[0].prompt[0], role="user")
    turns = (
        text("Be brief.", "system"),
        block,
        text("What is it?", "user"),
        text("A cat.", "assistant"),
        text("Whose?", "user"),
    )
    items[0] = Record("talk", turns, "Mine.")
    pair = next(p for p in built(tmp_path, items=items)[0] if p.meta["source"] == "talk" and p.meta["kind"] == "grid")
    k = pair.meta["target"]
    said = [(b.role, b.data if b.kind == "text" else b.kind) for b in pair.prompt]
    assert said == [
        ("system", "Be brief."), ("user", "image"), ("user", f"In Image{k}, what is it?"), ("assistant", "A cat."),
        ("user", f"In image{k}, Whose?"),
    ]  # fmt: skip
    assert pair.chosen[0].role == pair.rejected[0].role == "assistant"


def test_what_cannot_be_a_pair_is_dropped_for_its_reason(tmp_path: Path) -> None:
    first, *others = source(5)
    prompt = first.prompt
    talk = (text("Where?", "user"), text("[0.1, 0.2, 0.3, 0.4]", "assistant"), text("What?", "user"))
    bad = [
        Record("box", prompt, "at [0.1, 0.2, 0.3, 0.4]"), Record("long", prompt, "x" * 512), Record("none", prompt, None),
        Record("two", (prompt[0], *prompt), "yes"), Record("blank", (prompt[0],), "yes"),
        Record("asked", (prompt[0], text("What is in (1., 2., 3., 4.)?")), "A cat."),
        Record("earlier", (replace(prompt[0], role="user"), *talk), "A cat."),
    ]  # fmt: skip
    pairs, ledger = built(tmp_path, items=[*others, *bad], kinds={"grid": 1})
    assert len(pairs) == len(others)
    assert ledger.skipped == {
        "compose: answer with a bounding box": 1, "plan: answer too long": 1, "plan: no known answer": 1,
        "plan: not exactly one image": 1, "plan: no question": 1, "compose: question with a bounding box": 2,
    }  # fmt: skip
    boxes, _ = built(tmp_path, items=[*others, bad[0]], kinds={"sequence": 1})
    assert len(boxes) == len(others) + 1, "in a sequence the image does not move"


def record_with(ratio: float, kind: str, count: int, said: str = "No idea.", perplexity: float | None = 2.0) -> Record:
    return Record("r", (), "A cat.", {"kind": kind, "count": count, "ratio": ratio, "answer": said, "perplexity": perplexity})


LIMITS = mia._Limits(mia.SEQUENCE_RATIOS, mia.GRID_RATIOS, 0.8, 1.1, None, 0.0)
SELECTION = [("sequence", n, r, True) for n, r in ((2, 0.8), (3, 0.7), (4, 0.6), (5, 0.6))]
SELECTION += [("grid", n, r, False) for n, r in ((2, 0.7), (3, 0.6), (4, 0.5), (6, 0.4), (9, 0.3))] + [("inset", 2, 0.8, False)]


@pytest.mark.parametrize(("kind", "count", "limit", "included"), SELECTION)
def test_selection_keeps_what_the_model_was_not_looking_at(kind: str, count: int, limit: float, included: bool) -> None:
    def kept(ratio: float) -> bool:
        try:
            mia._keep(record_with(ratio, kind, count), np.random.default_rng(0), limits=LIMITS, attention=True)
        except Dropped as reason:
            assert str(reason) == "model was looking at the asked image"
            return False
        return True

    assert kept(limit - 1e-6) and not kept(limit + 1e-6) and kept(limit) is included


@pytest.mark.parametrize(
    ("record", "limits", "reason"),
    [
        (record_with(0, "grid", 2, " "), LIMITS, "empty answer"),
        (record_with(0, "grid", 2, "A cat. "), LIMITS, "equal to the known answer"),
        (record_with(0, "grid", 2, perplexity=1.1), LIMITS, "answer too certain"),
        (
            record_with(0, "grid", 2, "No idea what that is."),
            dataclasses.replace(LIMITS, length_ratio=3.0),
            "lengths too different",
        ),
        (record_with(0, "grid", 2, "A cap."), dataclasses.replace(LIMITS, edit_distance=0.2), "answers too similar"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_filters_of_answers(record: Record, limits: Any, reason: str) -> None:
    with pytest.raises(Dropped, match=reason):
        mia._keep(record, np.random.default_rng(0), limits=limits, attention=True)
    if limits != LIMITS:
        mia._keep(record, np.random.default_rng(0), limits=LIMITS, attention=True)


def test_a_generator_that_tells_too_little_is_told() -> None:
    with pytest.raises(ValueError, match="tells no perplexity"):
        mia._keep(record_with(0, "grid", 2, perplexity=None), np.random.default_rng(0), limits=LIMITS, attention=True)


def test_attention_decides_through_the_whole_builder(tmp_path: Path) -> None:
    """The model looks at the first image only: of the sequences, those about it are dropped."""
    kept, ledger = built(tmp_path, generator=Guess(sees=0), kinds={"sequence": 1})
    everything, _ = built(tmp_path, generator=Guess(sees=0), kinds={"sequence": 1}, select="none")
    assert {p.meta["target"] for p in kept} & {1} == set() and {p.meta["target"] for p in everything} >= {1, 2}
    assert len(kept) == sum(p.meta["target"] != 1 for p in everything)
    assert ledger.skipped["select: model was looking at the asked image"] == len(everything) - len(kept)


def test_ratios_by_hand() -> None:
    assert attention_ratio.sequence_ratio((0.2, 0.5, 0.3), 1) == pytest.approx(0.5)
    region = np.arange(24.0 * 24).reshape(24, 24)
    assert attention_ratio.inset_ratio(region) == pytest.approx(region[4:20, 4:20].sum() / region.sum())
    rows = list(map(list, cells((936, 976), 2, 2)))
    assert attention_ratio.grid_ratio(region, rows, (936, 976), 2) == pytest.approx(region[12:, :12].sum() / region.sum())
    half = np.array(
        [[1.0, 3.0]]
    )  # one row of two tokens over 10 pixels: the box has 1 pixel of the first and all of the second
    assert attention_ratio.grid_ratio(half, [[4, 0, 10, 5], [0, 0, 4, 5]], (10, 5), 0) == pytest.approx(3.2 / 4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kinds": {"grid": 0}}, "kinds: expected weights"),
        ({"grid_counts": {5: 1}}, "numbers of images out of 2, 3, 4, 6, 9, found 5"),
        ({"sequence_counts": {1: 1}}, "at least 2 images, found 1"),
        ({"sequence_counts": {7: 1}}, "sequence_ratios: expected one for 7 images"),
        ({"reference": "In Image{i}, "}, "reference: expected text in which {k} is the image's number"),
        ({"openings": ()}, "openings: expected at least one, found none"),
        ({"tile": 0}, "tile: expected at least 1, found 0"),
        ({"grid_noise": -3.0}, "grid_noise: expected at least 0, found -3.0"),
        ({"share": 1.5}, "share: expected a share of the outer picture between 0 and 1, found 1.5"),
        ({"batch": 0}, "batch: expected at least 1 record, found 0"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        mia.collage(Tools(generator=Guess()), pool=mia.Pool(MediaStore(Path(), Path()), {}), **options)


def test_there_are_as_many_openings_as_in_the_paper() -> None:
    assert len(set(mia.OPENINGS)) == 96 and all(o.endswith(", ") for o in mia.OPENINGS)
