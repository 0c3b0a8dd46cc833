"""Two processes that find each other over gloo, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def in_two_processes(code: str, *, endings: tuple[int, ...] = (0,)) -> list[tuple[int, str]]:
    """Run a program as rank 0 and as rank 1; how each ended and what it printed. endings: statuses that are no failure."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", code]
        started.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True, cwd=ROOT))
    ended = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode in endings, err[-3000:]
        ended.append((process.returncode, out))
    return ended
