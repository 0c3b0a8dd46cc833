"""Reads a whole dataset without stopping at the first problem, and reports all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, files_told, ledger_for, rows
from mmpo.datasets.pairing import digest
from mmpo.errors import DataError


@dataclass
class Report:
    """What `validate` found. pairs: pairs (or candidates) that training would get; prompts: distinct ones among them.

    fatal: why the file could not be read to its end, if so. files: which ones of a folder are read.
    """

    path: str
    format: str | None = None
    ledger: Ledger = field(default_factory=lambda: Ledger("skip"))
    pairs: int = 0
    prompts: int = 0
    fatal: str | None = None
    files: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """Number of problems: bad rows, and one more when the file itself is unreadable."""
        return self.ledger.refused.total() + bool(self.fatal)

    def lines(self) -> list[str]:
        """The report: one line per bad row, one per field of other rows that is odd, then the summary."""
        hidden = self.ledger.refused.total() - len(self.ledger.problems)
        problems = self.ledger.problems + ([f"... and {hidden} more bad rows"] if hidden else [])
        fatal = [f"unreadable: {self.fatal}"] if self.fatal else []
        items = "candidates" if self.format == "candidates" else "pairs"
        summary = f"{self.path}: format {self.format or 'unknown'}, {self.pairs} {items} of {self.prompts} prompts"
        return [*problems, *self.ledger.remarks, *fatal, *self.files, summary, *str(self.ledger).splitlines()]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def validate(
    path: str | Path, format: str | None = None, root: str | Path | None = None, modality: str | None = None
) -> Report:
    """Check every row of a dataset: prompts, labels, paths, and that every image decodes. Ties count as skipped rows.

    modality: rows made of what it does not take are bad, too. Never raises for bad data; one row is in memory at a time. Raises
    RecipeError for a format or modality that does not exist.
    """
    report = Report(str(path), format, ledger_for(modality, "skip"))
    prompts: set[str] = set()
    try:
        report.format = format or detect(path)
        report.files = files_told(path, report.format)
        for item in rows(path, report.ledger, format=report.format, root=root):
            report.pairs += 1
            prompts.add(digest(*item.prompt))
        if not report.ledger.rows:
            report.fatal = f"{path}: there is nothing to read in it: no rows"
    except DataError as error:
        report.fatal = str(error)
    report.prompts = len(prompts)
    return report
