"""The `model:` section of recipes for vision-language models. Imports no torch, as all configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from mmpo.modalities import text_config
from mmpo.schema import Count, Section

if TYPE_CHECKING:
    from mmpo.pair import Kind

ANSWERS: Kind = "text"
PROMPTS: frozenset[Kind] = frozenset({"text", "image"})
DRAWS: bool = False  # the likelihood is exact


class ImagesConfig(Section):
    """Images of prompts and answers."""

    max_pixels: Count | None = Field(
        default=None, description="images are made smaller than this before the processor sees them; null: as they are"
    )
    pad_to_square: bool = Field(
        default=False,
        description="pad images to squares, as LLaVA-1.5's own code does; transformers' processor of it cuts their sides off",
    )
    too_long: Literal["resize", "skip", "error"] = Field(
        default="resize",
        description="a pair with images over max_length: its images are made smaller until it fits (and it is left out where "
        "they cannot be), it is left out, or it is an error",
    )
    store: bool = Field(
        default=True, description="keep every image's features on disk; otherwise each step encodes its images once"
    )


class ModelConfig(text_config.ModelConfig):
    """A vision-language model of transformers, and how it trains."""

    train: Literal["language", "language+projector"] = Field(
        default="language", description="what trains beside the language model; the vision tower never does"
    )
    images: ImagesConfig = Field(default=ImagesConfig(), description=str(ImagesConfig.__doc__))

    @model_validator(mode="after")
    def _whole_language_model(self) -> ModelConfig:
        if self.train_layers is not None:
            raise ValueError("train_layers: the states below cannot be kept where images enter them; leave it out")
        return self
