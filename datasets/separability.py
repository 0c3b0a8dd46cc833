"""How far the words alone tell chosen from rejected: a Bradley-Terry model on bags of words, tested on unseen prompts.

    P(chosen beats rejected) = sigmoid(w . (x_chosen - x_rejected))

fitted by logistic regression without an intercept, in five folds that never split a prompt. It needs nothing but SciPy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse, special, stats

WORDS = re.compile(r"\w+")
FOLDS = 5
VOCABULARY = 20_000
STRENGTH = 100.0  # C of the literature: loss summed over pairs, times C, plus half the squared norm of w
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Separation:
    """auc: chance that a chosen answer scores above a rejected one, of any prompt of the fold. right: for each pair whether
    its own chosen answer scores higher (0.5: equal), by a model that has not seen its prompt. The most telling words of
    either side are those of a model of all pairs."""

    auc: float
    right: Floats
    chosen_words: list[str]
    rejected_words: list[str]


def separate(chosen: Sequence[str], rejected: Sequence[str], folds: Sequence[int]) -> Separation | None:
    """Fit and test on the answers of N pairs. folds: (N,) numbers, equal for equal prompts; None when all are equal.

    An answer is the frequencies of its words, in lower case, which say nothing of its length.
    """
    places, vocabulary = np.asarray(folds), _vocabulary([*chosen, *rejected])
    if len(set(places.tolist())) < 2 or not vocabulary:
        return None
    good, bad = (_bags(side, vocabulary) for side in (chosen, rejected))
    right, aucs, sizes = np.zeros(len(places)), [], []
    for fold in sorted(set(places.tolist())):
        test = np.flatnonzero(places == fold)
        weights = fit(good[places != fold] - bad[places != fold])
        high, low = good[test] @ weights, bad[test] @ weights
        right[test] = (high > low) + 0.5 * (high == low)
        aucs.append(auc(high, low))
        sizes.append(len(test))
    order = np.argsort(fit(good - bad), kind="stable")
    words = np.array(list(vocabulary))
    return Separation(float(np.average(aucs, weights=sizes)), right, words[order[::-1][:8]].tolist(), words[order[:8]].tolist())


def auc(high: Floats, low: Floats) -> float:
    """Chance that a random one of `high` exceeds a random one of `low`, ties counting half (Mann and Whitney)."""
    ranks = stats.rankdata(np.concatenate([high, low]))[: len(high)]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def fit(differences: sparse.csr_matrix) -> Floats:
    """The weights w (V,) of least C * sum log(1 + exp(-w . d)) + |w|^2 / 2 over differences d (N, V)."""

    def loss(w: Floats) -> tuple[float, Floats]:
        margins = differences @ w
        value = STRENGTH * np.logaddexp(0, -margins).sum() + w @ w / 2
        return float(value), w - STRENGTH * (differences.T @ special.expit(-margins))

    found = optimize.minimize(loss, np.zeros(differences.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return found.x


def _vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """The words of at least two answers, the commonest first, with their columns."""
    counts = Counter(word for words in texts for word in set(WORDS.findall(words.casefold())))
    common = [w for w, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n > 1][:VOCABULARY]
    return {word: i for i, word in enumerate(common)}


def _bags(texts: Sequence[str], vocabulary: dict[str, int]) -> sparse.csr_matrix:
    """Word frequencies (N, V): each row adds up to 1."""
    columns = [[vocabulary[w] for w in WORDS.findall(words.casefold()) if w in vocabulary] for words in texts]
    rows = np.repeat(np.arange(len(texts)), [len(c) for c in columns])
    flat = np.array([c for found in columns for c in found], np.int64)
    counts = sparse.csr_matrix((np.ones(len(flat)), (rows, flat)), shape=(len(texts), len(vocabulary)))
    return sparse.diags_array(1 / np.maximum(np.asarray(counts.sum(1)).ravel(), 1)).tocsr() @ counts
