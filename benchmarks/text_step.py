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

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rounds import measure, ratio
from mmpo import recipe as recipes
from mmpo import reference as references
from mmpo.cache import Cache
from mmpo.launch import build_objective, make_modality, make_optimizer
from mmpo.modalities.quiet import quietly
from mmpo.pair import Pair, text
from mmpo.reference import Cached
from mmpo.runlog import RunLog
from mmpo.train import Run, advance, batch_of, draw, forward

PAIRS = 4
# Of no influence on time. A larger one lifts the rounding of sums of 512 log-probabilities, 1e-4 nats, over the tolerance.
BETA = 0.01
TOLERANCE = 1e-5
FLOPS = 1.02  # counted operations over the cost model's
aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """P prompt tokens and R answer tokens per side. bars: contestant -> (slower one, smallest ratio of times).

    saved: largest ratio of the bytes that autograd keeps, to TRL's; None where prompts are too short to promise any.
    """

    prompt: int
    answer: int
    bars: dict[str, tuple[str, float]]
    saved: float | None = None


CASES = (
    Case(960, 64, {"online": ("trl", 1.8), "cached": ("trl", 2.5)}, saved=0.56),
    Case(256, 256, {"online": ("trl", 1.35), "cached": ("trl", 1.75)}),
    Case(64, 512, {"online": ("separate", 0.98)}),
)


@dataclass(frozen=True)
class Shape:
    """The policy: a random Llama in fp32."""

    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    ff: int = 688
    vocab: int = 2048

    @property
    def body(self) -> int:
        """Weights of the linear layers between embedding and head."""
        head = self.hidden // self.heads
        return self.layers * self.hidden * (2 * self.heads * head + 2 * self.kv_heads * head + 3 * self.ff)


@dataclass
class Contestant:
    """logps: per-token log-probabilities of the first batch's answers, chosen then rejected. loss: of that batch."""

    name: str
    step: Callable[[int], object]
    logps: Callable[[], Tensor]
    loss: Callable[[], Tensor]
    model: nn.Module


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


# ---- TRL


def trl_trainer(paths: tuple[Path, Path], rows: list[dict[str, str]], folder: Path) -> Any:
    """DPOTrainer over the rows, with its batches in `prepared`, one row each, as its collator makes them."""
    import datasets
    import trl

    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths)
    args = trl.DPOConfig(
        str(folder / "trl"), beta=BETA, per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, max_length=None, disable_tqdm=True,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths[0])
    data = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer)
    trainer.prepared = [trainer.data_collator([row]) for row in trainer.train_dataset]
    trainer.model.train()
    return trainer


def trl_contestants(paths: tuple[Path, Path], rows: list[dict[str, str]], folder: Path) -> list[Contestant]:
    with quietly():
        datasets_progress(False)
        trainer = trl_trainer(paths, rows, folder)
    weights = list(trainer.model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6)
    cached = [batch | _sums(trainer, batch) for batch in trainer.prepared]

    def loss(batches: list[dict[str, Tensor]], precomputed: bool, number: int) -> Tensor:
        trainer.precompute_ref_logps = precomputed
        return trainer.compute_loss(trainer.model, dict(batches[number]))

    def step(batches: list[dict[str, Tensor]], precomputed: bool, number: int) -> None:
        loss(batches, precomputed, number).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def logps() -> Tensor:
        with torch.no_grad():
            return _log_probs(trainer.model, trainer.prepared[0])

    kinds: list[tuple[str, list[dict[str, Tensor]], bool]] = [("trl", trainer.prepared, False), ("trl_cached", cached, True)]
    return [
        Contestant(name, lambda n, b=b, p=p: step(b, p, n), logps, lambda b=b, p=p: loss(b, p, 0), trainer.model)  # type: ignore[misc]
        for name, b, p in kinds
    ]


def datasets_progress(shown: bool) -> None:
    """Hugging Face's bars, which would be drawn between the lines of the report."""
    import datasets

    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()


def _log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """TRL's per-token log-probabilities of the answers, from its own head."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    found = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    return found[batch["completion_mask"][:, 1:].bool()]


def _sums(trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = _log_probs(trainer.ref_model, batch).view(2, -1).sum(1)
    return {"ref_chosen_logps": found[:1], "ref_rejected_logps": found[1:]}


# ---- mmpo


def mmpo_run(paths: tuple[Path, Path], rows: list[dict[str, str]], folder: Path, layout: str, cached: bool) -> Run:
    """A run of the text modality over the rows, one pair per step."""
    file = folder / "recipe.yaml"
    file.write_text("modality: text\n")
    settings = [f"model.path={paths[0]}", "model.adapter=full", f"model.layout={layout}", "train.batch_size=1", "train.lr=1e-6"]
    settings += ["reference.kind=path", f"reference.path={paths[1]}", f"objective=[{{loss: dpo, beta: {BETA}}}]"]
    resolved = recipes.load(file, settings)
    recipe, own = resolved.recipe, folder / f"{layout}-{cached}"
    own.mkdir()
    accelerator = Accelerator(cpu=True)
    modality = make_modality(recipe, own, accelerator.device)
    reference: Any = references.build(recipe.reference, modality, modality.model)
    if cached:
        reference = Cached(reference, Cache(own / "reference.sqlite", memory=0), modality.model, "tokens")
    pairs = [Pair(str(i), (text(r["prompt"]),), (text(r["chosen"]),), (text(r["rejected"]),)) for i, r in enumerate(rows)]
    optimizer = make_optimizer(recipe, modality.model)
    parts = (recipe, own, accelerator, modality, modality.model, optimizer, reference, build_objective(resolved))
    return Run(*parts, pairs, [], None, [], RunLog(own / "log.jsonl"))


def mmpo_contestant(name: str, run: Run) -> Contestant:
    def step(number: int) -> None:
        run.progress.step = number
        advance(run)

    def logps() -> Tensor:
        with torch.no_grad():
            scores = run.modality.score(run.model, draw(run, *batch_of(run, 0, 0)))
        return torch.cat([scores[b].logp[scores[b].mask] for b in ("chosen", "rejected")])

    return Contestant(name, step, logps, lambda: forward(run, 0, 0)[0].loss.mean(), run.model)


def contestants(folder: Path, case: Case, shape: Shape) -> list[Contestant]:
    """All of them, with the same weights; the caches are filled."""
    paths, rows = make_models(folder, shape), make_rows(case, shape.vocab)
    kinds = {"online": ("shared", False), "cached": ("shared", True), "separate": ("packed", False)}
    runs = {name: mmpo_run(paths, rows, folder, *kind) for name, kind in kinds.items()}
    with torch.no_grad():
        for step in range(len(rows)):
            forward(runs["cached"], step, 0)
    first = int(batch_of(runs["online"], 0, 0)[0][0].id)  # mmpo's order of the pairs; TRL takes them in the same
    order = [first] + [int(batch_of(runs["online"], n, 0)[0][0].id) for n in range(1, len(rows))]
    theirs = trl_contestants(paths, [rows[i] for i in order], folder)
    return [*theirs, *(mmpo_contestant(name, run) for name, run in runs.items())]


# ---- the gates


def equality(found: Sequence[Contestant]) -> dict[str, dict[str, float]]:
    """Differences from TRL on one pair: of log-probabilities, nats, and of gradients, relative to the largest one."""
    logps, wanted = found[0].logps(), _gradients(found[0])
    scale = max(float(g.abs().max()) for g in wanted.values())
    out = {}
    for other in found[1:]:
        gradients = _gradients(other)
        away = max(float((gradients[name] - g).abs().max()) for name, g in wanted.items())
        out[other.name] = {"logp": float((other.logps() - logps).abs().max()), "gradient": away / scale}
    return out


def _gradients(contestant: Contestant) -> dict[str, Tensor]:
    weights = dict(contestant.model.named_parameters())
    found = torch.autograd.grad(contestant.loss(), list(weights.values()))
    return dict(zip(weights, found, strict=True))


def counts(contestant: Contestant, shape: Shape) -> dict[str, int]:
    """Operations of one whole step, rows that meet the head going forward, bytes that autograd keeps."""
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        contestant.step(0)
    with saved_bytes(contestant.model) as saved, HeadRows(shape) as head:
        contestant.loss()
    return {"flops": int(counter.get_total_flops()), "head_rows": head.rows, "saved_bytes": sum(saved.values())}


def _attention(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, *_: Any, **__: Any) -> int:
    """Two products of queries and keys; a causal square counts half."""
    *batch, rows, width = query
    return 4 * int(np.prod(batch)) * rows * key[-2] * width // (2 if is_causal else 1)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, *rest: Any, **named: Any) -> int:
    """Five products instead of two."""
    return 5 * _attention(query, key, value, *rest) // 2


class HeadRows(TorchDispatchMode):
    """Counts rows that are multiplied with the head, whatever tiles of tokens and vocabulary that is done in."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.products = shape, 0

    @property
    def rows(self) -> int:
        return self.products // self.shape.vocab

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (aten.mm.default, aten.addmm.default, aten.mm.out, aten.bmm.default):
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            weights = {self.shape.hidden, self.shape.ff, self.shape.hidden * self.shape.kv_heads // self.shape.heads}
            if left.shape[-1] == self.shape.hidden and right.shape[-1] not in weights:
                self.products += left.shape[-2] * right.shape[-1]
        return out


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of all that autograd keeps for the backward pass, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def model_flops(case: Case, shape: Shape, cached: bool) -> float:
    """The cost model's operations of one step (docs of the planner): a shared prompt, R - 1 states per answer and its prompt's.

    Forward 1, backward 2 (attention 2.5), reference 1; a causal square counts half.
    """
    prompt, answer, width = case.prompt, case.answer - 1, shape.hidden
    linear = 2 * shape.body * (prompt + 2 * answer)
    attention = width * shape.layers * (2 * prompt**2 + 2 * (4 * prompt * answer + 2 * answer**2))
    head = 2 * width * shape.vocab * 2 * case.answer
    forward_pass = linear + attention + head
    return forward_pass + 2 * (linear + head) + 2.5 * attention + (0 if cached else forward_pass)


def broken(case: Case, shape: Shape, equal: dict[str, Any], counted: dict[str, dict[str, int]]) -> list[str]:
    """What keeps the case from being timed, a line each."""
    out = [f"{n}: {what} differs by {d:.2g}" for n, row in equal.items() for what, d in row.items() if not d <= TOLERANCE]
    for name in ("online", "cached"):
        times = counted[name]["flops"] / model_flops(case, shape, name == "cached")
        if times > FLOPS:
            out.append(f"{name}: {times:.3f} times the operations of the cost model")
        rows = 2 * case.answer * (1 if name == "cached" else 2)
        if counted[name]["head_rows"] != rows:
            out.append(f"{name}: {counted[name]['head_rows']} rows meet the head, {rows} are scored")
        share = counted[name]["saved_bytes"] / counted["trl"]["saved_bytes"]
        if case.saved is not None and share > case.saved:
            out.append(f"{name}: keeps {share:.3f} of TRL's bytes for the backward pass")
    return out


# ---- the report


def results(case: Case, shape: Shape, seconds: dict[str, np.ndarray], counted: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Per contestant medians and counts, its speed relative to TRL and to its bar's rival, and what the counts promise."""
    out: dict[str, Any] = {}
    for name, times in seconds.items():
        cpu, wall = np.median(times, axis=0)
        row: dict[str, Any] = {"cpu_seconds": float(cpu), "wall_seconds": float(wall)} | counted[name]
        bars: dict[str, float | None] = {"trl": None} | dict([case.bars[name]] if name in case.bars else [])
        for rival, bar in bars.items():
            if name == rival:
                continue
            faster = {kind: ratio(seconds[rival][:, i], times[:, i]) for i, kind in enumerate(("cpu", "wall"))}
            entry: dict[str, Any] = faster | {"operations": counted[rival]["flops"] / counted[name]["flops"]}
            if bar is not None:
                entry |= {"bar": bar, "met": faster["cpu"]["low"] >= bar}
            row.setdefault("faster_than", {})[rival] = entry
        row["saved_of_trl"] = counted[name]["saved_bytes"] / counted["trl"]["saved_bytes"]
        if name in ("online", "cached"):
            row["flops_of_model"] = counted[name]["flops"] / model_flops(case, shape, name == "cached")
        out[name] = row
    return out


def report(case: Case, rows: dict[str, Any]) -> str:
    lines = [
        f"P={case.prompt} R={case.answer}  {'CPU ms':>8} {'GFLOP':>7} {'MB kept':>8} head rows   faster by CPU time (95 %)"
    ]
    for name, row in rows.items():
        line = f"{name:14} {1e3 * row['cpu_seconds']:8.0f} {row['flops'] / 1e9:7.2f} {row['saved_bytes'] / 1e6:8.1f}"
        line += f" {row['head_rows']:9}"
        for rival, found in row.get("faster_than", {}).items():
            cpu = found["cpu"]
            line += f"   {cpu['value']:.2f} ({cpu['low']:.2f} to {cpu['high']:.2f}) than {rival}"
            line += f", {found['operations']:.2f} by operations"
            if "bar" in found:
                line += f", bar {found['bar']}: {'met' if found['met'] else 'missed'}"
        lines.append(line)
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    import trl

    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl, accelerate)}
    state = {"python": platform.python_version(), "versions": versions, "processors": os.cpu_count()}
    return state | {"threads": torch.get_num_threads()}


def run_case(case: Case, shape: Shape, rounds: int) -> dict[str, Any]:
    """Gate, then time one case. `broken` in the result: why it was not timed."""
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(Path(folder), case, shape)
        equal = equality(found)
        counted = {c.name: counts(c, shape) for c in found}
        out: dict[str, Any] = {"prompt": case.prompt, "answer": case.answer, "equality": equal}
        if reasons := broken(case, shape, equal, counted):
            return out | {"broken": reasons, "counts": counted}
        seconds = measure(found, rounds, PAIRS)
    return out | {"variants": results(case, shape, seconds, counted)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One DPO step on text: mmpo against TRL 1.16.")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, at least 7")
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only this one")
    parser.add_argument("--out", type=Path, help="write the measurements here, as JSON")
    given = parser.parse_args(arguments)
    if given.rounds < 7:
        parser.error(f"--rounds: at least 7 are needed for an interval, got {given.rounds}")
    load, shape = os.getloadavg(), Shape()  # the load before this program adds its own
    record: dict[str, Any] = {"rounds": given.rounds, "load_before": load, "machine": machine(), "cases": []}
    for case in CASES if given.case is None else [CASES[given.case]]:
        found = run_case(case, shape, given.rounds)
        if "broken" in found:
            print(f"P={case.prompt} R={case.answer}: nothing was timed\n  " + "\n  ".join(found["broken"]), file=sys.stderr)
            return 1
        record["cases"].append(found)
        print(f"differences from TRL: {json.dumps(found['equality'])}\n{report(case, found['variants'])}", flush=True)
    if given.out:
        given.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
