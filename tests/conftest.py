"""Puts the checkout's root on the path, so that tests share their fakes as `from tests.room.name import ...`.

Hypothesis gets no deadline anywhere: how long an example takes depends on what else the machine is doing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
settings.register_profile("mmpo", deadline=None)
settings.load_profile("mmpo")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first run's settings for the whole process, and a process runs many tests."""
    yield
    if state := sys.modules.get("accelerate.state"):
        for shared in (state.AcceleratorState, state.PartialState, state.GradientState):
            shared._shared_state.clear()


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny vision-language checkpoint by family (tests/vlm_families.py), written once, not to be changed."""
    from tests.vlm_families import make  # transformers' model classes take seconds to import, and most tests need none

    return cache(lambda family: make(family, tmp_path_factory.mktemp("families") / family))
