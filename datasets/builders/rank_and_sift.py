"""UnifiedReward: pairs by duels, then by points (arXiv 2503.05236).

A question's answers meet in duels, two and two; winners and losers are then scored one by one, and the best of the winners
is chosen against the worst of the losers, if it also scores higher. Both judgements have to agree that way.

Behaviour checked against CodeGoat24/UnifiedReward@ff6f520, of which three things are not as there: scores are numbers (its
scripts for video and images compare them as text), every duel is fought in both orders and counts only if the same answer
wins, and what cannot be parsed is no vote (there, answer 1 wins and a score is 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmpo.datasets.sampling import judged_pair, number, regrouped, sampled
from mmpo.datasets.stages import Dropped, Record, Result, Stage, each
from mmpo.datasets.tools import PairJudge, Prompt, Tools

NEEDS: frozenset[str] = frozenset({"pair_judge", "point_judge"})

Duel = tuple[Prompt, str, str]


def rank_and_sift(
    tools: Tools,
    *,
    answers: int = 10,
    temperature: float = 0.7,
    max_new_tokens: int = 4096,
    swap: bool = True,
    aspect: str = "quality",
    batch: int = 2,
) -> list[Stage]:
    """One pair a question: the best-scored winner of a duel against the worst-scored loser.

    A generator is needed only where the source has no candidates; of an odd number of different answers the last one sits
    out. swap: judge each duel in both orders. aspect: what the point judge is asked for. Dropped are questions without a
    decided duel, without a score on either side, and those where chosen does not score higher than rejected.
    """
    pair_judge, point_judge = tools.pair_judge, tools.point_judge
    if pair_judge is None or point_judge is None:
        raise ValueError("rank_and_sift: expected a pair_judge and a point_judge")

    def rank(records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        meetings = [list(zip(a[::2], a[1::2], strict=False)) for a in (r.fields["candidates"] for r in records)]
        duels = [(r.prompt, a, b) for r, met in zip(records, meetings, strict=True) for a, b in met]
        won = regrouped(decided(pair_judge, duels, swap), [len(met) for met in meetings])
        return [_ranked(r, met, first) for r, met, first in zip(records, meetings, won, strict=True)]

    def point(records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        asked = [(r.prompt, answer) for r in records for answer in (*r.fields["winners"], *r.fields["losers"])]
        found = point_judge([p for p, _ in asked], [a for _, a in asked], aspect)
        points = regrouped([number(v) for v in found], [2 * len(r.fields["winners"]) for r in records])
        return [r.having({"points": p}, points=p) for r, p in zip(records, points, strict=True)]

    sampling = sampled(tools.generator, answers, temperature=temperature, max_new_tokens=max_new_tokens, batch=batch)
    return [sampling, Stage("duels", batch, rank), Stage("points", batch, point), each("sift", _sifted)]


def decided(judge: PairJudge, duels: Sequence[Duel], swap: bool) -> list[bool | None]:
    """Whether the first answer of each duel wins; None where the judge said nothing, or something else in the other order."""
    prompts = [prompt for prompt, _, _ in duels]
    first, second = [a for _, a, _ in duels], [b for _, _, b in duels]
    said = [None if verdict is None else verdict == "first" for verdict in judge(prompts, first, second)]
    if not swap:
        return said
    again = [None if verdict is None else verdict == "second" for verdict in judge(prompts, second, first)]
    return [a if a == b else None for a, b in zip(said, again, strict=True)]


def _ranked(record: Record, meetings: Sequence[tuple[str, str]], first_won: Sequence[bool | None]) -> Result:
    done = [(a, b) if first else (b, a) for (a, b), first in zip(meetings, first_won, strict=True) if first is not None]
    told = {"duels": len(meetings), "undecided": len(meetings) - len(done)}
    if not done:
        return Dropped("no duel with a verdict that holds in both orders")
    return record.having(told, winners=[a for a, _ in done], losers=[b for _, b in done])


def _sifted(record: Record, random: np.random.Generator) -> Record:
    """Equal scores go to the answer that came first."""
    winners, losers, points = (record.fields[name] for name in ("winners", "losers", "points"))
    up = [(p, a) for p, a in zip(points, winners, strict=False) if p is not None]
    down = [(p, a) for p, a in zip(points[len(winners) :], losers, strict=True) if p is not None]
    if not up or not down:
        raise Dropped("no score of a winner or of a loser")
    (high, chosen), (low, rejected) = max(up, key=lambda item: item[0]), min(down, key=lambda item: item[0])
    if high <= low:
        raise Dropped("the chosen answer does not score higher")
    meta = {"winners": len(winners)}
    return record.having(pair=judged_pair(record, chosen, rejected, {"chosen": high, "rejected": low}, meta))
