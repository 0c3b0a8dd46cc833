"""Finds texts that are nearly the same: MinHash to find candidates, the Jaccard index of word triples to decide.

Broder (1997), "On the resemblance and containment of documents": the chance that two sets have the same least hash is their
Jaccard index.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"\w+|[^\w\s]")
ROWS, BANDS = 4, 16  # two texts of Jaccard index J share a band with probability 1 - (1 - J^4)^16: 0.9998 at 0.8
Hashes = NDArray[np.uint64]


def plain(words: str) -> str:
    """A text without regard to case and white space."""
    return " ".join(words.casefold().split())


def triples(words: str) -> Hashes:
    """The hashes of all runs of three words, each once and sorted; of a shorter text the one run there is."""
    ids = np.array([zlib.crc32(w.encode()) for w in WORD.findall(words.casefold())] or [0], np.uint64)
    ids = np.pad(ids, (0, max(0, 3 - len(ids))))
    a, b = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
    return np.unique((ids[:-2] * a + ids[1:-1]) * b + ids[2:])


def jaccard(first: Hashes, second: Hashes) -> float:
    """Shared elements as a share of all: 1 for equal sets."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def near_copies(texts: Sequence[str], least: float = 0.8) -> list[int]:
    """For each text the place of the first one it is a copy of, by way of copies of copies; its own where there is none.

    least: smallest Jaccard index of the sets of word triples that counts as a copy. Texts that differ in case and white
    space only are always copies.
    """
    first: dict[str, int] = {}
    parents = [first.setdefault(plain(words), i) for i, words in enumerate(texts)]
    distinct = sorted(set(parents))
    sets = {i: triples(texts[i]) for i in distinct}
    for i, j in _candidates(sets):
        a, b = sorted((_root(parents, i), _root(parents, j)))
        if a != b and jaccard(sets[i], sets[j]) >= least:
            parents[b] = a
    return [_root(parents, i) for i in range(len(texts))]


def _root(parents: list[int], place: int) -> int:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


def _candidates(sets: dict[int, Hashes]) -> Iterator[tuple[int, int]]:
    """Pairs of places whose texts share a band: each with the last eight of its kind, which bounds the work."""
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**63, ROWS * BANDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for place, found in sets.items():
        mixed = found ^ (found >> np.uint64(31))
        least = (mixed[:, None] * factors[None, :]).min(0).reshape(BANDS, ROWS)
        for band, hashes in enumerate(least):
            bucket = buckets[band, hashes.tobytes()]
            yield from ((other, place) for other in bucket[-8:])
            bucket.append(place)
