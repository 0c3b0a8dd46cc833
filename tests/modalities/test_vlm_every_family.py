"""All families of vision-language models: what `vlm_checks` says of one holds for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.modalities import vlm_checks
from tests.modalities.tiny_vlm import changed
from tests.vlm_families import FAMILIES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_plain_transformers(family: str, family_folder: Callable[[str], Path]) -> None:
    vlm_checks.likelihoods_are_those_of_plain_transformers(family_folder(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_rows_are_separate_rows(family: str, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder(family)
    if family == "gemma3":  # whose tiny window is shorter than the rows: these are padded, and packed with a wide one
        folder = changed(folder, tmp_path / "wide", sliding_window=512)
    vlm_checks.shared_rows_are_separate_rows(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_saves_what_plain_libraries_load(family: str, family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    vlm_checks.training_saves_what_plain_libraries_load(family_folder(family), tmp_path)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "idefics3"])  # which name their projectors differently
def test_the_projector_trains_where_that_is_asked_for(
    family: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    vlm_checks.the_projector_trains(family_folder(family), tmp_path, "lora")


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_transformers(family: str, family_folder: Callable[[str], Path]) -> None:
    vlm_checks.generation_is_that_of_transformers(family_folder(family))
