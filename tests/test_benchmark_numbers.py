"""benchmarks/README.md quotes the result files: every ratio with its interval stands there as it stands in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
FILES = ("diffusion_step", "text_step", "vlm_step", "token_head")


def intervals(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, float]]]:
    """Every interval of a result file, with where it stands."""
    if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
        yield "/".join(path), value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from intervals(item, (*path, str(name)))


def quoted(name: str) -> str:
    """The section that quotes a file, without its tables of counts, in one line."""
    text = (FOLDER / "README.md").read_text()
    section = next(s for s in text.split("\n## ") if f"benchmarks/results/{name}.json" in s)
    return re.sub(r"\s+", " ", section)


@pytest.mark.parametrize("name", FILES)
def test_quoted_intervals_are_those_of_the_file(name: str) -> None:
    found = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    known = {f"{v['value']:.2f} ({v['low']:.2f} to {v['high']:.2f}" for _, v in intervals(found)}
    section = quoted(name).split("Earlier runs")[0]
    ratios = re.findall(r"(\d\.\d\d)[^()|\d]*\((\d\.\d\d) to (\d\.\d\d)", section)
    assert len(ratios) >= 2
    assert {f"{value} ({low} to {high}" for value, low, high in ratios} <= known
    if rounds := re.search(r"(\d+) rounds", section):
        assert int(rounds[1]) == found["rounds"]
