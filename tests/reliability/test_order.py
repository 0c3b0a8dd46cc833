"""T15: the order of pairs is a function of (seed, epoch) and the data, for any number of devices, wherever a run resumes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from mmpo import train
from mmpo.pair import Pair, text
from mmpo.progress import Progress
from mmpo.schema import Recipe
from tests.reliability.counters import counter

PAIRS, BATCH, EPOCHS = 96, 4, 3


def fake(seed: int, world: int, rank: int, accumulate: int = 1, size: int = PAIRS) -> Any:
    """As much of a run as `batch_of` reads."""
    spec = Recipe.model_validate({"seed": seed, "train": {"batch_size": BATCH, "accumulate": accumulate}})
    pairs = [Pair(str(n), (text("p"),)) for n in range(size)]
    devices = SimpleNamespace(num_processes=world, process_index=rank)
    return SimpleNamespace(recipe=spec, accelerator=devices, pairs=pairs, progress=Progress())


def ids(runs: list[Any], first: int, until: int) -> list[tuple[str, int]]:
    """(pair, draw) in the order in which steps first..until-1 of all devices take them."""
    micros = range(runs[0].recipe.train.accumulate)
    keys = [k for s in range(first, until) for m in micros for run in runs for k in train.batch_of(run, s, m)[1]]
    return [(k.sample, k.index) for k in keys]


def test_t15_order() -> None:
    start, count = time.monotonic(), 0
    for seed in range(5):
        whole = ids([fake(seed, 1, 0)], 0, PAIRS * EPOCHS // BATCH)
        for epoch in range(EPOCHS):  # each pair once in each epoch, in an order of its own
            assert sorted(whole[epoch * PAIRS : (epoch + 1) * PAIRS]) == sorted((str(n), epoch) for n in range(PAIRS))
        for world, accumulate in ((1, 1), (2, 1), (1, 3), (4, 2)):
            steps = PAIRS * EPOCHS // (BATCH * world * accumulate)
            offsets = [round(i * steps / 20) for i in range(20)]
            for offset in offsets:
                runs = [fake(seed, world, rank, accumulate) for rank in range(world)]
                train._ORDERS.clear()  # a new process knows nothing
                assert whole[: offset * BATCH * world * accumulate] + ids(runs, offset, steps) == whole
                count += 1
    counter("T15", "resumes: 5 seeds, 3 epochs, 4 topologies, 20 offsets", count, "identical order", time.monotonic() - start)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(train.order(seed, epoch, PAIRS)) for seed in range(5) for epoch in range(EPOCHS)}
    assert len(orders) == 15


@pytest.mark.parametrize("step", [0, 10, 10**6, 10**9])
def test_a_batch_takes_no_longer_however_far_the_run_has_come(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the two epochs that a batch can touch are shuffled: nothing is replayed."""
    made: list[int] = []

    def counted(seed: int, epoch: int, size: int) -> Any:
        made.append(epoch)
        return original(seed, epoch, size)

    original = train.order
    monkeypatch.setattr(train, "order", counted)
    monkeypatch.setattr(train, "_ORDERS", {})
    train.batch_of(fake(0, 1, 0, size=97), step, 0)
    first = step * BATCH // 97
    assert made in ([first], [first, first + 1])
