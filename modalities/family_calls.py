"""How each family encodes its prompts and how its denoiser is called: the rows of the table FAMILIES.

Every function takes a `Loaded` checkpoint (mmpo.modalities.families), which is also what users see; nothing here is public.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmpo.modalities.families import Loaded

Conditions = dict[str, Tensor]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Family:
    """What is particular to one family.

    pipelines: diffusers class names it answers to. denoiser: the pipeline's component that trains.
    encode: (loaded, prompts) -> batched conditions. predict: (loaded, model, latents, t, conditions) -> raw prediction.
    packing: side of the latent patches packed into one token outside the transformer. sized: whether a denoiser with
    this configuration is conditioned on picture sizes. options: further arguments of `from_pretrained`.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: Literal["unet", "transformer"]
    encode: Callable[[Loaded, list[str]], Conditions]
    predict: Callable[[Loaded, nn.Module, Tensor, Tensor, Conditions], Tensor]
    lora_targets: tuple[str, ...] = ()
    packing: int = 1
    sized: Callable[[Mapping[str, Any]], bool] = lambda config: False
    options: Mapping[str, Any] = field(default_factory=dict)


def call_default(pipe: Any, name: str) -> Any:
    """The default of an argument of the pipeline's own call, or None when it has no such argument."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    return parameter.default if parameter else None


def _model_time(loaded: Loaded, t: Tensor) -> Tensor:
    """Sigma counted in training steps, which is what most flow transformers were trained on."""
    return (t * loaded.process.num_train_timesteps).float()


def pixart_sized(config: Mapping[str, Any]) -> bool:
    flag = config.get("use_additional_conditions")
    return config.get("sample_size") == 128 if flag is None else bool(flag)


def _sd_encode(loaded: Loaded, prompts: list[str]) -> Conditions:
    embeds, _ = loaded.pipe.encode_prompt(prompts, loaded.pipe.text_encoder.device, 1, False)
    return {"prompt_embeds": embeds}


def _sd_predict(loaded: Loaded, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    return model(latents, t, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False)[0]


def _sdxl_encode(loaded: Loaded, prompts: list[str]) -> Conditions:
    embeds, _, pooled, _ = loaded.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    if loaded.pipe.config.force_zeros_for_empty_prompt:
        keep = torch.tensor([p != "" for p in prompts], device=embeds.device, dtype=embeds.dtype)
        embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
    return {"prompt_embeds": embeds, "pooled": pooled}


def _sdxl_predict(loaded: Loaded, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    added = {"text_embeds": conditions["pooled"], "time_ids": conditions["size"].to(latents.dtype)}
    embeds = conditions["prompt_embeds"]
    return model(latents, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]


def _pixart_encode(loaded: Loaded, prompts: list[str]) -> Conditions:
    embeds, mask, _, _ = loaded.pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=loaded.text_length
    )
    return {"prompt_embeds": embeds, "mask": mask}


def _pixart_predict(loaded: Loaded, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if pixart_sized(loaded.config):
        target = conditions["size"][:, 4:].to(latents.dtype)
        added = {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}
    return model(
        latents,
        encoder_hidden_states=conditions["prompt_embeds"],
        encoder_attention_mask=conditions["mask"],
        timestep=t,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _sd3_encode(loaded: Loaded, prompts: list[str]) -> Conditions:
    embeds, _, pooled, _ = loaded.pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=loaded.text_length
    )
    return {"prompt_embeds": embeds, "pooled": pooled}


def _sd3_predict(loaded: Loaded, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    return model(
        hidden_states=latents,
        timestep=_model_time(loaded, t),
        encoder_hidden_states=conditions["prompt_embeds"],
        pooled_projections=conditions["pooled"],
        return_dict=False,
    )[0]


def _flux_encode(loaded: Loaded, prompts: list[str]) -> Conditions:
    embeds, pooled, _ = loaded.pipe.encode_prompt(prompts, max_sequence_length=loaded.text_length)
    return {"prompt_embeds": embeds, "pooled": pooled}


def _flux_predict(loaded: Loaded, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    embeds = conditions["prompt_embeds"]
    output = model(
        hidden_states=pack(latents),
        timestep=t.float(),  # sigma itself: the transformer multiplies by 1000
        guidance=conditions.get("guidance"),
        pooled_projections=conditions["pooled"],
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=latents.dtype),
        img_ids=image_ids.to(latents.device, latents.dtype),
        return_dict=False,
    )[0]
    return unpack(output, height, width)


def pack(latents: Tensor) -> Tensor:
    """(N, C, 2h, 2w) -> (N, h w, 4 C): FLUX's tokens are 2 x 2 patches, channels outermost."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (N, height width, 4 C) -> (N, C, 2 height, 2 width)."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


def _sana_encode(loaded: Loaded, prompts: list[str]) -> Conditions:
    """The pipeline puts its long instruction before every prompt except the empty, unconditional one."""
    instruction = call_default(loaded.pipe, "complex_human_instruction")
    rows = [_sana_row(loaded, prompt, instruction if prompt else None) for prompt in prompts]
    return {"prompt_embeds": torch.cat([e for e, _ in rows]), "mask": torch.cat([m for _, m in rows])}


def _sana_row(loaded: Loaded, prompt: str, instruction: list[str] | None) -> tuple[Tensor, Tensor]:
    embeds, mask, _, _ = loaded.pipe.encode_prompt(
        prompt,
        do_classifier_free_guidance=False,
        max_sequence_length=loaded.text_length,
        complex_human_instruction=instruction,
    )
    return embeds, mask


def _sana_predict(loaded: Loaded, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    return model(
        latents,
        encoder_hidden_states=conditions["prompt_embeds"],
        encoder_attention_mask=conditions["mask"],
        timestep=_model_time(loaded, t) * loaded.config["timestep_scale"],
        return_dict=False,
    )[0]


def _unet_encode(loaded: Loaded, prompts: list[str]) -> Conditions:
    if loaded.config.get("num_class_embeds") is None:
        _refuse_prompts(prompts)
        return {"unconditional": torch.zeros(len(prompts), dtype=torch.long)}
    return {"class_labels": torch.tensor([_label(loaded, p) for p in prompts])}


def _refuse_prompts(prompts: list[str]) -> None:
    given = next((p for p in prompts if p), None)
    if given is not None:
        raise ValueError(f"prompt {given!r}: this UNet has no class embedding and would ignore it; expected an empty prompt")


def _label(loaded: Loaded, prompt: str) -> int:
    """The index of a class, from its name in labels.json or its decimal number."""
    count = int(loaded.config["num_class_embeds"])
    if prompt in loaded.labels:
        return loaded.labels.index(prompt)
    if prompt.isdecimal() and int(prompt) < count:
        return int(prompt)
    hint = "the checkpoint has no null class: list '' in its labels.json" if prompt == "" else "see its labels.json"
    raise ValueError(f"prompt {prompt!r}: expected a class name or a number from 0 to {count - 1}; {hint}")


def _unet_predict(loaded: Loaded, model: nn.Module, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    return model(latents, t, class_labels=conditions.get("class_labels"), return_dict=False)[0]


FAMILIES = {
    f.name: f
    for f in (
        Family(
            "sd", ("StableDiffusionPipeline",), "unet", _sd_encode, _sd_predict, ATTENTION,
            options={"safety_checker": None, "requires_safety_checker": False},
        ),
        Family(
            "sdxl", ("StableDiffusionXLPipeline",), "unet", _sdxl_encode, _sdxl_predict, ATTENTION, sized=lambda config: True
        ),
        Family(
            "pixart", ("PixArtAlphaPipeline", "PixArtSigmaPipeline"), "transformer", _pixart_encode, _pixart_predict, ATTENTION,
            sized=pixart_sized,
        ),
        Family("sd3", ("StableDiffusion3Pipeline",), "transformer", _sd3_encode, _sd3_predict, JOINT_ATTENTION),
        Family("flux", ("FluxPipeline",), "transformer", _flux_encode, _flux_predict, JOINT_ATTENTION, packing=2),
        Family("sana", ("SanaPipeline",), "transformer", _sana_encode, _sana_predict, ATTENTION),
        Family("unet", ("DDPMPipeline", "DDIMPipeline"), "unet", _unet_encode, _unet_predict),
    )
}  # fmt: skip
