"""Puts the checkout's root on the path, so that tests share their fakes as `from tests.room.name import ...`.

Hypothesis gets no deadline anywhere: how long an example takes depends on what else the machine is doing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
