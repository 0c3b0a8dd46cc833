"""One line per reliability test that counts something; with MMPO_COUNTERS=FILE each is also a JSON line of that file."""

from __future__ import annotations

import json
import os

FULL = os.environ.get("MMPO_FULL") == "1"


def counter(test: str, what: str, size: int, result: str, seconds: float) -> None:
    """Print `test | what | size | result | seconds`, and append it to the file that MMPO_COUNTERS names."""
    print(f"{test} | {what} | {size} | {result} | {seconds:.1f}")
    if name := os.environ.get("MMPO_COUNTERS"):
        row = {"test": test, "what": what, "size": size, "result": result, "seconds": round(seconds, 1)}
        with open(name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
