"""What the page tells at the end: agreement that chance gives none of, and tables that hold what their names say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmpo.demos.ballots import Ballot
from mmpo.demos.pool import Entry, Pool, entry_of
from mmpo.demos.standings import agreement, caption, results
from mmpo.pair import text
from tests.demos.pools import text_pool

Says = Callable[[Any, Any], str]  # (left, right) -> choice


def votes(pool: Pool, voters: int, says: Says, seed: int = 0) -> list[Ballot]:
    """Each voter on every two answers, which stand on either side."""
    drawn, found = random.Random(seed), []
    for number, couple in enumerate(pool.matchups):
        for voter in range(voters):
            left, right = couple if drawn.random() < 0.5 else couple[::-1]
            found.append(Ballot(f"{number}-{voter}", str(voter), left.item, left.id, right.id, says(left, right), 0.0))
    return found


def prefer(system: str) -> Says:
    return lambda left, right: "left" if left.system == system else "right"


# Agreement


@pytest.mark.parametrize(
    ("systems", "mode"),
    [(("base", "aligned"), "vote"), (("a", "b", "c"), "vote"), (("", "named"), "vote"), (("base", "aligned"), "label")],
)
@pytest.mark.parametrize("voters", [2, 5])
@pytest.mark.parametrize("choices", [("left", "right"), ("left", "right", "tie", "both_bad")])
def test_voters_who_flip_coins_agree_by_chance_alone(
    systems: Sequence[str], mode: Any, voters: int, choices: Sequence[str]
) -> None:
    pool, coin = text_pool(300, systems), random.Random(1)
    found = agreement(votes(pool, voters, lambda left, right: coin.choice(choices)), pool, mode)
    assert found == {"agreement": pytest.approx(0, abs=0.1), "why": None}


@pytest.mark.parametrize("mode", ["vote", "label"])
def test_voters_who_see_the_same_agree(mode: Any) -> None:
    pool = text_pool(40)
    better = {item: random.Random(item).choice(entries).id for item, entries in pool.items.items()}
    cast = votes(pool, 3, lambda left, right: "left" if better[left.item] == left.id else "right")
    assert agreement(cast, pool, mode) == {"agreement": 1.0, "why": None}


def test_a_system_that_most_prefer_is_no_agreement_by_itself() -> None:
    """Nine of ten votes for one system, whatever the item: votes agree as often as chance has it."""
    pool, drawn = text_pool(400), random.Random(2)
    cast = votes(pool, 2, lambda left, right: prefer("aligned" if drawn.random() < 0.9 else "base")(left, right))
    assert agreement(cast, pool, "vote")["agreement"] == pytest.approx(0, abs=0.1)


def test_why_agreement_is_not_defined() -> None:
    pool = text_pool(5)
    assert agreement(votes(pool, 1, lambda left, right: "left"), pool, "vote") == {
        "agreement": None, "why": "no comparison was voted on by two people"
    }  # fmt: skip
    for says in (lambda left, right: "tie", prefer("aligned")):
        found = agreement(votes(pool, 3, says), pool, "vote")
        assert found["agreement"] is None and "every vote on what several people saw says the same" in found["why"]


@pytest.mark.parametrize(("systems", "mode"), [(("base", "aligned"), "vote"), (("a", "b", "c"), "vote"), (("a", "b"), "label")])
def test_what_is_told_is_about_answers_that_are_there(systems: Sequence[str], mode: Any) -> None:
    whole, coin = text_pool(20, systems), random.Random(3)
    smaller = Pool(whole.source, whole.entries[: 10 * len(systems)])
    cast = votes(whole, 2, lambda left, right: coin.choice(("left", "right")))
    here = [ballot for ballot in cast if ballot.left in smaller.by_id]
    told, alone = (results(said, smaller, mode, "nobody") for said in (cast, here))
    assert (told["votes"], told["others"]) == (len(cast), len(cast) - len(here)) == (2 * len(here), len(here))
    assert told | {"votes": len(here), "others": 0} == alone


# Tables


def test_two_systems_have_one_interval_everywhere() -> None:
    """In the sentence, in the row of either, and on the scale of Elo; where all agree it is as wide as few items make it."""
    pool, drawn = text_pool(12), random.Random(4)
    for says in (prefer("aligned"), lambda left, right: drawn.choice(("left", "right", "tie"))):
        told = results(votes(pool, 2, says), pool, "vote", "0")
        rate, rows = told["win_rate"], {row["name"]: row for row in told["systems"]}
        assert rate == rows["aligned"]["win_rate"] | {"of": "aligned", "over": "base"}
        for bound, other in (("low", "high"), ("high", "low")):
            assert rate[bound] == pytest.approx(1 - rows["base"]["win_rate"][other])
            assert (rows["aligned"]["elo"][bound] is None) == (rate[bound] == 1)
        assert rate["high"] - rate["low"] > 0.2 and json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("systems", [("base", "aligned"), ("a", "b", "c")])
def test_seeds_of_one_prompt_are_no_more_prompts(systems: Sequence[str]) -> None:
    """Votes on three seeds of each prompt bound no more than those on one: seeds of a prompt are not independent."""

    def pool_of(seeds: int) -> Pool:
        asked = [(i, seed, system) for i in range(8) for seed in range(seeds) for system in systems]
        entries = [entry_of(f"{i}-{k}", s, (text(f"Question {i}?"),), text(f"{i} {k} {s}"), k) for i, k, s in asked]
        return Pool(Path("/nowhere"), tuple(entries))

    def says(left: Entry, right: Entry) -> str:
        drawn = random.Random(f"{caption(left)} {sorted((left.system, right.system))}")
        return prefer(drawn.choice(sorted((left.system, right.system))))(left, right)

    def rows_of(pool: Pool) -> dict[str, Any]:
        return {row["name"]: row for row in results(votes(pool, 1, says), pool, "vote", "0")["systems"]}

    one, three = rows_of(pool_of(1)), rows_of(pool_of(3))
    assert one.keys() == three.keys() == set(systems)
    for name, row in three.items():
        assert row["wins"] == 3 * one[name]["wins"]
        assert row["win_rate"] == one[name]["win_rate"] | {"n": 3 * one[name]["win_rate"]["n"]}
