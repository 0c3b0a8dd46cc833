"""Writes the table of docs/reliability.md from benchmarks/results/reliability.jsonl (`python docs/reliability.py`).

The rows are what the tests counted in a full run; of a repeated one the last counts. tests/test_docs.py fails when the page
is out of date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
COUNTED = ROOT / "benchmarks" / "results" / "reliability.jsonl"


def page() -> str:
    """The page as it stands, with the table between its marks made anew."""
    return re.sub(
        r"(?s)(<!-- counted -->\n).*(<!-- end -->)", lambda m: m[1] + table() + m[2], PAGE.read_text(encoding="utf-8")
    )


def table() -> str:
    rows = {}
    for line in COUNTED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["test"], row["what"]] = row
    body = [
        f"| {r['test']} | {r['what']} | {r['size']:,} | {r['result']} | {r['seconds']:,.0f} |"
        for r in sorted(rows.values(), key=lambda r: (int(r["test"][1:]), r["what"]))
    ]
    return "\n".join(["| | what | how many | result | seconds |", "|---|---|---:|---|---:|", *body]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
