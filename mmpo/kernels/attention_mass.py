"""How much some tokens attend to each image, from one layer of one forward pass that stores no attention weights.

An attention implementation that is sdpa everywhere, but computes, at one layer, the weights of the wanted query rows from the
rotated queries and keys it is given, one head at a time, and ends the pass there: later layers and the head are not run.
The rows of a forward pass over a prompt and its answer are those of the steps that generated it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmpo.kernels.key_mask import attending, mask
from mmpo.kernels.prefix import UNSUPPORTED, causal

NAME = "mmpo_attention_mass"


@dataclass(frozen=True)
class _Wanted:
    layer: int
    queries: Tensor


class _Seen(Exception):
    """The pass came to the wanted layer; the argument is what was found there."""


_wanted: ContextVar[_Wanted] = ContextVar("wanted")


def attention_mass(model: nn.Module, inputs: Mapping[str, Any], layer: int, queries: Tensor, spans: Sequence[Tensor]) -> Tensor:
    """Attention mass of each query row on each span of keys, mean over heads, (R, len(spans)) fp32.

    inputs: what the model's forward takes for one row, (1, L). layer: of the language model, from 0. queries: R positions of
    the row; the query that sees token t last stands at t. spans: positions of keys, e.g. of the tokens of each image.
    """
    rows = attention_rows(model, inputs, layer, queries)
    masses = [rows[:, span.to(rows.device)].sum(-1) for span in spans]
    return torch.stack(masses, 1) if masses else rows.new_empty(len(rows), 0)


@torch.no_grad()
def attention_rows(model: nn.Module, inputs: Mapping[str, Any], layer: int, queries: Tensor) -> Tensor:
    """Attention weights of the query rows of one layer, mean over heads, (R, L) fp32: `attention_mass` before its sums.

    Errors: ValueError for more than one row, a layer that the model does not have, a model that takes no other attention
    implementation, and where its attention is not a softmax of scaled products (soft caps, sinks, position biases).
    """
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"attention is read from one row at a time, received {len(inputs['input_ids'])}")
    layers = causal(model).config.get_text_config().num_hidden_layers
    if not 0 <= layer < layers:
        raise ValueError(f"layer {layer}: the model has layers 0 to {layers - 1}")
    token = _wanted.set(_Wanted(layer, queries))
    try:
        with attending(model, NAME):
            model(**inputs, use_cache=False)
    except _Seen as seen:
        return seen.args[0]
    finally:
        _wanted.reset(token)
    name = type(causal(model)).__name__
    raise ValueError(f"layer {layer} of {name} did not compute its attention by transformers' interface")


def middle_layer(model: nn.Module) -> int:
    """The layer in the middle, n // 2 of n from 0 (MIA-DPO); of those that see the whole row, where some see a window only."""
    config = causal(model).config.get_text_config()
    middle = config.num_hidden_layers // 2
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    whole = [i for i, kind in enumerate(kinds) if kind == "full_attention"] or range(len(kinds))
    return min(whole, key=lambda i: (abs(i - middle), i))


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: sdpa, up to the wanted layer. query (1, H, L, E), key (1, K, L, E), K dividing H."""
    wanted = _wanted.get()
    if getattr(module, "layer_idx", None) != wanted.layer:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if found := [text for name, text in UNSUPPORTED.items() if kwargs.get(name) is not None]:
        raise ValueError(f"attention with {found[0]} cannot be looked at")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _Seen(_rows(query[0], key[0], attention_mask, wanted.queries.to(query.device), scale))


def _rows(query: Tensor, key: Tensor, attention_mask: Tensor | None, at: Tensor, scale: float) -> Tensor:
    positions = torch.arange(key.shape[1], device=key.device)
    seen = positions <= at[:, None] if attention_mask is None else attention_mask[0, 0, at]
    groups = len(query) // len(key)
    total = torch.zeros(len(at), key.shape[1], device=key.device)
    for head, rows in enumerate(query[:, at]):
        scores = rows.float() @ key[head // groups].float().T * scale
        total += scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return total / len(query)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
