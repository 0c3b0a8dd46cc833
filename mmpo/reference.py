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
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmpo.cache import Cache, digest_module, key
from mmpo.checkpoint import environment
from mmpo.modality import Modality
from mmpo.scores import Scores


class Reference(Protocol):
    fixed: bool  # false when its weights move during training: its scores may not be cached

    def active(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The module to score with, for the time of the context; the policy is untouched afterwards."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name: what checkpoints, moving averages and adapter copies hold."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class AdapterOff:
    """The policy without its adapter. Backward must run outside the context: checkpointing recomputes the forward."""

    fixed = True

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        with unwrap(model).disable_adapter():  # type: ignore[operator]  # peft's own try/finally
            yield model


class Frozen:
    """A second module with frozen weights."""

    fixed = True

    def __init__(self, module: nn.Module):
        self.module = module.requires_grad_(False).eval()

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        yield self.module


class Values:
    """Other values for the policy's trainable parameters, exchanged for the time of the context.

    Pointers are exchanged, nothing is copied; the saved graph of the policy keeps its own tensors, because the values
    are back before backward runs.
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
            parameter.data, self.values[name] = self.values[name], parameter.data

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


def anew(config: Any, model: nn.Module) -> Values | None:
    """The reference of a later round: the policy as it is now, moving on where the recipe's reference moves."""
    if config.kind == "none":
        return None
    return Values(model, config.ema_decay, config.ema_every) if config.kind == "ema" else Values(model)


@torch.no_grad()
def score(reference: Reference | None, modality: Modality, model: nn.Module, batch: Any) -> dict[str, Scores] | None:
    """The reference's scores of a batch, or None without a reference."""
    if reference is None:
        return None
    if isinstance(reference, Cached):
        return reference.score(modality, model, batch)
    with reference.active(model) as module:
        return modality.score(module, batch)


class Cached:
    """A fixed reference whose scores are stored per (pair, draw) and replayed: the second time costs no model call.

    Keys hold the reference's weights, autocast's precision, package versions, threads and devices (which move the last bits,
    and the margin before the first step has to be exactly 0), and what the modality says the draw is (`batch.keys`: content,
    condition, noise, the model's configuration): a stored score is never used for anything but the very computation it came
    from.
    """

    fixed = True

    def __init__(self, inner: Reference, cache: Cache, model: nn.Module):
        if not inner.fixed:
            raise ValueError("reference.cache: an ema reference changes during training, its scores cannot be cached")
        self.inner, self.cache = inner, cache
        with inner.active(model) as module:
            self.identity = digest_module(unwrap(module)) + type(inner).__name__ + json.dumps(environment(), sort_keys=True)

    def active(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return self.inner.active(model)

    def score(self, modality: Modality, model: nn.Module, batch: Any) -> dict[str, Scores]:
        keys = [key("reference", self.identity, _precision(batch.device), k) for k in batch.keys]
        found = self.cache.get_many(keys)
        if any(f is None for f in found):
            with self.inner.active(model) as module:
                scores = modality.score(module, batch)
            self.cache.put_many([(k, _row(scores, i)) for i, k in enumerate(keys)])
            return scores
        return _stack(found, batch.device)  # type: ignore[arg-type]


def _precision(device: torch.device) -> str:
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "own"


def _row(scores: dict[str, Scores], i: int) -> dict[str, Tensor]:
    flat = {}
    for branch, s in scores.items():
        flat[f"{branch}/logp"], flat[f"{branch}/mask"] = s.logp[i].cpu(), s.mask[i].cpu()
    return flat


def _stack(rows: list[dict[str, Tensor]], device: torch.device) -> dict[str, Scores]:
    branches = dict.fromkeys(name.rsplit("/", 1)[0] for name in rows[0])
    return {
        b: Scores(
            torch.stack([r[f"{b}/logp"] for r in rows]).to(device), torch.stack([r[f"{b}/mask"] for r in rows]).to(device)
        )
        for b in branches
    }
