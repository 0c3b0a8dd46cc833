"""Puts the checkout's root on the path, so that tests share their fakes as `from tests.room.name import ...`.

Hypothesis gets no deadline anywhere: how long an example takes depends on what else the machine is doing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
settings.register_profile("mmpo", deadline=None)
settings.load_profile("mmpo")
