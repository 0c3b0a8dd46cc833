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
from mmpo.errors import RecipeError
from mmpo.evaluate import Samples
from mmpo.kernels import token_stats
from mmpo.kernels.prefix import Segments, causal, forward_hidden, forward_padded, pack, why_not
from mmpo.modalities import text_model, text_ratios, text_rows, text_sample, text_sheet, text_trunk
from mmpo.modalities.text_config import ModelConfig, SampleConfig
from mmpo.modalities.text_rows import Group
from mmpo.modalities.text_tokens import Tokens, Turns, Unusable
from mmpo.modality import DrawKey, LogRatios, Watch
from mmpo.pair import Block, Pair, text
from mmpo.prepare import ASSETS
from mmpo.reference import Reference
from mmpo.schema import DrawConfig
from mmpo.scores import NOTHING, Scores, States

SAMPLE_BATCH = 64
PLANNED = 4096  # pairs whose lengths say what a batch costs
EMBEDDED = ASSETS / "sums"
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
    pair has spans. keys: what each pair's draw is. prompts: how many of the row's prompts each pair has.
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
    prompts: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device


class Adapter:
    """The text modality (see `mmpo.modality.Modality`)."""

    PROVIDES = STATISTICS | {"hidden_sum", "weights"}
    NAME = "text"
    AUTO = "AutoModelForCausalLM"  # the class of transformers that loads its models
    READER = "AutoTokenizer"  # and the one that loads what stands beside them
    KEPT = 1 << 16  # pairs whose tokens are remembered
    branches: tuple[str, ...] = ("chosen", "rejected")
    takes_further = True
    embedded_model = EMBEDDED
    embedded_data = EMBEDDED / "candidates.parquet"
    embedded_judge = "sums"

    def __init__(self, config: ModelConfig, draw: DrawConfig, cache: Cache, device: torch.device, prompt_dropout: float = 0.0):
        self.config, self.device, self.prompt_dropout = config, device, prompt_dropout
        self._path = str(self.embedded_model) if config.path == "embedded" else packaged.resolve(config.path)
        model = self._load(self._path, self._dtype, config.quantize)
        self._context = text_model.context_of(model)
        self.turns = self._reader(model, cache)
        if prompt_dropout:
            self._check_dropped_prompts()
        room = config.sample.max_new_tokens if self._context is None else self._context // 2
        self._sampling = config.sample.model_copy(update={"max_new_tokens": min(config.sample.max_new_tokens, room)})
        self.is_embedded = config.path == "embedded"
        self.starts_from_adapter = bool(config.lora.path)
        settings = text_model.settings_of(model)
        self.weights = {"model": digest_module(model), "tokenizer": self.turns.digest, "settings": settings}
        self._stop = self.turns.stops(_listed(model.generation_config.eos_token_id))
        self.model = self._trainable(self._placed(model))
        text_model.check_head(self.model)
        if self.starts_from_adapter:
            self.weights["adapter"] = digest_module(self.model)
        self._trunk = None if config.train_layers is None else text_trunk.Trunk(config.train_layers, cache)
        self._encoded: dict[str, Encoded] = {}
        self._said: set[str] = set()
        self._tiling: token_stats.Tiling | None = None
        self.layout: str = "shared" if config.layout == "auto" else config.layout
        self.layout = self._possible(0)

    def _check_dropped_prompts(self) -> None:
        """Raise RecipeError where an answer without its prompt would have nothing before it."""
        try:
            self.turns.prompt(())
        except Unusable as error:
            raise RecipeError(
                "data.prompt_dropout: this model's tokenizer puts no token before a text, so an answer whose prompt is dropped "
                "would have nothing to be conditioned on; expected 0"
            ) from error

    @property
    def _dtype(self) -> torch.dtype:
        return text_model.DTYPES[self.config.dtype]

    def _load(self, path: str, dtype: torch.dtype, quantize: str = "none") -> Any:
        options: dict[str, Any] = {"quantize": quantize, "allow_download": self.config.allow_download, "auto": self.AUTO}
        return text_model.load_model(path, dtype, **options)

    def _reader(self, model: Any, cache: Cache) -> Turns:
        """What makes tokens of blocks."""
        config = self.config
        tokenizer = text_model.load_tokenizer(self._path, config.chat_template, allow_download=config.allow_download)
        return Turns(tokenizer, config, self._context)

    def _trainable(self, model: Any) -> nn.Module:
        return text_model.trainable(model, self.config)

    def _placed(self, model: Any) -> Any:
        """The model on the adapter's device; bitsandbytes has put its own there already."""
        return model if self.config.quantize != "none" else model.to(self.device)

    def _possible(self, longest: int) -> str:
        """The layout for rows of at most so many tokens: the model's reason against packed ones is said once, and they are
        padded; where the recipe asks for packed ones it is an error."""
        reason = None if self.layout == "padded" else self._why_not(longest)
        if reason is None:
            return self.layout
        if self.config.layout != "auto":
            raise ValueError(f"model.layout: {self.config.layout} is not possible: {reason}; set it to auto or padded")
        self._say(f"layout: padded, one row per answer, because {reason}")
        return "padded"

    def _why_not(self, longest: int) -> str | None:
        """Why rows of at most so many tokens cannot be packed, or None."""
        return why_not(self.model, longest)

    def load_reference(self, path: str) -> nn.Module:
        """Another model with the same vocabulary, for reference.kind: path."""
        path = packaged.resolve(path)
        other = self._load(path, self._dtype).to(self.device)
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
                self._of(pair)
                kept.append(pair)
            except Unusable as error:
                if self._refuses(pair):
                    raise
                self.turns.counts[f"pairs left out: {error.reason}"] += 1
        return kept, Counter(self.turns.counts)

    def _refuses(self, pair: Pair) -> bool:
        """Whether a pair beyond the limits is an error."""
        return self.config.too_long != "skip"

    def plan(self, pairs: Sequence[Pair], batch_size: int, reference: bool, shards: int = 1) -> str:
        """Choose layout, tile of the head and checkpointing (`mmpo.planner`): by average batches, memory by the longest."""
        if not hasattr(causal(self.model).config.get_text_config(), "num_attention_heads"):
            return ""  # the cost model knows attention only
        rows = [list(self._of(pair).rows.values()) for pair in pairs[:PLANNED]]
        lengths = sorted((text_rows.lengths(r) for r in rows), key=text_rows.total)
        spread = [lengths[(2 * i + 1) * len(lengths) // (2 * batch_size)] for i in range(batch_size)]
        given: dict[str, Any] = {"reference": reference, "device": self.device.type}
        sizes, asked = planner.sizes_of(self.model, shards), self.config.gradient_checkpointing
        given["free"] = planner.free_after(planner.free_bytes(self.device), self.model, shards)
        longest = max(map(text_rows.total, lengths))
        given["unable"] = self._why_not(longest) if self._possible(longest) == "padded" else None
        self.layout = planner.choose(sizes, spread, layout=self.config.layout, **given).layout
        worst = planner.choose(sizes, lengths[-batch_size:], layout=self.layout, checkpointing=asked, **given)
        if worst.checkpointing and not asked:
            text_model.checkpoint(causal(self.model))
        self._tiling = worst.tiling
        return planner.choose(sizes, spread, layout=self.layout, checkpointing=worst.checkpointing, **given).describe()

    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        """The tokens of each pair. Raises DataError, naming the pair, for one that cannot be tokenised within the limits."""
        return [self._of(pair) for pair in pairs]

    def _of(self, pair: Pair) -> Encoded:
        """The tokens of a pair, remembered by content."""
        name = text_rows.content_of(pair, self.branches)
        if name not in self._encoded:
            if len(self._encoded) >= self.KEPT:
                self._encoded.pop(next(iter(self._encoded)))
            rows = self.turns.rows(pair, self.branches)
            empty = self.turns.rows(pair, self.branches, dropped=True) if self.prompt_dropout else {}
            weights = {b: text_rows.span_weights_of(pair, b, row) for b, row in rows.items() if b in pair.spans}
            self._encoded[name] = Encoded(rows, weights, empty)
        return self._encoded[name]

    # ---- draw: nothing is random but whether the prompt is dropped

    def draw(self, encoded: Sequence[Encoded], keys: Sequence[DrawKey], model: nn.Module) -> Batch:
        groups = self._groups(encoded, keys)
        layout = self._possible(max(len(row.ids) for group in groups for row in group.values()))
        return self._packed(encoded, groups, layout)

    def _packed(self, encoded: Sequence[Encoded], groups: Sequence[Group], layout: str) -> Batch:
        sides = {side: row for group in groups for side, row in group.items()}
        prompts = [next(iter(group.values())).prompt for group in groups]
        answers = [[text_rows.read(row) for row in group.values()] for group in groups]
        ids, positions, segments = pack(prompts, answers, share=layout == "shared")
        parts = [(prompt, branch) for prompt, branches in segments.pairs for branch in branches]
        states = {s: text_rows.predictors(row, *part) for (s, row), part in zip(sides.items(), parts, strict=True)}
        order = sorted(states, key=lambda side: (self.branches.index(side[0]), side[1]))
        masks = {b: text_rows.mask_of([sides.get((b, i)) for i in range(len(encoded))]) for b in self.branches}
        prompted = Counter(i for group in groups for _, i in (list(group)[:1] if layout == "shared" else group))
        stops = list(accumulate((int(m.sum()) for m in masks.values()), initial=0))
        return Batch(
            layout,
            ids.to(self.device),
            positions.to(self.device),
            segments,
            torch.cat([states[s] for s in order]).to(self.device),
            torch.cat([sides[s].ids[sides[s].supervised] for s in order]).to(self.device),
            {b: slice(*ends) for b, ends in zip(masks, pairwise(stops), strict=True)},
            {b: m.to(self.device) for b, m in masks.items()},
            text_rows.unit_weights([e.weights for e in encoded], masks, self.device),
            tuple(self._key(layout, {b: row for (b, k), row in sides.items() if k == i}) for i in range(len(encoded))),
            tuple(prompted[i] for i in range(len(encoded))),
        )

    def _groups(self, encoded: Sequence[Encoded], keys: Sequence[DrawKey]) -> list[Group]:
        """The rows of a call by branch and pair, those of a pair under one and the same prompt together."""
        pairs = [e.empty if self.drops(name) else e.rows for e, name in zip(encoded, keys, strict=True)]
        return text_rows.grouped([{b: rows[b] for b in self.branches if b in rows} for rows in pairs])

    def drops(self, name: DrawKey) -> bool:
        """Whether this draw is one without the prompt."""
        if not self.prompt_dropout:
            return False
        stream = key("prompt", name.seed, name.sample, name.index)
        generator = torch.Generator().manual_seed(int.from_bytes(stream[:7], "big"))
        return bool(torch.rand((), generator=generator) < self.prompt_dropout)

    def _key(self, layout: str, rows: Mapping[str, Tokens]) -> bytes:
        """Names what is computed for a pair: its tokens, which of them are scored, and the layout, which moves last bits."""
        parts = [x.numpy().tobytes() for row in rows.values() for x in (row.ids, row.supervised)]
        return key(self.NAME, layout, self.config.dtype, self.config.quantize, self.weights["settings"], *rows, *parts)

    # ---- score: pure

    def score(
        self, model: nn.Module, batch: Batch, wants: frozenset[str] = NOTHING, against: Mapping[str, Scores] | None = None
    ) -> dict[str, Scores]:
        hidden = self._hidden(model, batch)
        head = text_model.head_of(model)
        ref_hidden, ref_head = text_rows.states_of(against, batch.masks) if FROM_BOTH & wants else (None, None)
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
            names = text_trunk.rows_of(batch.keys, batch.segments, batch.prompts)
            return self._trunk.forward(model, row, names, padded)[batch.states]
        return (forward_padded(model, row[0], row[2]) if padded else forward_hidden(model, *row))[batch.states]

    def head(self, model: nn.Module) -> token_stats.Head:
        return text_model.head_of(model)

    # ---- sample, describe, save

    def sample(
        self, model: nn.Module, prompts: Sequence[tuple[Block, ...]], seeds: Sequence[int], watch: Watch | None = None,
        steps: int | None = None,
    ) -> list[Block]:  # fmt: skip
        spec = text_sample.limited(self._sampling, steps)
        ids = [self._asked(p) for p in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # prompts of like length waste no padding
        blocks: dict[int, Block] = {}
        for start in range(0, len(order), SAMPLE_BATCH):
            part = order[start : start + SAMPLE_BATCH]
            given = ([ids[i] for i in part], [seeds[i] for i in part])
            found = text_sample.generate(model, *given, self._stop, spec, watch=self._telling(watch, part, spec))
            blocks |= {i: text(self.turns.decode(tokens)) for i, tokens in zip(part, found, strict=True)}
        return [blocks[i] for i in range(len(ids))]

    def _telling(self, watch: Watch | None, part: Sequence[int], spec: SampleConfig) -> text_sample.Tell | None:
        return None if watch is None else text_sample.telling(watch, part, spec.max_new_tokens, self.turns.decode)

    def log_ratios(self, model: nn.Module, base: Reference, prompt: tuple[Block, ...], answer: Block, seed: int) -> LogRatios:
        return text_ratios.by_token(self, model, base, prompt, answer, seed)

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
        return f"beta {beta:g} per nat of the answer's log-ratio, {end} the token that ends the turn"

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
        theirs = self._placed(text_model.reload(self._path, folder, whole, dtype, self.config.quantize, self.AUTO))
        base = self._placed(self._load(self._path, dtype, self.config.quantize))
        after, before, policy = (list(self._dummy_logits(m)) for m in (theirs, base, model))
        away = [max(float((a - b).abs().max()) for a, b in zip(after, other, strict=True)) for other in (policy, before)]
        return away[0], away[1], max(float(p.abs().max()) for p in policy)

    def _dummy_logits(self, model: nn.Module) -> Iterator[Tensor]:
        for encoded in self.encode(self.dummy()):
            for row in encoded.rows.values():
                yield causal(model)(input_ids=row.ids[None].to(self.device), use_cache=False).logits.float()

    def how_to_load(self, folder: Path, merge: bool = False) -> str:
        """Lines for the user, after `import peft` and `from transformers import ...` of the two classes that they name."""
        reader = f"  {self.READER.removeprefix('Auto').lower()} = {self.READER}.from_pretrained({str(folder)!r})"
        if self.config.adapter == "full" or merge:
            return f"  model = {self.AUTO}.from_pretrained({str(folder)!r})\n{reader}"
        base = f"  model = {self.AUTO}.from_pretrained({self._path!r})\n"
        return f"{base}  model = peft.PeftModel.from_pretrained(model, {str(folder)!r})\n{reader}"

    def write_samples(self, folder: Path, prompts: Sequence[tuple[Block, ...]], base: Samples, aligned: Samples) -> None:
        """base.jsonl and aligned.jsonl in one order, a line per generation, and sheet.html, the two beside each other."""
        lines = {n: text_sheet.lines(prompts, samples) for n, samples in (("base", base), ("aligned", aligned))}
        text_sheet.write(folder, text_sheet.page(**lines), **lines)


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
