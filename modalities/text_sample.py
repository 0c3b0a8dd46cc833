"""Generation: batches of answers with a key-value cache, each a function of the weights, its prompt and its seed alone.

Every sequence draws its random numbers from a generator of its own, one per token, and turns each into a token by the
inverse of the cumulative distribution: what else is in the batch moves nothing but the last bits of the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpo.kernels.prefix import causal
from mmpo.modalities.text_config import SampleConfig
from mmpo.modality import Step, Watch
from mmpo.sharding import sharded

Tell = Callable[[int, list[list[int]]], None]


def telling(watch: Watch, part: Sequence[int], longest: int, decode: Callable[[list[int]], str]) -> Tell:
    """What tells `watch` of a batch in words. part: which prompts it holds. A character of which a part is missing waits."""

    def tell(number: int, written: list[list[int]]) -> None:
        texts = {i: decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}") for i, tokens in zip(part, written, strict=True)}
        watch(Step(number, longest, texts))

    return tell


def limited(spec: SampleConfig, tokens: int | None) -> SampleConfig:
    """The same settings, for at most so many tokens where they are given."""
    return spec if tokens is None else spec.model_copy(update={"max_new_tokens": min(tokens, spec.max_new_tokens)})


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    stops: frozenset[int],
    spec: SampleConfig,
    first: Mapping[str, Any] | None = None,
    ahead: Tensor | None = None,
    watch: Tell | None = None,
) -> list[list[int]]:
    """The generated tokens of each prompt, without the one that ended it.

    prompts: N lists of ids, none empty. stops: ids that end a sequence. spec: max_new_tokens, temperature (0 takes the
    likeliest token), top_p. first: further inputs of the first call, which reads the prompts padded on the left. ahead: (N,)
    how far positions are ahead of the number of tokens, where the model numbers them by rows and columns too. watch: called
    after every token with how many there are at most by now, and with what has been written; what it raises ends this.
    """
    device = next(model.parameters()).device
    uniform = torch.stack([torch.rand(spec.max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
    written: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    own = causal(model)
    keeps = "past_key_values" in inspect.signature(own.forward).parameters
    with _inference(model if sharded(model) else own) as inner:  # a model in shards gathers what its outermost call needs
        steps: Any = _Cached(inner, prompts, device, first or {}, ahead) if keeps else _Recomputed(inner, prompts, device)
        for number in range(spec.max_new_tokens):
            tokens = choose(steps.logits(), uniform[alive, number].to(device), spec.temperature, spec.top_p).tolist()
            kept = [row for row, token in enumerate(tokens) if token not in stops]
            for row in kept:
                written[alive[row]].append(tokens[row])
            if watch is not None:
                watch(number + 1, written)
            alive = [alive[row] for row in kept]
            if not alive:
                break
            steps.go_on(kept, [tokens[row] for row in kept])
    return written


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each row: logits (N, V) fp32, uniform (N,) in [0, 1). Returns (N,) int64.

    top_p keeps the fewest likeliest tokens whose probabilities reach it (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = p.sort(-1, descending=True)
        above = ordered.cumsum(-1) - ordered
        p = p * torch.zeros_like(p, dtype=torch.bool).scatter(-1, places, above < top_p)
    cumulative = p.cumsum(-1)
    wanted = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=p.shape[-1] - 1)


class _Cached:
    """The model's next-token logits while sequences grow; those that have ended leave the batch."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        device: torch.device,
        first: Mapping[str, Any],
        ahead: Tensor | None,
    ):
        longest = max(map(len, prompts))  # padded on the left, so that every row grows at the same place
        self.model, self.first = model, dict(first)
        self.ahead = None if ahead is None else ahead.to(device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.cache: Any = None

    def logits(self) -> Tensor:
        """(N, V) fp32, of the token after each row."""
        position = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        if self.ahead is not None:
            position = (position + self.ahead[:, None]).expand(3, -1, -1)
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": position, "past_key_values": self.cache}
        output = self.model(**inputs | self.first, use_cache=True, logits_to_keep=1)
        self.cache, self.first = output.past_key_values, {}
        return output.logits[:, -1].float()

    def go_on(self, rows: list[int], tokens: list[int]) -> None:
        """Keep these rows of the batch, each with one more token."""
        if len(rows) < len(self.mask):
            self.cache.batch_select_indices(torch.tensor(rows, device=self.mask.device))
            self.mask = self.mask[rows]
            self.ahead = None if self.ahead is None else self.ahead[rows]
        self.ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)


class _Recomputed:
    """The same for recurrent models, whose states are no key-value cache: the whole row again for every token."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device):
        self.model, self.device, self.rows = model, device, [list(p) for p in prompts]

    def logits(self) -> Tensor:
        width = max(map(len, self.rows))  # padded on the right, where a recurrence has passed the last token already
        ids = torch.tensor([row + [0] * (width - len(row)) for row in self.rows], device=self.device)
        last = torch.tensor([len(row) - 1 for row in self.rows], device=self.device)
        found = self.model(input_ids=ids, use_cache=False).logits
        return found[torch.arange(len(ids), device=self.device), last].float()

    def go_on(self, rows: list[int], tokens: list[int]) -> None:
        self.rows = [[*self.rows[row], token] for row, token in zip(rows, tokens, strict=True)]


@contextmanager
def _inference(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode throughout: layers that recompute their activations keep no cache."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True
