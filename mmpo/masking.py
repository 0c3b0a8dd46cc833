"""Keeps secrets out of what mmpo writes and prints.

A secret is known by the name it is kept under (api_key, hf_token, ...), by its issuer's prefix (hf_..., sk-...), and by its
very value where the environment or a recipe holds it under such a name.
"""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
NAME = re.compile("token|key|secret|password|passwd|credential", re.IGNORECASE)
_NEVER_A_NUMBER = re.compile("token|key", re.IGNORECASE)  # max_tokens: 64 is a setting
_ISSUERS = "hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-|AKIA"
# A digit, or 16 letters without a break: a token may be letters only, and hf_hub_download_of_pairs is a name in words.
_ISSUED = re.compile(rf"(?<![A-Za-z0-9])({_ISSUERS})(?=[A-Za-z_-]*\d|[\w-]{{0,100}}[A-Za-z]{{16}})[\w-]{{8,}}")
_SHORTEST = 8  # characters of a value that is looked for in text
_LEARNT: set[str] = set()


def masked(name: Any, value: Any) -> Any:
    """The value as it may be shown under `name`, mappings and lists all the way down."""
    if value is not None and _is_secret(str(name), value):
        return MASK
    if isinstance(value, dict):
        return {k: masked(k, v) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(None, item) for item in value]
    return in_text(value) if isinstance(value, str) else value


def in_text(text: str) -> str:
    """The text without secrets: what looks issued, what the environment keeps under a secret's name, what was learnt."""
    for secret in sorted(_LEARNT | _of_environment(), key=len, reverse=True):  # a longer one may contain a shorter
        text = text.replace(secret, MASK)
    return _ISSUED.sub(MASK, text)


def learn(name: Any, value: Any) -> None:
    """Remember the values that a recipe keeps under secret names, so that no message shows them either."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            learn(name if NAME.search(str(name)) else key, item)
    elif isinstance(value, str) and _is_secret(str(name), value) and _findable(value):
        _LEARNT.add(value)


def _is_secret(name: str, value: Any) -> bool:
    if isinstance(value, bool | int | float) and _NEVER_A_NUMBER.search(name):
        return False
    return NAME.search(name) is not None


def _of_environment() -> set[str]:
    return {value for name, value in os.environ.items() if NAME.search(name) and _findable(value)}


def _findable(value: str) -> bool:
    """Long enough not to occur by chance, and no path: HF_TOKEN_PATH names a file."""
    return len(value) >= _SHORTEST and not value.startswith(("/", "~", "."))
