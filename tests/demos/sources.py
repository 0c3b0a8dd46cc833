"""Sources that need no model: what a worker's process opens in tests. Each is a function that the process imports."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmpo import media
from mmpo.demos import heat
from mmpo.demos.systems import Source

WORDS = Source("words", "text", ("base", "aligned"), (8, "tokens"))


class Says:
    """Answers in words: the prompt and the seed. Some prompts do something else."""

    judge: object = None

    def held_out(self) -> list[dict[str, Any]]:
        return [{"words": "a held-out prompt", "pictures": []}]

    def answer(self, request: dict[str, Any], tell: Callable[..., None], check: Callable[[], None]) -> None:
        words = request["words"]
        if words == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if words == "fail":
            raise ValueError("no such word")
        for step in range(1000 if words in ("long", "deaf") else 2):
            if words != "deaf":
                check()
            tell("progress", done=0.1, note=f"step {step}")
            time.sleep(0.02)
        for system in range(2):
            for index, seed in enumerate(request["seeds"]):
                tell("sample", system=system, index=index, text=f"{words} {seed}")
                tokens = [[0, 1, 3.0], [1, 2, -3.0], [-1, -1, 0.5]]
                tell("explained", system=system, index=index, total=0.5, tokens=tokens)


def says(source: Source, files: Path, cache: Path) -> Says:
    return Says()


def cannot(source: Source, files: Path, cache: Path) -> Says:
    raise ValueError("this model is not there")


def dies(source: Source, files: Path, cache: Path) -> Says:
    os.kill(os.getpid(), signal.SIGKILL)
    return Says()


_lock: Any = None


def locks(source: Source, files: Path, cache: Path) -> Says:
    """As libraries do that show a bar of progress."""
    global _lock
    _lock = multiprocessing.RLock()
    return Says()


class ReadsBadly(Says):
    """Its prompts cannot be read: whatever reads them ends the process."""

    def held_out(self) -> list[dict[str, Any]]:
        os._exit(9)


def dies_reading(source: Source, files: Path, cache: Path) -> Says:
    with (files / "starts").open("a") as file:
        file.write("started\n")
    return ReadsBadly()


PICTURES = Source("pictures", "image", ("base", "aligned"), (4, "denoiser steps"))


class Paints(Says):
    """Answers in pictures of one colour, with a map and a strip."""

    def __init__(self, files: Path) -> None:
        self.files, self.judge = files, object()

    def answer(self, request: dict[str, Any], tell: Callable[..., None], check: Callable[[], None]) -> None:
        for system in range(2):
            for index, seed in enumerate(request["seeds"]):
                name = secrets.token_hex(16) + ".png"
                (self.files / name).write_bytes(media.encode(np.full((16, 16, 3), 40 * (seed + 1), np.uint8)))
                tell("sample", system=system, index=index, file=name)
                tell("judged", system=system, index=index, score=0.25 + system / 2, correct=bool(system))
                strip = secrets.token_hex(16) + ".svg"
                (self.files / strip).write_bytes(heat.strip([1.0, None, -1.0], 1.0))
                drawn = {"map": name, "strip": strip, "bars": [1.0, None, -1.0]}
                tell("explained", system=system, index=index, total=1.5 - system, tokens=[], **drawn)


def paints(source: Source, files: Path, cache: Path) -> Paints:
    return Paints(files)
