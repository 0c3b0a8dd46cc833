"""A polite end: the first SIGINT or SIGTERM lets the running step finish and be saved, the next one ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The run stopped at a step boundary because of signal `number`; the same command continues it."""

    def __init__(self, number: int, step: int) -> None:
        self.number = number
        super().__init__(f"{signal.Signals(number).name}: saved at step {step}; the same command continues the run")


@dataclass
class Request:
    """number: the signal that asked to stop, 0 as long as none did."""

    number: int = 0


@contextlib.contextmanager
def requests() -> Iterator[Request]:
    """Note the first SIGINT or SIGTERM instead of acting on it. Outside the main thread signals stay as they are."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        for each, handler in before.items():
            signal.signal(each, handler)
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")  # print is not safe in a handler

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
