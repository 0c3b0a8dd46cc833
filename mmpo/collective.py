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
