"""Votes over HTTP while the server is killed: every acknowledged vote is stored once, and none is invented.

Clients are voters who repeat a request with its nonce until it is answered. The server is `mmpo demo vote` in a process of its
own, which is sent SIGKILL again and again; both processor cores are kept busy by something like generation meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from mmpo.demos.ballot_pairs import export
from mmpo.demos.ballots import FILE
from tests.reliability.counters import FULL, counter

CLIENTS, VOTES, KILLS = (32, 100, 20) if FULL else (32, 10, 2)
LONGEST = 900.0
BUSY = (
    "import os, numpy as np\nos.nice(10)\nx = np.random.default_rng(0).random((256, 256))\nwhile True: x = np.tanh(x @ x) / 16"
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass
class Account:
    """What clients sent, (comparison, nonce) -> choice; which of it was acknowledged; and how long
    that took where no kill was in between."""

    sent: dict[tuple[str, str], str] = field(default_factory=dict)
    acknowledged: set[tuple[str, str]] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    retries: int = 0


@contextmanager
def server(source: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mmpo", "demo", "vote", str(source), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **ONE_THREAD})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def busy(cores: int = 2) -> Iterator[None]:
    """Something else that would like all of the machine, at the priority of the process that generates."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY], env={**os.environ, **ONE_THREAD}) for _ in range(cores)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def request(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], method: str, path: str, cookie: str, body: Any = None
) -> tuple[int, dict[str, Any], str]:
    """One exchange on an open connection: status, JSON, and the cookie of the visitor."""
    reader, writer = streams
    data = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(data)}", "content-type: application/json"]
    head += [f"cookie: {cookie}"] if cookie else []
    writer.write("\r\n".join([*head, "", ""]).encode() + data)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in answer[1:] if ": " in line)
    raw = dict(line.split(": ", 1) for line in answer[1:] if ": " in line)
    told = json.loads(await reader.readexactly(int(headers["content-length"])))
    given = next((value for name, value in raw.items() if name.lower() == "set-cookie"), "")
    return int(answer[0].split()[1]), told, given.partition(";")[0] or cookie


async def voter(port: int, account: Account, seed: int) -> None:
    """Votes VOTES times. A request that is not answered is sent again, with its nonce, on a new connection."""
    chance, cookie, done = random.Random(seed), "", 0
    streams: Any = None
    waiting: dict[str, Any] | None = None
    again = False
    while done < VOTES:
        start = time.monotonic()
        try:
            streams = streams or await asyncio.open_connection("127.0.0.1", port)
            method, body = ("GET", None) if waiting is None else ("POST", waiting)
            status, told, cookie = await asyncio.wait_for(request(streams, method, "/vote", cookie, body), 20)
        except (OSError, EOFError, asyncio.IncompleteReadError, TimeoutError):
            account.retries, again = account.retries + 1, True
            if streams:
                streams[1].close()
            streams = None
            await asyncio.sleep(0.2)
            continue
        if status in (429, 503):
            await asyncio.sleep(0.2)
            continue
        assert status == 200, told
        if waiting is None:
            nonce, choice = f"{seed:04d}-{chance.getrandbits(64):016x}", chance.choice(["left", "right", "tie", "both_bad"])
            waiting = {"comparison": told["comparison"], "choice": choice, "nonce": nonce}
            account.sent[told["comparison"], nonce] = choice
        else:
            account.acknowledged.add((waiting["comparison"], waiting["nonce"]))
            account.seconds += [] if again else [time.monotonic() - start]
            waiting, done, again = None, done + 1, False
    streams[1].close()


async def vote(source: Path, port: int, account: Account, kills: int) -> None:
    """All voters at once, while the server is killed at even distances of acknowledged votes."""
    voters = [asyncio.create_task(voter(port, account, seed)) for seed in range(CLIENTS)]
    end, total = time.monotonic() + LONGEST, CLIENTS * VOTES
    for number in range(1, kills + 2):
        with server(source, port) as process:
            goal = total if number > kills else total * number // (kills + 1)
            while len(account.acknowledged) < goal:
                assert process.poll() is None, f"the server ended by itself, exit code {process.returncode}"
                assert time.monotonic() < end, f"{len(account.acknowledged)} of {total} votes in {LONGEST:.0f} s"
                for task in voters:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
    await asyncio.gather(*voters)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def texts(root: Path, items: int) -> Path:
    for system in ("base", "aligned"):
        (root / system).mkdir(parents=True)
        for i in range(items):
            (root / system / f"{i:03d}.txt").write_text(f"What {system[0]} says about {i}")
    return root


def stored(source: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """(comparison, nonce, choice) of every vote, and the systems of both sides of every comparison."""
    with closing(sqlite3.connect(source / "votes" / FILE)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        votes = db.execute("SELECT comparison, nonce, choice FROM votes").fetchall()
        sides = db.execute(
            "SELECT a.system, b.system FROM comparisons "
            "JOIN entries a ON a.id = left_entry JOIN entries b ON b.id = right_entry"
        ).fetchall()
    return votes, sides


@pytest.mark.slow
def test_no_acknowledged_vote_is_lost_or_doubled(tmp_path: Path) -> None:
    source, account, start = texts(tmp_path / "samples", VOTES + 20), Account(), time.monotonic()
    with busy(), ThreadPoolExecutor(1) as own:  # playwright's loop may run in this thread
        own.submit(asyncio.run, vote(source, free_port(), account, KILLS)).result()
    votes, sides = stored(source)
    kept = Counter((comparison, nonce) for comparison, nonce, _ in votes)
    assert len(account.acknowledged) == CLIENTS * VOTES
    assert account.acknowledged <= kept.keys(), "lost"
    assert set(kept.values()) == {1}, "doubled"
    assert all(account.sent.get((comparison, nonce)) == choice for comparison, nonce, choice in votes), "invented or changed"
    assert binomtest(sum(left == "base" for left, _ in sides), len(sides)).pvalue > 1e-4
    count, ledger = export(source / "votes", "mmpo")
    assert count == sum(choice in ("left", "right") for _, _, choice in votes) and ledger.rows == len(votes)
    seconds = sorted(account.seconds)
    p95 = seconds[int(0.95 * len(seconds))]
    told = f"0 lost, 0 doubled, 0 invented, {account.retries} requests sent again, p95 {1000 * p95:.0f} ms"
    counter("T14", f"votes of {CLIENTS} clients, SIGKILL {KILLS} times", len(votes), told, time.monotonic() - start)
    assert p95 < (0.3 if FULL else 1.5), told  # the small size runs on machines that do other things, too
