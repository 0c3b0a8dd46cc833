"""Offline by default: what the Hugging Face libraries are told before they are imported.

Loading passes `local_files_only` as well; this closes what a library does of its own accord: update checks, telemetry, a
look-up of a file that is not in the cache. A recipe opens the door with `allow_download: true`, of its model or its judge.
"""

from __future__ import annotations

import os
from typing import Any

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
NO_TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
_CLOSED: set[str] = set()  # by us, not by the user's own environment


def close() -> None:
    """Offline and without telemetry, except where the environment says otherwise."""
    for name in (*OFFLINE, *NO_TELEMETRY):
        if name not in os.environ:
            os.environ[name] = "1"
            _CLOSED.add(name)


def open_for(recipe: Any) -> None:
    """Take `close`'s offline settings back where the recipe allows a download. Call it before anything heavy is imported."""
    if getattr(recipe.model, "allow_download", False) or recipe.judge.options.get("allow_download"):
        for name in _CLOSED.intersection(OFFLINE):
            os.environ.pop(name, None)
            _CLOSED.discard(name)
