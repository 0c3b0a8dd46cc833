"""A causal language model's files: loading it, its head, what of it trains, and exports that plain libraries load."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpo import sharding
from mmpo.errors import MissingExtra
from mmpo.kernels.prefix import causal, forward_padded, pack
from mmpo.kernels.token_stats import Head
from mmpo.modalities.quiet import quietly
from mmpo.modalities.text_trunk import layers_of
from mmpo.weights import check_place, loading

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(
    path: str, dtype: torch.dtype, *, quantize: str = "none", allow_download: bool = False, auto: str = "AutoModelForCausalLM"
) -> Any:
    """The model of a transformers directory or hub id, in evaluation mode: safetensors only, none of its own code is run.

    auto: the class of transformers that loads it.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": not allow_download}
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, dtype)
    check_place(path)
    kind = "causal " if auto == "AutoModelForCausalLM" else "vision-"
    with loading(path, f"a {kind}language model as safetensors"), quietly(downloads=allow_download):
        return getattr(transformers, auto).from_pretrained(path, trust_remote_code=False, **options).eval()


def load_tokenizer(path: str, template: str | None = None, allow_download: bool = False) -> Any:
    """The tokenizer beside a model. template: a file whose Jinja text takes the place of its chat template."""
    with loading(path, "a tokenizer"), quietly(downloads=allow_download):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=not allow_download
        )
    if template is not None:
        tokenizer.chat_template = read_template(template)
    return tokenizer


def read_template(path: str) -> str:
    """The chat template of a file that the recipe names."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"model.chat_template {path[:200]}: {error.strerror}; expected a file of a Jinja template") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"model.chat_template {path}: not UTF-8 text ({error}); expected a Jinja template") from error


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings: NF4 with doubly quantized scales (QLoRA, arXiv 2305.14314), or LLM.int8 (arXiv 2208.07339)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize")
    if bits == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **nf4)


def settings_of(model: Any) -> str:
    """Names the configuration: what it changes is not all in the weights. Where and by what it was written is left out."""
    told = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def context_of(model: nn.Module) -> int | None:
    """Tokens the model can read, where its configuration says so."""
    return getattr(causal(model).config.get_text_config(), "max_position_embeddings", None)


def head_of(model: nn.Module) -> Head:
    """What turns final hidden states into logits, of a model that may be wrapped by peft or DistributedDataParallel.

    Of a model in shards it has a gradient after the forward pass, which leaves it gathered for the backward pass.
    """
    inner = causal(model)
    layer, config = inner.get_output_embeddings(), inner.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(layer, "bias", None)
    weight, bias = sharding.whole(layer.weight), None if bias is None else sharding.whole(bias)
    return Head(weight, bias, getattr(config, "final_logit_softcapping", None), scale)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the model's own logits of a few tokens with those of `head_of`.

    ValueError for a model that does something else on the way from its last hidden state to its logits, or whose head has
    an adapter or is quantized: its likelihoods would not be its own.
    """
    inner, device = causal(model), next(model.parameters()).device
    layer = inner.get_output_embeddings()
    if layer is None or hasattr(layer, "base_layer") or not layer.weight.is_floating_point():
        raise ValueError(f"{type(inner).__name__}: expected a plain linear head; leave it out of model.lora.targets")
    ids = torch.arange(4, device=device) % layer.weight.shape[0]
    row, _, segments = pack([ids], [[ids[:0]]], share=False)
    head, own = head_of(model), inner(input_ids=ids[None], use_cache=False).logits[0].float()
    logits = head.scale * nn.functional.linear(
        forward_padded(model, row, segments).to(head.weight.dtype), head.weight, head.bias
    )
    logits = logits.float() if head.softcap is None else head.softcap * (logits.float() / head.softcap).tanh()
    away = float((logits - own).abs().max())
    if not away <= 0.02 * float(own.abs().max()) + 1e-4:
        raise ValueError(f"{type(inner).__name__}: its logits are not those of its last states and its head ({away:.3g} away)")


def trainable(model: Any, config: Any) -> nn.Module:
    """The model as a recipe's `model:` section trains it: all of it in fp32, or frozen under a low-rank adapter."""
    if config.gradient_checkpointing:
        checkpoint(model)
    if config.adapter == "full":
        return _upper(model, config.train_layers).float()
    return _with_lora(model, config.lora, config.train_layers)


def _upper(model: Any, train_layers: int | None) -> Any:
    """The model with gradients for all its weights, or for those of its last layers alone."""
    if train_layers is None:
        return model.requires_grad_(True)
    model.requires_grad_(False)
    _last(model, train_layers).requires_grad_(True)
    return model


def _last(model: Any, train_layers: int) -> nn.ModuleList:
    layers = layers_of(model)
    if train_layers >= len(layers):
        raise ValueError(f"model.train_layers: expected fewer than the model's {len(layers)} layers, got {train_layers}")
    return layers[-train_layers:]


def checkpoint(model: Any) -> None:
    """Recompute layers in the backward pass. transformers does so in training mode only, which is set on the layers alone.

    What is inside them stays in evaluation mode, and a layer's own rates are set to 0: no dropout anywhere.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def _with_lora(model: Any, config: Any, train_layers: int | None) -> Any:
    """The model with a trainable LoRA (arXiv 2106.09685) without dropout; a fresh one has B = 0 and so changes nothing."""
    model.requires_grad_(False)
    targets = config.targets or "all-linear"
    some: dict[str, Any] = {}
    if train_layers is not None:
        upper, count = _last(model, train_layers), len(layers_of(model))
        names = {n.rpartition(".")[2] for n, m in upper.named_modules() if isinstance(m, nn.Linear)}
        targets, some = config.targets or sorted(names), {"layers_to_transform": list(range(count - train_layers, count))}
    return adapted(model, config, targets, **some)


@quietly()
def adapted(model: Any, config: Any, targets: Any, **more: Any) -> Any:
    """A frozen model under the LoRA of a recipe. targets: names of its layers, or one regular expression of whole names."""
    import peft

    alpha = config.alpha or config.rank
    shape = {"r": config.rank, "lora_alpha": alpha, "target_modules": targets, "lora_dropout": 0.0}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**shape, task_type="CAUSAL_LM", **more))
    if config.path:
        _continue(wrapped, config.path)
    return wrapped


def _continue(model: Any, path: str) -> None:
    """Copy an exported adapter into a wrapped model. Every tensor has to find its place, under the same scale."""
    from peft import set_peft_model_state_dict

    layers, alpha = _read_adapter(path)
    spec = model.peft_config["default"]
    if alpha is not None and alpha != float(spec.lora_alpha):
        raise ValueError(
            f"model.lora.path {path}: trained with alpha {alpha:g}, this one has alpha {spec.lora_alpha:g}; "
            "set model.lora.alpha to the adapter's"
        )
    try:
        result = set_peft_model_state_dict(model, layers)
    except RuntimeError as error:
        raise ValueError(f"model.lora.path {path}: does not fit this adapter (model.lora.rank, targets): {error}") from error
    odd = [k for k in result.missing_keys if "lora_" in k] + list(result.unexpected_keys)
    if odd or not layers:
        raise ValueError(f"model.lora.path {path}: does not fit this adapter (rank, targets), e.g. {(odd or ['no layers'])[0]}")


def _read_adapter(path: str) -> tuple[dict[str, Tensor], float | None]:
    """The tensors and alpha of a directory in peft's layout."""
    file, settings = (Path(path) / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    if not (file.is_file() and settings.is_file()):
        raise ValueError(f"model.lora.path {path}: expected a directory with {file.name} and {settings.name}")
    with loading(file, "a LoRA adapter as safetensors"):
        alpha = json.loads(settings.read_text(encoding="utf-8")).get("lora_alpha")
        return load_file(file), None if alpha is None else float(alpha)


@quietly()
def save(model: Any, tokenizer: Any, folder: Path, merge: bool) -> None:
    """Write an adapter in peft's layout, or whole weights (full fine-tuning, or merged), and the tokenizer beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    if merge and getattr(causal(model), "is_quantized", False):
        raise ValueError(
            "a quantized model cannot be merged without loss: export its adapter, and merge that into the whole model"
        )
    whole = copy.deepcopy(model).merge_and_unload() if merge and hasattr(model, "merge_and_unload") else model
    inner = whole if hasattr(whole, "peft_config") else causal(whole)
    inner.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@quietly()
def reload(path: str, folder: Path, whole: bool, dtype: torch.dtype, quantize: str, auto: str) -> nn.Module:
    """The model as plain transformers, or peft upon it, gets it from an export."""
    if whole:
        return getattr(transformers, auto).from_pretrained(str(folder), dtype=dtype, use_safetensors=True).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(path, dtype, quantize=quantize, auto=auto), str(folder)).eval()
