"""RunLog: valid JSON whatever is logged, durable offsets, exact truncation."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpo.runlog import RunLog, read


def test_lines_are_valid_json_with_sorted_keys_and_named_non_finite_numbers(tmp_path: Path):
    log = RunLog(tmp_path / "run" / "metrics.jsonl")
    log.append({"step": 1, "loss": float("nan"), "a": [float("inf"), {"b": float("-inf")}], "id": "é\u2028"})
    log.append({"loss": np.float32(0.5), "grad": torch.tensor(2.0), "nan": np.float32("nan"), "step": 2})
    log.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()
    assert lines[0] == b'{"a": ["Infinity", {"b": "-Infinity"}], "id": "\\u00e9\\u2028", "loss": "NaN", "step": 1}'
    assert json.loads(lines[1]) == {"loss": 0.5, "grad": 2.0, "nan": "NaN", "step": 2}


def test_truncate_returns_to_the_checkpoint_and_counts_torn_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path)
    log.append({"step": 1})
    seen = log.offset()
    assert seen == path.stat().st_size
    before = path.read_bytes()
    log.append({"step": 2})
    log.append({"step": 3})
    with path.open("ab") as f:
        f.write(b'{"step": 4, "lo')
    assert [r["step"] for r in read(path)] == [1, 2, 3] and read(tmp_path / "absent") == []
    resumed = RunLog(path)
    assert resumed.truncate(seen) == 3
    assert path.read_bytes() == before
    assert resumed.truncate(seen) == 0
    resumed.append({"step": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_truncate_refuses_a_log_that_is_not_the_checkpoints(tmp_path: Path):
    log = RunLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    with pytest.raises(ValueError, match="metrics.jsonl has 12 bytes, the checkpoint has seen 99"):
        log.truncate(99)
    with pytest.raises(ValueError, match="no line ends at byte 5"):
        log.truncate(5)
    assert log.truncate(0) == 1


def test_a_log_whose_beginning_was_changed_is_refused(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path)
    log.append({"step": 1, "loss": 0.5})
    seen, digest = log.offset(), log.digest(log.offset())
    log.append({"step": 2})
    assert log.digest(seen) == digest and not log.torn()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0.5", b"0.4"))
    with pytest.raises(ValueError, match=f"metrics.jsonl: its first {seen} bytes are not those that the checkpoint has seen"):
        RunLog(path).truncate(seen, digest)
    assert b"0.4" in path.read_bytes() and RunLog(path).truncate(seen) == 1  # of a checkpoint that has no digest
    path.write_bytes(whole[:-3])
    assert RunLog(path).torn() and RunLog(path).truncate(seen, digest) == 1


@pytest.mark.parametrize("byte", [b"\xff", b"}"])
def test_a_damaged_line_is_named(byte: bytes, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": ' + byte + b'}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: damaged \(.*\); put the log back"):
        read(path)


def test_disk_full_takes_the_line_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = RunLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    real, calls = os.write, []

    def half_then_full(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "no space")
        return real(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OSError, match="no space"):
        log.append({"step": 2})
    monkeypatch.undo()
    log.append({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.lists(x) | st.tuples(x)))
def test_any_value_round_trips(tmp_path_factory: pytest.TempPathFactory, value: object):
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    log = RunLog(path)
    log.append({"value": value})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = path.read_text().splitlines()
    json.loads(line, parse_constant=refuse)
