"""Real pictures with all that real files bring, through import and validation to a short run.

Photographs (scikit-image, scikit-learn) against twins spoilt in four ways, and ImageReward's ranked generations. The split
is by photograph: no crop of a held-out photograph is trained on.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFilter

from mmpo import cli, media
from mmpo.datasets.formats.pick_a_pic import SCHEMA, write_pick_a_pic
from mmpo.datasets.load import load
from mmpo.datasets.validate import validate
from mmpo.pair import Pair, image, text
from mmpo.prepare import is_heldout
from mmpo.runlog import read
from tests.modalities import tiny

SHARED = Path(os.environ.get("MMPO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
RANKS = SHARED / "prompts" / "imagereward_test.json"
needs_shared = pytest.mark.skipif(not RANKS.is_file(), reason=f"no real test data at {SHARED} (or MMPO_TEST_DATA)")
SIDE = 128
HELDOUT = 0.35
GENERATIONS = "a painting of an ocean with clouds and birds, day time, low depth field effect"


def blurred(picture: Image.Image) -> bytes:
    return media.encode(np.asarray(picture.filter(ImageFilter.GaussianBlur(2.5))))


def compressed(picture: Image.Image) -> bytes:
    return media.encode(np.asarray(picture), "JPEG", quality=8)


def noisy(picture: Image.Image) -> bytes:
    noise = np.random.default_rng(0).normal(0, 35, (SIDE, SIDE, 3))
    return media.encode(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def downscaled(picture: Image.Image) -> bytes:
    return media.encode(np.asarray(picture.resize((SIDE // 4, SIDE // 4), Image.Resampling.BOX)))


SPOIL: dict[str, Callable[[Image.Image], bytes]] = {f.__name__: f for f in (blurred, compressed, noisy, downscaled)}


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    """Sixteen real photographs by caption, grey ones repeated over the channels."""
    data, sets = pytest.importorskip("skimage.data"), pytest.importorskip("sklearn.datasets")
    china, flower = sets.load_sample_images().images
    found = {
        "an astronaut": data.astronaut(), "a cup of coffee": data.coffee(), "a cat": data.chelsea(), "a rocket": data.rocket(),
        "a Chinese temple": china, "a flower": flower, "stained tissue": data.immunohistochemistry(), "grass": data.grass(),
        "deep space": data.hubble_deep_field(), "a retina": data.retina(), "a motorcycle": data.stereo_motorcycle()[0],
        "a brick wall": data.brick(), "gravel": data.gravel(), "a cameraman": data.camera(), "old coins": data.coins(),
        "the moon": data.moon(),
    }  # fmt: skip
    return {c: p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=2) for c, p in found.items()}


def crops(photo: np.ndarray, count: int) -> Iterator[Image.Image]:
    """Squares along the photograph's diagonal, around its middle."""
    height, width = photo.shape[:2]
    for place in np.linspace(0.3, 0.7, count):
        top, left = int(place * (height - SIDE)), int(place * (width - SIDE))
        yield Image.fromarray(photo[top : top + SIDE, left : left + SIDE])


def pairs_of(photos: dict[str, np.ndarray], count: int) -> list[Pair]:
    """Each crop against each of its spoilt twins."""
    return [
        Pair(f"{caption}/{i}/{name}", (text(caption),), (image(media.encode(np.asarray(crop))),), (image(spoil(crop)),))
        for caption, photo in photos.items()
        for i, crop in enumerate(crops(photo, count))
        for name, spoil in SPOIL.items()
    ]


def faulty_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Three ties, and five rows with a fault each, made of sound ones."""
    ties = [row | {"label_0": 0.5, "label_1": 0.5} for row in rows[:3]]
    bad: list[dict[str, Any]] = [
        {"caption": "  "}, {"jpg_0": rows[1]["jpg_0"][:200]}, {"jpg_1": None}, {"label_0": 1.0, "label_1": 1.0},
        {"label_0": 0.7},
    ]  # fmt: skip
    return ties + [row | fault for row, fault in zip(rows, bad, strict=False)]


def with_faults(pairs: list[Pair], path: Path) -> Path:
    """The pairs as Pick-a-Pic, followed by eight rows that are not to be trained on."""
    write_pick_a_pic(pairs, path)
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows + faulty_rows(rows), SCHEMA), path)
    return path


def generations(folder: Path) -> list[Pair]:
    """ImageReward's four generations of one prompt, in the order of its rewards, as pairs."""
    names = [f"imagereward_{i}.webp" for i in range(1, 5)]
    path = folder / "ranked.json"
    path.write_text(json.dumps([{"prompt": GENERATIONS, "generations": names, "ranking": [1, 2, 3, 4]}]))
    return load(path, root=SHARED / "image")[0]


def test_photographs_are_imported_and_every_row_is_accounted_for(photos: dict[str, np.ndarray], tmp_path: Path) -> None:
    pairs = pairs_of(photos, 1)
    path = with_faults(pairs, tmp_path / "photos.parquet")
    report = validate(path)
    assert report.format == "pick_a_pic" and report.pairs == len(pairs) == 64 and report.prompts == 16
    assert report.ledger.rows == 72 and report.ledger.skipped == {"tie": 3}
    assert report.ledger.refused == {
        "missing prompt": 1, "undecodable image": 1, "missing image": 1, "bad label_1": 2
    }  # fmt: skip
    assert report.ledger.notes == {"sides of different size (kept)": 16} and report.bad == 5
    assert all(f"{path.name}:row {n} " in report.lines()[i] for i, n in enumerate(range(67, 72)))
    kept, _ = load(path, on_bad="skip", ties="soft")
    assert len(kept) == 67 and Counter(p.label for p in kept) == {1.0: 64, 0.5: 3}
    assert {p.chosen[0].digest for p in kept if p.label == 1} == {p.chosen[0].digest for p in pairs}
    assert cli.main(["data", "validate", str(path)]) == 3


@needs_shared
def test_ranked_generations_and_prompts(tmp_path: Path) -> None:
    """The four real generations at the places that one of the 466 rows names: 1 row imported, 465 refused, none lost."""
    rows = json.loads(RANKS.read_text())
    row = next(r for r in rows if len(r["generations"]) == 4 and len(set(r["ranking"])) == 4)
    for number, name in enumerate(row["generations"], start=1):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((SHARED / "image" / f"imagereward_{number}.webp").read_bytes())
    report = validate(RANKS, root=tmp_path)
    assert (report.pairs, report.prompts, report.ledger.rows, report.ledger.used) == (6, 1, 466, 1)
    assert report.ledger.refused == {"missing file": 465}
    pairs, _ = load(RANKS, root=tmp_path, on_bad="skip")
    assert {p.caption for p in pairs} == {row["prompt"]} and all(
        p.meta["ranks"]["chosen"] < p.meta["ranks"]["rejected"] for p in pairs
    )
    assert len(generations(tmp_path)) == 6


def autoencoder() -> diffusers.AutoencoderKL:
    """A random one that divides the resolution by 4, so that 50 steps at 128 pixels take seconds; always the same one."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


@pytest.mark.slow
@needs_shared
def test_fifty_steps_on_real_pairs(photos: dict[str, np.ndarray], tmp_path: Path) -> None:
    """`mmpo train` on a random tiny Stable Diffusion: every row is accounted for, and what is reported adds up.

    No accuracy is asked for: fifty steps teach an untrained model nothing about photographs that it has not seen.
    """
    pairs = pairs_of(photos, 3) + generations(tmp_path)
    path = with_faults(pairs, tmp_path / "pairs.parquet")
    model = tiny.make("sd", tmp_path / "model", vae=autoencoder())
    heldout = [p for p in pairs if is_heldout(p.prompt, HELDOUT)]
    settings = [
        f"model.path={model}", "model.adapter=full", f"model.resolution={SIDE}", f"data.path={path}", "data.on_bad=skip",
        f"data.heldout={HELDOUT}", "data.pairing=null", "objective=[{loss: dpo, beta_dpo: 2000}]", "train.steps=50",
        "train.batch_size=8", "train.lr=1e-3", "train.warmup=5", "eval.every=25", "eval.draws=4", f"out={tmp_path / 'run'}",
    ]  # fmt: skip
    assert cli.main(["train", "diffusion_dpo", *settings]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    print(json.dumps({k: summary[k] for k in ("heldout_pair_accuracy", "by_timestep", "pairs", "best_step", "data")}, indent=1))
    assert summary["pairs"] == {"train": len(pairs) - len(heldout), "heldout": len(heldout)} and summary["steps"] == 50
    assert "3 skipped + 5 refused" in summary["data"]["rows"]
    table = summary["by_timestep"]
    assert len(table) == 4 and sum(row["n"] for row in table) == 4 * len(heldout)
    assert all(0 <= row["accuracy"] <= 1 and np.isfinite(row["margin"]) for row in table)
    told = {r["step"]: r for r in read(tmp_path / "run" / "log.jsonl") if r["event"] == "eval"}
    assert list(told) == [0, 25, 50] and told[0]["eval/pair_accuracy"] == 0.5 and told[0]["eval/margin"] == 0
    best = told[summary["best_step"]]
    assert best["eval/margin"] == pytest.approx(sum(r["n"] * r["margin"] for r in table) / (4 * len(heldout)), rel=1e-4) != 0
    assert summary["heldout_pair_accuracy"] == pytest.approx(best["eval/pair_accuracy"], abs=0.02)
