"""Global statistics: alone, and across two real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from mmpo.collective import global_mean

WORKER = """
import json, sys, torch
from torch import distributed
from mmpo.collective import global_mean
rank, path, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
print(json.dumps([global_mean(torch.tensor(case[rank])).item() for case in cases]))
distributed.destroy_process_group()
"""


def test_mean_without_a_process_group() -> None:
    x = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert global_mean(x).item() == 3 and not global_mean(x).requires_grad
    assert global_mean(x[:0]).item() == 0


def test_ranks_with_unequal_counts_agree(tmp_path: Path) -> None:
    """Rows weigh the same wherever they are: (1 + 2 + 3 + 10) / 4, not the mean of the ranks' means, which is 6."""
    cases = [[[1.0, 2.0, 3.0], [10.0]], [[], [4.0, 8.0]], [[], []]]
    args = [str(tmp_path / "store"), json.dumps(cases)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(r), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=120) for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], outputs
    assert [json.loads(out) for out, _ in outputs] == [[4.0, 6.0, 0.0]] * 2
