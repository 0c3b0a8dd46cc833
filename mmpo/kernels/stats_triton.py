"""The tiles' folds as two Triton kernels; products stay with the GPU library, and everything else with `stats_tiled`.

Why not one fused kernel: a library GEMM runs at about the device's full rate, and the fold reads a tile that is still in
the L2 cache (14 MiB), so all that fusion could save is that read; a hand-written GEMM would lose more. In PyTorch the same
fold passes over the tile five to ten times. Runs on CUDA, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
One program owns one row of sums, without atomics, so the order of summation is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmpo.errors import MissingExtra
from mmpo.kernels import stats_tiled
from mmpo.kernels.stats_tiled import FLOOR, Fold, Scratch
from mmpo.kernels.token_stats import Head, Tiling, TokenStats

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingExtra("triton", "triton") from error

BLOCK = 1024
MAX, SUM, LABEL, SHIFTED, SQUARES, REF_MAX, REF_SUM, CROSS_REF, CROSS_POLICY = map(tl.constexpr, range(stats_tiled.SUMS))
LSE, REF_LSE, LABELS, REF, P, P_LOG_P, P_LOG_Q = map(tl.constexpr, range(stats_tiled.COEFFICIENTS))
MASKED = tl.constexpr(FLOOR)


def stats(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    wants: frozenset[str],
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    top_k: int,
    tiling: Tiling,
) -> TokenStats:
    """See `token_stats`. Raises ValueError for fp64, and for states on the CPU outside of the interpreter."""
    if hidden.dtype == torch.float64:
        raise ValueError("backend 'triton' computes in fp32; for fp64 states take 'tiled' or 'reference'")
    if not (hidden.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"backend 'triton' needs CUDA (or TRITON_INTERPRET=1), got states on {hidden.device}; take 'tiled'")
    with torch.cuda.device_of(hidden):
        return stats_tiled.stats(hidden, head, labels, wants, ref_hidden, ref_head, top_k, tiling, FOLD)


def fold_forward(sums: Tensor, z: Tensor, ref: Tensor | None, local: Tensor, wants: frozenset[str], scratch: Scratch) -> None:
    """`Fold.forward` as one kernel, one program per row."""
    flags = [ref is not None, *(name in wants for name in ("entropy", "log_sum_p2", "kl_ref", "kl_policy"))]
    other = z if ref is None else ref
    _forward[(len(z),)](sums, sums.stride(0), z, other, local, z.shape[1], *flags, BLOCK)


def fold_backward(z: Tensor, ref: Tensor | None, coefficients: Tensor, local: Tensor, logs: bool, scratch: Scratch) -> None:
    """`Fold.backward` as one kernel, one program per row and block of columns."""
    other, grid = z if ref is None else ref, (len(z), triton.cdiv(z.shape[1], BLOCK))
    _backward[grid](coefficients, coefficients.stride(0), z, other, local, z.shape[1], ref is not None, logs, BLOCK)


FOLD = Fold(fold_forward, fold_backward)


@triton.jit
def _forward(
    sums,
    stride,
    z_rows,
    ref_rows,
    local,
    width,
    HAS_REF: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARED: tl.constexpr,
    KL_REF: tl.constexpr,
    KL_POLICY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sums += row
    highest, total = tl.load(sums + MAX * stride), tl.load(sums + SUM * stride)
    shifted, squares = tl.load(sums + SHIFTED * stride), tl.load(sums + SQUARES * stride)
    ref_highest, ref_total = tl.load(sums + REF_MAX * stride), tl.load(sums + REF_SUM * stride)
    cross_ref, cross_policy = tl.load(sums + CROSS_REF * stride), tl.load(sums + CROSS_POLICY * stride)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z = tl.load(z_rows + row * width + columns, mask=inside, other=MASKED)
        old = highest
        highest = tl.maximum(highest, tl.max(z, axis=0))
        decay = tl.exp(old - highest)
        e = tl.where(inside, tl.exp(z - highest), 0.0)
        if ENTROPY:
            shifted = decay * (shifted + (old - highest) * total) + tl.sum(e * (z - highest), axis=0)
        if SQUARED:
            squares = decay * decay * squares + tl.sum(e * e, axis=0)
        total = decay * total + tl.sum(e, axis=0)
        if HAS_REF:
            ref = tl.load(ref_rows + row * width + columns, mask=inside, other=MASKED)
            old_ref = ref_highest
            ref_highest = tl.maximum(ref_highest, tl.max(ref, axis=0))
            ref_decay = tl.exp(old_ref - ref_highest)
            ref_e = tl.where(inside, tl.exp(ref - ref_highest), 0.0)
            ref_total = ref_decay * ref_total + tl.sum(ref_e, axis=0)
            if KL_REF:
                cross_ref = ref_decay * cross_ref + tl.sum(ref_e * (ref - z), axis=0)
            if KL_POLICY:
                cross_policy = decay * cross_policy + tl.sum(e * (z - ref), axis=0)
    tl.store(sums + MAX * stride, highest)
    tl.store(sums + SUM * stride, total)
    tl.store(sums + SHIFTED * stride, shifted)
    tl.store(sums + SQUARES * stride, squares)
    if HAS_REF:
        tl.store(sums + REF_MAX * stride, ref_highest)
        tl.store(sums + REF_SUM * stride, ref_total)
        tl.store(sums + CROSS_REF * stride, cross_ref)
        tl.store(sums + CROSS_POLICY * stride, cross_policy)
    label = tl.load(local + row)
    if (label >= 0) & (label < width):
        tl.store(sums + LABEL * stride, tl.load(z_rows + row * width + label))


@triton.jit
def _backward(
    coefficients, stride, z_rows, ref_rows, local, width, HAS_REF: tl.constexpr, LOGS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    coefficients += row
    log_p = tl.load(z_rows + row * width + columns, mask=inside, other=MASKED) - tl.load(coefficients + LSE * stride)
    factor = tl.load(coefficients + P * stride)
    if LOGS:
        factor += tl.load(coefficients + P_LOG_P * stride) * log_p
    dz = tl.exp(log_p)
    if HAS_REF:
        log_q = tl.load(ref_rows + row * width + columns, mask=inside, other=MASKED) - tl.load(coefficients + REF_LSE * stride)
        if LOGS:
            factor += tl.load(coefficients + P_LOG_Q * stride) * log_q
        dz = dz * factor - tl.load(coefficients + REF * stride) * tl.exp(log_q)
    else:
        dz = dz * factor
    dz += tl.where(columns == tl.load(local + row), tl.load(coefficients + LABELS * stride), 0.0)
    tl.store(z_rows + row * width + columns, dz, mask=inside)
