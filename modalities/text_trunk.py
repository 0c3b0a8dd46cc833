"""Lower layers that do not train, computed once per pair: their last states are kept and replayed (`model.train_layers`).

Policy and reference read the same states, which do not depend on anything that trains, so a step costs the upper layers
alone. Replaying needs no change of a model: for the time of a call the lower layers pass on what they are given, and the last
of them gives the stored states.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmpo.cache import Cache, key
from mmpo.checkpoint import digest_tensors, environment
from mmpo.kernels.prefix import Segments, causal, forward_hidden, forward_padded, padded_mask

Row = tuple[Tensor, Tensor, Segments]  # what `pack` makes


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, first to last. ValueError for a model that keeps them elsewhere."""
    decoder = causal(model).get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"model.train_layers: {type(decoder).__name__} has no list of layers; leave train_layers out")
    return layers


class _Reached(Exception):
    """Raised out of a forward pass where the lower layers end."""


class Trunk:
    """The states behind a model's lower layers, by pair, in a cache.

    Keys hold the weights of everything below, precision and environment, as those of a cached reference do. What is stored
    first stays: a row's states are those of the first batch it came in.
    """

    def __init__(self, train_layers: int, cache: Cache):
        self.train_layers, self.cache = train_layers, cache
        self._digests: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def forward(self, model: nn.Module, row: Row, names: Sequence[tuple[bytes, slice]], padded: bool) -> Tensor:
        """`forward_hidden`, or `forward_padded`, with the lower layers run only for pairs that the cache does not know. (L, D).

        names: see `rows_of`. They have to name the layout, which moves last bits.
        """
        below = layers_of(model)[: -self.train_layers]
        keys = [key("trunk", self._digest(model), _precision(row[0].device), name) for name, _ in names]
        found = dict(zip(keys, self.cache.get_many(keys), strict=True))
        if missing := [k for k in keys if found[k] is None]:
            states = _below(model, below, row, padded)
            fresh = {k: {"states": states[part].cpu().contiguous()} for k, (_, part) in zip(keys, names, strict=True)}
            self.cache.put_many([(k, fresh[k]) for k in missing])
            found |= {k: fresh[k] for k in missing}
        states = torch.cat([found[k]["states"] for k in keys]).to(row[0].device)  # type: ignore[index]
        with _replaying(below, _as_rows(states, row[2]) if padded else states[None]):
            return forward_padded(model, row[0], row[2]) if padded else forward_hidden(model, *row, skipped=len(below))

    def _digest(self, model: nn.Module) -> str:
        inner = causal(model)
        if inner not in self._digests:
            below = nn.ModuleList([inner.get_input_embeddings(), *layers_of(model)[: -self.train_layers]])
            self._digests[inner] = digest_tensors(dict(below.state_dict())) + json.dumps(environment(), sort_keys=True)
        return self._digests[inner]


def rows_of(keys: Sequence[bytes], segments: Segments, counts: Sequence[int]) -> list[tuple[bytes, slice]]:
    """Each pair's name and its place in the packed row. counts: how many of the row's prompts belong to each pair."""
    parts, found = iter(segments.pairs), []
    for name, count in zip(keys, counts, strict=True):
        own = [next(parts) for _ in range(count)]
        last_prompt, last = own[-1]
        found.append((name, slice(own[0][0].start, max([last_prompt.stop, *(branch.stop for branch in last)]))))
    return found


@torch.no_grad()
def _below(model: nn.Module, below: nn.ModuleList, row: Row, padded: bool) -> Tensor:
    """The states behind the lower layers in packed order, (L, D)."""
    found: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    handle = below[-1].register_forward_hook(stop)
    try:
        forward_padded(causal(model), row[0], row[2]) if padded else forward_hidden(causal(model), *row)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not isinstance(found[0], Tensor):
        raise ValueError(f"model.train_layers: {type(below[-1]).__name__} gives more than states; leave train_layers out")
    states: Tensor = found[0]
    return states[padded_mask(row[2]).to(states.device)] if padded else states[0]


def _as_rows(states: Tensor, segments: Segments) -> Tensor:
    """(L, D) in packed order to padded rows (N, width, D), 0 where they are padding."""
    mask = padded_mask(segments).to(states.device)
    return states.new_zeros(*mask.shape, states.shape[-1]).masked_scatter(mask[..., None], states)


@contextmanager
def _replaying(below: nn.ModuleList, states: Tensor) -> Iterator[None]:
    """The lower layers compute nothing; the last of them gives `states` (N, L, D)."""
    for layer in below:
        layer.forward = lambda hidden_states, *_, **__: hidden_states  # type: ignore[method-assign]
    below[-1].forward = lambda *_, **__: states  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in below:
            del layer.forward


def _precision(device: torch.device) -> str:
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "own"
