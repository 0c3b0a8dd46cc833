"""Global statistics: alone, and across two real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpo.collective import global_mean, of_same_rank, running_mean

WORKER = """
import json, sys, torch
from torch import distributed
from mmpo.collective import gather, global_mean, of_same_rank, running_mean
rank, path, cases = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
cases = [torch.tensor(case[rank]) for case in cases]
means = [global_mean(case).item() for case in cases]
running = [v.item() for v in running_mean(cases[0], torch.tensor(2.0), torch.tensor(4.0))]
places = of_same_rank(cases[0] * 10, by=-cases[0]).tolist()
print(json.dumps([means, running, [gather(case)[0].tolist() for case in cases], gather(cases[0])[1], places]))
distributed.destroy_process_group()
"""


def test_mean_without_a_process_group() -> None:
    x = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert global_mean(x).item() == 3 and not global_mean(x).requires_grad
    assert global_mean(x[:0]).item() == 0


@pytest.mark.slow
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
    first, second = (json.loads(out) for out, _ in outputs)
    assert first[0] == second[0] == [4.0, 6.0, 0.0]
    assert first[1] == second[1] == [3.0, 8.0]  # 4 earlier rows of mean 2 and 4 of mean 4
    assert first[2] == second[2] == [[1, 2, 3, 10], [4, 8], []] and (first[3], second[3]) == (0, 3)
    assert first[4] == [100, 30, 20] and second[4] == [10]  # the smallest of one list stands where the other is largest


def test_the_place_in_a_sorted_list() -> None:
    x, by = torch.tensor([10.0, 30.0, 20.0]), torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    assert of_same_rank(x, by).tolist() == [30, 10, 20]
    assert of_same_rank(by, by).tolist() == by.tolist() and not of_same_rank(by, by).requires_grad
    assert [v.item() for v in running_mean(x, torch.tensor(0.0), torch.tensor(0.0))] == [20, 3]
    assert [v.item() for v in running_mean(x[:0], torch.tensor(0.5), torch.tensor(0.0))] == [0.5, 0]
