"""Maps of image tokens lie over the picture as its tokens do: squeezed, cut and padded pictures, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image

from mmpo.modalities.vlm_regions import over_picture, seen
from tests.vlm_families import CASES, photo


def clip(crop: bool, pad: bool = False, size: dict[str, int] | None = None) -> Any:
    given = {"do_resize": True, "size": size or {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return SimpleNamespace(do_center_crop=crop, do_pad=pad, **given)


def test_seen_part_of_a_picture() -> None:
    assert seen(clip(crop=True), 100, 100) == (0, 0, 100, 100)
    assert seen(clip(crop=True), 200, 100) == (50, 0, 150, 100)  # the sides are cut off
    assert seen(clip(crop=True, pad=True), 200, 100) == (0, -50, 200, 150)
    assert seen(clip(crop=True, pad=True), 936, 488) == (0, -224, 936, 712)  # a collage of two: half a token row of padding
    assert seen(clip(crop=True, size={"height": 28, "width": 28}), 200, 100) == (0, 0, 200, 100)  # squeezed
    assert seen(clip(crop=True, size={"shortest_edge": 56}), 100, 100) == (25, 25, 75, 75)
    assert seen(clip(crop=False), 100, 100) == (0, 0, 100, 100)


def test_map_over_a_padded_and_a_cut_picture() -> None:
    weights = np.arange(1.0, 17.0)  # 4 x 4 tokens
    grid = weights.reshape(4, 4)

    def laid(size: tuple[int, int], pad: bool = False) -> np.ndarray:
        found = over_picture(weights, SimpleNamespace(image_processor=clip(crop=True, pad=pad)), "llava", size)
        assert found is not None
        return found

    assert np.array_equal(laid((50, 50)), grid)
    padded = laid((100, 50), pad=True)  # the picture is the two rows in the middle
    assert padded.sum() == pytest.approx(grid[1:3].sum())
    assert padded.shape == (8, 16)
    assert padded.reshape(2, 4, 4, 4).sum((1, 3)) == pytest.approx(grid[1:3])
    cut = laid((100, 50))  # the tokens are the half in the middle
    assert cut.sum() == pytest.approx(grid.sum())
    assert not cut[:, :8].any() and not cut[:, 24:].any()
    assert cut[:, 8:24].reshape(4, 4, 4, 4).sum((1, 3)) == pytest.approx(grid)
    uneven = laid((80, 60), pad=True)  # three quarters of the height: half a row above and below is padding
    assert uneven.sum() == pytest.approx(grid[0].sum() / 2 + grid[1:3].sum() + grid[3].sum() / 2)
    assert over_picture(weights[:15], SimpleNamespace(image_processor=clip(crop=True)), "llava", (9, 9)) is None
    assert over_picture(weights, SimpleNamespace(), "unheard_of", (9, 9)) is None


@pytest.mark.parametrize("family", CASES)
def test_a_spot_of_the_picture_changes_the_tokens_laid_over_it(family: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(family)
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    processor = T.AutoProcessor.from_pretrained(folder)
    for height, width in ((28, 28), (28, 56)):
        picture = np.full((height, width, 3), 128, np.uint8)
        rest = features(model, processor, picture)
        for top in (0, 14):
            for left in range(0, width, 14):
                spotted = picture.copy()
                spotted[top : top + 14, left : left + 14] = photo(1, (14, 14))
                inputs, changed = features(model, processor, spotted)
                grid = tuple(inputs["image_grid_thw"][0].tolist()) if "image_grid_thw" in inputs else None
                away = (changed - rest[1]).norm(dim=-1).numpy() ** 2
                found = over_picture(away, processor, family, (width, height), grid)
                assert found is not None
                rows, columns = found.shape
                masses = found.reshape(2, rows // 2, 2, columns // 2).sum((1, 3))  # quarters of the picture
                if family == "llava" and width == 56 and left in (0, 42):
                    assert masses.sum() < 1e-9  # cut off
                else:
                    assert np.unravel_index(masses.argmax(), (2, 2)) == (top // 14, 2 * left // width)


@torch.no_grad()
def features(model: Any, processor: Any, picture: np.ndarray) -> tuple[Any, torch.Tensor]:
    """The processor's tensors of one picture and its tokens' features (k, D)."""
    inputs = processor(images=[[Image.fromarray(picture)]], text=[processor.image_token], return_tensors="pt")
    taken = {n: v for n, v in inputs.items() if n.startswith(("pixel", "image_", "batch_"))}
    pooled = model.model.get_image_features(**taken, return_dict=True).pooler_output
    parts = [pooled] if isinstance(pooled, torch.Tensor) else pooled
    return inputs, torch.cat([part.flatten(0, -2) for part in parts])
