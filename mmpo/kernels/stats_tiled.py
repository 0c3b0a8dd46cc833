"""Token statistics on tiles of logits, in PyTorch: a library GEMM per tile, then one fold of the tile into per-row sums.

Forward: per row the running maximum, sum of exponentials, label's logit, and the weighted sums that each wanted statistic
needs, rescaled whenever the maximum grows. Backward: the tile is computed again (or taken from the kept logits, if all of
them fit) and overwritten with the gradient of the logits,

    dz = a (1_y - p) + b (p - q) + c p (log p - log q - KL(p||q)) - e p (log p + H),

a, b, c, e the incoming gradients of logp, kl_ref, kl_policy and entropy. Two GEMMs carry it to hidden and weight. The
vocabulary is the outer loop, so a weight's gradient is finished tile by tile and needs no fp32 copy of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpo.kernels.token_stats import NAMES, Head, Tiling, TokenStats

# Rows of the sums (SUMS, T): of e^(z - max), of e^(z - max)(z - max), of e^2(z - max), and for the divergences of
# e^(z' - max')(z' - z) and e^(z - max)(z - z'), z' the reference's logits.
MAX, SUM, LABEL, SHIFTED, SQUARES, REF_MAX, REF_SUM, CROSS_REF, CROSS_POLICY, SUMS = range(10)
# Rows of the coefficients (COEFFICIENTS, T): dz = LABELS 1_y + p (P + P_LOG_P log p + P_LOG_Q log q) - REF q.
LSE, REF_LSE, LABELS, REF, P, P_LOG_P, P_LOG_Q, COEFFICIENTS = range(8)
FLOOR = -1e30  # stands for -inf: e^FLOOR is 0 as well, but 0 FLOOR is 0 where 0 inf would be NaN
MAX_ROWS = {"cpu": 1024, "cuda": 2048}


Rows = tuple[slice, Tensor, Tensor | None]


class Scratch:
    """Buffers of one tile's size, made on first use and used again for every tile."""

    def __init__(self, like: Tensor, elements: int) -> None:
        self.like, self.elements = like, elements
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.elements)
        return self.buffers[name][: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class Fold:
    """What is done to one tile. Shapes: tile z and the reference's (r, c), sums (SUMS, r), coefficients (COEFFICIENTS, r).

    forward(sums, z, ref, local, wants, scratch) adds the tile to the sums; local: labels minus the tile's first token.
    backward(z, ref, coefficients, local, logs, scratch) turns z into dz; logs: whether log p or log q occur in it.
    Both may overwrite the tiles.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None, Tensor, frozenset[str], Scratch], None]
    backward: Callable[[Tensor, Tensor | None, Tensor, Tensor, bool, Scratch], None]


@dataclass(frozen=True)
class Plan:
    """One call's settings: everything of it that is not a tensor.

    shapes: (softcap, scale), and compute: the dtype of operands, of policy and reference.
    """

    wants: frozenset[str]
    top_k: int
    shapes: tuple[tuple[float | None, float], tuple[float | None, float]]
    tiling: Tiling
    fold: Fold
    compute: tuple[torch.dtype, torch.dtype]
    training: bool


def stats(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    wants: frozenset[str],
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    top_k: int,
    tiling: Tiling,
    fold: Fold | None = None,
) -> TokenStats:
    """See `token_stats`. fold: what is done to a tile, in PyTorch by default."""
    ref, ref_states = ref_head or head, hidden if ref_hidden is None else ref_hidden
    compute = _operands(hidden, head.weight), _operands(ref_states, ref.weight)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, head.weight, head.bias))
    shapes = (head.softcap, head.scale), (ref.softcap, ref.scale)
    plan = Plan(wants, top_k, shapes, tiling, fold or TORCH, compute, training)
    reference = (None, None, None) if ref_hidden is None else (ref_hidden, ref.weight, ref.bias)
    found = Function.apply(plan, hidden, head.weight, head.bias, labels, *reference)
    return TokenStats(**dict(zip(NAMES, found, strict=True)))


def _operands(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a plain linear layer would multiply in here, autocast included."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    autocast = torch.is_autocast_enabled(device) and dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else dtype


class Function(torch.autograd.Function):
    """The autograd node. Saves inputs, four numbers per row, and the logits only where they fit into `tiling.keep`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        values, numbers, kept = _forward(plan, tensors)
        ctx.plan, ctx.inputs = plan, len(tensors)
        ctx.save_for_backward(*tensors, numbers, *kept)
        ctx.mark_non_differentiable(*(v for n, v in values.items() if n in NAMES[4:]))
        return tuple(values.get(name) for name in NAMES)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, (numbers, *kept) = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        found = _backward(ctx.plan, tensors, numbers, kept, grads[:4], ctx.needs_input_grad[1:4])
        return (None, *found, *(None,) * (ctx.inputs - len(found)))


class Projection:
    """Hidden states and a head, ready to give any tile of logits in fp32 (fp64 for fp64 states)."""

    def __init__(self, hidden: Tensor, head: Head, compute: torch.dtype, dtype: torch.dtype) -> None:
        self.hidden, self.head, self.compute, self.dtype = hidden, head, compute, dtype
        self.operand = compute if hidden.is_cuda else self.dtype  # only CUDA multiplies halves into fp32
        self.bias = None if head.bias is None else head.bias.to(self.dtype).clamp(min=FLOOR)

    def states(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.compute).to(self.operand)

    def weights(self, columns: slice) -> Tensor:
        return self.head.weight[columns].to(self.compute).to(self.operand)

    def logits(self, rows: slice, columns: slice, weights: Tensor, out: Tensor) -> Tensor:
        states, softcap = self.states(rows), self.head.softcap
        if states.dtype == out.dtype:
            torch.mm(states, weights.T, out=out)
        else:
            torch.mm(states, weights.T, out_dtype=out.dtype, out=out)
        if self.bias is not None:
            out.add_(self.bias[columns])
        if self.head.scale != 1:
            out.mul_(self.head.scale)
        return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


class Tiles:
    """One pass over the logits of one call, tile by tile: over columns, and for each over rows.

    Few rows make tiles wide, so that the weight is read once. A tile is narrower where its part of the weight is copied:
    for a product in another dtype, or to sum the weight's gradient (`accumulates`) in fp32 where it is not summed in place
    (`direct`), because it is a half and made of several tiles.
    """

    def __init__(self, plan: Plan, tensors: Sequence[Tensor | None], accumulates: bool = False) -> None:
        hidden, weight, bias, labels, ref_hidden, ref_weight, ref_bias = tensors
        assert hidden is not None and weight is not None and labels is not None
        self.labels, self.size, self.vocabulary = labels, len(hidden), len(weight)
        dtype = torch.promote_types(plan.compute[0], torch.float32)
        self.policy = Projection(hidden, Head(weight, bias, *plan.shapes[0]), plan.compute[0], dtype)
        self.models = [self.policy]
        if ref_hidden is not None and ref_weight is not None:
            self.models.append(Projection(ref_hidden, Head(ref_weight, ref_bias, *plan.shapes[1]), plan.compute[1], dtype))
        elements = plan.tiling.tile // dtype.itemsize
        self.height = max(1, min(self.size, MAX_ROWS.get(hidden.device.type, 2048)))
        self.direct = weight.dtype == dtype or (weight.dtype == self.policy.operand and self.size <= self.height)
        copies = sum(m.head.weight.dtype != m.operand for m in self.models) + (accumulates and not self.direct)
        width = elements // max(1, self.height, copies * max(m.hidden.shape[1] for m in self.models))
        self.width = max(1, min(self.vocabulary, width))
        self.scratch = Scratch(hidden.new_empty(0, dtype=dtype), self.height * self.width)

    def columns(self) -> Iterator[tuple[slice, list[Tensor]]]:
        """Columns, and each model's weight there; where both have one and the same weight (an adapter's), read once."""
        first, last = self.models[0], self.models[-1]
        shared = first.compute == last.compute and first.head.weight.is_set_to(last.head.weight)
        for columns in _blocks(self.vocabulary, self.width):
            weights = first.weights(columns)
            yield columns, [weights, weights if shared else last.weights(columns)]

    def rows(self, columns: slice, weights: list[Tensor], kept: Sequence[Tensor] = ()) -> Iterator[Rows]:
        """Rows, and each model's logits there in buffers that may be overwritten; from the kept ones where there are any."""
        for rows in _blocks(self.size, self.height):
            shape, tiles = (rows.stop - rows.start, columns.stop - columns.start), []
            for number, model in enumerate(self.models):
                z = self.scratch(f"logits {number}", *shape)
                tiles.append(z.copy_(kept[number][rows, columns]) if kept else model.logits(rows, columns, weights[number], z))
            yield rows, tiles[0], tiles[1] if len(tiles) > 1 else None


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _forward(plan: Plan, tensors: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Statistics by name, the numbers per row that the backward pass needs, each model's logits (T, V) if they are kept."""
    tiles = Tiles(plan, tensors)
    sums, models = tiles.scratch.like.new_zeros(SUMS, tiles.size), len(tiles.models)
    sums[MAX], sums[REF_MAX], sums[LABEL] = FLOOR, FLOOR, torch.nan
    top = sums.new_full((tiles.size, plan.top_k), FLOOR) if {"top_mass", "top_entropy"} & plan.wants else None
    keeps = plan.training and models * tiles.size * tiles.vocabulary * sums.itemsize <= plan.tiling.keep
    kept = [sums.new_empty(tiles.size, tiles.vocabulary) for _ in range(models * keeps)]
    for columns, weights in tiles.columns():
        for rows, z, ref in tiles.rows(columns, weights):
            for whole, tile in zip(kept, (z, ref), strict=False):
                if tile is not None:
                    whole[rows, columns] = tile
            if top is not None:
                top[rows] = torch.cat([top[rows], z.topk(min(plan.top_k, z.shape[1])).values], 1).topk(plan.top_k).values
            plan.fold.forward(sums[:, rows], z, ref, tiles.labels[rows] - columns.start, plan.wants, tiles.scratch)
    return *_finish(plan.wants, sums, top), kept


def _finish(wants: frozenset[str], sums: Tensor, top: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics by name; log-sum-exp of policy and reference, KL(p||q) and H, (4, T)."""
    log_sum, ref_log_sum = sums[SUM].log(), sums[REF_SUM].log()
    shift = (sums[MAX] - sums[REF_MAX]) + (log_sum - ref_log_sum)  # exactly 0 for equal models
    kl_policy, entropy = sums[CROSS_POLICY] / sums[SUM] - shift, log_sum - sums[SHIFTED] / sums[SUM]
    found = {"logp": _infinite(sums[LABEL] - sums[MAX] - log_sum), "entropy": entropy}
    found["kl_ref"] = _infinite(sums[CROSS_REF] / sums[REF_SUM] + shift).clamp(min=0)  # what is below is rounding
    found["kl_policy"] = _infinite(kl_policy).clamp(min=0)
    found["log_sum_p2"] = sums[SQUARES].log() - 2 * log_sum
    lse = sums[MAX] + log_sum
    if top is not None:
        log_p = top - lse[:, None]
        found["top_mass"], found["top_entropy"] = log_p.exp().sum(1), -(log_p.exp() * log_p).sum(1)
    numbers = torch.stack([lse, sums[REF_MAX] + ref_log_sum, kl_policy, entropy])
    return {n: v for n, v in found.items() if n == "logp" or n in wants}, numbers


def _infinite(values: Tensor) -> Tensor:
    """Puts back the infinities that FLOOR stood for."""
    return torch.where(values.abs() >= -FLOOR / 100, values.sign() * torch.inf, values)


def _backward(
    plan: Plan,
    tensors: Sequence[Tensor | None],
    numbers: Tensor,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, each where wanted."""
    uses_ref = grads[1] is not None or grads[2] is not None
    tiles = Tiles(plan, tensors if uses_ref else [*tensors[:4], None, None, None], accumulates=wanted[1])
    coefficients, policy = _coefficients(grads, numbers, plan.shapes[0][1]), tiles.policy
    hidden, weight, bias = policy.hidden, policy.head.weight, policy.head.bias
    d_hidden = torch.zeros_like(hidden, dtype=policy.dtype) if wanted[0] else None
    d_weight = torch.zeros_like(weight) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=policy.dtype) if wanted[2] and bias is not None else None
    for columns, weights in tiles.columns():
        part = None
        if d_weight is not None:
            part = d_weight[columns] if tiles.direct else torch.zeros_like(weights[0], dtype=policy.dtype)
        for rows, z, ref in tiles.rows(columns, weights, kept):
            local, logs = tiles.labels[rows] - columns.start, grads[2] is not None or grads[3] is not None
            dz = _logits_gradient(plan, z, ref, coefficients[:, rows], local, logs, tiles.scratch)
            if d_bias is not None:
                d_bias[columns] += dz.sum(0)
            dz = dz.to(policy.operand)
            if d_hidden is not None:
                _accumulate(d_hidden[rows], dz, weights[0])
            if part is not None:
                _accumulate(part, dz.T, policy.states(rows))
        if d_weight is not None and part is not None and not tiles.direct:
            d_weight[columns] = part
    return d_hidden, d_weight, d_bias


def _coefficients(grads: Sequence[Tensor | None], numbers: Tensor, scale: float) -> Tensor:
    """(COEFFICIENTS, T) from the gradients of logp, kl_ref, kl_policy and entropy; the logits' scale is in them."""
    lse, ref_lse, kl, h = numbers
    a, b, c, e = (torch.zeros_like(lse) if g is None else scale * g.to(lse.dtype) for g in grads)
    constant = b - a
    constant = constant if grads[2] is None else constant - c * kl  # kl is NaN where there is no reference
    constant = constant if grads[3] is None else constant - e * h
    return torch.stack([lse, ref_lse, a, b, constant, c - e, -c])


def _logits_gradient(
    plan: Plan, z: Tensor, ref: Tensor | None, coefficients: Tensor, local: Tensor, logs: bool, scratch: Scratch
) -> Tensor:
    """dz of one tile, in z's buffer, through the softcap: s'(x) = 1 - (z / softcap)^2."""
    softcap, slope = plan.shapes[0][0], None
    if softcap is not None:
        slope = torch.div(z, softcap, out=scratch("slope", *z.shape)).square_().neg_().add_(1)
    plan.fold.backward(z, ref, coefficients, local, logs, scratch)
    return z if slope is None else z.mul_(slope)


def _accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, summed in out's precision."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def fold_forward(sums: Tensor, z: Tensor, ref: Tensor | None, local: Tensor, wants: frozenset[str], scratch: Scratch) -> None:
    """`Fold.forward` in PyTorch."""
    column, inside = local.clamp(0, z.shape[1] - 1)[:, None], (local >= 0) & (local < z.shape[1])
    sums[LABEL] = torch.where(inside, z.gather(1, column)[:, 0], sums[LABEL])
    if ref is not None:
        exponentials, decay = _exponentials(sums, REF_MAX, ref, scratch("exponentials", *z.shape))
        sums[REF_SUM].mul_(decay).add_(exponentials.sum(1))
        ref.sub_(z)
        if "kl_ref" in wants:
            sums[CROSS_REF].mul_(decay).add_(exponentials.mul_(ref).sum(1))
    old = sums[MAX].clone()
    exponentials, decay = _exponentials(sums, MAX, z, scratch("exponentials", *z.shape))
    if "entropy" in wants:
        shift = (old - sums[MAX]) * sums[SUM]
        z.sub_(sums[MAX][:, None])
        sums[SHIFTED].add_(shift).mul_(decay).add_(z.mul_(exponentials).sum(1))
    sums[SUM].mul_(decay).add_(exponentials.sum(1))
    if ref is not None and "kl_policy" in wants:
        sums[CROSS_POLICY].mul_(decay).sub_(ref.mul_(exponentials).sum(1))
    if "log_sum_p2" in wants:
        sums[SQUARES].mul_(decay).mul_(decay).add_(exponentials.square_().sum(1))


def _exponentials(sums: Tensor, row: int, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """e^(z - max) with the new maximum, which it writes, and the factor e^(old max - max) for sums made with the old one."""
    highest = torch.maximum(sums[row], z.amax(1))
    decay = (sums[row] - highest).exp_()
    sums[row] = highest
    return torch.sub(z, highest[:, None], out=out).exp_(), decay


def fold_backward(z: Tensor, ref: Tensor | None, coefficients: Tensor, local: Tensor, logs: bool, scratch: Scratch) -> None:
    """`Fold.backward` in PyTorch."""
    lse, ref_lse, labels, ref_factor, constant, p_log_p, p_log_q = coefficients[:, :, None]
    z.sub_(lse)
    if ref is not None:
        ref.sub_(ref_lse)
    if logs:
        factor = torch.mul(z, p_log_p, out=scratch("factor", *z.shape)).add_(constant)
        if ref is not None:
            factor.addcmul_(ref, p_log_q)
        z.exp_().mul_(factor)
    else:
        z.exp_().mul_(constant)
    if ref is not None:
        z.addcmul_(ref.exp_(), ref_factor, value=-1)
    inside, column = ((local >= 0) & (local < z.shape[1]))[:, None], local.clamp(0, z.shape[1] - 1)[:, None]
    z.scatter_(1, column, z.gather(1, column) + torch.where(inside, labels, 0))  # one entry a row: no order to depend on


TORCH = Fold(fold_forward, fold_backward)
