"""Token statistics by their definitions, over full logits with plain autograd: the oracle of the other two."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpo.kernels.token_stats import Head, Tiling, TokenStats


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
    """See `token_stats`. Computes in fp32, or in fp64 for fp64 inputs, and holds several (T, V) tensors."""
    log_p = logits(hidden, head).log_softmax(-1)
    found = TokenStats(log_p.gather(1, labels[:, None])[:, 0])
    if ref_hidden is not None and ref_head is not None:
        log_q = logits(ref_hidden, ref_head).log_softmax(-1)
        found.kl_ref = _expected(log_q, log_q, log_p) if "kl_ref" in wants else None
        found.kl_policy = _expected(log_p, log_p, log_q) if "kl_policy" in wants else None
    if "entropy" in wants:
        found.entropy = -_expected(log_p, log_p)
    top = log_p.detach().topk(top_k).values
    if "log_sum_p2" in wants:
        found.log_sum_p2 = (2 * log_p.detach()).logsumexp(-1)
    if "top_mass" in wants:
        found.top_mass = top.exp().sum(-1)
    if "top_entropy" in wants:
        found.top_entropy = -_expected(top, top)
    return found


def logits(hidden: Tensor, head: Head) -> Tensor:
    """(T, V) logits of a head, fp32 or fp64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ head.weight.to(dtype).T
    z = z if head.bias is None else z + head.bias.to(dtype)
    z = head.scale * z
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _expected(log_weight: Tensor, log_a: Tensor, log_b: Tensor | None = None) -> Tensor:
    """sum_v w_v (log a_v - log b_v) over tokens with w > 0: those taken out of the vocabulary would give 0 times inf."""
    inside = log_weight > -torch.inf
    values = log_a if log_b is None else torch.where(inside, log_a, 0) - torch.where(inside, log_b, 0)
    return (log_weight.exp() * torch.where(inside, values, 0)).sum(-1)
