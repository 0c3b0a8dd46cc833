"""Every guard has a test that fails without it: each is taken out of a copy of the sources, and its test run there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.counters import FULL, counter

ROOT = Path(__file__).resolve().parents[2]

# name: file, what stands there, what takes its place, and the tests that have to notice
GUARDS = {
    "checkpoint digests": (
        "mmpo/checkpoint.py", 'if blake3(data).hexdigest() != entry["blake3"]:', "if False:",
        "tests/test_checkpoint.py -k damaged_file",
    ),
    "verify before prune": (
        "mmpo/checkpoint.py", "    for _ in _verified(checkpoint):\n            pass", "    pass",
        "tests/test_checkpoint.py",
    ),
    "paths stay under their root": (
        "mmpo/media.py", "if not path.is_relative_to(base):", "if False:",
        "tests/reliability/test_paths.py",
    ),
    "no device is opened": (
        "mmpo/media.py", "if not stat.S_ISREG(status.st_mode):", "if False:",
        "tests/reliability/test_paths.py",
    ),
    "scores are finite": (
        "mmpo/train.py", "result.loss = _nan_where_broken(result.loss * rows.weight, policy, ref)",
        "result.loss = result.loss * rows.weight",
        "tests/reliability/test_nonfinite.py -k saturates",
    ),
    "gradients are finite": (
        "mmpo/train.py", "if not torch.isfinite(norm) and", "if False and",
        "tests/reliability/test_nonfinite.py -k refused_before",
    ),
    "one writer": (
        "mmpo/lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/reliability/test_writers.py",
    ),
    "secrets are masked": (
        "mmpo/masking.py", "if value is not None and _is_secret(str(name), value):", "if False:",
        "tests/reliability/test_secrets.py",
    ),
    "a lost decoder is replaced": (
        "mmpo/decoding.py", "except EndedFromOutside:  # by", "except ZeroDivisionError:  # by",
        "tests/reliability/test_workers.py -k killed_again",
    ),
    "memory is told": (
        "mmpo/train.py", "        _halve(run, said, error)\n", "        raise\n",
        "tests/reliability/test_memory.py -k numbers",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="MMPO_FULL=1 takes ten guards out of a copy of the sources")
@pytest.mark.parametrize("name", GUARDS)
def test_without_the_guard_a_test_fails(name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    file, there, instead, tests = GUARDS[name]
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    source = (copy / file).read_text(encoding="utf-8")
    assert source.count(there) == 1, f"{name}: the guard has moved"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(copy), "MMPO_FULL": "0", "MMPO_COUNTERS": "", "OMP_NUM_THREADS": "1"}
    codes = []
    for text in (source, source.replace(there, instead)):  # with it the tests pass, or their failure would prove nothing
        (copy / file).write_text(text, encoding="utf-8")
        codes.append(subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=600).returncode)
    assert codes == [0, 1]
    counter("T23", "guards taken out, one at a time", 1, "a test fails each time", time.monotonic() - began)
