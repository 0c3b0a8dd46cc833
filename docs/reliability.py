"""Writes the table of docs/reliability.md from benchmarks/results/reliability.jsonl (`python docs/reliability.py`).

The rows are what the tests counted in one full run. tests/test_docs.py fails when the page
is out of date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
COUNTED = ROOT / "benchmarks" / "results" / "reliability.jsonl"


def page() -> str:
    """The page as it stands, with the table between its marks made anew."""
    return re.sub(
        r"(?s)(<!-- counted -->\n).*(<!-- end -->)", lambda m: m[1] + table() + m[2], PAGE.read_text(encoding="utf-8")
    )


def table() -> str:
    """One line per kind of test; the counts and seconds of its cases are added up."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in COUNTED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        total = rows.setdefault((row["test"], row["what"]), row | {"size": 0, "seconds": 0.0})
        total["size"] += row["size"]
        total["seconds"] += row["seconds"]
    body = [
        f"| {r['test']} | {r['what']} | {r['size']:,} | {r['result']} | {r['seconds']:,.0f} |"
        for r in sorted(rows.values(), key=lambda r: (r["test"][0], int(r["test"][1:]), r["what"]))
    ]
    return "\n".join(["| | what | how many | result | seconds |", "|---|---|---:|---|---:|", *body]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
