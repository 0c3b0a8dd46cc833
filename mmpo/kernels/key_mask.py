"""Keys that no other token may see: what image-key masking does to a language model (BDHS, arXiv 2407.02477).

The rule joins the mask function that transformers is about to turn into a mask, so it holds in every layer, in a forward pass
and in each step of generation, with a cache, padding and sliding windows, and moves no position. Zeroing the two-dimensional
attention mask instead would: generation counts positions from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, sdpa_mask

from mmpo.kernels.prefix import causal

NAME = "mmpo_key_mask"
_keep: ContextVar[Tensor | None] = ContextVar("keep", default=None)


@contextmanager
def hidden_keys(model: nn.Module, keep: Tensor | None) -> Iterator[None]:
    """Inside, tokens of `model`'s language model attend to a key only where `keep` is true.

    keep: (B, L) bool, over the first L positions of the batch's padded rows; later keys are seen by everyone. None changes
    nothing. A hidden token still attends to itself, which no other token learns of, so that no row of the mask is empty.
    Errors: ValueError where the model takes no other attention implementation, where a call has another number of rows than
    `keep`, and at the end where something else (a packed row) took the attention over meanwhile.
    """
    if keep is None:
        yield
        return
    if keep.ndim != 2 or keep.dtype.is_floating_point or keep.dtype.is_complex:
        raise ValueError(f"keep: expected bool of (rows, positions), received {keep.dtype} of {tuple(keep.shape)}")
    token = _keep.set(keep.bool())
    try:
        with attending(model, NAME):
            yield
    finally:
        _keep.reset(token)


@contextmanager
def attending(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the language model's layers compute attention by the registered implementation `name`; vision keeps its own."""
    inner = causal(model)
    if not getattr(inner, "_supports_attention_backend", False):
        told = "takes no other attention implementation: its keys cannot be hidden or looked at"
        raise ValueError(f"{type(inner).__name__} {told}")
    config = inner.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
        if config._attn_implementation != name:
            raise ValueError(f"attention became {config._attn_implementation!r} inside {name!r}: no packed rows in here")
    finally:
        config._attn_implementation = before


def mask(*, mask_function: Callable[..., Any], batch_size: int, device: Any = "cpu", **known: Any) -> Tensor | None:
    """transformers' interface of masks: sdpa's, without the hidden keys. (B, 1, Q, K) bool, or None where it is causal."""
    keep = _keep.get()
    if keep is not None:
        if len(keep) != batch_size:
            raise ValueError(f"keys are hidden in {len(keep)} rows, the call has {batch_size}")
        mask_function = and_masks(mask_function, _seen(keep.to(device)))
        known |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(mask_function=mask_function, batch_size=batch_size, device=device, **known)


def _seen(keep: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    last = keep.shape[1] - 1

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return keep[batch, key.clamp(max=last)] | (key > last) | (key == query)

    return seen


AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, mask)
