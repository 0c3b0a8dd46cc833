"""The process that holds the models: it opens them, answers what comes through the pipe, and stops where nobody waits.

`mmpo.demos.worker` is the other end. Every request gets one last event, whatever happens; errors go back as words.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmpo import masking
from mmpo.demos.systems import Source

Open = Callable[[Source, Path, Path], Any]


class Stopped(Exception):
    """Nobody waits for the answer any more."""


def serve(pipe: Connection, source: Source, files: Path, cache: Path, opener: Open | None) -> None:
    """Open the source and answer requests until the other end of the pipe is closed."""
    link = Link(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    with contextlib.suppress(OSError):
        os.nice(10)  # votes and pages come first
    try:
        opened = (opener or _opener())(source, files, cache)
    except Exception as error:
        return link.say("broken", message=f"The models cannot be opened: {told(error)}")
    link.say("state", judged=opened.judge is not None)
    try:
        link.say("prompts", prompts=opened.held_out())
    except Exception as error:  # data that are no longer where they were cost the prompts, not the page
        link.say("prompts", prompts=[], message=f"The held-out prompts cannot be read: {told(error)}")
    while (request := link.requests.get()) is not None:
        answer(opened, link, request)


def _opener() -> Open:
    from mmpo.demos.opened import open_source  # and with it torch, in this process alone

    return open_source


def answer(opened: Any, link: Link, request: dict[str, Any]) -> None:
    """Answer one request, with one last event whatever happens."""

    def check() -> None:
        if request["id"] in link.stopped:
            raise Stopped

    def tell(kind: str, **fields: Any) -> None:
        link.say(kind, id=request["id"], **fields)

    tell("begun")
    try:
        opened.answer(request, tell, check)
        tell("done")
    except Stopped:
        tell("stopped")
    except Exception as error:
        tell("failed", message=told(error))


def told(error: Exception) -> str:
    """An error as a page may show it: in its own words, without secrets."""
    named = type(error).__module__.startswith("mmpo") or isinstance(error, ValueError)
    return masking.in_text(str(error) if named and str(error) else f"{type(error).__name__}: {error}")


class Link:
    """The process's end of the pipe. requests: what is asked. stopped: numbers of requests that nobody waits for."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self.requests: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: there will be no other
        self.stopped: set[int] = set()
        threading.Thread(target=self._read, daemon=True).start()

    def say(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._pipe.send_bytes(json.dumps({"kind": kind, **fields}).encode())

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                said = json.loads(self._pipe.recv_bytes())
                if said["do"] == "end":  # in its own time, as libraries' semaphores outlive a process that is killed
                    self.requests.put(None)
                elif said["do"] == "stop":
                    self.stopped.add(said["id"])
                else:
                    self.requests.put(said)
        os._exit(0)  # the server is gone
