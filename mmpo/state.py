"""An optimizer's state and the random generators as tensors and JSON, and back: the next step is the same to the bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpo import sharding


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors "<parameter>.<key>" and JSON: parameter names, shapes, settings, scalar state.

    names: every parameter's name, e.g. `{p: n for n, p in model.named_parameters()}`; ValueError for one that has none.
    Works on any optimizer whose state is tensors and JSON scalars per parameter, wrapped by accelerate or not. State of
    parameters in shards is in shards.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        tensors |= {f"group {i}.{k}": v for k, v in settings.items() if isinstance(v, Tensor)}
        shapes = {_name(p, names): list(p.shape) for p in group["params"]}
        groups.append({"shapes": shapes, "settings": {k: v for k, v in settings.items() if not isinstance(v, Tensor)}})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{names[parameter]}.{key}"] = value
                else:
                    scalars.setdefault(names[parameter], {})[key] = value
    return tensors, {"groups": groups, "scalars": scalars}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Restore what `pack_optimizer` returned, of shards the whole: the next step is bit-identical to the one it would take.

    ValueError names the first parameter that is missing, not expected, in another group or of another shape.
    """
    _check_parameters(optimizer, names, meta)
    owned = _by_owner(tensors)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: list[dict[str, Any]] = [
        {k: sharding.part(v, p) for k, v in owned.get(names[p], {}).items()} | meta["scalars"].get(names[p], {})
        for p in parameters
    ]
    groups = optimizer.state_dict()["param_groups"]
    for i, (group, packed) in enumerate(zip(groups, meta["groups"], strict=True)):
        settings = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in packed["settings"].items()}
        group.update(settings | owned.get(f"group {i}", {}))
    optimizer.load_state_dict({"state": {i: s for i, s in enumerate(state) if s}, "param_groups": groups})
    for parameter, values in zip(parameters, state, strict=True):
        for key, value in values.items():  # torch casts state to the parameter's dtype, and garbles strings
            if not isinstance(value, Tensor):
                optimizer.state[parameter][key] = value
            elif optimizer.state[parameter][key].dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(parameter.device)


def _name(parameter: Tensor, names: Mapping[Tensor, str]) -> str:
    if parameter not in names:
        raise ValueError(f"optimizer: a parameter of shape {tuple(parameter.shape)} has no name; pass the whole model's names")
    return names[parameter]


def _by_owner(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Own copies, because optimizers update their state in place and two of them may be restored from one checkpoint."""
    owned: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        owned.setdefault(owner, {})[key] = value.clone()
    return owned


def _check_parameters(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], meta: Mapping[str, Any]) -> None:
    saved = {n: (i, shape) for i, group in enumerate(meta["groups"]) for n, shape in group["shapes"].items()}
    here = {_name(p, names): (i, list(p.shape)) for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for name in [*here, *saved]:
        if name not in saved:
            raise ValueError(f"optimizer: parameter {name} is not in the checkpoint; resume with the model it was saved from")
        if name not in here:
            raise ValueError(f"optimizer: the checkpoint has parameter {name}, this model does not train it")
        if here[name] != saved[name]:
            raise ValueError(
                f"optimizer: parameter {name}: the checkpoint has group {saved[name][0]}, shape {saved[name][1]}; "
                f"this model has group {here[name][0]}, shape {here[name][1]}"
            )
    if len(meta["groups"]) != len(optimizer.param_groups):
        raise ValueError(f"optimizer: the checkpoint has {len(meta['groups'])} groups, expected {len(optimizer.param_groups)}")


def rng_state() -> dict[str, Tensor]:
    """The global generators of python, numpy, torch and every initialised CUDA device, as tensors."""
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise ValueError(f"numpy's global generator is {state['bit_generator']}, expected MT19937: mmpo cannot save it")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python.words": torch.tensor([version, *words]),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.tensor([state["state"]["pos"], state["has_gauss"], *state["state"]["key"].tolist()]),
        "numpy.gauss": torch.tensor([state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        **{f"cuda.{i}": device for i, device in enumerate(cuda)},
    }


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Set the generators to what `rng_state` returned; warns when the checkpoint's CUDA devices are not all here."""
    version, *words = tensors["python.words"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python.gauss"].tolist()), None)))
    position, has_gauss, *keys = tensors["numpy.words"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, tensors["numpy.gauss"].item()))
    torch.set_rng_state(tensors["torch"])
    saved, here = sum(k.startswith("cuda.") for k in tensors), torch.cuda.device_count()
    if saved > here:
        warnings.warn(f"the checkpoint has {saved} CUDA generators, this machine {here}: not a bit-identical run", stacklevel=2)
    for i in range(min(saved, here)):
        torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
