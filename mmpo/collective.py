"""Statistics of the global batch: the same number on every rank, whatever share of the rows a rank holds."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def global_mean(x: Tensor) -> Tensor:
    """Mean over all elements of x on all ranks, a scalar without gradient; 0 when no rank has any.

    x: fp32 or wider, any shape; ranks may hold different counts, also none, but every rank has to call.
    Without an initialised process group it is the mean of x.
    """
    x = x.detach()
    total = torch.stack([x.sum(), x.new_full((), x.numel())])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total[0] / total[1].clamp(min=1)


def any_process(value: bool, device: torch.device) -> bool:
    """Whether it is true on any rank; every rank has to call."""
    found = torch.tensor([int(value)], device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return bool(found.item())


def running_mean(x: Tensor, mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and number of all elements seen, x's on all ranks after `count` earlier ones with mean `mean`; scalars."""
    here = torch.stack([x.detach().sum(), x.new_full((), x.numel())])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(here)
    total = count + here[1]
    return mean + (here[0] - here[1] * mean) / total.clamp(min=1), total


def gather(x: Tensor) -> tuple[Tensor, int]:
    """x (n,) of all ranks in their order, (N,) without gradient, and the place where this rank's begins.

    Ranks may hold different counts, but every rank has to call. Without an initialised process group it is x.
    """
    x = x.detach()
    if not (distributed.is_available() and distributed.is_initialized()):
        return x, 0
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = [int(c) for c in counts]
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x))])
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sum(sizes[: distributed.get_rank()])


def of_same_rank(x: Tensor, by: Tensor) -> Tensor:
    """For each of `by` (n,) the value of x (n,) that holds the same place when each is sorted over the global batch, (n,).

    Without gradient. Ties keep the order of the rows.
    """
    everyone, first = gather(by)
    places = everyone.argsort(stable=True).argsort()[first : first + len(by)]
    return gather(x)[0].sort().values[places]
