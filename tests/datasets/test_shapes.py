"""The shapes world: its captions, its pictures, and the verifier that holds one against the other."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from mmpo.datasets.worlds import shapes

CAPTIONS = shapes.captions()
captions = st.sampled_from(CAPTIONS)
BLANK = np.tile(np.array(shapes.BACKGROUND, np.float32), (shapes.SIZE, shapes.SIZE, 1))
seeds = st.integers(0, 2**32 - 1)


def drawn(count: int, seed: int = 0) -> list[tuple[str, shapes.Image]]:
    """`count` captions from all over the world, each with a picture."""
    rng = np.random.default_rng(seed)
    chosen = [CAPTIONS[i] for i in rng.permutation(len(CAPTIONS))[:count]]
    return [(c, shapes.render(c, rng)) for c in chosen]


def test_there_are_1340_distinct_captions_and_all_are_read_back() -> None:
    assert len(CAPTIONS) == len(set(CAPTIONS)) == 1340
    scenes = [shapes.parse(c) for c in CAPTIONS]
    assert len(set(scenes)) == 1340
    assert sum(s.relation is not None for s in scenes) == 1280
    assert sum(len(s.objects) > 1 and s.relation is None for s in scenes) == 40
    assert sum(len(s.objects) == 1 for s in scenes) == 20


def test_parse_by_hand() -> None:
    pair = shapes.Scene((("red", "circle"), ("blue", "square")), "left of")
    assert shapes.parse("a red circle left of a blue square") == pair
    assert shapes.parse("three yellow crosses") == shapes.Scene((("yellow", "cross"),) * 3)
    assert shapes.parse("a green triangle") == shapes.Scene((("green", "triangle"),))


@pytest.mark.parametrize("caption", ["", "a photo of a dog", "four red circles", "a red circle near a blue square"])
def test_a_caption_of_another_world_is_named(caption: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(caption))):
        shapes.parse(caption)


def test_an_unknown_object_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'a pink circle'.*'pink circle'.*red, green.*circle, square"):
        shapes.parse("a pink circle")


@given(captions, seeds)
def test_rendering_is_a_function_of_caption_and_seed(caption: str, seed: int) -> None:
    first, second = (shapes.render(caption, np.random.default_rng(seed)) for _ in range(2))
    assert first.shape == (shapes.SIZE, shapes.SIZE, 3) and first.dtype == np.float32
    assert np.array_equal(first, second) and first.min() >= 0 and first.max() <= 1


def test_another_seed_is_another_picture() -> None:
    one, other = (shapes.render("a red circle", np.random.default_rng(s)) for s in (0, 1))
    assert not np.array_equal(one, other)


@given(captions, seeds)
def test_a_corrupted_caption_has_exactly_one_thing_wrong(caption: str, seed: int) -> None:
    wrong = shapes.corrupt(caption, np.random.default_rng(seed))
    before, after = shapes.parse(caption), shapes.parse(wrong)
    assert wrong in CAPTIONS
    kinds = {
        "number": len(before.objects) != len(after.objects),
        "relation": before.relation != after.relation,
        "objects": set(before.objects) != set(after.objects) or before.relation is not None and before.objects != after.objects,
    }
    assert sum(kinds.values()) == 1
    if kinds["objects"]:
        changed = {(b, a) for b, a in zip(before.objects, after.objects, strict=True) if b != a}
        ((old, new),) = changed  # one object, or all of a counted kind alike
        assert (old[0] != new[0]) + (old[1] != new[1]) == 1


def test_corruption_reaches_every_attribute() -> None:
    rng = np.random.default_rng(0)
    found = {shapes.corrupt("a red circle above a blue square", rng) for _ in range(300)}
    assert len(found) == 3 + 2 * 3 + 2 * 3  # relations, fresh colours and shapes of either object


def test_the_right_caption_is_judged_right() -> None:
    verdicts = [shapes.verify(picture, caption) for caption, picture in drawn(300)]
    assert np.mean([v.correct for v in verdicts]) >= 0.99
    assert np.mean([v.score for v in verdicts]) > 0.9


def test_a_corrupted_caption_is_judged_wrong() -> None:
    rng = np.random.default_rng(1)
    for caption, picture in drawn(300):
        wrong = shapes.corrupt(caption, rng)
        verdict = shapes.verify(picture, wrong)
        assert not verdict.correct, (caption, wrong, verdict)
        assert verdict.score < shapes.verify(picture, caption).score


def test_a_blank_picture_has_the_lowest_score() -> None:
    verdict = shapes.verify(BLANK, "a red circle")
    assert verdict.parts == {"colour": 0.0, "shape": 0.0, "count": pytest.approx(np.exp(-1)), "place": 1.0, "clean": 1.0}
    assert verdict.score == pytest.approx((0.02 * 0.02 * np.exp(-1)) ** (1 / 5))
    assert not verdict.correct


def test_the_score_grows_towards_the_right_picture() -> None:
    """From blank to the picture: near the floor while it is too pale to be seen, then growing."""
    for caption, picture in drawn(20):
        path = [shapes.verify((1 - a) * BLANK + a * picture, caption).score for a in (0.0, 0.2, *np.linspace(0.6, 1, 9))]
        assert max(path[:2]) < 0.1, (caption, path)
        assert all(later > earlier - 0.02 for earlier, later in itertools.pairwise(path[1:])), (caption, path)
        assert path[-1] > path[2] > 0.5, (caption, path)


def test_faint_noise_changes_little() -> None:
    rng = np.random.default_rng(2)
    for caption, picture in drawn(30):
        noisy = np.clip(picture + rng.normal(0, 0.01, picture.shape), 0, 1).astype(np.float32)
        assert shapes.verify(noisy, caption).score == pytest.approx(shapes.verify(picture, caption).score, abs=0.03)


def test_blur_costs_score() -> None:
    pictures = drawn(30)
    blurred = [[ndimage.gaussian_filter(p, (s, s, 0)) for _, p in pictures] for s in (0, 2, 4, 6)]
    scores = [[shapes.verify(b, c).score for b, (c, _) in zip(row, pictures, strict=True)] for row in blurred]
    means = np.mean(scores, axis=1)
    assert (np.diff(means) < 0).all(), means


def test_a_second_object_too_many_is_counted_and_not_clean() -> None:
    rng = np.random.default_rng(3)
    picture = shapes.render("a red circle left of a blue square", rng)
    verdict = shapes.verify(picture, "a red circle")
    assert verdict.parts["clean"] < 0.1 and not verdict.correct
    twice = shapes.verify(shapes.render("two red circles", rng), "a red circle")
    assert twice.parts["count"] == pytest.approx(np.exp(-1)) and not twice.correct


@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_place_follows_the_relation(relation: str) -> None:
    rng, opposite = np.random.default_rng(4), {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    picture = shapes.render(f"a red circle {relation} a blue square", rng)
    assert shapes.verify(picture, f"a red circle {relation} a blue square").parts["place"] > 0.9
    assert shapes.verify(picture, f"a red circle {opposite[relation]} a blue square").parts["place"] < 0.1
    assert shapes.verify(picture, f"a blue square {opposite[relation]} a red circle").parts["place"] > 0.9
