"""Win rates, Bradley-Terry, agreement and the choice of questions against closed forms and published examples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo.demos.rating import CENTRE, RIDGE, Outcome, bradley_terry, gains, held, krippendorff_alpha, ratings, win_rate, wins_of


def matrix(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float64)


# Bradley-Terry


def test_two_names_have_the_odds_of_their_wins() -> None:
    strengths = bradley_terry(matrix([0, 30], [10, 0]), ridge=1e-12)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3), abs=1e-6)
    assert strengths.sum() == pytest.approx(0, abs=1e-9)


def test_400_points_are_odds_of_ten_to_one() -> None:
    outcomes = [Outcome(str(i), "a", "b", float(i < 100)) for i in range(110)]
    a, b = ratings(outcomes, ["b", "a"], draws=2)
    assert (a.name, b.name) == ("a", "b")
    assert a.elo.value - b.elo.value == pytest.approx(400, abs=10)  # the ridge takes a little
    assert a.elo.value + b.elo.value == pytest.approx(2 * CENTRE)


def test_a_chain_of_three() -> None:
    """a beats b 2 to 1, b beats c 2 to 1 and nothing else was asked: odds multiply along the chain."""
    a, b, c = bradley_terry(matrix([0, 20, 0], [10, 0, 20], [0, 10, 0]), ridge=1e-12)
    assert (a - b, b - c, a - c) == pytest.approx((math.log(2), math.log(2), math.log(4)), abs=1e-6)


def test_who_has_won_everything_has_a_rating_too() -> None:
    """At the maximum n / (1 + exp(d)) = ridge d / 2, for a difference d."""
    best, worst = bradley_terry(matrix([0, 10], [0, 0]))
    d = best - worst
    assert 10 / (1 + math.exp(d)) == pytest.approx(RIDGE * d / 2, rel=1e-6)


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_the_slope_is_zero_and_names_do_not_matter(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    wins = matrix(*(random.integers(0, 30, (count, count)) / 2).tolist())
    np.fill_diagonal(wins, 0)
    strengths = bradley_terry(wins)
    odds = 1 / (1 + np.exp(strengths[None] - strengths[:, None]))
    slope = (wins - (wins + wins.T) * odds).sum(1) - RIDGE * strengths
    assert np.abs(slope).max() < 1e-6
    order = random.permutation(count)
    assert bradley_terry(wins[np.ix_(order, order)]) == pytest.approx(strengths[order], abs=1e-7)
    assert bradley_terry(wins.T) == pytest.approx(-strengths, abs=1e-7)


def test_nobody_played() -> None:
    assert bradley_terry(np.zeros((3, 3))) == pytest.approx([0, 0, 0])
    assert ratings([], ["a", "b"]) == []


# The table


def test_ties_are_half_a_win_for_either() -> None:
    outcomes = [
        Outcome("1", "a", "b", 1.0),
        Outcome("2", "b", "a", 0.5),
        Outcome("3", "b", "a", 1.0),
        Outcome("4", "a", "b", 1.0),
    ]
    assert wins_of(outcomes, ["a", "b"]).tolist() == [[0, 2.5], [1.5, 0]]
    a, b = ratings(outcomes, ["a", "b", "c"], draws=20)
    assert (a.wins, a.ties, a.losses, a.win_rate.value) == (2, 1, 1, 0.625)
    assert (b.wins, b.ties, b.losses, b.win_rate.value) == (1, 1, 2, 0.375)
    assert a.elo.low is not None and a.elo.high is not None and a.elo.low <= a.elo.value <= a.elo.high


def test_two_names_that_all_agree_on() -> None:
    """Ten items of ten: at least 1 - (0.025)^(1/10) of all are lost with little probability, and nothing limits the odds."""
    best, worst = ratings([Outcome(str(i), "a", "b", 1.0) for i in range(10)], ["a", "b"])
    least = 0.025**0.1
    assert (best.win_rate.low, best.win_rate.high) == pytest.approx((least, 1))
    assert best.elo.low == pytest.approx(CENTRE + 200 * math.log10(least / (1 - least)), abs=5)  # the ridge takes a little
    assert best.elo.high is None and worst.elo.low is None
    assert best.elo.low is not None and worst.elo.high == pytest.approx(2 * CENTRE - best.elo.low)
    tied, _ = ratings([Outcome(str(i), "a", "b", 0.5) for i in range(10)], ["a", "b"])
    assert tied.elo.low is not None and tied.elo.high is not None
    assert tied.elo.high - tied.elo.value == pytest.approx(tied.elo.value - tied.elo.low) and tied.elo.high > CENTRE + 50


@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30))
@settings(max_examples=30)
def test_two_names_have_one_interval(votes: list[tuple[str, float]]) -> None:
    """Their win rates mirror each other, and the odds of a rate are the distance on the scale of Elo, but for the ridge."""
    rows = ratings([Outcome(unit, "a", "b", share) for unit, share in votes], ["a", "b"], draws=200)
    one, other = rows
    assert (one.win_rate.low, one.win_rate.high) == pytest.approx((1 - other.win_rate.high, 1 - other.win_rate.low))
    for row in rows:
        for share, place in ((row.win_rate.low, row.elo.low), (row.win_rate.high, row.elo.high)):
            assert (place is None) == (share in (0, 1))
            if place is not None:
                wins = matrix([0, share * len(votes)], [(1 - share) * len(votes), 0])
                assert place == pytest.approx(CENTRE + 400 / math.log(10) * bradley_terry(wins)[0])
        assert row.elo.low is None or row.elo.low <= row.elo.value + 1e-6
        assert row.elo.high is None or row.elo.value <= row.elo.high + 1e-6


def rounds(*votes: tuple[str, str, float]) -> list[Outcome]:
    """The same votes on each of eight items."""
    return [Outcome(str(i), *vote) for i in range(8) for vote in votes]


def test_more_names_have_no_interval_where_votes_agree() -> None:
    ordered = rounds(("a", "b", 1.0), ("b", "c", 1.0), ("a", "c", 1.0))
    spread = [vote for i, vote in enumerate(ordered) if i % 5]  # the draws differ, and all votes agree as before
    tied = rounds(("a", "b", 0.5), ("b", "c", 0.5), ("a", "c", 0.5))
    for outcomes in (ordered, spread, tied):
        for row in ratings(outcomes, ["a", "b", "c"], draws=50):
            assert (row.elo.low, row.elo.high) == (None, None) and row.win_rate.low < row.win_rate.high


def test_more_names_have_intervals_where_all_are_held() -> None:
    """b and c share four to four in both; without one win of theirs over a their places are its own less a constant."""
    outcomes = rounds(("a", "b", 1.0), ("a", "c", 1.0)) + [Outcome(str(i), "b", "c", float(i % 2)) for i in range(8)]
    for row in ratings(outcomes, ["a", "b", "c"], draws=50):
        assert (row.elo.low, row.elo.high) == (None, None)
    for row in ratings([*outcomes, Outcome("0", "c", "a", 1.0)], ["a", "b", "c"], draws=50):
        assert row.elo.low is not None and row.elo.high is not None and row.elo.low < row.elo.value < row.elo.high


def test_all_are_held_or_none() -> None:
    """b, c and d have beaten one another in a circle, and a has beaten b: nothing says how far, until d beats a."""

    def won(*games: str) -> np.ndarray:
        names = sorted(set("".join(games)))
        wins = np.zeros((len(names), len(names)))
        for game in games:
            wins[names.index(game[0]), names.index(game[1])] = 1
        return wins

    assert held(won("bc", "cd", "db")) and held(won("ab", "bc", "cd", "db", "da"))
    assert not held(won("ab", "bc", "cd", "db")) and not held(won("bc", "cd", "db", "de"))
    assert not held(won("ab", "ba", "cd", "dc")), "two circles that never met"
    ring = [f"{a}{b}" for a, b in itertools.pairwise("abcdefghijk")]
    assert held(won(*ring, "ka")) and not held(won(*ring))


def test_win_rate_interval_is_over_units() -> None:
    """The same votes say less when they are about fewer things."""
    spread = [(str(i), float(i % 2)) for i in range(64)]
    few = [(str(i % 4), float(i % 2)) for i in range(64)]
    wide, narrow = win_rate(few), win_rate(spread)
    assert wide is not None and narrow is not None
    assert wide.value == narrow.value == 0.5
    assert narrow.high - narrow.low == pytest.approx(4 * 0.5 / 8 * 0.98, abs=0.05)  # 1.96 standard errors to either side
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30))
@settings(max_examples=30)
def test_win_rate_mirrors(shares: list[tuple[str, float]]) -> None:
    mine, theirs = win_rate(shares, draws=200), win_rate([(unit, 1 - share) for unit, share in shares], draws=200)
    assert mine is not None and theirs is not None
    assert mine.value == pytest.approx(1 - theirs.value)
    assert (mine.low, mine.high) == pytest.approx((1 - theirs.high, 1 - theirs.low))
    assert 0 <= mine.low <= mine.high <= 1 and mine.n == len(shares)


def test_no_votes_no_win_rate() -> None:
    assert win_rate([]) is None


# Agreement: the worked examples of Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"


def columns(*voters: str) -> list[list[str]]:
    """What each voter said of thing after thing, as the labels of each thing; '.' is no label."""
    return [[label for label in said if label != "."] for said in zip(*(v.split() for v in voters), strict=True)]


MEG_AND_OWEN = columns("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0")
BEN_AND_GERRY = columns("a a b b d c c c e d d a", "b a b b b c c c e d d d")
FOUR = columns("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")


@pytest.mark.parametrize(("units", "alpha"), [(MEG_AND_OWEN, 0.095), (BEN_AND_GERRY, 0.692), (FOUR, 0.743)])
def test_published_agreement(units: list[list[str]], alpha: float) -> None:
    assert krippendorff_alpha(units) == pytest.approx(alpha, abs=5e-4)


def test_agreement_at_its_ends() -> None:
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1
    assert krippendorff_alpha([["a", "b"], ["b", "a"]]) == pytest.approx(-0.5)  # 1 - 3 * 4 / 8
    assert krippendorff_alpha([["a"], ["b"]]) is None and krippendorff_alpha([]) is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None


def test_agreement_by_chance_is_about_zero() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (4000, 2)).tolist()
    assert krippendorff_alpha(labels) == pytest.approx(0, abs=0.05)


# What to ask next


def test_an_open_question_tells_more_than_a_settled_one() -> None:
    wins = np.zeros((3, 3))
    wins[0, 1] = 20  # 0 beats 1 for certain; 2 is unknown
    worth = gains(wins)
    assert worth[0, 2] > worth[0, 1] and worth[1, 2] > worth[0, 1]
    assert np.diag(worth) == pytest.approx(0) and worth == pytest.approx(worth.T)


def test_the_gain_is_that_of_the_determinant() -> None:
    """With nothing known the information is ridge I, p = 1/2 and v = 2 / ridge."""
    assert gains(np.zeros((2, 2)), ridge=0.5)[0, 1] == pytest.approx(math.log(1 + 0.25 * 2 / 0.5))
