"""Models in a process of their own: it can be asked, stopped, timed out and started again, and pages never wait for it.

The two processes speak JSON over a pipe; nothing is unpickled, and media pass as files whose names nobody can guess. One
request is answered at a time. A request is stopped between two steps of the model; what does not stop then is killed, and so
is what takes too long, and the process is started again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from mmpo.demos.serving import Open, serve
from mmpo.demos.systems import Source

TIMEOUT = 300.0  # seconds of one request
START_TIMEOUT = 900.0  # of loading models
GRACE = 5.0  # between being asked to stop and being killed
END = 2.0  # between being asked to end and being killed
AWAY = 3 * GRACE  # after which one who waits, but does not look whether it is their turn, is passed by
ENDS = 2  # processes in a row that end before they answer anything, until no other is started
KINDS = ("waiting", "progress", "partial", "sample", "judged", "explained", "note", "done", "stopped", "failed")
LAST = frozenset({"done", "stopped", "failed"})
Kind = Literal["waiting", "progress", "partial", "sample", "judged", "explained", "note", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Event:
    """One thing that became known. system, index: whose sample of which seed. value: its fields (see `Opened.answer`)."""

    kind: Kind
    system: int = 0
    index: int = 0
    value: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """name: starting, ready (it answers), failed (it does not: message), closed. prompts: held-out ones, None while unread."""

    name: Literal["starting", "ready", "failed", "closed"]
    message: str = ""
    prompts: tuple[dict[str, Any], ...] | None = None
    judged: bool = False


@dataclass(eq=False)
class Place:
    """One in the line of those who ask. seen: when they last looked. served: whether their request is being answered.

    asked: whether the process was asked, and has not given its last answer yet.
    """

    owner: str
    seen: float
    served: bool = False
    asked: bool = False


class Worker:
    """The models of a source, behind a pipe. files: folder for samples. opener: what opens the source, there."""

    def __init__(
        self, source: Source, files: Path, cache: Path, *, timeout: float = TIMEOUT, grace: float = GRACE,
        opener: Open | None = None,
    ) -> None:  # fmt: skip
        self.source, self.files, self.cache = source, files, cache
        self.timeout, self.grace, self.opener = timeout, grace, opener
        self.state = State("starting")
        self._change, self._turns = threading.RLock(), threading.Condition()
        self._process: Any = None
        self._pipe: Connection | None = None
        self._events: queue.Queue[Event] = queue.Queue()
        self._number, self._owner = 0, ""
        self._line: list[Place] = []  # first come, first served
        self._loading = ""  # whose request waits for the models
        self._left: set[str] = set()  # who wants no answer any more
        self._began, self._stopping = 0.0, 0.0
        self._begun, self._ends = False, 0  # whether this process has begun to answer; ends in a row of those that had not
        self._leaving: threading.Thread | None = None  # ends the request of somebody who has gone

    def start(self) -> None:
        """Start the process; returns at once, and `state` tells when it is ready."""
        with self._change:
            if self.state.name == "closed":
                return
            context = multiprocessing.get_context("spawn")
            near, far = context.Pipe()
            process = context.Process(target=serve, args=(far, self.source, self.files, self.cache, self.opener), daemon=True)
            process.start()
            far.close()
            self._process, self._pipe, self._began, self._begun = process, near, time.monotonic(), False
            self.state = State("starting", prompts=self.state.prompts, judged=self.state.judged)
            threading.Thread(target=self._listen, args=(near, process), daemon=True).start()

    def sample(
        self, words: str, seeds: Sequence[int], *, held: int | None = None, steps: int | None = None, owner: str = "",
        pictures: Sequence[str] = (),
    ) -> Iterator[Event]:  # fmt: skip
        """What becomes known of an answer of every system, seed by seed; the last event is done, stopped or failed.

        held: number of the held-out prompt that the words are of, or belong to. owner: who may `cancel` it. pictures: names of
        files that stand before the words. Closing it returns at once; the request is ended, and others are served after that.
        """
        self._left.discard(owner)
        place = Place(owner, time.monotonic())
        with self._turns:
            self._line.append(place)
        try:
            while before := self._before(place):
                if owner in self._left:
                    return (yield Event("stopped"))
                told = "one request is" if before == 1 else f"{before} requests are"
                yield Event("waiting", value={"note": f"Waiting: {told} answered before yours."})
            yield from self._until_ready(owner)
            if owner in self._left:
                return (yield Event("stopped"))
            if self.state.name != "ready":
                yield Event("failed", value={"message": self.state.message or "The models are not running."})
                return
            request = {"words": words, "seeds": list(seeds), "held": held, "steps": steps, "pictures": list(pictures)}
            yield from self._answered(request, place)
        finally:
            if place.asked and self.state.name != "closed":
                # Whoever asked has gone, and this may be the thread that serves everybody.
                leaving = threading.Thread(target=self._abandon, args=(place,), daemon=True)
                leaving.start()
                self._leaving = leaving
            else:
                self._leave(place)

    def _leave(self, place: Place) -> None:
        """Give up a place, so that the next one is served."""
        with self._turns:
            self._line.remove(place)
            self._turns.notify_all()

    def _before(self, place: Place) -> int:
        """How many are answered before this one; 0 when its turn has come, which it then has. Waits a little for that."""
        with self._turns:
            before = self._ahead(place)
            if before:
                self._turns.wait(0.5)
                before = self._ahead(place)
            place.served = not before
            return before

    def _ahead(self, place: Place) -> int:
        place.seen = now = time.monotonic()
        earlier = self._line[: self._line.index(place)]
        wait = [p for p in earlier if not p.served and p.owner not in self._left and now - p.seen < AWAY]
        return len(wait) + sum(p.served for p in self._line)

    def cancel(self, owner: str = "") -> bool:
        """Ask the request of this owner to stop, whether it is answered or still waits; whether there was one."""
        with self._change:
            waits = any(p.owner == owner and not p.served for p in self._line)
            if owner and (waits or owner == self._loading):
                self._left.add(owner)
                return True
            running = bool(self._owner) and self._owner == (owner or self._owner)
            if running:
                self._stop()
            return running

    def close(self) -> None:
        """End the process; no other is started."""
        with self._change:
            self.state = State("closed", "The server is being closed.")
            if self._process is not None:
                self._send({"do": "stop", "id": self._number})
                self._send({"do": "end"})
                self._process.join(min(self.grace, END))
            self._kill()
        if self._leaving is not None:  # not before others can hold what it may wait for
            self._leaving.join(self.grace)

    # ---- one request

    def _until_ready(self, owner: str) -> Iterator[Event]:
        self._loading = owner
        try:
            yield from self._loaded(owner)
        finally:
            self._loading = ""

    def _loaded(self, owner: str) -> Iterator[Event]:
        while self.state.name == "starting" and owner not in self._left:
            waited = time.monotonic() - self._began
            yield Event("waiting", value={"note": f"Loading the models, {waited:.0f} s."})
            if waited > START_TIMEOUT:
                self._give_up(f"The models were not loaded within {START_TIMEOUT:.0f} s. Start the command again.")
            time.sleep(0.25)

    def _answered(self, request: dict[str, Any], place: Place) -> Iterator[Event]:
        with self._change:
            self._number, self._owner, self._events = self._number + 1, place.owner or "nobody", queue.Queue()
            self._stopping, place.asked = 0.0, True
            self._send(request | {"do": "sample", "id": self._number})
        late, deadline = False, time.monotonic() + self.timeout
        try:
            while place.asked:
                event = self._next()
                if self._stopping and time.monotonic() > self._stopping and not (event and event.kind in LAST):
                    event = Event("stopped")
                    self._again()
                elif not late and time.monotonic() > deadline:
                    late = True
                    self._stop()
                if event is not None:
                    place.asked = event.kind not in LAST
                    yield self._timed_out() if late and event.kind == "stopped" else event
        finally:
            self._owner = ""

    def _stop(self) -> None:
        """Ask the process to stop what it does, and note when it is killed if it does not."""
        self._stopping = time.monotonic() + self.grace
        self._send({"do": "stop", "id": self._number})

    def _next(self) -> Event | None:
        """What comes next, None while nothing does; after the end of everything that it has stopped."""
        try:
            return self._events.get(timeout=0.25)
        except queue.Empty:
            return Event("stopped") if self.state.name == "closed" else None

    def _timed_out(self) -> Event:
        told = f"This took longer than {self.timeout:.0f} s and was stopped. Fewer seeds or steps take less."
        return Event("failed", value={"message": told})

    def _abandon(self, place: Place) -> None:
        """Stop the request of somebody who has gone, kindly at first, and give up their place when the process is free."""
        try:
            self._stop()
            while time.monotonic() < self._stopping:
                event = self._next()
                if event is not None and event.kind in LAST:
                    return
            self._again()
        finally:
            self._leave(place)

    # ---- the process

    def _send(self, message: dict[str, Any]) -> None:
        with self._change, contextlib.suppress(OSError):  # a process that has ended is noticed where it is listened to
            if self._pipe is not None:
                self._pipe.send_bytes(json.dumps(message).encode())

    def _listen(self, pipe: Connection, process: Any) -> None:
        """Read what the process says until it ends."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._heard(json.loads(pipe.recv_bytes()))
        with self._change:  # whoever holds it may wait for a process: two at once, and one is told that it lives
            if process is self._process and self.state.name != "closed":
                process.join(self.grace)
                self._ended(process.exitcode)

    def _heard(self, said: dict[str, Any]) -> None:
        if said["kind"] == "state":
            self.state = State("ready", prompts=self.state.prompts, judged=said["judged"])
        elif said["kind"] == "prompts":
            self.state = State("ready", said.get("message", ""), tuple(said["prompts"]), self.state.judged)
        elif said["kind"] == "begun":
            self._begun = True
        elif said["kind"] == "broken":
            self.state = State("failed", said["message"])
        elif said["id"] == self._number:
            known = ("kind", "system", "index", "id")
            value = {name: given for name, given in said.items() if name not in known}
            self._events.put(Event(said["kind"], said.get("system", 0), said.get("index", 0), value))

    def _ended(self, code: int | None) -> None:
        """The process is gone: what was asked of it fails, and a new one is started, but not where none comes to answer."""
        was = self.state
        if was.name == "failed":
            return
        if was.name == "starting":
            self.state = State("failed", f"The models' process {fate(code)} while it loaded them. Start the command again.")
            return
        self._ends = 0 if self._begun else self._ends + 1
        lasts = self._ends >= ENDS
        when = "while it read the held-out prompts" if was.prompts is None else "before it answered anything"
        rest = f" {when}, {ENDS} times in a row. Start the command again." if lasts else ". It is being started again."
        message = f"The models' process {fate(code)}{rest}"
        self._events.put(Event("failed", value={"message": message}))
        if lasts:
            self.state = State("failed", message)
        else:
            self.start()

    def _again(self) -> None:
        """Kill the process and start another."""
        with self._change:
            self._kill()
            self.start()

    def _give_up(self, message: str) -> None:
        with self._change:
            self.state = State("failed", message)
            self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join(self.grace)
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def fate(code: int | None) -> str:
    """In words, how a process ended that nobody ended."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was ended by {name}" + (", most likely because memory ran out; fewer seeds take less" if name == "SIGKILL" else "")
