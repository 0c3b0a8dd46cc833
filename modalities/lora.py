"""Low-rank adapters on a denoiser: a fresh one, or one that continues an adapter file in diffusers' format."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from mmpo.modalities.families import Loaded
from mmpo.modalities.quiet import quietly
from mmpo.weights import loading


def wrap(loaded: Loaded, config: Any) -> nn.Module:
    """The denoiser with a trainable LoRA (arXiv 2106.09685); everything else is frozen. config: `LoraConfig` of the recipe.

    A fresh adapter starts with B = 0 and so changes nothing. Raises ValueError when no layer has a target's name.
    """
    import peft

    if not loaded.family.lora_targets and not config.targets:
        name = type(loaded.denoiser).__name__
        raise ValueError(f"model.adapter: diffusers loads no LoRA into a {name}; use model.adapter: full")
    loaded.denoiser.requires_grad_(False)
    spec = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        init_lora_weights="gaussian",
        target_modules=config.targets or loaded.lora_targets,
    )
    model = peft.get_peft_model(loaded.denoiser, spec)
    if config.path:
        _continue(loaded, model, config.path)
    return model


def _continue(loaded: Loaded, model: Any, path: str) -> None:
    """Copy an exported adapter into the wrapped model. Every tensor has to find its place."""
    from peft import set_peft_model_state_dict

    read = _of_diffusers if hasattr(loaded.pipe, "lora_state_dict") else _of_peft
    layers = read(loaded, model, path)
    try:
        result = set_peft_model_state_dict(model, layers)
    except RuntimeError as error:
        raise ValueError(f"model.lora.path {path}: does not fit this adapter (model.lora.rank, targets): {error}") from error
    missing = [k for k in result.missing_keys if "lora_" in k]
    if result.unexpected_keys or missing or not layers:
        raise ValueError(
            f"model.lora.path {path}: does not fit this adapter (rank, targets): {len(missing)} layers missing, "
            f"{len(result.unexpected_keys)} unknown, e.g. {(missing + list(result.unexpected_keys) + ['no layers'])[0]}"
        )


def _of_diffusers(loaded: Loaded, model: Any, path: str) -> dict[str, Tensor]:
    """The layers in `pytorch_lora_weights.safetensors`, by peft's names."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    options = {"use_safetensors": True, "local_files_only": True, "return_lora_metadata": True}
    with loading(path, "a LoRA adapter as safetensors"):
        state, *alphas, metadata = loaded.pipe.lora_state_dict(path, **options)
    prefix = loaded.family.denoiser + "."
    _check_alpha(
        model, path, {k: v for part in (state, *alphas, metadata) for k, v in (part or {}).items() if k.startswith(prefix)}
    )
    layers = convert_unet_state_dict_to_peft({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return {f"base_model.model.{k}": v for k, v in layers.items() if not k.endswith(".alpha")}


def _of_peft(loaded: Loaded, model: Any, path: str) -> dict[str, Tensor]:
    """The layers in `adapter_model.safetensors`, peft's own layout, which is what `save_lora` writes for PixArt."""
    file, settings = (Path(path) / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    if not (file.is_file() and settings.is_file()):
        raise ValueError(f"model.lora.path {path}: expected a directory with {file.name} and {settings.name}")
    _check_alpha(model, path, {".lora_alpha": json.loads(settings.read_text())["lora_alpha"]})
    with loading(file, "a LoRA adapter as safetensors"):
        return load_file(file)


def _check_alpha(model: Any, path: str, entries: dict[str, Any]) -> None:
    """The file's own scale has to be the recipe's: with another alpha the same weights are another model."""
    spec = model.peft_config["default"]
    recorded = {float(v) for k, v in entries.items() if k.endswith((".alpha", ".lora_alpha"))}
    found = recorded or {float(spec.r)}  # diffusers' own rule for a file that does not say: alpha = rank
    if found != {float(spec.lora_alpha)}:
        raise ValueError(
            f"model.lora.path {path}: trained with alpha {', '.join(f'{a:g}' for a in sorted(found))}, this one has "
            f"alpha {spec.lora_alpha:g}; set model.lora.alpha to the adapter's"
        )


def save_merged(loaded: Loaded, model: Any, folder: Path) -> None:
    """Write the whole pipeline with the adapter folded into the denoiser's weights; the model itself keeps its adapter."""
    merged = copy.deepcopy(model).merge_and_unload()
    plain = dataclasses.replace(loaded, denoiser=merged, pipe=copy.copy(loaded.pipe))
    setattr(plain.pipe, loaded.family.denoiser, merged)
    plain.save_full(folder)


@quietly()
def reload(base: Loaded, folder: Path, whole: bool) -> nn.Module:
    """The denoiser as plain diffusers gets it from an export, whole or as an adapter on `base`."""
    if whole:
        pipe = type(base.pipe).from_pretrained(str(folder), use_safetensors=True, torch_dtype=base.dtype)
        return getattr(pipe, base.family.denoiser)
    if hasattr(base.pipe, "load_lora_weights"):
        base.pipe.load_lora_weights(str(folder))
        return getattr(base.pipe, base.family.denoiser)
    from peft import PeftModel

    return PeftModel.from_pretrained(base.denoiser, str(folder))
