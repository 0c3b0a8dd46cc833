"""Language models: any causal one of transformers, with exact likelihoods of the assistant's answer.

    logp[u] = log pi(y_u | prompt, y_<u)   in nats, for the answer's tokens and, as the recipe says, the one that ends the turn

Both answers of a pair are scored by one model call. Where the model can, all rows of a batch are one packed row in which
every prompt is computed once (`mmpo.kernels.prefix`), and only states that predict a scored token meet the head
(`mmpo.kernels.token_stats`).

    layout    shared   [prompt | chosen | rejected] for one pair after the other
              packed   [prompt | chosen] [prompt | rejected]
              padded   one row each, padded on the right: for models that cannot run packed rows
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmpo import packaged, planner
from mmpo.cache import Cache, digest_module, key
from mmpo.checkpoint import write_atomic
from mmpo.errors import DataError
from mmpo.evaluate import Samples
from mmpo.kernels import token_stats
from mmpo.kernels.prefix import Segments, causal, forward_hidden, forward_padded, pack, why_not
from mmpo.modalities import text_model, text_rows, text_sample, text_sheet, text_trunk
from mmpo.modalities.text_config import ModelConfig
from mmpo.modalities.text_tokens import Tokens, Turns, Unusable, span_weights
from mmpo.modality import DrawKey
from mmpo.pair import Block, Pair, text
from mmpo.schema import DrawConfig
from mmpo.scores import NOTHING, Scores, States

SAMPLE_BATCH = 64
KEPT = 1 << 16  # pairs whose tokens are remembered
PLANNED = 4096  # pairs whose lengths say what a batch costs
EMBEDDED = Path(__file__).resolve().parent.parent / "mmpo" / "assets" / "sums"
STATISTICS = frozenset(token_stats.NAMES) - {"logp"}
FROM_BOTH = frozenset({"kl_ref", "kl_policy"})


@dataclass(frozen=True)
class Encoded:
    """One pair as tokens. rows, weights: by branch, absent where the pair has no such side, or no spans for it.

    empty: the rows under the empty prompt, where prompts are dropped.
    """

    rows: dict[str, Tokens]
    weights: dict[str, Tensor]
    empty: dict[str, Tokens]


@dataclass(frozen=True)
class Batch:
    """Everything `score` needs: one packed row (1, L), which the padded layout takes apart again.

    states: (T,) positions of the states that predict the scored tokens, branch after branch and pair after pair. labels:
    (T,) those tokens. parts: where each branch's are. masks: (B, U) by branch. weights: (B, U) by branch, or None where no
    pair has spans. keys: what each pair's draw is.
    """

    layout: str
    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    states: Tensor
    labels: Tensor
    parts: dict[str, slice]
    masks: dict[str, Tensor]
    weights: dict[str, Tensor] | None
    keys: tuple[bytes, ...]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device


class Adapter:
    """The text modality (see `mmpo.modality.Modality`)."""

    PROVIDES = STATISTICS | {"hidden_sum", "weights"}
    branches: tuple[str, ...] = ("chosen", "rejected")
    embedded_data = EMBEDDED / "candidates.parquet"
    embedded_judge = "sums"

    def __init__(self, config: ModelConfig, draw: DrawConfig, cache: Cache, device: torch.device, prompt_dropout: float = 0.0):
        self.config, self.device, self.prompt_dropout = config, device, prompt_dropout
        self._path = str(EMBEDDED) if config.path == "embedded" else packaged.resolve(config.path)
        download = config.allow_download
        model = text_model.load_model(self._path, self._dtype, quantize=config.quantize, allow_download=download)
        tokenizer = text_model.load_tokenizer(self._path, config.chat_template, allow_download=download)
        self._context = text_model.context_of(model)
        self.turns = Turns(tokenizer, config, self._context)
        room = config.sample.max_new_tokens if self._context is None else self._context // 2
        self._sampling = config.sample.model_copy(update={"max_new_tokens": min(config.sample.max_new_tokens, room)})
        self.is_embedded = config.path == "embedded"
        self.starts_from_adapter = bool(config.lora.path)
        settings = text_model.settings_of(model)
        self.weights = {"model": digest_module(model), "tokenizer": self.turns.digest, "settings": settings}
        self._stop = self.turns.stops(_listed(model.generation_config.eos_token_id))
        self.model = text_model.trainable(self._placed(model), config)
        text_model.check_head(self.model)
        if self.starts_from_adapter:
            self.weights["adapter"] = digest_module(self.model)
        self._trunk = None if config.train_layers is None else text_trunk.Trunk(config.train_layers, cache)
        self._encoded: dict[str, Encoded] = {}
        self._said: set[str] = set()
        self._tiling: token_stats.Tiling | None = None
        self.layout: str = "shared" if config.layout == "auto" else config.layout
        self.layout = self._possible(0)

    @property
    def _dtype(self) -> torch.dtype:
        return text_model.DTYPES[self.config.dtype]

    def _placed(self, model: Any) -> Any:
        """The model on the adapter's device; bitsandbytes has put its own there already."""
        return model if self.config.quantize != "none" else model.to(self.device)

    def _possible(self, longest: int) -> str:
        """The layout for rows of at most so many tokens: the model's reason against packed ones is said once, and they are
        padded; where the recipe asks for packed ones it is an error."""
        reason = None if self.layout == "padded" else why_not(self.model, longest)
        if reason is None:
            return self.layout
        if self.config.layout != "auto":
            raise ValueError(f"model.layout: {self.config.layout} is not possible: {reason}; set it to auto or padded")
        self._say(f"layout: padded, one row per answer, because {reason}")
        return "padded"

    def load_reference(self, path: str) -> nn.Module:
        """Another model with the same vocabulary, for reference.kind: path."""
        path, download = packaged.resolve(path), self.config.allow_download
        other = text_model.load_model(path, self._dtype, allow_download=download).to(self.device)
        text_model.check_head(other)
        sizes = [len(text_model.head_of(m).weight) for m in (self.model, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"reference.path {path}: {sizes[1]} tokens, the policy has {sizes[0]}; expected the same vocabulary"
            )
        return other

    # ---- encode: tokens, remembered by content

    def admit(self, pairs: Sequence[Pair]) -> tuple[list[Pair], Counter[str]]:
        """The pairs that keep within the limits, and what was left out or changed for their sake, by reason.

        Raises DataError, naming the pair, for one that does not where the recipe says too_long: refuse.
        """
        self.turns.counts.clear()
        kept: list[Pair] = []
        for pair in pairs:
            try:
                self.encode([pair])
                kept.append(pair)
            except Unusable as error:
                if self.config.too_long != "skip":
                    raise
                self.turns.counts[f"pairs left out: {error.reason}"] += 1
        return kept, Counter(self.turns.counts)

    def plan(self, pairs: Sequence[Pair], batch_size: int, reference: bool, shards: int = 1) -> str:
        """Choose layout, tile of the head and checkpointing (`mmpo.planner`): by average batches, memory by the longest."""
        if not hasattr(causal(self.model).config.get_text_config(), "num_attention_heads"):
            return ""  # the cost model knows attention only
        rows = [e.rows.values() for e in self.encode(pairs[:PLANNED])]
        lengths = sorted(
            ((next(iter(r)).prompt_length, [len(text_rows.read(row)) for row in r]) for r in rows), key=text_rows.total
        )
        spread = [lengths[(2 * i + 1) * len(lengths) // (2 * batch_size)] for i in range(batch_size)]
        given: dict[str, Any] = {"reference": reference, "device": self.device.type}
        sizes, asked = planner.sizes_of(self.model, shards), self.config.gradient_checkpointing
        given["free"] = planner.free_after(planner.free_bytes(self.device), self.model, shards)
        longest = max(map(text_rows.total, lengths))
        given["unable"] = why_not(self.model, longest) if self._possible(longest) == "padded" else None
        self.layout = planner.choose(sizes, spread, layout=self.config.layout, **given).layout
        worst = planner.choose(sizes, lengths[-batch_size:], layout=self.layout, checkpointing=asked, **given)
        if worst.checkpointing and not asked:
            text_model.checkpoint(causal(self.model))
        self._tiling = worst.tiling
        return planner.choose(sizes, spread, layout=self.layout, checkpointing=worst.checkpointing, **given).describe()

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """The tokens of each pair. Raises DataError, naming the pair, for one that cannot be tokenised within the limits."""
        return [self._remembered(pair) for pair in pairs]

    def _remembered(self, pair: Pair) -> Encoded:
        name = _content(pair)
        if name not in self._encoded:
            if len(self._encoded) >= KEPT:
                self._encoded.pop(next(iter(self._encoded)))
            rows = self.turns.rows(pair)
            empty = self.turns.rows(pair, dropped=True) if self.prompt_dropout else {}
            weights = {b: _weights(pair, b, row) for b, row in rows.items() if b in pair.spans}
            self._encoded[name] = Encoded(rows, weights, empty)
        return self._encoded[name]

    # ---- draw: nothing is random but whether the prompt is dropped

    def draw(self, encoded: Sequence[Encoded], keys: Sequence[DrawKey], model: nn.Module) -> Batch:
        pairs = [e.empty if self._drops(k) else e.rows for e, k in zip(encoded, keys, strict=True)]
        sides = [(b, i) for i, rows in enumerate(pairs) for b in self.branches if b in rows]
        prompts = [next(iter(rows.values())).prompt for rows in pairs]
        answers = [[text_rows.read(rows[b]) for b in self.branches if b in rows] for rows in pairs]
        layout = self._possible(max(len(row.ids) for rows in pairs for row in rows.values()))
        ids, positions, segments = pack(prompts, answers, share=layout == "shared")
        parts = [(prompt, branch) for prompt, branches in segments.pairs for branch in branches]
        states = {side: text_rows.predictors(pairs[side[1]][side[0]], *part) for side, part in zip(sides, parts, strict=True)}
        order = sorted(states, key=lambda side: (self.branches.index(side[0]), side[1]))
        masks = {b: text_rows.mask_of([rows.get(b) for rows in pairs]) for b in self.branches}
        stops = list(accumulate((int(m.sum()) for m in masks.values()), initial=0))
        return Batch(
            layout,
            ids.to(self.device),
            positions.to(self.device),
            segments,
            torch.cat([states[s] for s in order]).to(self.device),
            torch.cat([pairs[i][b].ids[pairs[i][b].supervised] for b, i in order]).to(self.device),
            {b: slice(*ends) for b, ends in zip(masks, pairwise(stops), strict=True)},
            {b: m.to(self.device) for b, m in masks.items()},
            self._unit_weights(encoded, masks),
            tuple(self._key(layout, rows) for rows in pairs),
        )

    def _drops(self, name: DrawKey) -> bool:
        if not self.prompt_dropout:
            return False
        stream = key("prompt", name.seed, name.sample, name.index)
        generator = torch.Generator().manual_seed(int.from_bytes(stream[:7], "big"))
        return bool(torch.rand((), generator=generator) < self.prompt_dropout)

    def _unit_weights(self, encoded: Sequence[Encoded], masks: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """(B, U) by branch, 1 for the rows without spans."""
        if not any(e.weights for e in encoded):
            return None
        found = {}
        for b, mask in masks.items():
            found[b] = torch.ones(mask.shape)
            for i, e in enumerate(encoded):
                if b in e.weights:
                    found[b][i, : len(e.weights[b])] = e.weights[b]
            found[b] = found[b].to(self.device)
        return found

    def _key(self, layout: str, rows: Mapping[str, Tokens]) -> bytes:
        """Names what is computed for a pair: its tokens, which of them are scored, and the layout, which moves last bits."""
        parts = [x.numpy().tobytes() for row in rows.values() for x in (row.ids, row.supervised)]
        return key("text", layout, self.config.dtype, self.config.quantize, self.weights["settings"], *rows, *parts)

    # ---- score: pure

    def score(
        self, model: nn.Module, batch: Batch, wants: frozenset[str] = NOTHING, against: Mapping[str, Scores] | None = None
    ) -> dict[str, Scores]:
        hidden = self._hidden(model, batch)
        head = text_model.head_of(model)
        ref_hidden, ref_head = _states_of(against, batch) if FROM_BOTH & wants else (None, None)
        given = (hidden, head, batch.labels, STATISTICS & wants, ref_hidden, ref_head)
        stats = token_stats.token_stats(*given, tiling=self._tiling)
        scores = {}
        for branch, mask in batch.masks.items():
            part = batch.parts[branch]
            extras = {n: text_rows.scatter(getattr(stats, n)[part].float(), mask) for n in sorted(STATISTICS & wants)}
            if "hidden_sum" in wants:
                extras["hidden_sum"] = text_rows.scatter(hidden[part].detach().float(), mask).sum(1)
            states = States(text_rows.scatter(hidden[part], mask), head) if "states" in wants else None
            weights = batch.weights[branch] if batch.weights else None
            scores[branch] = Scores(text_rows.scatter(stats.logp[part].float(), mask), mask, extras, weights, states)
        return scores

    def _hidden(self, model: nn.Module, batch: Batch) -> Tensor:
        """The states that predict the scored tokens, (T, D)."""
        row, padded = (batch.input_ids, batch.position_ids, batch.segments), batch.layout == "padded"
        if self._trunk is not None:
            sides = torch.stack([mask.any(1) for mask in batch.masks.values()]).sum(0).tolist()
            counts = [1 if batch.layout == "shared" else int(n) for n in sides]
            names = text_trunk.rows_of(batch.keys, batch.segments, counts)
            return self._trunk.forward(model, row, names, padded)[batch.states]
        return (forward_padded(model, row[0], row[2]) if padded else forward_hidden(model, *row))[batch.states]

    def head(self, model: nn.Module) -> token_stats.Head:
        return text_model.head_of(model)

    # ---- sample, describe, save

    def sample(self, model: nn.Module, prompts: Sequence[tuple[Block, ...]], seeds: Sequence[int]) -> list[Block]:
        ids = [self._asked(p) for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # prompts of like length waste no padding
        blocks: dict[int, Block] = {}
        for start in range(0, len(order), SAMPLE_BATCH):
            part = order[start : start + SAMPLE_BATCH]
            given = ([ids[i] for i in part], [seeds[i] for i in part])
            found = text_sample.generate(model, *given, self._stop, self._sampling)
            blocks |= {i: text(self.turns.decode(tokens)) for i, tokens in zip(part, found, strict=True)}
        return [blocks[i] for i in range(len(ids))]

    def _asked(self, prompt: tuple[Block, ...]) -> list[int]:
        """The prompt's tokens; one that leaves no room for an answer loses its start, which is said once."""
        ids = self.turns.prompt(prompt)
        longest = self._sampling.max_new_tokens
        if longest < self.config.sample.max_new_tokens:
            self._say(f"answers are at most {longest} tokens, half of the model's context, and not model.sample.max_new_tokens")
        excess = 0 if self._context is None else len(ids) + longest - self._context
        if excess > 0:
            self._say(f"prompts that leave no room for {longest} tokens in the model's context are sampled without their start")
            first = self.turns.fixed(ids)
            ids = ids[:first] + ids[first + excess :]
        return ids

    def _say(self, line: str) -> None:
        if line not in self._said:
            tqdm.write(line)
            self._said.add(line)

    def describe(self, beta: float) -> str:
        end = "with" if self.turns.end is not None and self.config.end_of_turn == "supervise" else "without"
        return f"beta {beta:g} per nat of the answer's log-ratio, summed over its tokens, {end} the one that ends the turn"

    def dummy(self) -> list[Pair]:
        sums = [("12+34=", "46", "47"), ("50+25=", "75", "705")]
        return [Pair(f"dummy{i}", (text(p),), (text(a),), (text(b),)) for i, (p, a, b) in enumerate(sums)]

    def save(self, model: nn.Module, folder: Path, merge: bool = False) -> None:
        """Write what plain transformers and peft load: an adapter, or the whole model (full, or merged), and the tokenizer."""
        text_model.save(model, self.turns.tokenizer, folder, merge)

    @torch.no_grad()
    def check_export(self, model: nn.Module, folder: Path, merge: bool = False) -> tuple[float, float, float]:
        """Reload by plain transformers or peft: largest difference from the policy's logits, from the base's; their size."""
        whole = merge or self.config.adapter == "full"
        dtype = torch.float32 if self.config.adapter == "full" else self._dtype
        theirs = self._placed(text_model.reload(self._path, folder, whole, dtype, self.config.quantize))
        base = self._placed(text_model.load_model(self._path, dtype, quantize=self.config.quantize))
        after, before, policy = (list(self._dummy_logits(m)) for m in (theirs, base, model))
        away = [max(float((a - b).abs().max()) for a, b in zip(after, other, strict=True)) for other in (policy, before)]
        return away[0], away[1], max(float(p.abs().max()) for p in policy)

    def _dummy_logits(self, model: nn.Module) -> Iterator[Tensor]:
        for encoded in self.encode(self.dummy()):
            for row in encoded.rows.values():
                yield causal(model)(input_ids=row.ids[None].to(self.device), use_cache=False).logits.float()

    def how_to_load(self, folder: Path, merge: bool = False) -> str:
        """Lines for the user, after `import peft` and `from transformers import AutoModelForCausalLM, AutoTokenizer`."""
        tokenizer = f"  tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"
        if self.config.adapter == "full" or merge:
            return f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n{tokenizer}"
        base = f"  model = AutoModelForCausalLM.from_pretrained({self._path!r})\n"
        return f"{base}  model = peft.PeftModel.from_pretrained(model, {str(folder)!r})\n{tokenizer}"

    def write_samples(self, folder: Path, prompts: Sequence[tuple[Block, ...]], base: Samples, aligned: Samples) -> None:
        """base.jsonl and aligned.jsonl in one order, a line per generation, and sheet.html, the two beside each other."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = {n: text_sheet.lines(prompts, samples) for n, samples in (("base", base), ("aligned", aligned))}
        for name, own in lines.items():
            written = [json.dumps(line, ensure_ascii=False) for line in own]
            write_atomic(folder / f"{name}.jsonl", ("\n".join(written) + "\n").encode())
        write_atomic(folder / "sheet.html", text_sheet.page(**lines).encode())


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _content(pair: Pair) -> str:
    """Names all of a pair that its tokens depend on."""
    sides = [[b.digest for b in side] for side in (pair.prompt, pair.chosen, pair.rejected)]
    return repr((sides, sorted(pair.spans.items())))


def _weights(pair: Pair, branch: str, row: Tokens) -> Tensor:
    try:
        return span_weights(row, getattr(pair, branch), pair.spans[branch])
    except ValueError as error:
        raise DataError(f"pair {pair.id}, {branch}: {error}") from error


def _states_of(against: Mapping[str, Scores] | None, batch: Batch) -> tuple[Tensor, token_stats.Head]:
    """The reference's states in the order of the batch's scored tokens, (T, D), and its head."""
    states = {b: s.states for b, s in (against or {}).items()}
    if not states or any(s is None for s in states.values()):
        raise ValueError("a divergence from the reference needs its states: score it with wants={'states'} first")
    hidden = torch.cat([states[b].hidden[mask] for b, mask in batch.masks.items()])  # type: ignore[union-attr]
    return hidden, next(iter(states.values())).head  # type: ignore[union-attr]
