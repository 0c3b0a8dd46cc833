"""The work of one DPO step, counted: operations, rows that meet the head, bytes kept for backward. And the cost model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """The language model that trains: random weights, in fp32."""

    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    ff: int = 688
    vocab: int = 2048

    @property
    def body(self) -> int:
        """Weights of the linear layers between embedding and head."""
        head = self.hidden // self.heads
        return self.layers * self.hidden * (2 * self.heads * head + 2 * self.kv_heads * head + 3 * self.ff)


def counts(step: Callable[[int], object], loss: Callable[[], object], model: nn.Module, shape: Shape) -> dict[str, int]:
    """Operations of one whole step, rows that meet the head going forward, bytes that autograd keeps."""
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step(0)
    with saved_bytes(model) as saved, HeadRows(shape) as head:
        loss()
    return {"flops": int(counter.get_total_flops()), "head_rows": head.rows, "saved_bytes": sum(saved.values())}


def _attention(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, *_: Any, **__: Any) -> int:
    """Two products of queries and keys; a causal square counts half."""
    *batch, rows, width = query
    return 4 * int(np.prod(batch)) * rows * key[-2] * width // (2 if is_causal else 1)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, *rest: Any, **named: Any) -> int:
    """Five products instead of two."""
    return 5 * _attention(query, key, value, *rest) // 2


class HeadRows(TorchDispatchMode):
    """Counts rows that are multiplied with the head, whatever tiles of tokens and vocabulary that is done in."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.products = shape, 0

    @property
    def rows(self) -> int:
        return self.products // self.shape.vocab

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (aten.mm.default, aten.addmm.default, aten.mm.out, aten.bmm.default):
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            weights = {self.shape.hidden, self.shape.ff, self.shape.hidden * self.shape.kv_heads // self.shape.heads}
            if left.shape[-1] == self.shape.hidden and right.shape[-1] not in weights:
                self.products += left.shape[-2] * right.shape[-1]
        return out


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of all that autograd keeps for the backward pass, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def model_flops(prompt: int, answer: int, shape: Shape, cached: bool) -> float:
    """The cost model's operations of one step (docs of the planner): a shared prompt, R - 1 states per answer and its prompt's.

    Forward 1, backward 2 (attention 2.5), reference 1; a causal square counts half.
    """
    answer, width = answer - 1, shape.hidden
    linear = 2 * shape.body * (prompt + 2 * answer)
    attention = width * shape.layers * (2 * prompt**2 + 2 * (4 * prompt * answer + 2 * answer**2))
    head = 2 * width * shape.vocab * 2 * (answer + 1)
    forward_pass = linear + attention + head
    return forward_pass + 2 * (linear + head) + 2.5 * attention + (0 if cached else forward_pass)
