"""What a run's log says is going wrong, in plain words. Each file of the diagnostics room looks for one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmpo.find import find, names

Record = dict[str, Any]


@dataclass(frozen=True)
class Flag:
    """name: the diagnostic. text: what was seen, with numbers. advice: what to try, most promising first."""

    name: str
    text: str
    advice: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def diagnose(records: Sequence[Record]) -> list[Flag]:
    """All flags that a log (the records of log.jsonl so far) raises."""
    found = (find("diagnostics", name)(records) for name in names("diagnostics"))
    return [flag for flag in found if flag is not None]


def evaluations(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.get("event") == "eval"]
