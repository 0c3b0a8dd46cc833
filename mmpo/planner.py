"""What a preference step costs on a token model, and the layout, checkpointing and head tile that follow from it.

Pure functions of sizes. One multiply-add is two operations. A linear layer costs a token 2 operations per weight forward; a
query costs 4 E H on each key it looks at (two products). Backward, linear layers that train cost twice their forward pass and
frozen ones once; attention costs 2.5 times its forward pass, whose scores are computed again. A causal call on S tokens
counts as S^2 / 2 looks at a key; torch's counter has it as S^2, `counter` here as half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from transformers.pytorch_utils import Conv1D

from mmpo import sharding
from mmpo.kernels.prefix import causal, evaluating, forward_hidden, forward_padded, pack, why_not
from mmpo.kernels.token_stats import TILINGS, Tiling

LEAST_GAIN = 0.03  # of a step's operations, below which a shared prompt is not worth another way through the attention
ROOM = 0.8  # of the free memory that activations and head may take: the rest is for the allocator and other programs

Lengths = Sequence[tuple[int, Sequence[int]]]  # for each pair of a step: tokens of the prompt, tokens of each branch


@dataclass(frozen=True)
class Sizes:
    """What the cost of a model depends on.

    linear: weights of its linear layers, without the head; trained: those that train. attention: query heads times their
    width, summed over layers. layers, hidden, vocabulary: as named. head_trains: whether the head gets a gradient.
    itemsize: bytes of an activation. token_bytes: activations kept per token of a packed row without checkpointing.
    state_bytes: gradients and two moments of all that trains, which take their memory at the first step.
    """

    linear: int
    trained: int
    attention: int
    layers: int
    hidden: int
    vocabulary: int
    head_trains: bool
    itemsize: int
    token_bytes: int
    state_bytes: int = 0


@dataclass(frozen=True)
class Step:
    """One training step. tokens: that go through the policy. flops: by part. activations, head: bytes held at a time.

    free: bytes left for them. gain: operations of a prompt per answer, relative to these.
    """

    layout: str
    checkpointing: bool
    tiling: Tiling
    tokens: int
    flops: Mapping[str, float]
    activations: int
    head: int
    free: int | None
    gain: float

    def describe(self) -> str:
        """The prediction in two lines."""
        total = sum(self.flops.values())
        parts = ", ".join(f"{name} {_count(value)}" for name, value in self.flops.items() if value)
        saved = f", {self.gain:.2f}x fewer than with a prompt per answer" if self.gain > 1.005 else ""
        free = "" if self.free is None else f" of {_bytes(self.free)} free"
        how = "with" if self.checkpointing else "without"
        return (
            f"layout {self.layout}: {self.tokens} token rows, {_count(total)} operations per step ({parts}){saved}\n"
            f"memory: {_bytes(self.activations)} of activations {how} checkpointing and {_bytes(self.head)} for the head"
            f" (tile {_bytes(self.tiling.tile)}){free}"
        )


def _count(value: float) -> str:
    for name, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.1f} {name}"
    return f"{value / 1e6:.1f} M"


def _bytes(value: int) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def rows(lengths: Lengths, layout: str) -> int:
    """Tokens that go through the model for one call on these pairs."""
    if layout == "shared":
        return sum(prompt + sum(branches) for prompt, branches in lengths)
    apart = [prompt + branch for prompt, branches in lengths for branch in branches]
    return len(apart) * max(apart, default=0) if layout == "padded" else sum(apart)


def looks(lengths: Lengths, layout: str) -> float:
    """How many keys all queries of one call look at together."""
    apart = [prompt + branch for prompt, branches in lengths for branch in branches]
    if layout == "padded" and len(set(apart)) > 1:  # under a mask, which spares no work
        return float(len(apart) * max(apart) ** 2)
    if layout in ("padded", "packed"):
        return sum(row * row for row in apart) / 2
    total = 0.0
    for prompt, branches in lengths:
        first, *rest = [b for b in branches if b] or [0]
        total += (prompt + first) ** 2 / 2 + sum(prompt * b + b * b / 2 for b in rest)
    return total


def forward_flops(sizes: Sizes, lengths: Lengths, layout: str) -> float:
    """Operations of the body, without the head, for one forward pass."""
    return 2 * sizes.linear * rows(lengths, layout) + 4 * sizes.attention * looks(lengths, layout)


def backward_flops(sizes: Sizes, lengths: Lengths, layout: str) -> float:
    """Operations of the body's backward pass, without what checkpointing computes again (one forward pass)."""
    linear = 2 * (sizes.linear + sizes.trained) * rows(lengths, layout)
    return linear + 10 * sizes.attention * looks(lengths, layout)


def head_flops(sizes: Sizes, scored: int, tiling: Tiling, reference: bool = False) -> float:
    """Operations of the head on scored rows: forward, logits again unless they are kept, gradients, and the reference's."""
    kept = scored * sizes.vocabulary * 4 <= tiling.keep
    passes = 2 + (not kept) + sizes.head_trains + reference
    return 2.0 * passes * scored * sizes.hidden * sizes.vocabulary


def step_flops(
    sizes: Sizes, lengths: Lengths, layout: str, tiling: Tiling, *, checkpointing: bool, reference: bool
) -> dict[str, float]:
    """Operations of one step by part: policy, reference (0 where its scores are cached or it has none), head."""
    forward = forward_flops(sizes, lengths, layout)
    policy = forward * (1 + checkpointing) + backward_flops(sizes, lengths, layout)
    scored = sum(sum(branches) for _, branches in lengths)
    head = head_flops(sizes, scored, tiling, reference)
    return {"policy": policy, "reference": forward * reference, "head": head}


def activation_bytes(sizes: Sizes, lengths: Lengths, layout: str, checkpointing: bool) -> int:
    """Bytes of activations held at a time. With checkpointing: what goes into layers and last norm, and one layer's own."""
    tokens = rows(lengths, layout)
    if not checkpointing:
        return tokens * sizes.token_bytes
    return tokens * ((sizes.layers + 2) * sizes.hidden * sizes.itemsize + sizes.token_bytes // sizes.layers)


def head_bytes(sizes: Sizes, scored: int, tiling: Tiling) -> int:
    """Bytes of logits held at a time: all of them where they are kept for the backward pass, and a tile."""
    logits = scored * sizes.vocabulary * 4
    return (logits if logits <= tiling.keep else 0) + min(logits, tiling.tile)


def choose(
    sizes: Sizes,
    lengths: Lengths,
    *,
    layout: str = "auto",
    checkpointing: bool | None = None,
    reference: bool = True,
    free: int | None = None,
    device: str = "cpu",
    unable: str | None = None,
) -> Step:
    """The way to run a step of these pairs, and what it will cost.

    layout, checkpointing: fixed by the recipe, or "auto" and None to choose: the shared layout where it saves at least
    LEAST_GAIN of the operations (whatever is free, so that every process and a resumed run choose the same), checkpointing
    where the activations do not fit into ROOM of the free bytes otherwise. reference: whether a step runs the reference.
    unable: why the model cannot run packed rows (`prefix.why_not`), or None.
    Errors: ValueError where the recipe asks for a layout that the model cannot run.
    """
    if unable and layout in ("shared", "packed"):
        raise ValueError(f"model.layout: {layout} is not possible, because {unable}; set it to auto or padded")
    given = {"checkpointing": False, "reference": reference}
    apart, shared = (
        sum(step_flops(sizes, lengths, name, _tiling(None, device), **given).values()) for name in ("packed", "shared")
    )
    if layout == "auto":
        layout = "padded" if unable else "shared" if shared <= (1 - LEAST_GAIN) * apart else "packed"
    room = None if free is None else max(free - sizes.state_bytes, 0)
    tiling = _tiling(room, device)
    head = head_bytes(sizes, sum(sum(branches) for _, branches in lengths), tiling)
    if checkpointing is None:
        checkpointing = room is not None and activation_bytes(sizes, lengths, layout, False) + head > ROOM * room
    flops = step_flops(sizes, lengths, layout, tiling, checkpointing=checkpointing, reference=reference)
    activations = activation_bytes(sizes, lengths, layout, checkpointing)
    gain = apart / shared if layout == "shared" else 1.0
    return Step(layout, checkpointing, tiling, rows(lengths, layout), flops, activations, head, room, gain)


def _tiling(free: int | None, device: str) -> Tiling:
    """The device's tile, and logits kept up to a sixteenth of the free bytes."""
    tiling = TILINGS.get(device, TILINGS["cuda"])
    return tiling if free is None else replace(tiling, keep=min(tiling.keep, free // 16))


def sizes_of(model: nn.Module, shards: int = 1) -> Sizes:
    """The sizes of a transformers model, with adapters as may be. Bytes per token are measured on two short packed rows.

    shards: processes that share what the parameters take.
    """
    inner = causal(model)
    config = inner.config.get_text_config()
    linear, trained = _linear(inner.get_decoder())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = inner.get_output_embeddings()
    parameter = next(p for p in inner.parameters() if p.is_floating_point())
    return Sizes(
        linear=linear,
        trained=trained,
        attention=config.num_attention_heads * width * config.num_hidden_layers,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=head.weight.shape[0],
        head_trains=head.weight.requires_grad,
        itemsize=parameter.element_size(),
        token_bytes=_token_bytes(model),
        state_bytes=sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) // shards,
    )


def _linear(body: nn.Module) -> tuple[int, int]:
    """Weights of the linear layers, and of those that train; an adapter's are its own layers. Experts are not counted."""
    leaves: list[Any] = [m for m in body.modules() if hasattr(m, "weight") and not any(m.children())]
    sizes = {m: m.in_features * m.out_features for m in leaves if hasattr(m, "in_features")}  # packed weights say less
    sizes |= {m: m.weight.numel() for m in leaves if isinstance(m, Conv1D)}
    return sum(sizes.values()), sum(size for m, size in sizes.items() if m.weight.requires_grad)


def _token_bytes(model: nn.Module) -> int:
    short, long = 16, 48
    with evaluating(model), torch.enable_grad():
        return (_kept(model, long) - _kept(model, short)) // (long - short)


def _kept(model: nn.Module, tokens: int) -> int:
    """Bytes of all that autograd keeps for a row of its own of so many tokens, every storage once and no parameter."""
    row, positions, segments = pack(
        [torch.zeros(tokens, dtype=torch.long, device=next(model.parameters()).device)], [[]], share=True
    )
    with saved_bytes(model) as kept:
        padded = why_not(model, tokens)
        states = forward_padded(model, row, segments) if padded else forward_hidden(model, row, positions, segments)
        del states
    return kept()


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts what the backward pass of everything computed inside will need, in bytes: each storage once, no parameter.

    The numbers of the memory gates: a tensor that two operations keep, or two views of one, is held once.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor.detach()  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        yield lambda: sum(size for size, _ in kept.values())


def counter() -> flop_counter.FlopCounterMode:
    """torch's counter of operations, taught the attention kernel of the CPU, which it leaves out: causal calls count half."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flop_counter.FlopCounterMode(display=False, custom_mapping={flash: _forward_count, backward: _backward_count})


def _forward_count(q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return flop_counter.sdpa_flop_count(q, k, v) // (1 + is_causal)


def _backward_count(g: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dropout: float, is_causal: bool, **_: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(g, q, k, v) // (1 + is_causal)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take on a device: within the container's limit on Linux; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = _number(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB")
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max", r"(\d+)$"), _number(group / "memory.current", r"(\d+)$")
    found = [] if machine is None else [machine * 1024]
    if limit is not None and used is not None:  # files that could be dropped count as used there
        found.append(limit - used + (_number(group / "memory.stat", r"(?m)^inactive_file (\d+)$") or 0))
    return min(found, default=None)


def free_after(free: int | None, model: nn.Module, shards: int) -> int | None:
    """Free bytes once each process has given up all but its share of a model that it holds whole.

    What is gathered at a time counts as held throughout: the largest block, and all outside of the blocks.
    """
    if free is None or shards == 1:
        return free
    sizes = [_parameter_bytes(block) for block in sharding.blocks(model)]
    total = _parameter_bytes(model)
    return free + total - total // shards - max(sizes, default=0) - (total - sum(sizes))


def _parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _number(path: Path, pattern: str) -> int | None:
    try:
        match = re.search(pattern, path.read_text(encoding="ascii"))
    except OSError:
        return None
    return int(match[1]) if match else None
