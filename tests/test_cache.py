"""The cache: exact, shared, and never a damaged or exchanged value."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmpo.cache import Cache, digest_module, key

PARTS = st.none() | st.booleans() | st.text(max_size=6) | st.binary(max_size=6) | st.integers() | st.floats(allow_nan=False)


def entry(i: int) -> dict[str, Tensor]:
    return {"latent": torch.full((64, 8), float(i)), "mask": torch.tensor([True, False])}


def equal(a: dict[str, Tensor] | None, b: dict[str, Tensor]) -> bool:
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)


def filled(path: Path, n: int = 20) -> list[bytes]:
    keys = [key("entry", i) for i in range(n)]
    cache = Cache(path)
    cache.put_many([(k, entry(i)) for i, k in enumerate(keys)])
    cache.close()
    return keys


@pytest.mark.parametrize("on_disk", [True, False])
def test_get_returns_what_was_put_in_order(tmp_path: Path, on_disk: bool):
    cache = Cache(tmp_path / "cache.sqlite" if on_disk else None)
    cache.put_many([(key(i), entry(i)) for i in range(3)])
    found = cache.get_many([key(2), key(7), key(0), key(2)])
    assert equal(found[0], entry(2)) and found[1] is None and equal(found[2], entry(0)) and equal(found[3], entry(2))
    assert (cache.hits, cache.misses, cache.damaged) == (3, 1, 0)


def test_callers_own_what_they_get(tmp_path: Path):
    cache = Cache(None)
    cache.put_many([(key(1), {"x": torch.arange(12.0).reshape(3, 4).t()})])
    (first,) = cache.get_many([key(1)])
    assert first is not None
    first["x"].zero_()
    assert equal(cache.get_many([key(1)])[0], {"x": torch.arange(12.0).reshape(3, 4).t()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_dtypes_scalars_and_empty_tensors_survive_a_reopen(tmp_path: Path, dtype: torch.dtype):
    value = {"a": torch.ones(2, 3).to(dtype), "scalar": torch.tensor(1).to(dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    cache = Cache(tmp_path / "c")
    cache.put_many([(key("v"), value), (key("none"), {})])
    cache.close()
    again = Cache(tmp_path / "c").get_many([key("v"), key("none")])
    assert equal(again[0], value) and again[1] == {}


def test_memory_is_bounded_and_the_oldest_goes_first():
    cache = Cache(None, memory=3 * 2500)
    for i in range(3):
        cache.put_many([(key(i), entry(i))])
    cache.get_many([key(0)])
    cache.put_many([(key(3), entry(3))])
    assert [f is not None for f in cache.get_many([key(i) for i in range(4)])] == [True, False, True, True]
    assert cache._recent_bytes == sum(map(len, cache._recent.values())) <= cache.memory


def test_thousands_of_keys_in_one_call(tmp_path: Path):
    keys = [key(i) for i in range(1203)]
    Cache(tmp_path / "c").put_many([(k, {"x": torch.tensor(i)}) for i, k in enumerate(keys)])
    found = Cache(tmp_path / "c").get_many([*keys, key("other")])
    assert [int(f["x"]) for f in found if f] == list(range(1203)) and found[-1] is None


def test_a_flipped_byte_in_every_value_is_noticed_recomputed_and_healed(tmp_path: Path):
    path = tmp_path / "c"
    keys = filled(path)
    with sqlite3.connect(path) as connection:
        for i, k in enumerate(keys):
            value = bytearray(connection.execute("SELECT value FROM entries WHERE key = ?", (k,)).fetchone()[0])
            value[(i * 97) % len(value)] ^= 1 << (i % 8)
            connection.execute("UPDATE entries SET value = ? WHERE key = ?", (bytes(value), k))
    cache = Cache(path)
    assert cache.get_many(keys) == [None] * len(keys)
    assert (cache.damaged, cache.misses, cache.hits) == (20, 20, 0)
    cache.put_many([(k, entry(i)) for i, k in enumerate(keys)])
    again = Cache(path)
    assert all(equal(f, entry(i)) for i, f in enumerate(again.get_many(keys))) and again.damaged == 0


def test_values_that_traded_places_are_not_used(tmp_path: Path):
    keys = filled(tmp_path / "c", 2)
    with sqlite3.connect(tmp_path / "c") as connection:
        rows = [connection.execute("SELECT value, digest FROM entries WHERE key = ?", (k,)).fetchone() for k in keys]
        for k, row in zip(keys, reversed(rows), strict=True):
            connection.execute("UPDATE entries SET value = ?, digest = ? WHERE key = ?", (*row, k))
    cache = Cache(tmp_path / "c")
    assert cache.get_many(keys) == [None, None] and cache.damaged == 2


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "other table":
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE entries (a, b)")
        return
    variants = {
        "text": b"this is not a database, but it is long enough to be looked at as if it were one" * 20,
        "zeros": bytes(len(data)),
        "header": b"X" + data[1:],
        "half": data[: len(data) // 2],
        "one page": data[:4096],
        "odd length": data[: len(data) // 2 + 77],
        "hole": data[:4096] + bytes(8192) + data[12288:],
    }
    path.write_bytes(variants[how])


@pytest.mark.parametrize("how", ["text", "zeros", "header", "half", "one page", "odd length", "hole", "other table"])
def test_a_damaged_file_is_never_fatal_and_never_believed(tmp_path: Path, how: str):
    path = tmp_path / "c"
    keys = filled(path)
    damage(path, how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = Cache(path)
        found = cache.get_many(keys)
        cache.put_many([(k, entry(i)) for i, k in enumerate(keys)])
    assert all(f is None or equal(f, entry(i)) for i, f in enumerate(found))
    assert cache.misses > 0 and cache.damaged > 0
    if (tmp_path / "c.damaged-1").exists():
        assert "moved to c.damaged-1" in str(caught[0].message)
    cache.close()
    again = Cache(path)
    assert all(equal(f, entry(i)) for i, f in enumerate(again.get_many(keys)))


def test_random_damage_anywhere_in_the_file(tmp_path: Path):
    path = tmp_path / "c"
    keys = filled(path)
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    for _ in range(60):
        at = int(torch.randint(len(good), (), generator=generator))
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = Cache(path)
            found = cache.get_many(keys)
        assert all(f is None or equal(f, entry(i)) for i, f in enumerate(found))
        noticed += cache.damaged
        cache.close()
        for leftover in tmp_path.iterdir():
            leftover.unlink()
    assert noticed > 20


def test_a_path_that_cannot_be_opened_is_named(tmp_path: Path):
    (tmp_path / "c").mkdir()
    with pytest.raises(OSError, match="cache .*/c: unable to open"):
        Cache(tmp_path / "c")


def write_share(path: Path, first: int) -> None:
    cache = Cache(path)
    for i in range(first, 200, 2):
        cache.put_many([(key(i), entry(i)), (key("both"), entry(-1))])
    cache.close()


def test_two_processes_write_at_the_same_time(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_share, args=(tmp_path / "c", first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0, 0]
    cache = Cache(tmp_path / "c")
    found = cache.get_many([*(key(i) for i in range(200)), key("both")])
    assert all(equal(f, entry(i)) for i, f in enumerate(found[:200])) and equal(found[200], entry(-1))
    assert (cache.hits, cache.damaged) == (201, 0)


def open_many(folder: Path, start: float) -> None:
    for number in range(20):
        while time.time() < start + 0.05 * number:
            pass
        Cache(folder / f"c{number}").close()


def test_many_processes_make_the_same_file_at_the_same_time(tmp_path: Path):
    """SQLite does not wait by itself where a new file becomes one with a write-ahead log."""
    context, start = multiprocessing.get_context("fork"), time.time() + 0.2
    openers = [context.Process(target=open_many, args=(tmp_path, start)) for _ in range(6)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join(60)
    assert [opener.exitcode for opener in openers] == [0] * 6


def test_a_fork_uses_its_own_connection(tmp_path: Path):
    cache = Cache(tmp_path / "c")
    cache.put_many([(key(0), entry(0))])
    child = os.fork()
    if child == 0:
        cache.put_many([(key(1), entry(1))])
        cache.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert equal(cache.get_many([key(1)])[0], entry(1))


@given(st.lists(PARTS, max_size=4), st.lists(PARTS, max_size=4))
def test_keys_are_equal_only_when_the_parts_are(a: list, b: list):
    def exact(parts: list) -> list:
        return [(type(p), repr(p)) for p in parts]

    assert (key(*a) == key(*b)) == (exact(a) == exact(b))


def test_keys_that_look_alike_differ():
    alike: list[tuple] = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (b"abc",),
        ("a", "b", "c"),
        ("", "abc"),
        (1,),
        (1.0,),
        (True,),
        ("1",),
        (11,),
        (1, 1),
    ]
    alike += [(0.0,), (-0.0,), (None,), ("None",), (), ("",), ("3 abc",), ("str 1 a",)]
    assert len({key(*parts) for parts in alike}) == len(alike)
    assert len(key("a")) == 32
    with pytest.raises(TypeError, match="got list"):
        key([1])  # type: ignore[arg-type]


def test_digest_of_a_module_sees_every_bit():
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    same = digest_module(build(0))
    assert digest_module(build(0)) == same
    assert digest_module(build(1)) != same
    assert digest_module(build(0).to(torch.bfloat16)) != same
    changed = build(0)
    changed[1].num_batches_tracked += 1  # type: ignore[index, operator]
    assert digest_module(changed) != same
    negative_zero = build(0)
    with torch.no_grad():
        negative_zero[1].bias[0] = -0.0  # type: ignore[index]
    assert digest_module(negative_zero) != same
    renamed = nn.Sequential()
    for name, child in build(0).named_children():
        renamed.add_module(f"{name}x", child)
    assert digest_module(renamed) != same
