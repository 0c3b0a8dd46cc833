"""Puts the checkout's root on the path, so that tests share their fakes as `from tests.room.name import ...`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
