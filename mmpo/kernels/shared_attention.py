"""The attention of a packed row, forward and backward, from kernels that give and take log-sum-exps.

Every row is a query of one call on its own stretch of the packed row, causal but for stretches whose tokens see each other in
both directions; rows of further branches, and of a prompt behind such a stretch, are also queries of one call on what is
before them. Softmax over the union of two sets of keys is the average of the parts' outputs with weights
exp(lse_part - lse), lse = log(exp(lse_1) + exp(lse_2)) (Rabe and Staats, arXiv 2112.05682), and the gradient of a part is its
kernel's own, given the folded output and log-sum-exp (as in ring attention, arXiv 2310.01889). So there is no mask, no
concatenation of keys and nothing to keep but the packed query, key, value, output and log-sum-exp.

Key-value heads are never expanded. Kernels without groups are given the K key-value heads as the batch, and the G queries of
each as heads that see the same key and value through a stride of 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 256  # queries of a tile where no fused kernel serves: bounds the scores held at a time
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_varlen = torch.ops.aten._flash_attention_forward
_varlen_backward = torch.ops.aten._flash_attention_backward


class Call(NamedTuple):
    """One attention call: which queries look at which keys of the row, causally (both are the same then) or fully.

    One whose queries are its keys is a stretch of the row looking at itself.
    """

    rows: slice
    keys: slice
    causal: bool


class Lengths(NamedTuple):
    """Calls as one call of a kernel for sequences of many lengths takes them: indices in the row, starts (int32), longest."""

    rows: Tensor
    keys: Tensor
    row_starts: Tensor
    key_starts: Tensor
    row_max: int
    key_max: int


class Plan:
    """The attention calls of one forward pass, the same in every layer. Calls of stretches on themselves tile the packed row.

    own: these, first to last. blocks: those of them that are not causal. cross: calls on what is before their rows. longest:
    the farthest any token looks back, in tokens. layers: how many layers have run the calls, counted by them.
    """

    def __init__(self, calls: Iterable[Call], longest: int, device: torch.device) -> None:
        calls = list(calls)
        self.own = [call for call in calls if call.rows == call.keys]
        self.blocks = [call for call in self.own if not call.causal]
        self.cross = [call for call in calls if call.rows != call.keys]
        self.longest = longest
        self.device = device
        self.layers = 0

    @cached_property
    def own_lengths(self) -> Lengths:
        """The causal calls as one."""
        return _lengths([call for call in self.own if call.causal], self.device)

    @cached_property
    def part_lengths(self) -> list[tuple[Lengths, bool]]:
        """The calls of stretches on themselves as one causal call and one that is not, where there are such."""
        causal = [(self.own_lengths, True)] if len(self.blocks) < len(self.own) else []
        return [*causal, (_lengths(self.blocks, self.device), False)]

    @cached_property
    def cross_lengths(self) -> Lengths:
        """The calls on what is before, as one."""
        return _lengths(self.cross, self.device)


def _lengths(calls: list[Call], device: torch.device) -> Lengths:
    found: list[tuple[Tensor, Tensor, int]] = []
    for parts in ([call.rows for call in calls], [call.keys for call in calls]):
        sizes = [part.stop - part.start for part in parts]
        where = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        starts = torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32)
        found.append((where.to(device), starts.to(device), max(sizes)))
    (rows, row_starts, row_max), (keys, key_starts, key_max) = found
    return Lengths(rows, keys, row_starts, key_starts, row_max, key_max)


class SharedPrompt(torch.autograd.Function):
    """Attention of a packed row: query (1, H, L, E), key (1, K, L, E), value (1, K, L, F), K dividing H, to (1, L, H, F)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
        out, lse = (_forward_lengths if _has_lengths(query, value) else _forward_calls)(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        run = _backward_lengths if _has_lengths(query, value) else _backward_calls
        return *run(grad.contiguous(), query, key, value, out, lse, ctx.plan, ctx.scale), None, None


def _has_lengths(query: Tensor, value: Tensor) -> bool:
    """Whether CUDA's flash attention for sequences of many lengths takes these."""
    width = query.shape[-1]
    fits = query.dtype in (torch.float16, torch.bfloat16) and width == value.shape[-1] and width <= 256 and not width % 8
    return fits and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (K, G, L, .) of all three."""
    heads = key.shape[1]
    q = query[0].unflatten(0, (heads, -1))
    return q, key[0][:, None].expand(-1, q.shape[1], -1, -1), value[0][:, None].expand(-1, q.shape[1], -1, -1)


def _forward_calls(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """One kernel call per call of the plan. Returns the output (1, L, H, F) and log-sum-exps (K, G, L)."""
    q, k, v = _grouped(query, key, value)
    _, heads, length, _ = query.shape
    out = query.new_empty(1, length, heads, value.shape[-1])
    o = out[0].transpose(0, 1).unflatten(0, q.shape[:2])
    lse = torch.empty(q.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for rows, keys, is_causal in plan.own:
        o[:, :, rows], lse[:, :, rows] = _kernel(q[:, :, rows], k[:, :, keys], v[:, :, keys], is_causal, scale)
    for rows, keys, _ in plan.cross:
        part, part_lse = _kernel(q[:, :, rows], k[:, :, keys], v[:, :, keys], False, scale)
        o[:, :, rows], lse[:, :, rows] = _fold(o[:, :, rows], lse[:, :, rows], part, part_lse)
    return out, lse


def _fold(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over both sets of keys from softmax over each: outputs (..., F), log-sum-exps (...)."""
    both = torch.logaddexp(lse, part_lse)
    return out * (lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None], both


def _backward_calls(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _grouped(query, key, value)
    o, g = (x[0].transpose(0, 1).unflatten(0, q.shape[:2]) for x in (out, grad))
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    grouped = dq[0].unflatten(0, q.shape[:2])
    for rows, keys, is_causal in plan.own + plan.cross:
        at = (slice(None), slice(None), rows)
        parts = _kernel_backward(g[at], q[at], k[:, :, keys], v[:, :, keys], o[at], lse[at], is_causal, scale)
        summed = parts[0], parts[1].sum(1), parts[2].sum(1)
        for whole, part in zip((grouped[at], dk[0][:, keys], dv[0][:, keys]), summed, strict=True):
            whole.copy_(part) if rows == keys else whole.add_(part)  # these calls come first and leave no row out
    return dq, dk, dv


def _is_fused(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _kernel(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q (K, G, R, E) on k (K, G, S, E) and v (K, G, S, F): output (K, G, R, F), log-sum-exp (K, G, R)."""
    if _is_fused(q, v):
        return _flash(q, k, v, 0.0, is_causal, scale=scale)
    outs, lses = [], []
    for start, stop, seen in _tiles(q, k, is_causal):
        scores = _scores(q[:, :, start:stop], k[:, :, :seen], start if is_causal else None, scale)
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1][..., None]).exp().to(v.dtype) @ v[:, :, :seen])
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _kernel_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, those of k and v per query head, where g is the output's."""
    if _is_fused(q, v):
        return _flash_backward(g, q, k, v, o, lse, 0.0, is_causal, scale=scale)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    for start, stop, seen in _tiles(q, k, is_causal):
        rows = (slice(None), slice(None), slice(start, stop))
        p = (_scores(q[rows], k[:, :, :seen], start if is_causal else None, scale) - lse[rows][..., None]).exp()
        grad, past = g[rows].to(p.dtype), k[:, :, :seen].to(p.dtype)
        dv[:, :, :seen] += p.mT @ grad
        mean = (grad * o[rows]).sum(-1, keepdim=True)
        ds = p * (grad @ v[:, :, :seen].to(p.dtype).mT - mean) * scale
        dq[rows] = ds @ past
        dk[:, :, :seen] += ds.mT @ q[rows].to(p.dtype)
    return dq, dk, dv


def _tiles(q: Tensor, k: Tensor, is_causal: bool) -> list[tuple[int, int, int]]:
    """Queries from, to, and how many keys they see."""
    stops = [(start, min(start + TILE, q.shape[2])) for start in range(0, q.shape[2], TILE)]
    return [(start, stop, stop if is_causal else k.shape[2]) for start, stop in stops]


def _scores(q: Tensor, k: Tensor, first: int | None, scale: float) -> Tensor:
    """Scores (K, G, R, S) in fp32 or finer. first: the position of the first query, for causal calls."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * scale
    if first is None:
        return scores
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(first + 1)
    return scores.masked_fill(future, -torch.inf)


def _forward_lengths(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Two kernel calls per layer for the whole row, however many pairs, or three (`Plan.blocks`). Log-sum-exps (H, L)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if plan.blocks:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q), dtype=wide, device=q.device)
        for (rows, keys, *lengths), is_causal in plan.part_lengths:
            given = (q[rows], k[keys], v[keys], *lengths, 0.0, is_causal)
            out[rows], lse[:, rows] = _varlen(*given, return_debug_mask=False, scale=scale)[:2]
    else:
        out, lse = _varlen(q, k, v, *plan.own_lengths[2:], 0.0, True, return_debug_mask=False, scale=scale)[:2]
    if plan.cross:
        rows, keys, *lengths = plan.cross_lengths
        part, part_lse = _varlen(q[rows], k[keys], v[keys], *lengths, 0.0, False, return_debug_mask=False, scale=scale)[:2]
        folded, both = _fold(out[rows].transpose(0, 1), lse[:, rows], part.transpose(0, 1), part_lse)
        out[rows], lse[:, rows] = folded.transpose(0, 1).to(out.dtype), both
    return out[None], lse


def _backward_lengths(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    g, o = grad[0], out[0]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    if plan.blocks:
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        calls = plan.part_lengths
    else:
        dq, dk, dv = _varlen_backward(g, q, k, v, o, lse, *plan.own_lengths[2:], 0.0, True, *no_dropout, scale=scale)
        calls = []
    for (rows, keys, *lengths), is_causal in [*calls, *([(plan.cross_lengths, False)] if plan.cross else [])]:
        given = (g[rows], q[rows], k[keys], v[keys], o[rows], lse[:, rows].contiguous())
        parts = _varlen_backward(*given, *lengths, 0.0, is_causal, *no_dropout, scale=scale)
        for whole, index, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
            whole.index_add_(0, index, part)
    return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None]
