"""Parameters in shards (FSDP2, arXiv 2304.11277): each process keeps its part of every parameter, gradient and moment.

A block's parameters are gathered for its own forward and backward pass. Those outside of blocks (embeddings, last norm, head)
are the root's: gathered from a forward pass on, so that the head is whole where the token statistics read it, until the
backward pass, or `settle`, gives them up. Gathered parameters are other objects than a module's own: whatever lists, exchanges
or switches parameters settles the model first, and does so in every process, as each gathering needs all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def mesh(device: torch.device) -> DeviceMesh:
    """All processes of the run in one line."""
    return init_device_mesh(device.type, (distributed.get_world_size(),))


def shard(model: nn.Module, over: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Shard a model in place: its blocks, then what is left as the root. Every process holds the same whole model before.

    dtype: that blocks compute in, and are therefore gathered in; the root's parameters keep their own, and so does what passes
    from block to block. Gradients are averaged in fp32.
    """
    for block in blocks(model):
        fully_shard(block, mesh=over, mp_policy=_policy(dtype))
    fully_shard(model, mesh=over, mp_policy=_policy(None))


def _policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)  # timesteps are not


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: what the model's library never splits, else the members of its lists.

    Of such modules within one another the outermost.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    listed = {id(m) for lists in model.modules() if isinstance(lists, nn.ModuleList) for m in lists}

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if type(child).__name__ in names or (not names and id(child) in listed):
                if any(True for _ in child.parameters()):
                    yield child
            else:
                yield from within(child)

    return list(within(model))


def _parts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def settle(model: nn.Module) -> None:
    """Every parameter of a sharded model in its shards; nothing happens to another. Never between forward and backward."""
    for module in _parts(model) if sharded(model) else ():
        module.reshard()


@contextmanager
def settled(model: nn.Module) -> Iterator[nn.Module]:
    """The model settled before and after."""
    settle(model)
    try:
        yield model
    finally:
        settle(model)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shards, without gradient where it is: every process has to call."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a parameter was read in shards where its gradient is needed; run the model's forward pass before")
    own: Any = tensor.detach()
    found: Tensor = own.full_tensor()
    return found


def part(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process keeps it beside the parameter `like`: on its device, and in shards where it is.

    One of another shape, as an optimizer's count of steps, stays as it is.
    """
    if value.shape != like.shape:
        return value
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # which all of them have read


def collect(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors whole and on the CPU, gathered one by one. Every process has to call; one that does not `keep` gets none."""
    found = {}
    for name, tensor in sorted(tensors.items()):  # one order everywhere: what was read from a file came in any
        value = whole(tensor.detach())
        if keep:
            found[name] = value.cpu().contiguous()
    return found


@torch.no_grad()
def exchange(parameter: Tensor, value: Tensor) -> Tensor:
    """Give a parameter another value and return its own. In shards the contents move, as gathering reads the same storage."""
    if not isinstance(parameter, DTensor):
        parameter.data, value = value, parameter.data
        return value
    own = parameter.detach().clone()
    parameter.copy_(value)
    return own


def prepared(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimizer for accelerate's devices, precision and processes; what is in shards needs no wrapper of its own."""
    if sharded(model):
        return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
    found: tuple[Any, Any] = accelerator.prepare(model, optimizer)
    return found


def told(model: nn.Module, processes: int) -> str:
    """What train.fsdp came to, in one line."""
    if not sharded(model):
        return "train.fsdp: one process, which holds everything; torchrun --nproc-per-node=N -m mmpo train ... starts N"
    return f"sharded over {processes} processes: this one keeps {held(model):,} parameters"


def held(model: nn.Module) -> int:
    """Parameters that this process keeps."""
    settle(model)
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
