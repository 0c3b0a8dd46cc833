"""Statistics of next-token distributions from hidden states and the head, without the (T, V) logits.

One door, three implementations: `reference` (plain autograd over full logits, the oracle), `tiled` (PyTorch on tiles, any
device) and `triton` (the same tiles, folded by one kernel each; needs the extra `triton` and CUDA, or Triton's interpreter).
T scored tokens of a whole call, D hidden, V vocabulary, k top tokens; everything in nats.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES: tuple[str, ...] = ("logp", "kl_ref", "kl_policy", "entropy", "log_sum_p2", "top_mass", "top_entropy")
NOTHING: frozenset[str] = frozenset()
BACKENDS = ("auto", "reference", "tiled", "triton")
MIB = 2**20


@dataclass(frozen=True, eq=False)
class Head:
    """The last layer: logits z = s(scale (h W^T + b)), s(x) = softcap tanh(x / softcap), or s(x) = x without a softcap.

    weight: (V, D), possibly the input embedding (tied). bias: (V,); an entry of -inf takes its token out of the vocabulary.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Tiling:
    """Bytes. tile: one tile of logits. keep: logits up to this size are kept for the backward pass, not computed again."""

    tile: int
    keep: int


# A tile on the CPU lives in its last-level cache; on a GPU it has to fill the device and still fit into its L2. Per model
# at most three tiles exist at a time, with their part of the weight and a copy in half precision four and a half.
TILINGS = {"cpu": Tiling(4 * MIB, 16 * MIB), "cuda": Tiling(14 * MIB, 256 * MIB)}


@dataclass
class TokenStats:
    """Per scored token, (T,), fp32 (fp64 for fp64 hidden states), None where not wanted; p the policy, q the reference.

    logp: log p(label). kl_ref: KL(q || p). kl_policy: KL(p || q). entropy: of p. These carry gradient.
    log_sum_p2: log sum_v p_v^2. top_mass: sum of the k largest p. top_entropy: -sum p log p over them, not renormalised.
    """

    logp: Tensor
    kl_ref: Tensor | None = None
    kl_policy: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_p2: Tensor | None = None
    top_mass: Tensor | None = None
    top_entropy: Tensor | None = None


def token_stats(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    wants: Set[str] = NOTHING,
    ref_hidden: Tensor | None = None,
    ref_head: Head | None = None,
    top_k: int = 10,
    backend: str = "auto",
    tiling: Tiling | None = None,
) -> TokenStats:
    """`logp` of every label, and the statistics named in `wants` (out of NAMES).

    hidden: (T, D) states of scored rows only. labels: (T,) int64 in [0, V). ref_hidden: (T, D') of the reference, for
    kl_ref and kl_policy; ref_head: its head, by default `head`. The reference never receives a gradient. head.weight and
    head.bias receive one only if they require it: with an adapter on the trunk no (V, D) gradient exists.

    Logits are fp32, sums are fp32, in a fixed order: equal inputs give equal bits. Besides inputs, results, gradients
    (whose accumulators are fp32) and kept logits, a call holds at most 64 MiB at a time, 128 with a reference.
    Raises ValueError where shapes, names, labels or backend do not fit.
    """
    _check(hidden, head, labels, wants, top_k)
    if {"kl_ref", "kl_policy"} & wants:
        if ref_hidden is None:
            raise ValueError(f"{', '.join(sorted({'kl_ref', 'kl_policy'} & wants))}: needs ref_hidden, the reference's states")
        ref_head = _detached(ref_head or head)
        _check_reference(hidden, head, ref_hidden, ref_head)
        ref_hidden = ref_hidden.detach()
    else:
        ref_hidden = ref_head = None
    name = chosen_backend(backend, hidden)
    stats = importlib.import_module(f"mmpo.kernels.stats_{name}").stats
    tiling = tiling or TILINGS.get(hidden.device.type, TILINGS["cuda"])
    found: TokenStats = stats(
        hidden, head, labels, frozenset(wants), ref_hidden, ref_head, min(top_k, len(head.weight)), tiling
    )
    return found


def chosen_backend(backend: str, hidden: Tensor) -> str:
    """The implementation that runs: `auto` is triton on CUDA where it can be imported (not for fp64), else tiled."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got '{backend}'")
    if backend != "auto":
        return backend
    able = hidden.is_cuda and hidden.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    return "triton" if able else "tiled"


def _detached(head: Head) -> Head:
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.softcap, head.scale)


def _check(hidden: Tensor, head: Head, labels: Tensor, wants: Set[str], top_k: int) -> None:
    if unknown := set(wants) - set(NAMES):
        raise ValueError(f"wants: unknown {', '.join(sorted(unknown))} (there are: {', '.join(NAMES)})")
    if hidden.dim() != 2 or head.weight.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden: expected (T, D) for a head (V, D), got {_shape(hidden)} and {_shape(head.weight)}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected {len(hidden)} int64, one per row of hidden, got {_shape(labels)} {labels.dtype}")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"head.bias: expected ({len(head.weight)},), got {_shape(head.bias)}")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"head.softcap: expected a positive number or None, got {head.softcap}")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    # On a GPU this look would wait for it; there a label outside the vocabulary makes its logp NaN.
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(head.weight):
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels: expected token ids in [0, {len(head.weight)}), got {found}; pass scored rows only")


def _check_reference(hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head) -> None:
    if len(ref_head.weight) != len(head.weight):
        raise ValueError(
            f"ref_head: a divergence needs one vocabulary, but the policy has {len(head.weight)} tokens and the reference "
            f"{len(ref_head.weight)}; take a reference with the same tokenizer, or a loss without a KL"
        )
    if ref_hidden.shape != (len(hidden), ref_head.weight.shape[1]):
        raise ValueError(f"ref_hidden: expected ({len(hidden)}, {ref_head.weight.shape[1]}), got {_shape(ref_hidden)}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
