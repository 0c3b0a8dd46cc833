"""One DPO step on text, full fine-tuning: mmpo against TRL 1.16's `DPOTrainer`, on the same pair, models and tokens.

    python -m benchmarks.text_step [--rounds 15] [--out benchmarks/results/text_step.json]

Contestants take turns in one process:

    trl          compute_loss with its reference model, backward, clip, AdamW
    trl_cached   the same with the reference's sums in the batch (precompute_ref_log_probs)
    online       mmpo.train.advance: the prompt computed once for both answers
    cached       the same with the reference's scores from the cache on disk
    separate     online with a row of its own per answer (model.layout: packed)

TRL gets a collated batch; mmpo's side includes all of its own: cache reads, packing, metrics, a line of the log. No time is
measured before log-probabilities and gradients agree and the counted work is what the cost model says; else the exit code is
1. README.md beside this file says what the stored numbers mean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import side_by_side as side
from benchmarks.counted_work import Shape, counts, model_flops
from benchmarks.side_by_side import PAIRS, Case, Contestant
from mmpo.modalities.quiet import quietly
from mmpo.pair import Pair, text
from mmpo.progress import Run

CASES = (
    Case(960, 64, {"online": ("trl", 1.8), "cached": ("trl", 2.5)}, saved=0.56),
    Case(256, 256, {"online": ("trl", 1.35), "cached": ("trl", 1.75)}),
    Case(64, 512, {"online": ("separate", 0.98)}),
)


# ---- what both are given


def make_models(folder: Path, shape: Shape, seed: int = 0) -> tuple[Path, Path]:
    """Directories of a policy and of a reference a little away from it, each with a tokenizer of one token per word."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.ff, vocab_size=shape.vocab,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    tokenizer = _words(shape.vocab)
    for path in (folder / "policy", folder / "reference"):
        with quietly():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))
    return folder / "policy", folder / "reference"


def _words(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, size))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def make_rows(case: Case, vocab: int, count: int = PAIRS, seed: int = 0) -> list[dict[str, str]]:
    """Rows in TRL's columns: random words; an answer's last token is the end of text, which both sides add."""
    rng = np.random.default_rng(seed)

    def said(tokens: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, vocab, tokens))

    lengths = {"prompt": case.prompt, "chosen": case.answer - 1, "rejected": case.answer - 1}
    return [{n: said(k) + (" " if n == "prompt" else "") for n, k in lengths.items()} for _ in range(count)]


# ---- the contestants


def trl_contestants(paths: tuple[Path, Path], rows: list[dict[str, str]], folder: Path) -> list[Contestant]:
    with quietly():
        kind = transformers.AutoModelForCausalLM
        policy, reference = (kind.from_pretrained(path, dtype=torch.float32) for path in paths)
        tokenizer = transformers.AutoTokenizer.from_pretrained(paths[0])
    return side.trl_contestants(side.trl_trainer(policy, reference, tokenizer, rows, folder))


def mmpo_run(paths: tuple[Path, Path], rows: list[dict[str, str]], folder: Path, layout: str, cached: bool) -> Run:
    """A run of the text modality over the rows."""
    pairs = [Pair(str(i), (text(r["prompt"]),), (text(r["chosen"]),), (text(r["rejected"]),)) for i, r in enumerate(rows)]
    return side.mmpo_run(folder / f"{layout}-{cached}", "text", paths, [f"model.layout={layout}"], pairs, cached)


def contestants(folder: Path, case: Case, shape: Shape) -> list[Contestant]:
    """All of them, with the same weights; the caches are filled."""
    paths, rows = make_models(folder, shape), make_rows(case, shape.vocab)
    kinds = {"online": ("shared", False), "cached": ("shared", True), "separate": ("packed", False)}
    runs = {name: mmpo_run(paths, rows, folder, *kind) for name, kind in kinds.items()}
    side.fill(runs["cached"])
    theirs = trl_contestants(paths, [rows[i] for i in side.order_of(runs["online"])], folder)
    return [*theirs, *(side.mmpo_contestant(name, run) for name, run in runs.items())]


def expected(case: Case, shape: Shape) -> dict[str, float]:
    """The cost model's operations of a step."""
    return {name: model_flops(case.prompt, case.answer, shape, name == "cached") for name in ("online", "cached")}


def counted(contestant: Contestant, shape: Shape) -> dict[str, int]:
    return counts(contestant.step, contestant.loss, contestant.model, shape)


def bench(cases: Sequence[Case], shape: Shape) -> side.Bench:
    return side.Bench(
        "One DPO step on text: mmpo against TRL 1.16.", cases, lambda folder, case: contestants(folder, case, shape),
        lambda contestant: counted(contestant, shape), lambda case: expected(case, shape),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return side.main(bench(CASES, Shape()), arguments)


if __name__ == "__main__":
    sys.exit(main())
