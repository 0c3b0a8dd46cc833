"""Everything that differs between families of image diffusion models, behind one small interface.

Seven things differ and nothing else: latent packing, latent scaling, the noise process and its target, the number passed
as the timestep, the names of the conditioning arguments, the output's post-processing, and how prompts are encoded. Each
family is therefore two functions and a few names (family_calls.py); `Loaded` is one checkpoint with its family's rules.

Conditions are dictionaries of tensors: without batch dimension after `encode_prompts` (so they can be cached), batched
after `collate`. The empty prompt stands for the dropped condition and follows each family's rule at inference: the empty
string's encoding, zeros for SDXL where the checkpoint says so, no instruction for Sana, the null class for class labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmpo.modalities.family_calls import FAMILIES, Conditions, Family, call_default
from mmpo.modalities.noise import NoiseProcess
from mmpo.modalities.quiet import quietly
from mmpo.weights import CLOSED, check_place, loading

Generators = torch.Generator | list[torch.Generator] | None
LIBRARIES = {None, "diffusers", "transformers", "stable_diffusion"}


class Size(NamedTuple):
    """How a training picture was cut from its original, in pixels: SDXL's six time ids, in order."""

    original_height: int
    original_width: int
    crop_top: int
    crop_left: int
    target_height: int
    target_width: int

    @classmethod
    def square(cls, resolution: int) -> Size:
        """An uncropped square picture, which is also what sampling asks for."""
        return cls(resolution, resolution, 0, 0, resolution, resolution)


@dataclass(eq=False)
class Loaded:
    """One checkpoint: the pipeline, the module in it that trains, and the family's rules.

    config: the denoiser's own configuration, kept because the model passed to `denoise` may be wrapped. dtype: of the
    denoiser and the text encoders; the VAE always runs in fp32. text_length: tokens per prompt for T5 and Gemma.
    labels: names of the classes of a class-conditional model. distilled_guidance: fed to guidance-distilled FLUX.
    """

    pipe: Any
    denoiser: nn.Module
    process: NoiseProcess
    family: Family
    dtype: torch.dtype
    config: Mapping[str, Any]
    text_length: int | None = None
    labels: tuple[str, ...] = ()
    distilled_guidance: float = 3.5

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def lora_targets(self) -> list[str]:
        """Default target modules of a LoRA: the attention projections."""
        return list(self.family.lora_targets)

    def to(self, device: torch.device | str) -> Loaded:
        """Move the whole pipeline and the process's table; returns self."""
        self.pipe.to(device)
        self.process = self.process.to(device)
        return self

    # Pictures ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, mode: Literal["mode", "sample"] = "mode", generator: Generators = None) -> Tensor:
        """Scaled fp32 latents of pixels (N, 3, H, W) in [-1, 1].

        mode: the posterior's mode, or a sample drawn with `generator` (one, or one per picture). Deterministic autoencoders
        (Sana's DC-AE) and pixel models have no posterior: both modes are the same there.
        """
        if self.vae is None:
            return pixels.float()
        encoded = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
        latents = encoded.latent if hasattr(encoded, "latent") else _draw(encoded.latent_dist, mode, generator)
        scale, shift = self._scaling
        return (latents - shift).float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) fp32 in [0, 1] of scaled latents."""
        if self.vae is not None:
            scale, shift = self._scaling
            latents = self.vae.decode((latents / scale + shift).to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return (latents.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square picture. ValueError when the resolution does not divide."""
        if self.vae is None:
            return int(self.config["in_channels"]), resolution, resolution
        factor = int(self.pipe.vae_scale_factor)
        multiple = factor * self._patch
        if resolution % multiple:
            raise ValueError(f"resolution: {self.family.name} needs a multiple of {multiple} pixels, got {resolution}")
        return int(self.vae.config.latent_channels), resolution // factor, resolution // factor

    # Prompts -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditions]:
        """One dictionary of unbatched tensors per prompt; "" is the dropped condition. Prompts are not cleaned."""
        batch = self.family.encode(self, list(prompts))
        return [{k: v[i] for k, v in batch.items()} for i in range(len(prompts))]

    def collate(self, conditions: Sequence[Conditions], sizes: Sequence[Size] | None = None) -> Conditions:
        """Conditions batched on the denoiser's device, plus what the family derives from each member's size.

        sizes: required by SDXL (time ids) and by PixArt checkpoints with resolution conditioning.
        """
        batch = {k: torch.stack([c[k] for c in conditions]).to(self.device) for k in conditions[0]}
        needs_sizes = self.family.sized(self.config)
        if needs_sizes and (sizes is None or len(sizes) != len(conditions)):
            received = "none" if sizes is None else len(sizes)
            raise ValueError(f"{self.family.name}: needs one size per picture: expected {len(conditions)}, got {received}")
        if needs_sizes:
            batch["size"] = torch.tensor(sizes, device=self.device)
        if self.config.get("guidance_embeds"):
            batch["guidance"] = torch.full((len(conditions),), self.distilled_guidance, device=self.device)
        return batch

    # The denoiser ------------------------------------------------------------------------------------------------------

    def denoise(self, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The native prediction (see `process.target`) at noisy latents (N, ...) and times t (N,), at least fp32."""
        dtype = self.dtype
        cast = {k: v.to(dtype) if v.is_floating_point() and k != "guidance" else v for k, v in conditions.items()}
        prediction = self.family.predict(self, model, latents.to(dtype), t, cast)
        if prediction.shape[1] == 2 * latents.shape[1]:  # the second half is a learned variance
            prediction = prediction.chunk(2, dim=1)[0]
        return prediction.to(torch.promote_types(latents.dtype, torch.float32))

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        conditions: Conditions,
        noise: Tensor,
        *,
        steps: int,
        guidance: float = 1.0,
        uncond: Conditions | None = None,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents sampled deterministically from `noise` (DDIM with eta = 0 for VP, Euler for flow).

        guidance: classifier-free scale, 1 is off; it needs the collated `uncond`. Guidance-distilled models take the scale
        as an input instead and need no `uncond`. watch: called after every step with how many are done.
        """
        if self.config.get("guidance_embeds") and uncond is None:
            conditions = conditions | {"guidance": torch.full_like(conditions["guidance"], guidance)}
        elif guidance != 1 and uncond is None:
            raise ValueError(f"sampling: guidance {guidance} needs the unconditional conditions, got none; set guidance to 1")
        times = self.process.levels(steps, tokens=self.tokens(noise)).to(noise.device)
        latents = noise
        for i, level in enumerate(times):
            t = level.expand(len(noise))
            output = self._guided(model, latents, t, conditions, uncond if guidance != 1 else None, guidance)
            t_next = times[i + 1].expand(len(noise)) if i + 1 < steps else None
            latents = self.process.step(latents, output, t, t_next)
            if watch is not None:
                watch(i + 1)
        return latents

    def _guided(
        self, model: nn.Module, x: Tensor, t: Tensor, conditions: Conditions, uncond: Conditions | None, guidance: float
    ) -> Tensor:
        if uncond is None:
            return self.denoise(model, x, t, conditions)
        both = {k: torch.cat([uncond[k], v]) for k, v in conditions.items()}
        without, given = self.denoise(model, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + guidance * (given - without)

    # Files -------------------------------------------------------------------------------------------------------------

    def save_lora(self, model: nn.Module, folder: Path | str, adapter: str = "default") -> None:
        """Write one LoRA adapter of a denoiser, wrapped by peft or injected into it, for plain diffusers.

        The file is `pytorch_lora_weights.safetensors`, for `Pipeline.load_lora_weights(folder)`. PixArt's pipelines have no
        such method: there it is peft's own layout, for `PeftModel.from_pretrained(pipe.transformer, folder)`. ValueError
        for pixel-space models, which nothing loads a LoRA into.
        """
        from accelerate.utils import extract_model_from_parallel
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import PeftModel, get_peft_model_state_dict

        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        self._check_lora(inner, adapter)
        if isinstance(inner, PeftModel) and not hasattr(self.pipe, "save_lora_weights"):
            return inner.save_pretrained(str(folder), selected_adapters=[adapter])
        layers = {
            k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(inner, adapter_name=adapter).items()
        }
        if self.family.denoiser == "unet":
            layers = convert_state_dict_to_diffusers(layers)
        names = {f"{self.family.denoiser}_lora_layers": layers}
        names[f"{self.family.denoiser}_lora_adapter_metadata"] = _metadata(inner.peft_config[adapter])
        self.pipe.save_lora_weights(str(folder), **names)

    def _check_lora(self, inner: Any, adapter: str) -> None:
        if not self.family.lora_targets:
            name = type(self.denoiser).__name__
            raise ValueError(f"save LoRA: diffusers loads no LoRA into a {name}; train it in full and use save_full")
        if adapter not in getattr(inner, "peft_config", {}):
            raise ValueError(
                f"save LoRA: expected a model with a peft adapter {adapter!r}, got a {type(inner).__name__} without"
            )

    @quietly()
    def save_full(self, folder: Path | str) -> None:
        """Write the whole pipeline, with the denoiser as it is now, as safetensors. A safety checker is not included."""
        if any("lora_" in name for name, _ in self.denoiser.named_parameters()):
            raise ValueError("save full: the denoiser carries a LoRA; use save_lora, or merge and unload the adapter first")
        self.pipe.save_pretrained(str(folder), safe_serialization=True)
        if self.labels:
            (Path(folder) / "labels.json").write_text(json.dumps(self.labels, ensure_ascii=False))

    @cached_property
    def _frozen(self) -> dict[str, Any]:
        return {k: v for k, v in self.pipe.components.items() if k not in (self.family.denoiser, "scheduler") and v is not None}

    def digest(self) -> str:
        """A hash of every frozen encoder's configuration, vocabulary and weights: part of the key of cached encodings."""
        h = hashlib.blake2b(f"{self.family.name} {self.text_length} {self.labels}".encode(), digest_size=16)
        for name, part in sorted(self._frozen.items()):
            if isinstance(part, nn.Module):
                h.update(f"{name} {json.dumps(_config(part), sort_keys=True, default=str)}".encode())
                for key, value in sorted(part.state_dict().items()):
                    h.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                    h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            elif hasattr(part, "get_vocab"):
                h.update(f"{name} {sorted(part.get_vocab().items())} {part.model_max_length}".encode())
        return h.hexdigest()

    def settings(self) -> str:
        """Everything but weights that the denoiser's prediction and its target depend on, as text."""
        configs = [{k: v for k, v in c.items() if k != "_name_or_path"} for c in (self.config, self.pipe.scheduler.config)]
        return json.dumps([*configs, str(self.dtype), self.distilled_guidance], default=str, sort_keys=True)

    # Facts about the checkpoint ----------------------------------------------------------------------------------------

    @property
    def vae(self) -> Any:
        """The autoencoder, or None for a pixel-space model."""
        return getattr(self.pipe, "vae", None)

    @property
    def _scaling(self) -> tuple[float, float]:
        config = self.vae.config
        return float(config.scaling_factor), float(config.get("shift_factor") or 0.0)

    @property
    def _patch(self) -> int:
        return self.family.packing * int(self.config.get("patch_size") or 1)

    def tokens(self, latents: Tensor) -> int:
        """Number of tokens a transformer sees of latents (N, C, h, w): what a dynamic timestep shift depends on."""
        return latents.shape[-1] * latents.shape[-2] // self._patch**2


def load(
    path: str,
    *,
    family: str = "auto",
    dtype: torch.dtype = torch.float32,
    allow_download: bool = False,
    text_length: int | None = None,
) -> Loaded:
    """Load a diffusers checkpoint from a directory, or from the hub by id when downloads are allowed.

    Only safetensors are read and no code that comes with the checkpoint is run. family: checked against the checkpoint's
    pipeline class unless "auto". text_length: tokens per prompt for T5 and Gemma encoders; None is the pipeline's own.
    ValueError says what the directory lacks or which class is not supported.
    """
    import diffusers

    index = _model_index(path, allow_download)
    chosen = _family_of(index, family, path)
    cls = getattr(diffusers, index["_class_name"])
    precision = {"default": dtype, "vae": torch.float32} if "vae" in index else dtype
    options = {"torch_dtype": precision, "use_safetensors": True, "local_files_only": not allow_download, **chosen.options}
    with loading(path, f"a {index['_class_name']} that loads from safetensors"), quietly(downloads=allow_download):
        pipe = cls.from_pretrained(path, **options)
    _check_vae(pipe, path)
    denoiser = getattr(pipe, chosen.denoiser)
    return Loaded(
        pipe=pipe,
        denoiser=denoiser,
        process=NoiseProcess.from_scheduler_config(pipe.scheduler.config, type(pipe.scheduler).__name__),
        family=chosen,
        dtype=dtype,
        config=dict(denoiser.config),
        text_length=text_length or call_default(pipe, "max_sequence_length"),
        labels=_labels(path),
    )


def _model_index(path: str, allow_download: bool) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    if Path(path).is_dir():
        file = Path(path) / "model_index.json"
        if not file.is_file():
            raise ValueError(f"{path}: has no model_index.json; expected a directory written by a diffusers pipeline")
    else:
        check_place(path)
        try:
            file = Path(hf_hub_download(path, "model_index.json", local_files_only=not allow_download))
        except Exception as error:  # the hub client raises a dozen unrelated types: bad id, offline, gated, not found
            reason = type(error).__name__ if allow_download else CLOSED
            raise ValueError(f"{path}: expected a diffusers checkpoint; {reason}") from error
    index = json.loads(file.read_text())
    for part, source in index.items():
        if isinstance(source, list) and source[0] not in LIBRARIES:
            raise ValueError(
                f"{file}: component {part!r} comes from {source[0]!r}: checkpoints with their own code are refused"
            )
    return index


def _family_of(index: Mapping[str, Any], family: str, path: str) -> Family:
    name = index.get("_class_name")
    found = next((f for f in FAMILIES.values() if name in f.pipelines), None)
    if found is None:
        known = ", ".join(p for f in FAMILIES.values() for p in f.pipelines)
        raise ValueError(f"{path}: pipeline class {name!r} is not supported; expected one of {known}")
    if family not in ("auto", found.name):
        raise ValueError(f"{path}: is a {name} of family {found.name!r}, but family {family!r} was asked for")
    return found


def _check_vae(pipe: Any, path: str) -> None:
    """Refuse per-channel latent statistics, which would need another scaling."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError(f"{path}: its VAE has per-channel latents_mean/latents_std, which no supported family uses")


def _labels(path: str) -> tuple[str, ...]:
    file = Path(path) / "labels.json"
    return tuple(json.loads(file.read_text())) if file.is_file() else ()


def _draw(posterior: Any, mode: str, generator: Generators) -> Tensor:
    if mode not in ("mode", "sample"):
        raise ValueError(f"encode_images: mode {mode!r} is not known; expected 'mode' or 'sample'")
    return posterior.mode() if mode == "mode" else posterior.sample(generator)


def _config(part: Any) -> dict[str, Any]:
    """A component's configuration without where it came from."""
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else part.config
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _metadata(config: Any) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
