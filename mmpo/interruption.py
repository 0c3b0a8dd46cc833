"""A polite end: the first SIGINT or SIGTERM lets the running step finish and be saved, the next one ends the process.

An evaluation is left where it is, as it changes nothing that is saved; a resumed run makes it up."""

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


class BrokenOff(BaseException):
    """A measurement was left because a signal asked to stop; no judge may take it for an error of its own."""


@dataclass
class Request:
    """number: the signal that asked to stop, 0 as long as none did. at_once: whether the next one raises BrokenOff."""

    number: int = 0
    at_once: bool = False

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """Inside, where nothing changes that is saved, a signal raises BrokenOff and waits for nothing."""
        self.at_once = True  # before the question, so that a signal between the two is not missed
        try:
            if self.number:
                raise BrokenOff
            yield
        finally:
            self.at_once = False


@contextlib.contextmanager
def requests() -> Iterator[Request]:
    """Note the first SIGINT or SIGTERM instead of acting on it, but in what is `breakable`. Other threads' stay as they are."""
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
        if request.at_once:
            request.at_once = False
            raise BrokenOff

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
