"""The `model:` section of text recipes. Imports no torch, so that recipes are checked before anything heavy loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mmpo.schema import Count, Precision, Section

if TYPE_CHECKING:
    from mmpo.pair import Kind

ANSWERS: Kind = "text"
PROMPTS: frozenset[Kind] = frozenset({"text"})
DRAWS: bool = False  # the likelihood is exact


class LoraConfig(Section):
    """The low-rank adapter. It has no dropout: policy and reference have to be one function at the start."""

    rank: Count = Field(default=16, description="rank of the update")
    alpha: float | None = Field(default=None, gt=0, description="the update is scaled by alpha / rank; null: alpha = rank")
    targets: list[str] | None = Field(
        default=None, description="names of the adapted layers; null: all linear layers but the head"
    )
    path: str | None = Field(
        default=None, description="directory of a peft adapter to start from, e.g. from supervised fine-tuning"
    )


class SampleConfig(Section):
    """How answers are generated."""

    max_new_tokens: Count = Field(default=256, description="longest answer, in tokens")
    temperature: float = Field(default=1.0, ge=0, description="of the softmax over the vocabulary; 0: the likeliest token")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")


class ModelConfig(Section):
    """The language model, its chat turns, and how it is trained and sampled."""

    path: str = Field(
        default="embedded",
        description="transformers directory or hub id; 'embedded': the small model that mmpo ships; asset:NAME: one that "
        "`mmpo assets add NAME` fetched",
    )
    adapter: Literal["lora", "full"] = Field(default="lora", description="train a low-rank adapter, or every weight")
    lora: LoraConfig = Field(default=LoraConfig(), description=str(LoraConfig.__doc__))
    train_layers: Count | None = Field(
        default=None,
        description="train only the last so many layers; the states below are computed once per pair and kept; null: all",
    )
    quantize: Literal["none", "4bit", "8bit"] = Field(
        default="none", description="precision of the frozen weights beneath a LoRA (QLoRA), by bitsandbytes, on a GPU"
    )
    dtype: Precision = Field(default="fp32", description="precision of the frozen weights")
    gradient_checkpointing: bool | None = Field(
        default=None, description="recompute activations in the backward pass; null: where memory would not do otherwise"
    )
    allow_download: bool = Field(default=False, description="let a hub id be downloaded; otherwise only local files are read")
    layout: Literal["auto", "shared", "packed", "padded"] = Field(
        default="auto",
        description="rows of one model call: a prompt once for both answers, a row per answer end to end, or padded rows",
    )
    chat_template: str | None = Field(default=None, description="file of a Jinja chat template; null: the tokenizer's own")
    template_options: dict[str, Any] = Field(
        default={}, description="further variables of the chat template, e.g. enable_thinking: false"
    )
    chat_markup: Literal["as_text", "as_tokens"] = Field(
        default="as_text",
        description="what a row's own text means where it spells a special token such as <|im_end|>: its characters, or the "
        "token, for data that were written through a chat template already",
    )
    end_of_turn: Literal["supervise", "leave_out"] = Field(
        default="supervise", description="whether the token that ends an answer is part of its likelihood"
    )
    max_length: Count | None = Field(
        default=None, description="tokens of a prompt with its longer answer; null: the model's context"
    )
    max_response: Count | None = Field(
        default=None, description="tokens of an answer; longer ones are cut and lose their end of turn; null: never cut"
    )
    too_long: Literal["skip", "keep_end", "refuse"] = Field(
        default="skip", description="a pair over max_length: left out and counted, its prompt's start dropped, or an error"
    )
    sample: SampleConfig = Field(default=SampleConfig(), description=str(SampleConfig.__doc__))

    @property
    def steps(self) -> tuple[int, str]:
        """What a sample takes at most, and of what."""
        return self.sample.max_new_tokens, "tokens"

    @model_validator(mode="after")
    def _quantized_weights_stay(self) -> ModelConfig:
        if self.quantize != "none" and self.adapter == "full":
            raise ValueError(f"quantize: {self.quantize} keeps the weights frozen; it goes with adapter: lora")
        return self
