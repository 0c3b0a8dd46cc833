"""The `model:` section of diffusion recipes. Imports no torch, so that recipes are checked before anything heavy loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mmpo.schema import Count, Precision, Section

if TYPE_CHECKING:
    from mmpo.pair import Kind

ANSWERS: Kind = "image"
PROMPTS: frozenset[Kind] = frozenset({"text"})
DRAWS: bool = True  # timesteps and noise


class LoraConfig(Section):
    """The low-rank adapter."""

    rank: Count = Field(default=8, description="rank of the update")
    alpha: float | None = Field(default=None, gt=0, description="the update is scaled by alpha / rank; null: alpha = rank")
    targets: list[str] | None = Field(
        default=None, description="names of the adapted layers; null: the family's attention projections"
    )
    path: str | None = Field(
        default=None, description="directory of an adapter to start from, e.g. from supervised fine-tuning"
    )


class ModelConfig(Section):
    """The diffusion model, and how it is trained and sampled."""

    path: str = Field(
        default="embedded", description="diffusers directory or hub id; 'embedded': the small model that mmpo ships"
    )
    family: Literal["auto", "sd", "sdxl", "pixart", "sd3", "flux", "sana", "unet"] = Field(
        default="auto", description="architecture; auto: from the model's own configuration"
    )
    adapter: Literal["lora", "full"] = Field(
        default="lora", description="train a low-rank adapter, or every weight of the denoiser"
    )
    lora: LoraConfig = Field(default=LoraConfig(), description=str(LoraConfig.__doc__))
    dtype: Precision = Field(default="fp32", description="precision of the frozen parts")
    resolution: Count | None = Field(default=None, description="side of a training picture, in pixels; null: the model's own")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass, to save memory"
    )
    allow_download: bool = Field(default=False, description="let a hub id be downloaded; otherwise only local files are read")
    guidance: float = Field(default=5.0, ge=0, description="scale of classifier-free guidance when sampling; 1: none")
    sample_steps: Count = Field(default=20, description="denoiser steps of one sample")

    @property
    def steps(self) -> tuple[int, str]:
        """What a sample takes at most, and of what."""
        return self.sample_steps, "denoiser steps"
