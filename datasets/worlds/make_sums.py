"""How the shipped base model and candidates of the sums world were made: a LlamaForCausalLM, from scratch.

    mmpo make-base text --out DIR            a few minutes on 2 cores; --steps makes it shorter

Its training data are imperfect on purpose: a share of the answers (`WRONG`) is wrong, as a crowd of careless people answers.
The base therefore mostly knows the right sum and says it about half of the time, which is what preference pairs can mend. It
never sees the sums that the recipe holds out. The candidates are its own samples, judged by the exact verifier.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.worlds import sums
from mmpo.pair import text
from mmpo.prepare import is_heldout

WRONG = 0.35  # share of training answers that are wrong
HELDOUT = 0.2  # share of the sums never trained on: data.heldout of configs/text.yaml, by the same hash
END = "<|end|>"
BATCH, LR = 256, 3e-3
ANSWER = 4  # tokens of the longest answer, its end included


@dataclass(frozen=True)
class Budget:
    """How much of everything. The defaults are what the shipped model was made with."""

    steps: int = 600
    prompts: int = 8100
    candidates: int = 4


def make(out: Path | str, *, seed: int = 0, **budget: int) -> None:
    """Train the base and sample its candidates into `out`: a Hugging Face directory and candidates.parquet."""
    spec, out = Budget(**budget), Path(out)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    train_model(model, tokenizer, spec.steps, seed + 1)
    save(model, tokenizer, out)
    rows = sample_candidates(LlamaForCausalLM.from_pretrained(out), tokenizer, spec.prompts, spec.candidates, seed + 2)
    write_candidates(rows, out / "candidates.parquet")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and an end of text: every digit is one token, and any text at all can be spelt."""
    vocab = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    spelling = Tokenizer(BPE(vocab=vocab, merges=[]))
    spelling.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    spelling.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token=END, pad_token=END, model_max_length=64)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model: three layers of width 96, 0.36 M parameters, input and output embeddings tied."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip


def train_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Next-token training on the answers only; each sum of the training share has one answer, right or wrong, for good."""
    ids, labels = encode(tokenizer, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=max(steps, 2), pct_start=0.1)
    for _ in trange(steps, desc="language model"):
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def encode(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Every sum of the training share with its answer, (n, length), and the labels: -100 on the prompt and after the end."""
    shown = [p for p in sums.prompts() if not is_heldout((text(p),), HELDOUT)]
    answers = [sums.corrupt(p, rng) if rng.random() < WRONG else sums.answer(p) for p in shown]
    ids = tokenizer([p + a + END for p, a in zip(shown, answers, strict=True)], padding=True, return_tensors="pt").input_ids
    labels = ids.clone()
    start, place = len(shown[0]), torch.arange(ids.shape[1])
    ends = torch.tensor([start + len(a) for a in answers])
    labels[(place < start) | (place > ends[:, None])] = -100
    return ids, labels


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer with the weights in half precision, to be loaded in single precision."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


@torch.no_grad()
def sample_candidates(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: int, per_prompt: int, seed: int
) -> list[Candidate]:
    """`per_prompt` answers of the model's own at temperature 1 to each of `prompts` sums, judged exactly.

    The few that are blank or bytes of no character are left out.
    """
    order = np.random.default_rng(seed).permutation(len(sums.prompts()))[:prompts]
    asked = [sums.prompts()[i] for i in sorted(order) for _ in range(per_prompt)]
    torch.manual_seed(seed)
    answers = []
    for start in trange(0, len(asked), 2000, desc="candidates", unit="batch"):
        ids = tokenizer(asked[start : start + 2000], return_tensors="pt").input_ids
        out = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=ANSWER
        )
        answers += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [
        Candidate((text(p),), text(a), float(sums.verify(p, a)), i % per_prompt)
        for i, (p, a) in enumerate(zip(asked, answers, strict=True))
        if a.strip() and a.isascii()
    ]
