"""Turns scored candidates into pairs: several answers to one prompt, a score each, and a strategy that picks the pairs.

Every choice that is not decided by the scores (ties, byes, opponents, which pairs to keep) is decided by a hash of the seed
and the contents, so the order in which candidates arrive, their number of workers and the other prompts do not matter.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpo.pair import Block, Pair


@dataclass(frozen=True)
class Candidate:
    """One answer to a prompt. score: higher is better, None when nobody has judged it; seed: what it was sampled with.

    meta: what else the data say of it, e.g. who wrote it and its score by aspect.
    """

    prompt: tuple[Block, ...]
    block: Block
    score: float | None = None
    seed: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def value(self) -> float:
        """The score, where there has to be one."""
        if self.score is None:
            raise ValueError("this candidate has no score: judge it first")
        return self.score


Match = tuple[Candidate, Candidate]  # higher or equal score first
Strategy = Callable[[Sequence[Candidate], int], list[Match]]


def digest(*blocks: Block) -> str:
    """A name for the content of some blocks, 80 bits in hexadecimal."""
    return hashlib.sha256("".join(b.digest for b in blocks).encode()).hexdigest()[:20]


def pair_id(prompt: Sequence[Block], chosen: Sequence[Block], rejected: Sequence[Block]) -> str:
    """The id of a pair, from its contents only: the same in every file, order and process."""
    parts = "|".join(",".join(b.digest for b in side) for side in (prompt, chosen, rejected))
    return hashlib.sha256(parts.encode()).hexdigest()[:20]


def by_prompt(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates grouped by the content of their prompt, in the order of first appearance."""
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[digest(*candidate.prompt)].append(candidate)
    return dict(groups)


def best_worst(ranked: Sequence[Candidate], seed: int) -> list[Match]:
    """The best against the worst: one pair a prompt, the widest gap."""
    return [(ranked[0], ranked[-1])]


def every(ranked: Sequence[Candidate], seed: int) -> list[Match]:
    """Every two candidates: n (n - 1) / 2 matches."""
    return list(itertools.combinations(ranked, 2))


def tournament(ranked: Sequence[Candidate], seed: int) -> list[Match]:
    """A knock-out: shuffled into a bracket, losers leave, winners meet winners until one is left: n - 1 matches.

    The good candidates play most matches, so late pairs are between two good answers. With an odd number the last of the
    bracket has a bye. A drawn match gives no pair, and the higher-ranked one goes on.
    """
    bracket = sorted(range(len(ranked)), key=lambda i: _draw(seed, "bracket", ranked[i]))
    matches = []
    while len(bracket) > 1:
        meetings = [(min(a, b), max(a, b)) for a, b in zip(bracket[::2], bracket[1::2], strict=False)]
        matches += [(ranked[a], ranked[b]) for a, b in meetings]
        bracket = [a for a, _ in meetings] + bracket[len(meetings) * 2 :]
    return matches


def random_below(ranked: Sequence[Candidate], seed: int) -> list[Match]:
    """Each candidate against one, drawn at random, among those with a strictly lower score."""
    matches = []
    for candidate in ranked:
        below = [c for c in ranked if c.value < candidate.value]
        if below:
            matches.append((candidate, below[_draw(seed, "below", candidate) % len(below)]))
    return matches


STRATEGIES: dict[str, Strategy] = {
    "best_worst": best_worst,
    "all": every,
    "margin": every,
    "tournament": tournament,
    "random_below": random_below,
}


def pair_up(
    candidates: Mapping[str, Sequence[Candidate]] | Iterable[Candidate],
    strategy: str = "best_worst",
    *,
    margin: float = 0.0,
    max_per_prompt: int | None = None,
    seed: int = 0,
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs by `strategy`, and the number of drops by reason. The strategy `margin` is `all` with a margin that must be given.

    candidates: grouped by prompt, as `by_prompt` returns them, or in one row, which is then grouped.
    margin: least gap between the two scores, in the judge's units; a gap of 0 is a tie and never a pair.
    max_per_prompt: keep at most so many pairs of one prompt, drawn by hash. The reasons start with what they count:
    "candidate: ...", "group: ..." or "pair: ...". Each Pair carries its scores and `group`, the digest of its prompt.

    Raises ValueError for an unknown strategy, a negative margin, or a group that mixes prompts.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"no pairing strategy {strategy!r}; strategies: {', '.join(STRATEGIES)}")
    if not (margin >= 0 and math.isfinite(margin)) or (strategy == "margin" and margin == 0):
        raise ValueError(f"margin: expected {'> 0' if strategy == 'margin' else '>= 0'} for {strategy!r}, found {margin}")
    if max_per_prompt is not None and max_per_prompt < 1:
        raise ValueError(f"max_per_prompt: expected at least 1, found {max_per_prompt}")
    drops: Counter[str] = Counter()
    pairs: list[Pair] = []
    groups = candidates if isinstance(candidates, Mapping) else by_prompt(candidates)
    for name, group in groups.items():
        if len({digest(*c.prompt) for c in group}) > 1:
            raise ValueError(f"group {name!r} mixes different prompts; group candidates with pairing.by_prompt")
        ranked = _ranked(group, seed, drops)
        if len(ranked) < 2:
            drops["group: fewer than two answers"] += 1
        elif ranked[0].score == ranked[-1].score:
            drops["group: all scores equal"] += 1
        else:
            pairs += _kept(STRATEGIES[strategy](ranked, seed), margin, max_per_prompt, seed, drops)
    return pairs, {reason: count for reason, count in drops.items() if count}


def _ranked(group: Sequence[Candidate], seed: int, drops: Counter[str]) -> list[Candidate]:
    """The distinct scored candidates, best first, equal scores in a hashed order."""
    scored = [c for c in group if c.score is not None and math.isfinite(c.score)]
    scored.sort(key=lambda c: (-c.value, _draw(seed, "rank", c), c.seed))
    best = {c.block.digest: c for c in reversed(scored)}  # of copies the best scored one stays
    distinct = [c for c in scored if best[c.block.digest] is c]
    drops["candidate: no finite score"] += len(group) - len(scored)
    drops["candidate: copy of another answer"] += len(scored) - len(distinct)
    return distinct


def _kept(matches: list[Match], margin: float, limit: int | None, seed: int, drops: Counter[str]) -> list[Pair]:
    pairs = []
    for better, worse in matches:
        gap = better.value - worse.value
        if gap <= 0:
            drops["pair: tied scores"] += 1
        elif gap < margin:
            drops["pair: gap below the margin"] += 1
        else:
            pairs.append(_pair(better, worse))
    if limit is not None and len(pairs) > limit:
        drops["pair: over max_per_prompt"] += len(pairs) - limit
        pairs = sorted(pairs, key=lambda p: _hash(seed, "keep", p.id))[:limit]
    return pairs


def _pair(better: Candidate, worse: Candidate) -> Pair:
    told = {"chosen": dict(better.meta), "rejected": dict(worse.meta)}
    return Pair(
        pair_id(better.prompt, (better.block,), (worse.block,)),
        better.prompt,
        (better.block,),
        (worse.block,),
        scores={"chosen": better.value, "rejected": worse.value},
        group=digest(*better.prompt),
        meta={"seeds": {"chosen": better.seed, "rejected": worse.seed}} | ({"answers": told} if any(told.values()) else {}),
    )


def _draw(seed: int, purpose: str, candidate: Candidate) -> int:
    return _hash(seed, purpose, digest(*candidate.prompt, candidate.block))


def _hash(seed: int, purpose: str, name: str) -> int:
    """A uniform 64-bit number that depends on the three arguments only."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()[:8], "big")
