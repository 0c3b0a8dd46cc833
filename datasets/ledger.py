"""What became of every input row: used, skipped by design, or refused as bad. Nothing disappears without a reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mmpo.errors import DataError

Row = Mapping[str, Any]
EXAMPLES = 3
MAX_PROBLEMS = 1000
T = TypeVar("T")


class BadField(Exception):
    """One field of a row is not what the format promises."""

    def __init__(self, name: str, expected: str, found: str, reason: str | None = None) -> None:
        super().__init__(f"field '{name}': expected {expected}, found {found}")
        self.reason = reason or f"bad {name}"


class Skip(Exception):
    """The row is valid, and left out by design; the message is the reason."""


@dataclass
class Ledger:
    """Counts of rows and, by reason, where the first few are.

    on_bad: "refuse" raises DataError at the first bad row; "skip" counts it and goes on.
    notes: what happened inside used rows (e.g. "tied pair dropped"); they are no rows and not part of the sum.
    problems: one line per bad row, `file:row N field 'x': expected ..., found ...`, the first 1,000 of them.
    """

    on_bad: Literal["refuse", "skip"] = "refuse"
    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad not in ("refuse", "skip"):
            raise ValueError(f"on_bad: expected 'refuse' or 'skip', found {self.on_bad!r}")

    @property
    def rows(self) -> int:
        """Rows read: used + skipped + refused."""
        return self.used + self.skipped.total() + self.refused.total()

    def skip(self, where: str, reason: str) -> None:
        self.skipped[reason] += 1
        self._example(where, reason)

    def refuse(self, where: str, problem: BadField) -> None:
        """Count a bad row. Raises DataError when on_bad is "refuse"."""
        message = f"{where} {problem}"
        if self.on_bad == "refuse":
            raise DataError(f"{message} (on_bad=skip counts such rows and goes on; `mmpo data validate` lists all of them)")
        self.refused[problem.reason] += 1
        self._example(where, problem.reason)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(message)

    def _example(self, where: str, reason: str) -> None:
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(where)

    def __str__(self) -> str:
        skipped, refused = self.skipped.total(), self.refused.total()
        lines = [f"{self.rows} rows = {self.used} used + {skipped} skipped + {refused} refused"]
        for kind, counts in (("skipped", self.skipped), ("refused", self.refused)):
            for reason, count in sorted(counts.items()):
                lines.append(f"  {kind} {count}: {reason} (e.g. {', '.join(self.examples[reason])})")
        return "\n".join(lines + [f"  note {count}: {reason}" for reason, count in sorted(self.notes.items())])


def import_rows(rows: Iterable[tuple[str, Row | BadField]], parse: Callable[[Row], list[T]], ledger: Ledger) -> Iterator[T]:
    """Run `parse` over every (location, row) and account for it; a reader passes a row it could not read as a BadField.

    parse: returns what the row yields, or raises Skip or BadField.
    """
    for where, row in rows:
        try:
            if isinstance(row, BadField):
                raise row
            items = parse(row)
        except Skip as reason:
            ledger.skip(where, str(reason))
        except BadField as problem:
            ledger.refuse(where, problem)
        else:
            ledger.used += 1
            yield from items
