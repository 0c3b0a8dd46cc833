"""T16: what a cache holds is used for the computation it came from, whole, or not at all."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpo import reference as references
from mmpo.cache import Cache, key
from mmpo.modalities import diffusion
from mmpo.reference import Cached
from tests.modalities import tiny
from tests.modalities.adapters import adapter, calls, keys, make_pairs
from tests.reliability.counters import FULL, counter

ENTRIES = 200 if FULL else 60
Row = tuple[bytes, bytes, bytes]
Damage = Callable[[Row, Row, np.random.Generator], tuple[bytes, bytes, bytes]]


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]


DAMAGE: dict[str, Damage] = {
    "flip in the value": lambda row, other, rng: (row[0], flipped(row[1], rng), row[2]),
    "flip in the digest": lambda row, other, rng: (row[0], row[1], flipped(row[2], rng)),
    "flip in both": lambda row, other, rng: (row[0], flipped(row[1], rng), flipped(row[2], rng)),
    "truncated": lambda row, other, rng: (row[0], row[1][: int(rng.integers(len(row[1])))], row[2]),
    "empty": lambda row, other, rng: (row[0], b"", row[2]),
    "longer": lambda row, other, rng: (row[0], row[1] + b"\0", row[2]),
    "another's value": lambda row, other, rng: (row[0], other[1], row[2]),
    "another's value and digest": lambda row, other, rng: (row[0], other[1], other[2]),
    "no digest": lambda row, other, rng: (row[0], row[1], b""),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_entries_are_computed_again_and_counted(how: str, tmp_path: Path) -> None:
    """Every entry damaged: none is used, all are counted, and what is put back holds."""
    start, rng = time.monotonic(), np.random.default_rng(7)
    names = [key("entry", i) for i in range(ENTRIES)]
    values = [{"x": torch.full((9,), float(i)), "mask": torch.tensor([True])} for i in range(ENTRIES)]
    path = tmp_path / "cache.sqlite"
    cache = Cache(path)
    cache.put_many(zip(names, values, strict=True))
    cache.close()
    with sqlite3.connect(path) as connection:
        rows = {k: connection.execute("SELECT key, value, digest FROM entries WHERE key = ?", (k,)).fetchone() for k in names}
        for i, name in enumerate(names):
            k, value, digest = DAMAGE[how](rows[name], rows[names[i - 1]], rng)
            connection.execute("UPDATE entries SET value = ?, digest = ? WHERE key = ?", (value, digest, k))
    cache = Cache(path)
    assert cache.get_many(names) == [None] * ENTRIES
    assert (cache.damaged, cache.misses, cache.hits) == (ENTRIES, ENTRIES, 0)
    cache.put_many(zip(names, values, strict=True))
    cache.close()
    again = Cache(path)
    found = again.get_many(names)
    assert all(f is not None and torch.equal(f["x"], v["x"]) for f, v in zip(found, values, strict=True)) and again.damaged == 0
    counter("T16", "damaged entries of a cache", ENTRIES, "all computed again and counted", time.monotonic() - start)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("sd", tmp_path_factory.mktemp("pipe"))


def encoded(path: Path, cache: Cache, **settings: Any) -> tuple[int, int, torch.Tensor]:
    """Pictures and prompts that were computed, and the first latent."""
    ours = adapter(path, cache=cache, **settings)
    with calls(ours.loaded.pipe.vae.encoder) as pictures, calls(ours.loaded.pipe.text_encoder) as prompts:
        found = ours.encode(make_pairs(2))
    return sum(pictures), sum(prompts), found[0].latents["chosen"]


@pytest.mark.slow
def test_latents_belong_to_weights_precision_settings_and_version(
    pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file shared by runs that differ in one thing: what depends on it is computed, the rest is read, values are right."""
    start, cache = time.monotonic(), Cache(tmp_path / "encoded.sqlite")
    other = tiny.make("sd", tmp_path / "weights", seed=1)
    scaled = tiny.make("sd", tmp_path / "scaled", vae=tiny.kl(scaling_factor=0.5))
    assert encoded(pipe, cache)[:2] == (4, 2) and encoded(pipe, cache)[:2] == (0, 0)
    changes: list[tuple[Path, dict[str, Any]]] = [
        (other, {}), (scaled, {}), (pipe, {"resolution": 32}), (pipe, {"draw": {"vae": "sample"}}), (pipe, {"dtype": "bf16"}),
    ]  # fmt: skip
    for path, settings in changes:
        pictures, prompts, latent = encoded(path, cache, **settings)
        assert (pictures, prompts) == (4, 2), (path, settings)
        assert torch.equal(latent, encoded(path, Cache(None), **settings)[2])
    monkeypatch.setattr(diffusion, "__version__", "another")
    assert encoded(pipe, cache)[:2] == (4, 2)
    counter("T16", "latents under another setting", len(changes) + 1, "all computed again", time.monotonic() - start)


@pytest.mark.slow
def test_a_reference_score_belongs_to_its_weights_precision_and_machine(
    pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, cache = time.monotonic(), Cache(tmp_path / "scores.sqlite")

    def computed(change: float = 0.0, autocast: bool = False, **settings: Any) -> int:
        ours = adapter(pipe, **settings)
        with torch.no_grad():
            ours.loaded.denoiser.get_parameter("conv_in.bias").add_(change)
        pairs = make_pairs(2)
        batch = ours.draw(ours.encode(pairs), keys(pairs), ours.model)
        with calls(ours.loaded.denoiser) as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            references.score(Cached(references.AdapterOff(), cache, ours.model), ours, ours.model, batch)
        return len(seen)

    assert computed() == 1 and computed() == 0
    found = [computed(change=2.0**-20), computed(autocast=True), computed(dtype="bf16"), computed(draw={"weight": "min_snr"})]
    for name, value in (("threads", 64), ("torch", "9.9"), ("devices", "another"), ("mmpo", "9.9")):
        here = references.environment()
        with monkeypatch.context() as patch:
            patch.setattr(references, "environment", lambda here=here, name=name, value=value: here | {name: value})
            found.append(computed())
    assert found == [1] * 8 and computed() == 0
    counter("T16", "reference scores under another setting", len(found), "all computed again", time.monotonic() - start)
