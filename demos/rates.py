"""How often somebody may ask: a bucket of requests for each, which fills again with time."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

REMEMBERED = 10_000  # of those who asked last; one who is forgotten starts with a full bucket


@dataclass
class Rates:
    """burst: requests at once. per_second: how many come back."""

    burst: float
    per_second: float
    buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def knows(self, who: str) -> bool:
        return who in self.buckets

    def wait(self, who: str, now: float | None = None) -> float:
        """Seconds until this one may ask again: 0 when the request is let through, and counted."""
        now = time.monotonic() if now is None else now
        left, then = self.buckets.pop(who, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.per_second)
        waits = 0.0 if left >= 1 else (1 - left) / self.per_second
        self.buckets[who] = (left - 1 if left >= 1 else left, now)
        while len(self.buckets) > REMEMBERED:
            self.buckets.popitem(last=False)
        return waits

    def give_back(self, who: str) -> None:
        """Uncount a request that was let through."""
        if who in self.buckets:
            left, then = self.buckets[who]
            self.buckets[who] = (min(self.burst, left + 1), then)
