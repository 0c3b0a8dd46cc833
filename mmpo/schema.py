"""What a recipe may say: its sections, their defaults, units and limits, as pydantic models.

A modality adds its own `model:` section (`<modality>_config.py`), a loss its own keyword-only parameters (`mmpo.recipe`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from mmpo import find
from mmpo.errors import RecipeError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "bf16", "fp16"]

_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, numbers are finite, and a boolean is never taken for a number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_stray_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation not in (bool, bool | None, Any):
            raise ValueError("a boolean is no value of this field")
        return value


class PairingConfig(Section):
    """How scored candidates of one prompt become pairs."""

    strategy: Literal["best_worst", "all", "margin", "tournament", "random_below"] = Field(
        default="best_worst", description="which two candidates make a pair"
    )
    margin: float = Field(
        default=0.0, ge=0, description="smallest difference of score between chosen and rejected, in the judge's units"
    )
    max_per_prompt: Count | None = Field(default=None, description="at most this many pairs of one prompt; null: all")
    temperature: float | None = Field(
        None, gt=0, description="label = sigmoid(score gap / temperature); null: labels are certain"
    )


class DataConfig(Section):
    """The preference pairs."""

    path: str | None = Field(
        default=None,
        description="file, directory or hub id; null or 'embedded': the modality's own small world; embedded/NAME: another one",
    )
    format: str | None = Field(
        default=None, description="importer, see `mmpo list datasets.formats`; null: recognised from the columns"
    )
    root: str | None = Field(
        default=None, description="folder that relative media paths start from; null: the data file's folder"
    )
    pairing: PairingConfig | None = Field(
        default=None, description="how scored candidates become pairs; null: rows are pairs already"
    )
    heldout: float = Field(default=0.1, ge=0, lt=1, description="share of the prompts kept out of training, for evaluation")
    on_bad: Literal["refuse", "skip", "quarantine"] = Field(
        default="refuse", description="bad rows stop the run, are skipped and counted, or also kept in quarantine.jsonl"
    )
    bad_budget: Share = Field(default=1.0, description="share of the rows that may be bad before the run is refused")
    prompt_dropout: Share = Field(default=0.0, description="probability that a pair is trained without its prompt")
    limit: Count | None = Field(default=None, description="use only the first so many pairs, or candidates; null: all")
    ties: Literal["drop", "soft"] = Field(default="drop", description="tied rows: leave out, or keep with label 0.5")
    aspect: str | None = Field(
        default=None, description="formats with scores by aspect (ultrafeedback): the one that counts; null: the overall score"
    )
    ches_keep: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="keep this share of the training pairs, those least likely to displace their chosen answer: lowest "
        "length-normalised CHES under the model at the start (tokens only); null: all",
    )
    cache: str | None = Field(default=None, description="folder for encoded media; null: inside the run")


class DrawConfig(Section):
    """Where randomness enters: timesteps, noise and the other conditions of one scoring."""

    mode: Literal["shared", "independent", "inversion", "renoise"] = Field(
        default="shared",
        description="noise of the two sides: the same, one each, from inversion (InPO), or from ReNoise inversion (SmPO)",
    )
    timesteps: Literal["uniform", "logit_normal", "grid"] = Field(default="uniform", description="distribution of the timestep")
    t_min: Share = Field(default=0.0, description="smallest timestep, as a fraction of the schedule")
    t_max: Share = Field(default=1.0, description="largest timestep, as a fraction of the schedule")
    logit_mean: float = Field(default=0.0, description="logit_normal: mean of logit(t)")
    logit_std: float = Field(default=1.0, gt=0, description="logit_normal: standard deviation of logit(t)")
    weight: Literal["constant", "min_snr", "eps"] = Field(default="constant", description="weight w(t) of a timestep's error")
    min_snr_gamma: float = Field(
        default=5.0, gt=0, description="min_snr: the signal-to-noise ratio at which the weight is clipped"
    )
    inversion_steps: Count = Field(
        default=10, description="inversion, renoise: levels of the whole schedule; the drawn one is reached in as many steps"
    )
    inversion_eta: Share = Field(
        default=0.1, description="inversion: fresh noise after each step, as a share of the step's own"
    )
    inversion_model: Literal["policy", "reference"] = Field(
        default="policy", description="inversion, renoise: the model that inverts"
    )
    vae: Literal["mode", "sample"] = Field(
        default="mode", description="latent of a picture: the posterior's mode, or a sample of it"
    )

    @model_validator(mode="after")
    def _ordered(self) -> DrawConfig:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min must not exceed t_max (got {self.t_min} and {self.t_max})")
        return self


class Term(Section):
    """One loss of the objective. Every further key is a parameter of that loss; beta_dpo stands for 1000 beta."""

    model_config = ConfigDict(extra="allow")

    loss: str = Field(description="name of the loss, see `mmpo list losses`")
    of: Annotated[list[str] | None, BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = Field(
        default=None, description="branches in the order of the loss's roles; null: branches named as the roles"
    )
    weight: float = Field(default=1.0, description="factor of this term in the sum")
    reduce: Literal["sum", "mean", "ld"] = Field(
        default="sum",
        description="log-likelihood of a branch over its units: sum, mean per unit, or LD-DPO's sum that discounts length",
    )
    ld_alpha: Share | None = Field(
        default=None, description="reduce ld: what a unit beyond the shorter side's length counts; null: 0.5"
    )
    weights: Literal["none", "spans"] = Field(
        default="none", description="what a unit counts: 1, or what the row's spans say of its characters (Mask-DPO)"
    )
    link: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence"] = Field(
        default="reverse_kl", description="divergence whose derivative turns a log-ratio into a reward"
    )
    link_alpha: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="link alpha_divergence: the f-DPO paper's alpha, which TRL calls 1 - alpha; null: 0.5"
    )

    @model_validator(mode="after")
    def _belongs_to_its_slot(self) -> Term:
        for name, slot, needed in (("ld_alpha", "reduce", "ld"), ("link_alpha", "link", "alpha_divergence")):
            if getattr(self, name) is not None and getattr(self, slot) != needed:
                raise ValueError(f"{name} goes with {slot}: {needed}, and only with it (got {slot}: {getattr(self, slot)})")
        return self


class ReferenceConfig(Section):
    """What the policy is compared with."""

    kind: Literal["none", "start", "adapter_off", "path", "ema"] = Field(
        default="start",
        description="nothing, the policy at step 0, the model without its adapter, another model, or a moving average",
    )
    path: str | None = Field(default=None, description="kind path: directory or hub id of the reference")
    cache: Literal["sums", "tokens", "states"] | None = Field(
        default=None,
        description="keep the reference's scores per (sample, draw) on disk and replay them: their sums, those of each unit "
        "(or true), or hidden states as well, for exact divergences; null or false: no",
    )
    ema_decay: float = Field(default=0.999, gt=0, lt=1, description="kind ema: share of the average kept at each update")
    ema_every: Count = Field(default=1, description="kind ema: optimizer steps between updates")

    @field_validator("cache", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return ("tokens" if value else None) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _path_belongs_to_kind(self) -> ReferenceConfig:
        if (self.path is not None) != (self.kind == "path"):
            raise ValueError(f"path goes with kind: path, and only with it (got kind: {self.kind}, path: {self.path})")
        return self


class JudgeConfig(Section):
    """What scores generations, for evaluation and for further rounds."""

    name: str | None = Field(default=None, description="see `mmpo list judges`; null: the modality's own")
    path: str | None = Field(default=None, description="directory or hub id of the judge's weights")
    options: dict[str, Any] = Field(default={}, description="further arguments of the judge")


class TrainConfig(Section):
    """The loop."""

    steps: Count = Field(default=200, description="optimizer steps of one round")
    batch_size: Count = Field(default=16, description="pairs per device and forward pass")
    accumulate: Count = Field(default=1, description="forward passes per optimizer step")
    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    warmup: int = Field(default=0, ge=0, description="optimizer steps from 0 to the peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="learning rate after the warm-up")
    optimizer: Literal["adamw", "adafactor", "sgd"] = Field(
        default="adamw", description="optimizer; adafactor without relative steps or scaling by the parameter"
    )
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="adamw: decay of the two moments")
    weight_decay: float = Field(default=1e-2, ge=0, description="decoupled weight decay, per unit of learning rate")
    eps: float = Field(default=1e-8, gt=0, description="adamw: added to the denominator")
    clip: float = Field(default=1.0, gt=0, description="largest L2 norm of the whole gradient")
    precision: Precision = Field(default="fp32", description="autocast of the forward pass; losses are always fp32")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of a moving average of the trained weights; null: none"
    )
    save_every: Count = Field(default=50, description="optimizer steps between checkpoints")
    keep: Count = Field(default=2, description="checkpoints kept")
    draws_per_pair: Count | None = Field(
        default=None,
        description="reuse this many draws per pair, so that reference scores can be cached; null: a fresh draw each epoch",
    )
    rounds: Count = Field(default=1, description="rounds of sample, judge, pair and train; 1: train on the given pairs only")
    round_prompts: Count = Field(default=256, description="rounds > 1: training prompts sampled at the start of a round")
    round_candidates: Count = Field(default=6, description="rounds > 1: samples of each of them")
    round_keeps_data: bool = Field(
        default=False, description="rounds > 1: later rounds train on the given pairs as well, not on fresh ones alone"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="a loss or gradient that is not finite: stop, or skip the step"
    )
    nonfinite_budget: Share | None = Field(
        default=None, description="on_nonfinite skip: share of the steps that may be skipped, always one; null: 0.01"
    )
    on_oom: Literal["stop", "halve"] = Field(
        default="stop",
        description="memory ran out in a step: stop with the numbers, or go on with half the batch and twice the accumulation",
    )
    fsdp: bool = Field(
        default=False,
        description="shard parameters, gradients and optimizer state over the processes, which otherwise each hold them whole",
    )


class EvalConfig(Section):
    """Measurements on held-out prompts, during and after training."""

    every: Count = Field(default=50, description="optimizer steps between evaluations")
    prompts: Count = Field(default=48, description="held-out prompts per evaluation during training")
    seeds: Count = Field(default=2, description="samples per prompt during training")
    pairs: Count = Field(default=128, description="held-out pairs per evaluation, drawn by a hash of their content")
    draws: Count = Field(default=8, description="draws per held-out pair for its implicit reward")
    test_prompts: Count = Field(default=64, description="held-out prompts of the final comparison")
    test_seeds: Count = Field(default=3, description="samples per prompt of the final comparison")
    shifted: str | None = Field(
        default=None, description="pairs of another distribution, whose implicit accuracy is measured beside the held-out one"
    )


class Recipe(Section):
    """A whole run."""

    modality: str = Field(default="diffusion", description="what is generated, see `mmpo list modalities`")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything random")
    out: str | None = Field(default=None, description="folder of the run; null: a new one under runs/")
    model: Any = Field(default={}, description="the modality's own section, see `mmpo config explain model`")
    data: DataConfig = Field(default=DataConfig(), description=str(DataConfig.__doc__))
    draw: DrawConfig = Field(default=DrawConfig(), description=str(DrawConfig.__doc__))
    objective: list[Term] = Field(default=[Term(loss="dpo")], min_length=1, description="terms whose weighted sum is the loss")
    reference: ReferenceConfig = Field(default=ReferenceConfig(), description=str(ReferenceConfig.__doc__))
    judge: JudgeConfig = Field(default=JudgeConfig(), description=str(JudgeConfig.__doc__))
    train: TrainConfig = Field(default=TrainConfig(), description=str(TrainConfig.__doc__))
    eval: EvalConfig = Field(default=EvalConfig(), description=str(EvalConfig.__doc__))
    track: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[], description="where metrics go besides the run's own files"
    )


_NOT_IN_SHARDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("train.optimizer", "adafactor".__eq__, "its moments are of whole matrices; use adamw or sgd"),
    ("train.precision", "fp16".__eq__, "its loss scale is not kept for shards; use bf16"),
    ("draw.mode", {"inversion", "renoise"}.__contains__, "processes would call the model different numbers of times"),
    ("model.quantize", {"4bit", "8bit"}.__contains__, "quantized weights cannot be cut; use model.dtype: bf16"),
    ("model.train_layers", lambda value: value is not None, "the layers below are replayed, not gathered"),
    ("model.train", lambda value: value is not None, "images are encoded outside of the model's call, which gathers shards"),
)


def not_in_shards(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe asks for beside train.fsdp that cannot be sharded: dotted key, problem."""
    found = []
    for key, unable, reason in _NOT_IN_SHARDS if recipe.train.fsdp else ():
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name, None)
        if unable(value):
            found.append((key, f"does not go with train.fsdp: {reason} (got {value})"))
    return found


@functools.cache
def recipe_class(modality: str) -> type[Recipe]:
    """`Recipe` with the modality's own class for `model:`. Raises RecipeError for an unknown modality."""
    model = find.model_config(modality)
    return create_model("Recipe", __base__=Recipe, model=(model, Field(default=model(), description=str(model.__doc__))))


def section_at(schema: type[BaseModel], keys: Iterable[str | int]) -> type[BaseModel] | None:
    """The section a key path leads to; list positions are passed over. None where there is no such section."""
    section: type[BaseModel] | None = schema
    for key in keys:
        if isinstance(key, str) and section is not None:
            section = _section(section.model_fields[key].annotation) if key in section.model_fields else None
    return section


def explain(key: str = "", modality: str = "diffusion") -> str:
    """What a dotted key means, with its type, limits and default; for a section, or for no key, all its keys.

    Raises RecipeError for a key that there is not.
    """
    schema, path = recipe_class(modality), [k for k in key.split(".") if k and not k.isdecimal()]
    section = section_at(schema, path)
    if section is not None:
        return "\n".join(_entry(section, name, ".".join([*path, name])) for name in section.model_fields)
    parent = section_at(schema, path[:-1]) or schema
    if path[-1] not in parent.model_fields:
        known = list(parent.model_fields)
        raise RecipeError(f"no setting '{key}' (there are: {', '.join(known)}){find.nearest(path[-1], known)}")
    return _entry(parent, path[-1], key)


def _section(kind: Any) -> type[BaseModel] | None:
    if get_args(kind):
        return next(filter(None, map(_section, get_args(kind))), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _entry(section: type[BaseModel], name: str, shown: str) -> str:
    schema = section.model_json_schema()["properties"][name]
    default = "" if "$ref" in schema or "default" not in schema else f"; default {json.dumps(schema['default'])}"
    return f"{shown}: {_kind(schema)}{default}\n    {section.model_fields[name].description}"


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(schema["enum"])
    if "anyOf" in schema:
        return " | ".join(map(_kind, schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    limits = [f"{sign} {schema[limit]}" for limit, sign in _LIMITS.items() if limit in schema]
    return " ".join([schema.get("type", "section" if "$ref" in schema else "any"), *limits])
