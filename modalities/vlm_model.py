"""A vision-language model's files and what of it trains: the language model, if asked for the projector, never the tower."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn

from mmpo.kernels.prefix import causal
from mmpo.modalities import text_model
from mmpo.modalities.quiet import quietly
from mmpo.modalities.vlm_images import decoder_name
from mmpo.weights import loading

# What the families call the layers between tower and language model.
PROJECTORS = re.compile(r"(multi_modal_projector|connector|merger|deepstack_merger_list)")


def load_processor(path: str, template: str | None = None, allow_download: bool = False, pad_to_square: bool = False) -> Any:
    """The processor beside a model, with a chat template: its own, its tokenizer's, or that of a file.

    pad_to_square: images are padded with the mean colour before they are resized. Raises ValueError where that is not CLIP's.
    """
    with loading(path, "a processor of images and text"), quietly(downloads=allow_download):
        processor = transformers.AutoProcessor.from_pretrained(
            path, trust_remote_code=False, local_files_only=not allow_download
        )
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{path}: expected a processor of images and text, found {type(processor).__name__}")
    own = processor.chat_template or processor.tokenizer.chat_template
    processor.chat_template = own if template is None else text_model.read_template(template)
    if pad_to_square:
        processor.image_processor = padding(processor.image_processor)
    return processor


def padding(images: Any) -> Any:
    """LLaVA's image processor with the settings of a CLIP one, and its padding on."""
    name = type(images).__name__
    if name.removesuffix("Pil") not in ("CLIPImageProcessor", "LlavaImageProcessor"):
        raise ValueError(f"model.images.pad_to_square: expected CLIP's image processor, as LLaVA-1.5 has it, found {name}")
    made = getattr(transformers, "LlavaImageProcessor" + ("Pil" if name.endswith("Pil") else ""))
    told = {key: value for key, value in images.to_dict().items() if key != "image_processor_type"}
    return made.from_dict(told | {"do_pad": True})


def image_token(model: nn.Module) -> int:
    """The id of the tokens whose embeddings are an image's features; the processor's own name can be that of its begin."""
    config = causal(model).config
    found = getattr(config, "image_token_id", None)
    if found is None:
        raise ValueError(f"{type(config).__name__}: has no image_token_id; expected a vision-language model")
    return int(found)


def rope_index(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Positions (3, L) by time, row and column (M-RoPE) of ids (L,), which of them are images' (L,), and grids (I, 3).

    None for a model that numbers all tokens in order.
    """
    find = getattr(causal(model).model, "get_rope_index", None)
    if find is None:
        return None

    def positions(ids: Tensor, is_image: Tensor, grids: Tensor) -> Tensor:
        found: Tensor = find(ids[None], mm_token_type_ids=is_image[None].int(), image_grid_thw=grids)[0]
        return found[:, 0]

    return positions


def projector(model: Any) -> list[str]:
    """Names of the modules between tower and language model. ValueError where none is known."""
    named = {n: m for n, m in model.named_modules() if PROJECTORS.fullmatch(n.rpartition(".")[2])}
    found = [
        name
        for n, m in named.items()
        for name in ([f"{n}.{i}" for i in range(len(m))] if isinstance(m, nn.ModuleList) else [n])
    ]
    if not found:
        raise ValueError(f"model.train: language+projector: {type(model).__name__} has no projector that is known by name")
    return found


def trainable(model: Any, config: Any) -> nn.Module:
    """The model as a recipe trains it: a LoRA on the language model, or all of that; the projector whole where it trains."""
    if config.gradient_checkpointing:
        text_model.checkpoint(model)
    model.requires_grad_(False)
    names = projector(model) if config.train == "language+projector" else []
    if config.adapter == "lora":
        return text_model.adapted(model, config.lora, targets(model, config.lora.targets), modules_to_save=names or None)
    model.float()
    for module in (model.get_decoder(), model.get_output_embeddings(), *(model.get_submodule(n) for n in names)):
        module.requires_grad_(True)
    return model  # type: ignore[no-any-return]


def targets(model: Any, names: list[str] | None) -> str:
    """A regular expression of whole names: the linear layers of the language model, or those of these names."""
    linear = {n.rpartition(".")[2] for n, m in model.get_decoder().named_modules() if isinstance(m, nn.Linear)}
    return rf"{re.escape(decoder_name(model))}\..*\.({'|'.join(map(re.escape, names or sorted(linear)))})"


def projector_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What trains of the projector."""
    named = causal(model).named_parameters()
    return [p for n, p in named if p.requires_grad and any(PROJECTORS.fullmatch(part) for part in n.split("."))]


def freeze_check(model: nn.Module, trains_projector: bool) -> None:
    """Features are shared by policy and reference as long as nothing of tower and projector trains: make sure of it."""
    inner = causal(model)
    language = decoder_name(inner)
    between = {id(p) for p in projector_parameters(model)} if trains_projector else set()
    for name, parameter in inner.named_parameters():
        assert not parameter.requires_grad or name.startswith((language, "lm_head")) or id(parameter) in between, name


def bidirectional(model: nn.Module) -> bool:
    """Whether an image's tokens look at each other in both directions (the families that are told which tokens they are)."""
    return "token_type_ids" in inspect.signature(type(causal(model)).forward).parameters
