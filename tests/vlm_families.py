"""Tiny vision-language checkpoints of every family, written offline by transformers in the real formats.

Images are 28 pixels with patches of 7 (a photo of another size is resized, cut or tiled by its family's own rules), language
models have two layers of width 64; weights are random, but large enough for images to matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from tests.modalities.tiny_text import CORPUS

PLAIN = ("<s>", "</s>", "<pad>", "<unk>")
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
WORDS = 40  # merges of the byte-level tokenizer
CONTENT = (  # a message's words and images, IMAGE standing for the family's placeholder
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
)
LLAVA_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: CONTENT</s>{% elif m.role == 'user' %}USER: CONTENT "
    "{% else %}CONTENT {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\nCONTENT<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_TURNS = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}: CONTENT<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_TURNS = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "CONTENT<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Words:
    """A family's tokenizer: special tokens, those its processor asks for by name, its template and what an image is in it."""

    special: tuple[str, ...]
    turns: str
    image: str
    eos: str
    pad: str
    bos: str | None = None
    adds_bos: bool = False
    named: dict[str, str] = field(default_factory=dict)

    def make(self) -> T.PreTrainedTokenizerFast:
        raw = Tokenizer(BPE())
        raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = ByteLevel.alphabet()
        raw.train_from_iterator(CORPUS, BpeTrainer(vocab_size=len(alphabet) + WORDS, initial_alphabet=alphabet))
        raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        names: dict[str, Any] = {"eos_token": self.eos, "pad_token": self.pad} | ({"bos_token": self.bos} if self.bos else {})
        if self.adds_bos and self.bos:
            raw.post_processor = TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, raw.token_to_id(self.bos))]
            )
        if self.named:
            names["extra_special_tokens"] = self.named
        return T.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=1024, **names)

    @property
    def template(self) -> str:
        return self.turns.replace("CONTENT", CONTENT.replace("IMAGE", self.image))


LLAVA = Words((*PLAIN, "<image>"), LLAVA_TURNS, "<image>\n", "</s>", "<pad>", bos="<s>", adds_bos=True)
ONEVISION = Words((*CHATML, "<image>", "<video>"), CHATML_TURNS, "<image>\n", "<|im_end|>", "<|endoftext|>")
QWEN = Words(
    (*CHATML, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"), CHATML_TURNS,
    "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>", "<|endoftext|>",
)  # fmt: skip
INTERNVL = Words(
    (*CHATML, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"), CHATML_TURNS, "<IMG_CONTEXT>\n", "<|im_end|>", "<|endoftext|>",
    named={
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)  # fmt: skip
IDEFICS = Words(
    (*CHATML, "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>",
     *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))),
    IDEFICS_TURNS, "<image>", "<end_of_utterance>", "<|endoftext|>", bos="<|im_start|>",
)  # fmt: skip
GEMMA = Words(
    ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    GEMMA_TURNS, "<start_of_image>", "<end_of_turn>", "<pad>", bos="<bos>", adds_bos=True,
    named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
)  # fmt: skip

SIDE = {"height": 28, "width": 28}
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "initializer_range": 0.1,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7, "initializer_range": 0.1,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip

Tokens: TypeAlias = T.PreTrainedTokenizerFast
Parts = tuple[Any, Any]  # a model and its processor


def _text(tokens: Tokens, **more: Any) -> dict[str, Any]:
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    return TEXT | {"vocab_size": len(tokens)} | ids | more


def _id(tokens: Tokens, token: str) -> int:
    return int(tokens.convert_tokens_to_ids(token))


def _llava(tokens: Tokens) -> Parts:
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VIT | {"num_hidden_layers": 3}), text_config=T.LlamaConfig(**_text(tokens)),
        image_token_index=_id(tokens, "<image>"), image_seq_length=16,
    )  # fmt: skip
    images = T.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE)
    processor = T.LlavaProcessor(
        images, tokens, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return T.LlavaForConditionalGeneration(config), processor


def _llava_onevision(tokens: Tokens) -> Parts:
    pinpoints = [[28, 28], [28, 56], [56, 28]]
    config = T.LlavaOnevisionConfig(
        vision_config=T.SiglipVisionConfig(**VIT | {"vision_use_head": False}), text_config=T.Qwen2Config(**_text(tokens)),
        image_token_index=_id(tokens, "<image>"), video_token_index=_id(tokens, "<video>"), image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    processor = T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=pinpoints), tokens,
        T.LlavaOnevisionVideoProcessor(size=SIDE), num_image_tokens=16, vision_feature_select_strategy="full",
    )  # fmt: skip
    return T.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen_images() -> dict[str, Any]:
    return {"patch_size": 7, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 196, "longest_edge": 3136}}


def _qwen2_vl(tokens: Tokens) -> Parts:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 7}
    return _qwen(tokens, T.Qwen2VLForConditionalGeneration, T.Qwen2VLConfig, T.Qwen2VLProcessor, vision)


def _qwen2_5_vl(tokens: Tokens) -> Parts:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7, "window_size": 28,
        "out_hidden_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(tokens, T.Qwen2_5_VLForConditionalGeneration, T.Qwen2_5_VLConfig, T.Qwen2_5_VLProcessor, vision)


def _qwen3_vl(tokens: Tokens) -> Parts:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {"rope_parameters": MROPE | {"mrope_interleaved": True}, "head_dim": 16}
    return _qwen(tokens, T.Qwen3VLForConditionalGeneration, T.Qwen3VLConfig, T.Qwen3VLProcessor, vision, text)


def _qwen(tokens: Tokens, model: Any, config: Any, processor: Any, vision: dict[str, Any], text: Any = None) -> Parts:
    ids = {name: _id(tokens, token) for name, token in QWEN_IDS.items()}
    made = config(text_config=_text(tokens, **(text or {"rope_parameters": MROPE})), vision_config=vision, **ids)
    videos = (T.Qwen3VLVideoProcessor if "Qwen3" in processor.__name__ else T.Qwen2VLVideoProcessor)(**_qwen_images())
    return model(made), processor(T.Qwen2VLImageProcessor(**_qwen_images()), tokens, videos)


def _internvl(tokens: Tokens) -> Parts:
    vision = T.InternVLVisionConfig(**VIT | {"image_size": [28, 28], "patch_size": [7, 7]})
    config = T.InternVLConfig(
        vision_config=vision, text_config=T.Qwen2Config(**_text(tokens)), image_token_id=_id(tokens, "<IMG_CONTEXT>"),
        image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    images = T.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=2)
    return T.InternVLForConditionalGeneration(config), T.InternVLProcessor(
        images, tokens, T.InternVLVideoProcessor(size=SIDE), image_seq_length=4
    )


def _idefics3(tokens: Tokens) -> Parts:
    config = T.Idefics3Config(
        vision_config=VIT, text_config=T.LlamaConfig(**_text(tokens)), image_token_id=_id(tokens, "<image>"), scale_factor=2
    )
    images = T.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return T.Idefics3ForConditionalGeneration(config), T.Idefics3Processor(images, tokens, image_seq_len=4)


def _smolvlm(tokens: Tokens) -> Parts:
    config = T.SmolVLMConfig(
        vision_config=VIT, text_config=T.LlamaConfig(**_text(tokens)), image_token_id=_id(tokens, "<image>"), scale_factor=2
    )
    images = T.SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    videos = T.SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28})
    return T.SmolVLMForConditionalGeneration(config), T.SmolVLMProcessor(images, tokens, videos, image_seq_len=4)


def _gemma3(tokens: Tokens) -> Parts:
    text = T.Gemma3TextConfig(
        **_text(tokens), head_dim=16, query_pre_attn_scalar=16, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = T.Gemma3Config(
        text_config=text, vision_config=T.SiglipVisionConfig(**VIT | {"vision_use_head": False}), mm_tokens_per_image=4,
        boi_token_index=_id(tokens, "<start_of_image>"), eoi_token_index=_id(tokens, "<end_of_image>"),
        image_token_index=_id(tokens, "<image_soft_token>"),
    )  # fmt: skip
    model = T.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)  # zero as made: images unseen
    return model, T.Gemma3Processor(T.Gemma3ImageProcessor(size=SIDE), tokens, image_seq_length=4)


MAKERS: dict[str, tuple[Words, Callable[[Tokens], Parts]]] = {
    "llava": (LLAVA, _llava), "llava_onevision": (ONEVISION, _llava_onevision), "qwen2_vl": (QWEN, _qwen2_vl),
    "qwen2_5_vl": (QWEN, _qwen2_5_vl), "qwen3_vl": (QWEN, _qwen3_vl), "internvl": (INTERNVL, _internvl),
    "idefics3": (IDEFICS, _idefics3), "smolvlm": (IDEFICS, _smolvlm), "gemma3": (GEMMA, _gemma3),
}  # fmt: skip
FAMILIES: tuple[str, ...] = tuple(MAKERS)
QUICK = ("llava", "qwen2_5_vl", "gemma3")  # plain, with M-RoPE, with windows and attention in both directions
CASES = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def make(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny model of `family` (fp32 safetensors) and its processor into `folder` and return it."""
    words, parts = MAKERS[family]
    tokens = words.make()
    torch.manual_seed(seed)
    model, processor = parts(tokens)
    processor.chat_template = words.template
    model.generation_config = T.GenerationConfig(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def photo(seed: int, size: tuple[int, int] = (28, 28)) -> np.ndarray:
    """A picture (H, W, 3) uint8 for size (H, W): a coloured rectangle on a gradient with a little noise."""
    rng = np.random.default_rng(seed)
    height, width = size
    down, right = np.mgrid[:height, :width] / max(height, width)
    picture = rng.integers(0, 256, 3) * down[..., None] + rng.integers(0, 256, 3) * right[..., None]
    top, left = rng.integers(0, max(1, height // 2)), rng.integers(0, max(1, width // 2))
    picture[top : top + height // 2 + 1, left : left + width // 2 + 1] = rng.integers(0, 256, 3)
    return (picture + rng.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)


def ask(processor: Any, questions: Sequence[tuple[Sequence[np.ndarray], str]], side: str = "left") -> dict[str, Any]:
    """A batch of user turns, each some pictures and a text, padded on `side`, with whatever else the processor returns."""
    turns = [[{"type": "image"}] * len(pictures) + [{"type": "text", "text": words}] for pictures, words in questions]
    chats = [processor.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True) for t in turns]
    images = [[Image.fromarray(picture) for picture in pictures] for pictures, _ in questions]
    options = {"padding": True, "padding_side": side, "add_special_tokens": False, "return_tensors": "pt"}
    return dict(processor(images=images, text=chats, **options))


def go_on(inputs: dict[str, Any], answer: torch.Tensor) -> dict[str, Any]:
    """The same batch with answers (N, T) of text tokens after its rows."""
    longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], answer], 1)}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(answer, value)], 1)
    return longer
