"""Tiny random language models with a real byte-level BPE tokenizer, written offline, and the text adapter on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as T
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from mmpo.cache import Cache
from mmpo.modalities.text import Adapter
from mmpo.modalities.text_config import ModelConfig
from mmpo.pair import Pair, text
from mmpo.schema import DrawConfig

SPECIAL = ["<bos>", "<eos>", "<start>", "<stop>", "<eot>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog", "What is the capital of France? Paris is the capital of France.",
    "user assistant system", "Twelve and thirty are forty-two.", "I do not know, but the dog does.", "0 1 2 3 4 5 6 7 8 9 + =",
]  # fmt: skip
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<start>{{ m.role }}<stop>\n\n{{ m.content | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant<stop>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
BARE = (  # adds nothing after an answer
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% else %}{{ m.role }}: {{ m.content }}\nreply: "
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "bare": BARE, "none": None}
WORDS = ["the dog", "forty-two.", "Paris is the capital", "I do not know", " 12+30=42", "does the fox jump?"]


def tokenizer(template: str = "chatml", bos: bool = False, eos: bool = True) -> T.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 330 tokens. bos: it puts <bos> before every text of its own accord."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    added = [AddedToken(s, special=True) for s in SPECIAL]
    raw.train_from_iterator(CORPUS, BpeTrainer(vocab_size=330, special_tokens=added, initial_alphabet=ByteLevel.alphabet()))
    if bos:
        raw.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", raw.token_to_id("<bos>"))])
    names = {"bos_token": "<bos>"} | ({"eos_token": "<eos>"} if eos else {})
    made = T.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    made.chat_template = TEMPLATES[template]
    return made


SHAPE: dict[str, Any] = {
    "vocab_size": 336, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.15,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda more: T.LlamaForCausalLM(T.LlamaConfig(**(SHAPE | {"attention_dropout": 0.3} | more))),
    "qwen2": lambda more: T.Qwen2ForCausalLM(T.Qwen2Config(**(SHAPE | {"tie_word_embeddings": True} | more))),
    "gemma": lambda more: T.GemmaForCausalLM(T.GemmaConfig(**(SHAPE | {"head_dim": 8} | more))),
    "gemma2": lambda more: T.Gemma2ForCausalLM(T.Gemma2Config(**(SHAPE | {"head_dim": 8, "sliding_window": 8} | more))),
    "mamba": lambda more: T.MambaForCausalLM(T.MambaConfig(vocab_size=336, hidden_size=32, num_hidden_layers=2, **more)),
}


def make(folder: Path, family: str = "llama", template: str = "chatml", **options: Any) -> Path:
    """Write a tiny model of `family` and its tokenizer into `folder` and return it. options: of the model, or bos and eos."""
    words = {name: options.pop(name) for name in ("bos", "eos") if name in options}
    torch.manual_seed(0)
    MODELS[family](options).save_pretrained(folder)
    tokenizer(template, **words).save_pretrained(folder)
    return folder


def adapter(folder: Path, dropout: float = 0.0, **model: Any) -> Adapter:
    """The adapter on a checkpoint, with a LoRA of rank 2 unless `model` says otherwise."""
    torch.manual_seed(0)  # of the LoRA's A
    config = ModelConfig(path=str(folder), **({"lora": {"rank": 2}, "sample": {"max_new_tokens": 8}} | model))
    return Adapter(config, DrawConfig(), Cache(None), torch.device("cpu"), dropout)


def make_pairs(
    count: int = 3, prompts: Sequence[str] = ("What is the capital of France?", "12+30=", "Who jumps?")
) -> list[Pair]:
    """Pairs of answers of different lengths, to prompts of different lengths."""
    found = []
    for i in range(count):
        chosen, rejected = (WORDS[(2 * i + k) % len(WORDS)] for k in (0, 1))
        found.append(Pair(f"p{i}", (text(prompts[i % len(prompts)]),), (text(chosen),), (text(rejected),)))
    return found
