"""Pairing: the properties every strategy must have, and hand-made cases for each."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo.datasets.pairing import STRATEGIES, Candidate, by_prompt, pair_up
from mmpo.pair import image, text


def candidate(prompt: str, number: int, score: float | None, seed: int = 0) -> Candidate:
    return Candidate((text(prompt),), image(np.full((1, 1, 3), number, np.uint8)), score, seed)


def group(*scores: float | None, prompt: str = "p") -> dict[str, list[Candidate]]:
    return {prompt: [candidate(prompt, i, s) for i, s in enumerate(scores)]}


SCORES = st.lists(st.integers(-3, 3).map(float), min_size=0, max_size=7)
GROUPS = st.dictionaries(st.sampled_from("abcd"), SCORES, max_size=4).map(
    lambda d: {p: group(*scores, prompt=p)[p] for p, scores in d.items()}
)
NAMES = [s for s in STRATEGIES if s != "margin"]


@settings(max_examples=60)
@given(GROUPS, st.sampled_from(NAMES), st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.5]))
def test_chosen_scores_higher_within_one_prompt(groups, strategy, seed, margin) -> None:
    truth = {c.block.digest + c.prompt[0].digest: c.score for g in groups.values() for c in g}
    pairs, _ = pair_up(groups, strategy, margin=margin, seed=seed)
    for pair in pairs:
        better, worse = pair.scores["chosen"], pair.scores["rejected"]
        assert better > worse and better - worse >= margin
        assert truth[pair.chosen[0].digest + pair.prompt[0].digest] == better
        assert truth[pair.rejected[0].digest + pair.prompt[0].digest] == worse
    assert len({p.id for p in pairs}) == len(pairs)


@settings(max_examples=60)
@given(GROUPS, st.sampled_from(NAMES), st.integers(0, 3), st.randoms(use_true_random=False), st.sampled_from([None, 1, 2]))
def test_the_order_of_candidates_does_not_matter(groups, strategy, seed, rng: random.Random, limit) -> None:
    shuffled = {p: rng.sample(g, len(g)) for p, g in groups.items()}
    assert pair_up(shuffled, strategy, seed=seed, max_per_prompt=limit) == pair_up(
        groups, strategy, seed=seed, max_per_prompt=limit
    )


@settings(max_examples=60)
@given(GROUPS, st.sampled_from(NAMES), st.integers(0, 3))
def test_prompts_do_not_influence_each_other(groups, strategy, seed) -> None:
    alone = [pair for p, g in groups.items() for pair in pair_up({p: g}, strategy, seed=seed)[0]]
    assert pair_up(groups, strategy, seed=seed)[0] == alone


@settings(max_examples=60)
@given(SCORES, st.sampled_from([0.0, 2.0]), st.sampled_from([None, 1, 4]))
def test_all_gives_every_strict_pair_and_the_counts_add_up(scores, margin, limit) -> None:
    pairs, drops = pair_up(group(*scores), "all", margin=margin, max_per_prompt=limit)
    gaps = [abs(a - b) for i, a in enumerate(scores) for b in scores[:i]]
    strict = [g for g in gaps if g > 0 and g >= margin]
    assert len(pairs) == (len(strict) if limit is None else min(limit, len(strict)))
    if len(set(scores)) > 1:
        assert len(pairs) + sum(n for reason, n in drops.items() if reason.startswith("pair:")) == len(gaps)
        assert drops.get("pair: tied scores", 0) == gaps.count(0)
    else:
        assert drops == {"group: all scores equal" if len(scores) > 1 else "group: fewer than two answers": 1}


def test_best_worst() -> None:
    (pair,), drops = pair_up(group(0.5, 0.9, 0.1), "best_worst")
    assert pair.scores == {"chosen": 0.9, "rejected": 0.1} and drops == {}
    assert [b.digest for b in (*pair.chosen, *pair.rejected)] == [candidate("p", i, None).block.digest for i in (1, 2)]


def test_margin_keeps_gaps_of_at_least_tau() -> None:
    pairs, drops = pair_up(group(0.0, 1.0, 3.0), "margin", margin=2.0)
    assert sorted(p.scores["chosen"] - p.scores["rejected"] for p in pairs) == [2.0, 3.0]
    assert drops == {"pair: gap below the margin": 1}


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_tournament_has_one_match_less_than_players_and_the_best_is_never_rejected(count: int) -> None:
    pairs, drops = pair_up(group(*map(float, range(count))), "tournament", seed=5)
    assert len(pairs) == count - 1 and not drops
    losers = [p.rejected[0].digest for p in pairs]
    assert len(set(losers)) == count - 1  # who loses leaves
    assert max(p.scores["rejected"] for p in pairs) < count - 1
    assert any(p.scores["chosen"] == count - 1 for p in pairs)


def test_tournament_draws_are_counted() -> None:
    scores = [1.0, 1.0, 1.0, 0.0]
    pairs, drops = pair_up(group(*scores), "tournament")
    assert len(pairs) + drops["pair: tied scores"] == 3 and len(pairs) == 1


def test_random_below_uses_every_candidate_but_the_lowest_as_chosen() -> None:
    pairs, drops = pair_up(group(*map(float, range(6))), "random_below", seed=1)
    assert [p.scores["chosen"] for p in pairs] == [5.0, 4.0, 3.0, 2.0, 1.0] and not drops
    other = pair_up(group(*map(float, range(6))), "random_below", seed=2)[0]
    assert [p.id for p in other] != [p.id for p in pairs]


def test_max_per_prompt_is_counted_and_seeded() -> None:
    pairs, drops = pair_up(group(*map(float, range(5))), "all", max_per_prompt=3, seed=0)
    assert len(pairs) == 3 and drops == {"pair: over max_per_prompt": 7}
    kept = {
        frozenset(p.id for p in pair_up(group(*map(float, range(5))), "all", max_per_prompt=3, seed=s)[0]) for s in range(5)
    }
    assert len(kept) > 1


def test_unscored_infinite_and_copied_answers_are_dropped_and_counted() -> None:
    groups = group(1.0, None, float("nan"), float("inf"), 0.0)
    groups["p"].append(candidate("p", 0, 0.5))  # the same picture as the first, with a lower score
    (pair,), drops = pair_up(groups, "all")
    assert pair.scores == {"chosen": 1.0, "rejected": 0.0}
    assert drops == {"candidate: no finite score": 3, "candidate: copy of another answer": 1}


def test_ids_are_content_and_survive_other_scores() -> None:
    first = pair_up(group(0.0, 1.0), "best_worst", seed=0)[0][0]
    second = pair_up(group(0.2, 0.7), "best_worst", seed=9)[0][0]
    assert first.id == second.id and first.group == second.group
    assert pair_up(group(1.0, 0.0), "best_worst")[0][0].id != first.id


def test_by_prompt_groups_by_content() -> None:
    rows = [candidate("a", 0, 1.0), candidate("b", 1, 1.0), candidate("a", 2, 0.0)]
    assert [len(g) for g in by_prompt(rows).values()] == [2, 1]
    assert pair_up(rows, "all") == pair_up(by_prompt(rows), "all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "best"}, "no pairing strategy 'best'"),
        ({"margin": -1.0}, "margin"),
        ({"strategy": "margin"}, "> 0"),
        ({"margin": float("nan")}, "margin"),
        ({"max_per_prompt": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        pair_up(group(0.0, 1.0), **arguments)


def test_mixed_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="mixes different prompts"):
        pair_up({"x": [candidate("a", 0, 0.0), candidate("b", 1, 1.0)]}, "all")
