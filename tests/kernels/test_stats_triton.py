"""The Triton folds: in the interpreter, in a process of its own that has TRITON_INTERPRET set first, and on CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmpo.errors import MissingExtra
from mmpo.kernels.token_stats import MIB, NAMES, Head, Tiling, chosen_backend, token_stats

ALL = frozenset(NAMES)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
cuda = pytest.mark.skipif(not (torch.cuda.is_available() and INSTALLED), reason="needs CUDA and triton")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra triton")
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter", __file__]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def results(
    backend: str, size: int, width: int, vocabulary: int, wants: frozenset[str], **settings: Any
) -> Mapping[str, Tensor]:
    """Statistics and gradients by name. settings: softcap, scale, masked columns, tile and keep, device, dtype."""
    draw, dtype = torch.Generator().manual_seed(size + vocabulary), settings.get("dtype", torch.float32)
    shapes = 2 * ((size, width), (vocabulary, width), (vocabulary,))
    tensors = [torch.randn(s, generator=draw).to(settings.get("device", "cpu"), dtype) for s in shapes]
    labels = torch.randint(vocabulary, (size,), generator=draw).to(tensors[0].device)
    labels[-1:] = vocabulary - 1  # in the last, partial tile
    for column in settings.get("masked", ()):
        tensors[2][column] = tensors[5][column] = -torch.inf
        labels[labels == column] = vocabulary - 1
    hidden, weight, bias = inputs = [x.requires_grad_() for x in tensors[:3]]
    softcap, scale = settings.get("softcap"), settings.get("scale", 1.0)
    heads = Head(weight, bias, softcap, scale), Head(tensors[4], tensors[5], softcap)
    tiling = Tiling(settings.get("tile", 4 * max(size, 1) * 600), settings.get("keep", 0))
    stats = token_stats(hidden, heads[0], labels, wants, tensors[3], heads[1], 4, backend, tiling)
    found = {n: v for n in NAMES if (v := getattr(stats, n)) is not None}
    smooth = torch.stack([v for v in found.values() if v.requires_grad])
    factors = torch.linspace(-0.8, 1.1, smooth.numel(), device=smooth.device).view_as(smooth)
    gradients = torch.autograd.grad((smooth * factors).sum(), inputs)
    return found | dict(zip(("hidden", "weight", "bias"), gradients, strict=True))


def compare(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)


@interpreted
@pytest.mark.parametrize(
    "wants", [frozenset(), ALL, {"entropy"}, {"kl_ref"}, {"kl_policy", "log_sum_p2"}], ids=lambda w: "+".join(sorted(w))
)
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((7, 5, 1030), {}),
        ((3, 4, 17), {"tile": 4 * 3 * 5, "masked": (0, 1, 2, 3, 4, 9)}),
        ((5, 3, 2100), {"softcap": 3.0, "scale": 0.7}),
        ((5, 3, 1025), {"keep": MIB, "masked": (1000, 3)}),
        ((0, 4, 17), {}),
        ((1, 2, 1), {}),
    ],
    ids=["two blocks", "masked tile", "softcap", "kept", "no rows", "one token"],
)
def test_interpreter_equals_the_definition(
    shape: tuple[int, int, int], settings: dict[str, Any], wants: frozenset[str]
) -> None:
    compare(results("triton", *shape, frozenset(wants), **settings), results("reference", *shape, frozenset(wants), **settings))


@interpreted
def test_interpreter_takes_halves_and_refuses_doubles() -> None:
    shape = (6, 16, 70)
    ours, wanted = (results(b, *shape, ALL, dtype=torch.bfloat16, tile=4 * 6 * 20) for b in ("triton", "tiled"))
    compare(ours, wanted, tolerance=2e-3)
    with pytest.raises(ValueError, match="computes in fp32"):
        results("triton", *shape, ALL, dtype=torch.float64)


@pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="needs triton, compiled")
def test_states_on_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="needs CUDA .or TRITON_INTERPRET=1., got states on cpu"):
        results("triton", 2, 3, 4, frozenset())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mmpo.kernels.stats_triton", raising=False)
    with pytest.raises(MissingExtra, match="triton"):
        results("triton", 2, 3, 4, frozenset())
    results("auto", 2, 3, 4, frozenset())


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b in ("triton", "tiled") for d in (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(300, 512, 40_001), (2500, 256, 32_000), (64, 64, 1000)])
def test_cuda_equals_the_definition(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    settings: dict[str, Any] = {"device": "cuda", "dtype": dtype, "scale": 0.1, "tile": 14 * MIB}
    ours, again = (results(backend, *shape, ALL, **settings) for _ in range(2))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    exact = results("reference", *shape, ALL, **settings)
    for name, wanted in exact.items():
        error = float((ours[name].double() - wanted.double()).norm() / wanted.double().norm())
        assert error <= (1e-4 if dtype == torch.float32 else 1e-2), name


@pytest.mark.gpu
@cuda
def test_cuda_takes_triton() -> None:
    assert chosen_backend("auto", torch.ones(1, 1, device="cuda")) == "triton"
    assert chosen_backend("auto", torch.ones(1, 1, device="cuda", dtype=torch.float64)) == "tiled"
