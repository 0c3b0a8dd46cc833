"""What became of every input row: used, skipped by design, or refused as bad. Nothing disappears without a reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from mmpo.errors import DataError

Row = Mapping[str, Any]
Policy = Literal["refuse", "skip", "quarantine"]
EXAMPLES = 3
MAX_PROBLEMS = 1000
MAX_KEPT = 2000  # characters of one value in quarantine: its location leads to the whole of it
T = TypeVar("T")


class TextRow(dict[str, Any]):
    """A row whose cells have no type, as in CSV: text, or None where empty. Numbers are read from the text."""


class BadField(Exception):
    """One field of a row is not what the format promises. raw: the text of a row that could not be read."""

    raw: str | bytes | None = None

    def __init__(self, name: str, expected: str, found: str, reason: str | None = None) -> None:
        super().__init__(f"field '{name}': expected {expected}, found {found}")
        self.reason = reason or f"bad {name}"


class Skip(Exception):
    """The row is valid, and left out by design; the message is the reason. name: the field that is at fault, if one is."""

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(reason)
        self.name = name


class OverBudget(DataError):
    """More bad rows than are allowed; `ledger` has their account. shifted: they are those of eval.shifted."""

    shifted = False

    def __init__(self, message: str, ledger: Ledger) -> None:
        super().__init__(message)
        self.ledger = ledger


@dataclass
class Ledger:
    """Counts of rows and, by reason, where the first few are.

    on_bad: "refuse" raises DataError at the first bad row; "skip" counts it and goes on; "quarantine" also keeps it, as one
    JSON object with its location, reason, problem and content in `quarantined`.
    notes: what happened inside rows that are not bad (e.g. "tied pair dropped"); they are no rows and not part of the sum.
    problems: one line per bad row, `file:row N field 'x': expected ..., found ...`, the first 1,000 of them.
    remarks: the same for fields of other rows with which something is odd, and why: rows that are skipped for them, and used
    ones.
    check: what every pair or candidate of a row has to pass besides its format; it raises BadField. lister: the command that
    lists all bad rows, for messages.
    """

    on_bad: Policy = "refuse"
    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    check: Callable[[Any], None] | None = field(default=None, repr=False)
    lister: str = "mmpo data validate"

    _here: str = field(default="", repr=False)  # the row that is being read

    def __post_init__(self) -> None:
        if self.on_bad not in get_args(Policy):
            raise ValueError(f"on_bad: expected one of {', '.join(get_args(Policy))}, found {self.on_bad!r}")

    @property
    def rows(self) -> int:
        """Rows read: used + skipped + refused."""
        return self.used + self.skipped.total() + self.refused.total()

    def skip(self, where: str, reason: str, name: str | None = None) -> None:
        self.skipped[reason] += 1
        self._example(where, reason)
        if name is not None:
            self._remark(where, name, f"{reason} (skipped)")

    def remark(self, name: str, reason: str) -> None:
        """Count something odd about a field of the row that is being read, which is used all the same."""
        self.notes[reason] += 1
        self._remark(self._here, name, reason)

    def _remark(self, where: str, name: str, reason: str) -> None:
        if len(self.remarks) < MAX_PROBLEMS:
            self.remarks.append(f"{where} field '{name}': {reason}")

    def forget(self, notes: Counter[str], remarks: int) -> None:
        """Take back what was noted of a row that turned out to be bad: go back to these notes and so many remarks."""
        self.notes = notes
        del self.remarks[remarks:]

    def refuse(self, where: str, problem: BadField, row: Row | None = None) -> None:
        """Count a bad row. Raises DataError when on_bad is "refuse"."""
        message = f"{where} {problem}"
        if self.on_bad == "refuse":
            raise DataError(
                f"{message} (data.on_bad=skip, or --on-bad skip, counts such rows and goes on; `{self.lister}` lists them)"
            )
        self.refused[problem.reason] += 1
        self._example(where, problem.reason)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(message)
        if self.on_bad == "quarantine":
            entry = {"where": where, "reason": problem.reason, "problem": str(problem)}
            self.quarantined.append(json.dumps(entry | {"row": kept(problem.raw if row is None else row)}))

    def check_budget(self, share: float) -> None:
        """Raises OverBudget when more than this share of the rows is bad."""
        bad = self.refused.total()
        if bad and bad / self.rows > share:
            raise OverBudget(
                f"{bad} of {self.rows} rows are bad ({bad / self.rows:.3%}), data.bad_budget allows {share:.3%}; "
                f"`{self.lister}` lists them\n{self}",
                self,
            )

    def counts(self) -> dict[str, Any]:
        """The account as numbers: rows, used, and skipped, refused and notes by reason."""
        by_reason = {name: dict(sorted(getattr(self, name).items())) for name in ("skipped", "refused", "notes")}
        return {"rows": self.rows, "used": self.used} | by_reason

    def quarantine(self) -> bytes:
        """The bad rows that were kept, as JSON lines."""
        return "".join(f"{line}\n" for line in self.quarantined).encode()

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


def kept(value: Any) -> Any:
    """A value of a bad row as JSON: long text cut, bytes as their length and hash, anything else as its representation."""
    if isinstance(value, Mapping):
        return {str(k)[:MAX_KEPT]: kept(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [kept(v) for v in value[:MAX_KEPT]]
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
    if value is None or isinstance(value, (bool, float)):
        return value
    written = value if isinstance(value, str) else repr(value)
    return written if len(written) <= MAX_KEPT else f"{written[:MAX_KEPT]}... ({len(written)} characters)"


def import_rows(
    rows: Iterable[tuple[str, Row | BadField]], parse: Callable[[Row], list[T]], ledger: Ledger, own_ids: bool = True
) -> Iterator[T]:
    """Run `parse` over every (location, row) and account for it; a reader passes a row it could not read as a BadField.

    parse: returns what the row yields, or raises Skip or BadField. A row whose own `id` a used row has already is bad, unless
    own_ids is false, because the format's ids name something else.
    """
    places: dict[str, str] = {}
    for where, row in rows:
        ledger._here, noted, remarks = where, Counter(ledger.notes), len(ledger.remarks)
        try:
            if isinstance(row, BadField):
                raise row
            items = parse(row)
            if ledger.check is not None:
                for item in items:
                    ledger.check(item)
            if own_ids:
                _claim_id(row, where, places)
        except Skip as reason:
            ledger.skip(where, str(reason), reason.name)
        except BadField as problem:
            ledger.forget(noted, remarks)
            ledger.refuse(where, problem, None if isinstance(row, BadField) else row)
        else:
            ledger.used += 1
            yield from items


def _claim_id(row: Row, where: str, places: dict[str, str]) -> None:
    """Only rows that are used claim their id, so that the counts are the same in every order of the rows."""
    own = row.get("id")
    if own is None:
        return
    if isinstance(own, bool) or not isinstance(own, (str, int)):
        raise BadField("id", "text or a whole number", type(own).__name__, "wrong type of id")
    if str(own) in places:
        raise BadField("id", f"an id of its own ({places[str(own)]} has this one)", repr(str(own)[:60]), "duplicate id")
    places[str(own)] = where
