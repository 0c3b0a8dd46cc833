"""What the run's report says, for the page beside it: the verdict, and the curves as pictures."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
COLOURS = re.compile(r"^\s*(?:@media[^\n]*\n|:root\s*\{.*?\})", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Drawn:
    """A curve. file: where the page finds it."""

    file: str
    title: str
    caption: str


def verdict(run: Path) -> str:
    """The run's own words, or what is known of it before it has come to its end."""
    from mmpo.report import headline, read_summary

    try:
        return " ".join(part for part in headline(read_summary(run / "summary.json")) if part)
    except ValueError as error:
        return str(error)


def drawn(run: Path, files: Path) -> list[Drawn]:
    """The curves of report.html, each a file of its own in `files`, in the colours of the reader's system."""
    from mmpo.curves import curves
    from mmpo.report import read_log, read_summary

    try:
        summary = read_summary(run / "summary.json")
    except ValueError:
        summary = {}
    found = []
    for curve in curves(read_log(run / "log.jsonl")[0], summary):
        name = f"{secrets.token_hex(16)}.svg"
        (files / name).write_text(standing_alone(curve.svg), encoding="utf-8")
        found.append(Drawn(f"/shown/{name}", curve.title, curve.caption))
    return found


def standing_alone(svg: str) -> str:
    """An inline SVG of the report as a file: with its namespaces, and the report's colours for light and dark."""
    return svg.replace("<svg ", SVG, 1).replace(">", f"><style>{palette()}</style>", 1)


def palette() -> str:
    """The rules of the report's page that give its colours their values."""
    page = (resources.files("mmpo") / "report.html.j2").read_text(encoding="utf-8")
    light, dark = re.findall(r":root\s*\{(.*?)\}", page, re.DOTALL)[:2]
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
