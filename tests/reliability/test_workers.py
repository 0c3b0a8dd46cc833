"""T11: the process that decodes is killed, stopped or fails at any moment: another takes its place, in the same order."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mmpo import decoding, media
from mmpo.errors import DataError
from mmpo.pair import Block
from tests.reliability.counters import FULL, counter

ITEMS = 30
BAD = 60 if FULL else 15
LIMITS = decoding.Limits(wall=1.0)
SLOW = """
import time, numpy
class SoundFile:
    samplerate, channels, format, subtype = 16000, 1, "WAV", "PCM_16"
    def __init__(self, file):
        self.name = file.read()[4:].decode()
        time.sleep(0.05)
        raise RuntimeError("item " + self.name)
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="forks are found through /proc")


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A soundfile that takes 50 ms and then says which item it was given: long enough to be met by a signal."""
    (tmp_path / "soundfile.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decoding, "GRACE_SECONDS", 1.0)
    decoding.stop()
    yield
    decoding.stop()


def answer(index: int) -> str:
    """What the decoder said of one item, or why there is no answer."""
    with pytest.raises(DataError) as caught:
        media.open_audio(Block("audio", f"fLaC{index}".encode(), f"{index}.flac"), LIMITS)
    return str(caught.value)


def fork_of(server: int) -> int | None:
    found = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return int(found[0]) if found else None


def strike(how: str, server: int, moment: float) -> None:
    """Sends the signal to the process that forks, or to the first fork seen after `moment` seconds."""
    time.sleep(moment)
    target, number = how.split(" ")
    for _ in range(2000):
        if victim := server if target == "server" else fork_of(server):
            os.kill(victim, signal.Signals[number])
            return
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork SIGKILL", "server SIGKILL", "fork SIGSTOP", "server SIGSTOP"])
def test_a_lost_decoder_is_replaced_once_and_nothing_moves(slow: None, how: str) -> None:
    began, moments = time.monotonic(), random.Random(how)
    hit, longest, answers = set(moments.sample(range(ITEMS), BAD // 4)), 0.0, []
    for index in range(ITEMS):
        server = decoding._running().process.pid  # its start is not what is timed
        thread = threading.Thread(target=strike, args=(how, server, moments.uniform(0, 0.03)))
        start = time.monotonic()
        if index in hit:
            thread.start()
        answers.append(answer(index))
        longest = max(longest, time.monotonic() - start)
        if index in hit:
            thread.join()
    lost = [i for i, told in enumerate(answers) if f"item {i}" not in told]
    assert set(lost) <= hit  # no other item was touched, and each answer is of its own item
    if "SIGKILL" in how:
        assert not lost  # once more, and it was there
        assert longest < 2 * LIMITS.wall + 1
    else:
        assert all("no answer" in answers[i] or "longer than" in answers[i] for i in lost) and lost
        assert longest < LIMITS.wall + decoding.GRACE_SECONDS + 1
    result = f"order unchanged, {len(lost)} refused, longest wait {longest:.1f} s"
    counter("T11", how, len(hit), result, time.monotonic() - began)


def test_a_decoder_that_is_killed_again_refuses_the_file(slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def killed(*_: object) -> tuple[dict, object, int]:
        tried.append(1)
        return {}, None, -signal.SIGKILL

    monkeypatch.setattr(decoding, "_exchange", killed)
    with pytest.raises(DataError, match="killed twice"):
        media.open_audio(Block("audio", b"fLaC0", "0.flac"), replace(LIMITS, wall=5.0))
    assert len(tried) == 2
