"""Texts as vectors, by a transformers encoder whose token states are averaged: what sentence-transformers models mostly are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpo import packaged
from mmpo.datasets.tools import Embedder
from mmpo.datasets.vectors import in_batches
from mmpo.pair import Block
from mmpo.weights import loading

WEIGHTS = "a directory with an encoder of transformers and its tokenizer, such as all-mpnet-base-v2"


def sentence(path: str | Path | None = None, device: str = "cpu", *, batch_size: int = 32) -> Embedder:
    """Sentence-BERT (arXiv 1908.10084) with mean pooling: the mean of the last hidden states over a text's tokens.

    path: a local directory, or asset:minilm after `mmpo assets add minilm`. A directory of sentence-transformers says how it
    is pooled and how many tokens it reads; another pooling than the mean is refused, texts that are cut are told as a warning.
    Raises ValueError for that, without weights, and for a block that is not text.
    """
    folder = _folder(path)
    _check_pooling(folder)
    model, tokenizer, limit = _load(folder, device)

    def encode(blocks: Sequence[Block]) -> Tensor:
        if strangers := {b.kind for b in blocks} - {"text"}:
            raise ValueError(f"embedder sentence: expected texts, found {', '.join(sorted(strangers))}")
        words = [str(b.data) for b in blocks]
        if cut := sum(len(ids) > limit for ids in tokenizer(words, verbose=False)["input_ids"]):
            warnings.warn(
                f"embedder sentence: {cut} texts have over {limit} tokens, the rest of them is not read", stacklevel=3
            )
        tokens = tokenizer(words, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        states = model(**tokens).last_hidden_state.float()
        kept = tokens["attention_mask"].unsqueeze(-1).float()
        return (states * kept).sum(1) / kept.sum(1)

    return in_batches(encode, batch_size)


def _folder(path: str | Path | None) -> Path:
    if path is None:
        raise ValueError(f"embedder sentence: no weights; set path to {WEIGHTS}, or to asset:minilm")
    folder = Path(packaged.resolve(str(path)))
    if not folder.is_dir():
        raise ValueError(f"embedder sentence: {folder} is not a directory; expected {WEIGHTS}")
    return folder


def _check_pooling(folder: Path) -> None:
    """Refuse a directory of sentence-transformers that is pooled in another way, or goes through a further layer."""
    file = folder / "modules.json"
    if not file.is_file():
        return
    with loading(file, "a list of sentence-transformers' modules"):
        modules = {str(m["type"]).rpartition(".")[-1]: folder / str(m["path"]) for m in json.loads(file.read_bytes())}
        how = json.loads((modules["Pooling"] / "config.json").read_bytes())
    modes = [name for name, on in how.items() if name.startswith("pooling_mode_") and on]
    if modes != ["pooling_mode_mean_tokens"] or (further := set(modules) - {"Transformer", "Pooling", "Normalize"}):
        found = ", ".join(modes if modes != ["pooling_mode_mean_tokens"] else sorted(further)) or "no pooling"
        raise ValueError(f"embedder sentence: {folder}: expected a mean over tokens and nothing else, found {found}")


def _load(folder: Path, device: str) -> tuple[Any, Any, int]:
    """Model in fp32, tokenizer, and how many tokens are read."""
    from transformers import AutoModel, AutoTokenizer

    from mmpo.modalities.quiet import quietly

    with loading(folder, WEIGHTS), quietly():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="float32")
        own = folder / "sentence_bert_config.json"
        stated = json.loads(own.read_bytes()).get("max_seq_length") if own.is_file() else None
        places = getattr(model.config, "max_position_embeddings", None)
    limits = [int(n) for n in (stated, tokenizer.model_max_length, places) if n]
    return model.to(device).eval().requires_grad_(False), tokenizer, min(limits)
