"""What votes say: win rates with an interval, a Bradley-Terry scale, how far voters agree, and which question to ask next.

Pure functions of numbers. A tie, and "both bad", count as half a win for either side. Intervals are percentile bootstraps
over units, not over votes, because votes on one item are not independent.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmpo.intervals import unanimous

Matrix = NDArray[np.float64]
Bounds = tuple[float | None, float | None]
ELO = 400 / math.log(10)  # points of the Elo scale in one unit of log-odds
CENTRE = 1000.0  # the mean of all ratings
RIDGE = 0.1  # of the Bradley-Terry strengths: with it the estimate exists where one side has won everything


@dataclass(frozen=True)
class Outcome:
    """One vote. unit: what is drawn again as a whole by the bootstrap; share: 1 `first` won, 0 `second` did, 0.5 neither."""

    unit: str
    first: str
    second: str
    share: float


@dataclass(frozen=True)
class Interval:
    """An estimate, its 95 % interval, and the votes it was made of."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Elo:
    """A place on the Elo scale, its 95 % interval, and the votes it was made of; a bound is None where the votes set none."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Rating:
    """One row of the table: wins, ties and losses of a name, its share of wins, and its place on the Elo scale."""

    name: str
    wins: int
    ties: int
    losses: int
    win_rate: Interval
    elo: Elo


def win_rate(shares: Sequence[tuple[str, float]], seed: int = 0, draws: int = 2000) -> Interval | None:
    """The mean of the shares, and what it is when units are drawn again with replacement; None without any vote.

    shares: (unit, share in [0, 1]) of each vote. A unit weighs as much as it has votes. Where all units agree the interval is
    `intervals.unanimous`.
    """
    if not shares:
        return None
    sums, counts = (np.array(column, np.float64) for column in _by_unit(shares))
    random, means = np.random.default_rng(seed), np.empty(draws)
    for i in range(draws):
        drawn = random.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    if np.ptp(sums / counts) == 0:
        low, high = unanimous(float(sums[0] / counts[0]), len(sums))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), len(shares))


def _by_unit(shares: Sequence[tuple[str, float]]) -> tuple[list[float], list[int]]:
    sums: dict[str, float] = defaultdict(float)
    for unit, share in shares:
        sums[unit] += share
    counts = Counter(unit for unit, _ in shares)
    return list(sums.values()), [counts[unit] for unit in sums]


def bradley_terry(wins: Matrix, ridge: float = RIDGE, start: Matrix | None = None) -> Matrix:
    """Strengths (S,) in log-odds, mean 0, of the model P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    wins: (S, S), how often i has beaten j, ties as half a win each. Maximises sum_ij wins_ij log P(i beats j) - ridge / 2 |s|^2
    by Newton's method with halved steps; strictly concave for ridge > 0, so there is one maximum. For two names and a
    vanishing ridge the difference is log(wins / losses). start: strengths to begin at. Bradley and Terry 1952, Biometrika 39.
    """
    strengths = np.zeros(len(wins)) if start is None else start
    for _ in range(100):
        odds = _logistic(strengths[:, None] - strengths[None])
        slope = (wins - (wins + wins.T) * odds).sum(1) - ridge * strengths
        step = np.linalg.solve(information(wins, strengths, ridge), slope)
        size, before = 1.0, _fit(wins, strengths, ridge)
        while _fit(wins, strengths + size * step, ridge) < before and size > 1e-6:
            size /= 2
        strengths = strengths + size * step
        if np.abs(step).max(initial=0) < 1e-8:
            break
    return strengths - strengths.mean() if len(strengths) else strengths


def information(wins: Matrix, strengths: Matrix, ridge: float = RIDGE) -> Matrix:
    """Minus the second derivative of what `bradley_terry` maximises, (S, S)."""
    odds = _logistic(strengths[:, None] - strengths[None])
    weight = (wins + wins.T) * odds * (1 - odds)
    return np.diag(weight.sum(1)) - weight + ridge * np.eye(len(wins))


def gains(wins: Matrix, ridge: float = RIDGE) -> Matrix:
    """How much one more comparison of i and j would tell, (S, S), in nats.

    log(1 + p (1 - p) v), v the variance of the difference of their strengths: by so much the log-determinant of the
    information grows (D-optimal design). Large where the outcome is open and little is known; 0 on the diagonal.
    """
    strengths = bradley_terry(wins, ridge)
    covariance = np.linalg.inv(information(wins, strengths, ridge))
    spread = np.diag(covariance)
    odds = _logistic(strengths[:, None] - strengths[None])
    return np.log1p(odds * (1 - odds) * np.maximum(spread[:, None] + spread[None] - 2 * covariance, 0))


def _logistic(x: Matrix) -> Matrix:
    return np.exp(-np.logaddexp(0, -x))


def _fit(wins: Matrix, strengths: Matrix, ridge: float) -> float:
    differences = strengths[:, None] - strengths[None]
    return float(-(wins * np.logaddexp(0, -differences)).sum() - ridge / 2 * (strengths**2).sum())


def wins_of(outcomes: Iterable[Outcome], names: Sequence[str]) -> Matrix:
    """(S, S): how often each name has beaten each other, in the order of `names`."""
    place, wins = {name: i for i, name in enumerate(names)}, np.zeros((len(names), len(names)))
    for vote in outcomes:
        wins[place[vote.first], place[vote.second]] += vote.share
        wins[place[vote.second], place[vote.first]] += 1 - vote.share
    return wins


def ratings(outcomes: Sequence[Outcome], names: Sequence[str], seed: int = 0, draws: int = 300) -> list[Rating]:
    """The table of all names that have been voted on, best first.

    elo: 1000 + 400 / ln 10 times the Bradley-Terry strength, so that 400 points are odds of ten to one. Two names have the
    interval of their win rate on that scale, on which a rate of 0 or 1 is no bound; more names have a bootstrap's.
    """
    known = [name for name in names if any(name in (vote.first, vote.second) for vote in outcomes)]
    estimate = CENTRE + ELO * bradley_terry(wins_of(outcomes, known))
    drawn = _bounds(outcomes, known, seed, draws) if len(known) > 2 else []
    rows = []
    for i, name in enumerate(known):
        shares = [(v.unit, v.share if v.first == name else 1 - v.share) for v in outcomes if name in (v.first, v.second)]
        rate, tally = win_rate(shares, seed, draws), Counter(share for _, share in shares)
        assert rate is not None
        low, high = drawn[i] if drawn else (_place(share, len(shares)) for share in (rate.low, rate.high))
        elo = Elo(float(estimate[i]), low, high, len(shares))
        rows.append(Rating(name, tally[1.0], tally[0.5], tally[0.0], rate, elo))
    return sorted(rows, key=lambda row: -row.elo.value)


def _place(share: float, votes: int) -> float | None:
    """Where the first of two names stands that wins this share of the votes; None at 0 and 1, where odds have no bound."""
    wins = np.array([[0, votes * share], [votes * (1 - share), 0]])
    return float(CENTRE + ELO * bradley_terry(wins)[0]) if 0 < share < 1 else None


def _bounds(outcomes: Sequence[Outcome], names: Sequence[str], seed: int, draws: int) -> list[Bounds]:
    """A bootstrap's interval of each rating, no bounds where it cannot tell: where all draws are alike, and where the votes
    hold no place but by the ridge."""
    if not held(wins_of(outcomes, names)):
        return [(None, None)] * len(names)
    low, high = np.percentile(_resampled(outcomes, names, seed, draws), [2.5, 97.5], axis=0)
    return [(float(a), float(b)) if b - a > 1e-6 else (None, None) for a, b in zip(low, high, strict=True)]


def held(wins: Matrix) -> bool:
    """Whether every name has beaten every other, itself or along a chain of others; ties are wins of either.

    Else some strengths would be without bound but for the ridge, and with them the mean that all places are counted from.
    Ford 1957, American Mathematical Monthly 64.
    """
    reach = (wins > 0) | np.eye(len(wins), dtype=np.bool_)
    for _ in range(len(wins).bit_length()):  # chains of twice the length each time
        reach = reach @ reach
    return bool(reach.all())


def _resampled(outcomes: Sequence[Outcome], names: Sequence[str], seed: int, draws: int) -> Matrix:
    """(draws, S): the ratings of units drawn again with replacement."""
    place, units = ({name: i for i, name in enumerate(dict.fromkeys(column))} for column in (names, [o.unit for o in outcomes]))
    rows = [(place[vote.first], place[vote.second], units[vote.unit], vote.share) for vote in outcomes]
    first, second, unit, shares = (np.array(column) for column in zip(*rows, strict=True))
    random, found = np.random.default_rng(seed), np.empty((draws, len(names)))
    whole = bradley_terry(wins_of(outcomes, names))
    for i in range(draws):
        times = np.bincount(random.integers(0, len(units), len(units)), minlength=len(units))[unit]
        wins = np.zeros((len(names), len(names)))
        np.add.at(wins, (first, second), times * shares)
        np.add.at(wins, (second, first), times * (1 - shares))
        found[i] = CENTRE + ELO * bradley_terry(wins, start=whole)
    return found


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Agreement beyond chance on nominal labels, 1 where all agree, 0 where it is as by chance, negative below that.

    units: the labels that different voters gave to one thing each; things with fewer than two say nothing.
    alpha = 1 - (n - 1) sum_{c != k} o_ck / sum_{c != k} n_c n_k, over the coincidences o of values within units. None where
    nothing was labelled twice, or all labels are equal: agreement is then not defined. Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability".
    """
    values: Counter[Hashable] = Counter()
    apart = 0.0
    for labels in units:
        if len(labels) > 1:
            counts = Counter(labels)
            values += counts
            same = sum(count * (count - 1) for count in counts.values())
            apart += (len(labels) * (len(labels) - 1) - same) / (len(labels) - 1)
    total = values.total()
    expected = total**2 - sum(count**2 for count in values.values())
    return 1 - (total - 1) * apart / expected if expected else None
