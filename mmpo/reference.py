"""The reference policy: the model that alignment must not forget.

    none          no reference (MaPO, SimPO, ...)
    start         the policy as it was at the start of the run, a loaded SFT adapter included
    adapter_off   the policy with its adapter switched off: no second copy of the weights
    path          another model of the same architecture
    ema           a moving average of the policy (TR-DPO)

Each kind answers one question, `active(model)`: which module computes the reference's scores. Policy and reference run
the same code, so with equal weights their scores are equal to the last bit. `Cached` keeps any fixed reference's scores
on disk by (content, draw) and replays them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from mmpo import collective, sharding, tiers
from mmpo.cache import Cache, key
from mmpo.checkpoint import digest_tensors, environment
from mmpo.modality import GivesStates, Modality
from mmpo.scores import NOTHING, Scores

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from mmpo.kernels.token_stats import Head


class Reference(Protocol):
    fixed: bool  # false when its weights move during training: its scores may not be cached

    def active(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The module to score with, for the time of the context; the policy is untouched afterwards."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: what checkpoints, moving averages and adapter copies hold. In shards, settled."""
    sharding.settle(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class AdapterOff:
    """The policy without its adapter. Backward must run outside the context: checkpointing recomputes the forward."""

    fixed = True

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        own = trainable(unwrap(model)).values()
        with unwrap(model).disable_adapter():  # type: ignore[operator]  # peft's own try/finally
            for parameter in own if sharding.sharded(model) else ():  # shards note at their first use what has a gradient
                parameter.requires_grad_(True)
            yield model


class Frozen:
    """A second module with frozen weights."""

    fixed = True

    def __init__(self, module: nn.Module):
        self.module = module.requires_grad_(False).eval()

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        with sharding.settled(self.module):
            yield self.module


class Values:
    """Other values for the policy's trainable parameters, exchanged for the time of the context.

    Pointers are exchanged, nothing is copied, but for shards; the saved graph of the policy keeps its own tensors, because the
    values are back before backward runs.
    """

    def __init__(self, model: nn.Module, decay: float | None = None, every: int = 1):
        self.values = {name: p.detach().clone() for name, p in trainable(unwrap(model)).items()}
        self.decay, self.every, self.fixed = decay, every, decay is None

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        self._exchange(model)
        try:
            yield model
        finally:
            self._exchange(model)

    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in trainable(unwrap(model)).items():
            self.values[name] = sharding.exchange(parameter, self.values[name])
        torch.clear_autocast_cache()  # which knows a parameter by its name, not by its values

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take these values, whole ones, as the model keeps its parameters: on its device and in its shards."""
        self.values = {name: sharding.part(tensors[name], p) for name, p in trainable(unwrap(model)).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the policy: value = decay * value + (1 - decay) * policy, every `every` steps."""
        if self.decay is not None and step % self.every == 0:
            for name, parameter in trainable(unwrap(model)).items():
                self.values[name].lerp_(parameter, 1 - self.decay)


def build(config: Any, modality: Modality, model: nn.Module) -> Reference | None:
    """The reference a recipe asks for (`recipe.ReferenceConfig`). Call it before the first step."""
    if config.kind == "none":
        return None
    has_adapter = hasattr(model, "disable_adapter")
    if config.kind == "adapter_off" and not has_adapter:
        raise ValueError(
            "reference.kind: adapter_off needs model.adapter: lora; for full fine-tuning use reference.kind: start"
        )
    if config.kind == "ema":
        return Values(model, config.ema_decay, config.ema_every)
    if config.kind == "path":
        if not config.path:
            raise ValueError("reference.kind: path needs reference.path, a model directory of the policy's architecture")
        return Frozen(modality.load_reference(config.path))
    if config.kind == "start" and has_adapter and modality.starts_from_adapter:
        return Values(model)
    return AdapterOff() if has_adapter else Frozen(copy.deepcopy(model))


def shard(reference: Reference | None, model: nn.Module, over: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Shard what a reference keeps beside the policy, which is in shards already (`mmpo.sharding.shard`)."""
    inner = reference.inner if isinstance(reference, Cached) else reference
    if isinstance(inner, Frozen):
        sharding.shard(inner.module, over, dtype)
    elif isinstance(inner, Values):
        inner.load(model, inner.values)


def anew(config: Any, model: nn.Module) -> Values | None:
    """The reference of a later round: the policy as it is now, moving on where the recipe's reference moves."""
    if config.kind == "none":
        return None
    return Values(model, config.ema_decay, config.ema_every) if config.kind == "ema" else Values(model)


@torch.no_grad()
def score(
    reference: Reference | None, modality: Modality, model: nn.Module, batch: Any, wants: frozenset[str] = NOTHING
) -> dict[str, Scores] | None:
    """The reference's scores of a batch, or None without a reference. wants: see `Modality.score`."""
    if reference is None:
        return None
    if isinstance(reference, Cached):
        return reference.score(modality, model, batch, wants)
    with reference.active(model) as module:
        copied = sharding.sharded(module)
        return {branch: _kept(scores, copied) for branch, scores in modality.score(module, batch, wants).items()}


def _kept(scores: Scores, copied: bool) -> Scores:
    """Scores whose head stays the reference's when the policy's values are back in the very same parameters."""
    if scores.states is None:
        return scores
    return replace(scores, states=replace(scores.states, head=_own(scores.states.head, copied)))


def _own(head: Head, copied: bool = False) -> Head:
    """The head without gradient. copied: its memory is another's afterwards, as that of gathered shards is."""

    def own(x: Tensor) -> Tensor:
        return x.detach().clone() if copied else x.detach()

    return replace(head, weight=own(head.weight), bias=None if head.bias is None else own(head.bias))


class Cached:
    """A fixed reference whose scores are stored per (pair, draw) and replayed: the second time costs no model call.

    Keys hold the reference's weights, autocast's precision, package versions, threads and devices (which move the last bits,
    and the margin before the first step has to be exactly 0), and what the modality says the draw is (`batch.keys`: content,
    condition, noise, the model's configuration): a stored score is never used for anything but the very computation it came
    from. What is stored first stays: where a batch finds some of its rows, only the others are added. So every later step
    reads the same bits, also after a resume, whatever batch a row turns up in.

    tier: how much is stored, see `mmpo.tiers`.
    """

    fixed = True

    def __init__(self, inner: Reference, cache: Cache, model: nn.Module, tier: str = "tokens"):
        if not inner.fixed:
            raise ValueError("reference.cache: an ema reference changes during training, its scores cannot be cached")
        self.inner, self.cache, self.tier = inner, cache, tier
        self.identity = _weights(inner, model) + type(inner).__name__ + json.dumps(environment(), sort_keys=True)

    def active(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return self.inner.active(model)

    def score(self, modality: Modality, model: nn.Module, batch: Any, wants: frozenset[str] = NOTHING) -> dict[str, Scores]:
        kept = frozenset({"states"}) if self.tier == "states" else NOTHING
        if lacking := wants - kept:
            raise ValueError(f"reference.cache: {self.tier} does not store {', '.join(sorted(lacking))}")
        keys = [key("reference", self.tier, self.identity, _precision(batch.device), k) for k in batch.keys]
        found = dict(zip(keys, self.cache.get_many(keys), strict=True))
        missing, head = [k for k in keys if found[k] is None], None
        asked = bool(missing)
        if sharding.sharded(model):  # then all processes have to run the reference where one of them does
            asked = collective.any_process(asked, batch.device)
        if asked or kept:
            with self.inner.active(model) as module:
                if asked:
                    rows = dict(zip(keys, tiers.pack(modality.score(module, batch, kept), self.tier), strict=True))
                    self.cache.put_many([(k, rows[k]) for k in missing])
                    found |= {k: rows[k] for k in missing}
                head = _own(cast(GivesStates, modality).head(module), sharding.sharded(module)) if kept else None
        return tiers.unpack([found[k] for k in keys], self.tier, batch.device, head)  # type: ignore[misc]


def _weights(inner: Reference, model: nn.Module) -> str:
    """Digest of the reference's weights; those of an adapter that is switched off are not among them."""
    off = trainable(unwrap(model)) if isinstance(inner, AdapterOff) else {}
    with inner.active(model) as module:
        tensors = dict(unwrap(module).named_parameters()) | dict(unwrap(module).named_buffers())
        return digest_tensors({name: tensor for name, tensor in tensors.items() if name not in off})


def _precision(device: torch.device) -> str:
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "own"
