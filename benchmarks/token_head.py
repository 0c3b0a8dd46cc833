"""The language-model head, forward and backward: token statistics in tiles against full logits and against TRL's.

    python -m benchmarks.token_head [--rounds 15] [--out benchmarks/results/token_head.json]

At T = 1024 rows, D = 256, V = 32000 in fp32 on the CPU, to the gradients of states and weight:

    naive        log_softmax over full logits, the label's entry
    trl          trl.kernels.chunked_logprob, as TRL's DPOTrainer calls it on a CPU (tiles of 4096 x 32768)
    ours         mmpo.kernels.token_stats, log-probability alone
    naive_tdpo   log-probability and KL(reference || policy) over full logits, the order of operations of TDPO's repository
    ours_kl      mmpo.kernels.token_stats with kl_ref

Contestants take turns in one process; nothing is timed before all of them agree with `naive` or `naive_tdpo`, else the exit
code is 1. Memory is the growth of a child process's resident peak over one pass (Linux). README.md says what it means.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from benchmarks.rounds import measure, ratio
from mmpo.kernels.token_stats import MIB, Head, token_stats

ROWS, WIDTH, VOCABULARY = 1024, 256, 32000
TOLERANCE = 1e-5
# contestant: (peer, what at most: time and memory as shares of the peer's)
BARS = {("ours", "naive"): (1.5, 0.30), ("ours", "trl"): (1 / 1.4, 0.12), ("ours_kl", "naive_tdpo"): (1.3, 0.15)}

Inputs = dict[str, Tensor]


def inputs(rows: int = ROWS, vocabulary: int = VOCABULARY) -> Inputs:
    """States and weight of a policy, of a reference about half a nat away from it, labels, and each row's part in the loss."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, WIDTH), torch.randn(vocabulary, WIDTH) / 10
    ref_hidden, ref_weight = hidden + torch.randn(rows, WIDTH) / 2, weight + torch.randn(vocabulary, WIDTH) / 30
    found = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "labels": torch.randint(vocabulary, (rows,))}
    return found | {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "parts": torch.rand(rows) / rows}


def naive(given: Inputs) -> tuple[Tensor, ...]:
    return (_labels((given["hidden"] @ given["weight"].T).log_softmax(-1), given),)


def trl(given: Inputs) -> tuple[Tensor, ...]:
    arguments = (given["hidden"], given["weight"], None, given["labels"], 1.0, 32768, None, 1.0, ())
    return (ChunkedLogProbFunction.apply(*arguments)[0],)


def ours(given: Inputs) -> tuple[Tensor, ...]:
    return (token_stats(given["hidden"], Head(given["weight"]), given["labels"]).logp,)


def naive_tdpo(given: Inputs) -> tuple[Tensor, ...]:
    logits = given["hidden"] @ given["weight"].T
    with torch.no_grad():
        ref_logits = given["ref_hidden"] @ given["ref_weight"].T
    log_p, q = logits.log_softmax(-1), ref_logits.softmax(-1)
    log_q = q.log()
    return _labels(log_p, given), (q * (log_q - log_p)).sum(-1)


def ours_kl(given: Inputs) -> tuple[Tensor, ...]:
    ref = given["ref_hidden"], Head(given["ref_weight"])
    stats = token_stats(given["hidden"], Head(given["weight"]), given["labels"], {"kl_ref"}, *ref)
    assert stats.kl_ref is not None
    return stats.logp, stats.kl_ref


CONTESTANTS: dict[str, Callable[[Inputs], tuple[Tensor, ...]]] = {
    f.__name__: f for f in (naive, trl, ours, naive_tdpo, ours_kl)
}


def _labels(log_p: Tensor, given: Inputs) -> Tensor:
    return log_p.gather(1, given["labels"][:, None])[:, 0]


def gradients(name: str, given: Inputs) -> tuple[Tensor, ...]:
    """The statistics, and the gradients of states and weight through a loss in which every row has its own part."""
    found = CONTESTANTS[name](given)
    loss = sum((statistic * given["parts"]).sum() for statistic in found)
    assert isinstance(loss, Tensor)
    return (*(s.detach() for s in found), *torch.autograd.grad(loss, (given["hidden"], given["weight"])))


def equality(given: Inputs) -> dict[str, float]:
    """The largest difference of each contestant's statistics and gradients from its peer's, relative to their norm."""
    found = {name: gradients(name, given) for name in CONTESTANTS}
    pairs = {name: "naive_tdpo" if name == "ours_kl" else "naive" for name in ("trl", "ours", "ours_kl")}
    return {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(found[name], found[peer], strict=True))
        for name, peer in pairs.items()
    }


@dataclass(frozen=True)
class Pass:
    """A contestant on given tensors, for `measure`."""

    name: str
    given: Inputs

    def step(self, number: int) -> None:
        gradients(self.name, self.given)


def peak(name: str) -> int:
    """Bytes by which a process of its own grows at its highest during one pass, results included."""
    command = [sys.executable, "-m", "benchmarks.token_head", "--peak", name]
    run = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=True)
    return int(run.stdout)


def growth(name: str) -> int:
    """What `peak` measures, in this process: its high-water mark, reset before the pass, over what it holds by then."""
    gradients(name, inputs(8, 64))  # libraries take what they need for themselves
    given = inputs()
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    gradients(name, given)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def results(found: Mapping[str, np.ndarray], peaks: Mapping[str, int]) -> list[dict[str, Any]]:
    """One entry per bar: both contestants, the share of time with its interval, of memory, and whether the bars are met."""
    out = []
    for (name, peer), (slowest, largest) in BARS.items():
        spent, held = ratio(found[name], found[peer]), peaks[name] / peaks[peer]
        bars = {"time_bar": slowest, "time_met": spent["high"] <= slowest, "memory_bar": largest, "memory_met": held <= largest}
        out.append({"name": name, "peer": peer, "time": spent, "memory": held} | bars)
    return out


def report(record: Mapping[str, Any]) -> str:
    lines = [f"{name:11} {1e3 * row['cpu_seconds']:6.0f} ms {row['peak_mib']:6.0f} MiB" for name, row in record["each"].items()]
    for row in record["bars"]:
        t, met = row["time"], {True: "met", False: "missed"}
        lines.append(
            f"{row['name']} / {row['peer']}: time {t['value']:.2f} ({t['low']:.2f} to {t['high']:.2f}), bar "
            f"{row['time_bar']:.2f}: {met[row['time_met']]}; memory {row['memory']:.3f}, bar {row['memory_bar']:.2f}: "
            f"{met[row['memory_met']]}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The language-model head: tiles against full logits and TRL.")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, at least 7")
    parser.add_argument("--out", type=Path, help="write the measurements here, as JSON")
    parser.add_argument("--peak", choices=CONTESTANTS, help="print the bytes one contestant grows by, and nothing else")
    given = parser.parse_args(arguments)
    if given.peak:
        print(growth(given.peak))
        return 0
    if given.rounds < 7:
        parser.error(f"--rounds: at least 7 are needed for an interval, got {given.rounds}")
    load, tensors = os.getloadavg(), inputs()
    equal = equality(tensors)
    print("relative difference from full logits:", json.dumps(equal))
    if max(equal.values()) > TOLERANCE:
        print(f"not the same results (tolerance {TOLERANCE:g}): nothing was timed", file=sys.stderr)
        return 1
    peaks, spent = {name: peak(name) for name in CONTESTANTS}, measure([Pass(n, tensors) for n in CONTESTANTS], given.rounds, 1)
    found = {n: values[:, 0] for n, values in spent.items()}
    each = {n: {"cpu_seconds": float(np.median(found[n])), "peak_mib": peaks[n] / MIB} for n in CONTESTANTS}
    machine: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "trl": version("trl")}
    machine |= {"processors": os.cpu_count(), "threads": torch.get_num_threads()}
    shape = {"rows": ROWS, "width": WIDTH, "vocabulary": VOCABULARY}
    record = {"equality": equal, "each": each, "bars": results(found, peaks), "rounds": given.rounds, "shape": shape}
    record |= {"load_before": load, "machine": machine}
    print(report(record))
    if given.out:
        given.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
