"""Shared-prompt scoring: many prompts and all their branches in one packed row, each prompt computed once.

A packed row is `[prompt | branch 1 | branch 2 | ...]` for one pair after the other, with positions that restart at the
prompt's end for every branch. The attention is exact: a prompt and its first branch are one causal call; the other branches
look at their prompt in one call without a mask and at themselves in one causal call each (shared_attention.py). Where tokens of
a prompt see each other in both directions, as an image's do in some models, its call is taken apart there.

It is registered as an attention implementation of transformers, so that no model code is edited, and it is sdpa wherever no
packed row is under way: a model that has run one still generates, exports and runs ordinary batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmpo.kernels.shared_attention import Call, Plan, SharedPrompt
from mmpo.reference import unwrap

NAME = "mmpo_prefix"
ATTENTION = {"full_attention", "sliding_attention", "attention"}  # kinds of layers that only attention connects along the row
UNSUPPORTED = {"softcap": "soft-capped attention scores", "s_aux": "attention sinks", "position_bias": "a position bias"}


@dataclass(frozen=True)
class Segments:
    """Where everything is in a packed row: for each pair the prompt's range and those of the branches that continue it.

    Branches directly follow their prompt, pairs each other, from position 0 to the row's length. Branches may be empty.
    """

    pairs: tuple[tuple[range, tuple[range, ...]], ...]

    def __post_init__(self) -> None:
        parts = [part for prompt, branches in self.pairs for part in (prompt, *branches)]
        if any(part.start != before.stop for before, part in zip([range(0), *parts], parts, strict=False)):
            raise ValueError(f"the parts of a packed row must follow each other without gaps from 0, received {parts}")

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return max((part.stop for prompt, branches in self.pairs for part in (prompt, *branches)), default=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its branches: the span that one token may attend to."""
        return max((len(prompt) + len(b) for prompt, branches in self.pairs for b in branches or (range(0),)), default=0)

    def units(self) -> Tensor:
        """Positions of all branches' tokens, branch after branch, (T,)."""
        return torch.tensor([i for _, branches in self.pairs for branch in branches for i in branch], dtype=torch.long)

    def predictors(self) -> Tensor:
        """Positions of the states that predict `units`, (T,): a branch's first token is predicted by the prompt's last state.

        Errors: ValueError where a prompt is empty and nothing predicts the first token of its branches.
        """
        found: list[int] = []
        for index, (prompt, branches) in enumerate(self.pairs):
            if not prompt and any(branches):
                raise ValueError(
                    f"prompt {index} of the row is empty: its branches' first tokens have no state that predicts them"
                )
            found += [i for branch in branches if branch for i in (prompt[-1], *branch[:-1])]
        return torch.tensor(found, dtype=torch.long)


def pack(prompts: Sequence[Tensor], branches: Sequence[Sequence[Tensor]], share: bool) -> tuple[Tensor, Tensor, Segments]:
    """One packed row of token ids: input_ids (1, L), position_ids (1, L) and where everything is.

    prompts: B rows of ids (P,). branches: for each pair any number of rows of ids (R,). share: compute a prompt once for all
    its branches; otherwise every branch brings its own copy and is a pair of its own, in the same order.
    """
    if len(prompts) != len(branches):
        raise ValueError(f"{len(prompts)} prompts cannot be paired with the branches of {len(branches)}")
    groups = list(zip(prompts, branches, strict=True))
    if not share:
        groups = [(prompt, [branch]) for prompt, several in groups for branch in several]
    parts = [part for prompt, several in groups for part in (prompt, *several)]
    stops = list(accumulate((len(part) for part in parts), initial=0))
    ranges = iter([range(start, stop) for start, stop in zip(stops, stops[1:], strict=False)])
    segments = Segments(tuple((next(ranges), tuple(next(ranges) for _ in several)) for _, several in groups))
    positions = [torch.arange(len(part)) + offset for part, offset in _offsets(groups)]
    device = parts[0].device if parts else torch.device("cpu")
    nothing = torch.empty(0, dtype=torch.long)
    row = torch.cat([nothing.to(device), *parts])
    return row[None], torch.cat([nothing, *positions])[None].to(device), segments


def _offsets(groups: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Iterator[tuple[Tensor, int]]:
    for prompt, several in groups:
        yield prompt, 0
        yield from ((branch, len(prompt)) for branch in several)


def _calls(prompt: range, branches: Sequence[range], blocks: Sequence[range] = ()) -> Iterator[Call]:
    """The first branch that is not empty continues the prompt's causal call; the others look at the prompt together.

    blocks: stretches of the prompt, in order, whose tokens see each other in both directions.
    """
    filled = [branch for branch in branches if branch]
    stop = filled[0].stop if filled else prompt.stop
    ends = [prompt.start, *(end for block in blocks for end in (block.start, block.stop)), stop]
    for number, ends_here in enumerate(pairwise(ends)):
        part = slice(*ends_here)
        if part.stop > part.start:
            yield Call(part, part, not number % 2)
            if part.start > prompt.start:
                yield Call(part, slice(prompt.start, part.start), False)
    if prompt and filled[1:]:
        yield Call(slice(filled[1].start, filled[-1].stop), slice(prompt.start, prompt.stop), False)
    for branch in filled[1:]:
        yield Call(slice(branch.start, branch.stop), slice(branch.start, branch.stop), True)


def forward_hidden(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    segments: Segments,
    skipped: int = 0,
    blocks: Sequence[range] = (),
    **model_inputs: Any,
) -> Tensor:
    """Final hidden states (after the last norm) of a packed row, (L, D), with gradient.

    model: a transformers causal language model, with peft adapters or in DistributedDataParallel as may be. It is called as a
    whole, so that their hooks run, and asked for the logits of no position. model_inputs: anything else its forward takes.
    From then on the model's attention implementation is this module's, which is sdpa for every other call. skipped: layers that
    compute no attention in this call, because their states are known. position_ids: (1, L), or (3, 1, L) for a model that
    numbers tokens by time, row and column. blocks: stretches of prompts whose tokens see each other in both directions.
    Errors: ValueError where `why_not` has a reason that shows only now, or where a layer computed its attention otherwise.
    """
    config = causal(model).config.get_text_config()
    if config._attn_implementation != NAME:
        config._attn_implementation = NAME
    calls = [
        call
        for prompt, branches in segments.pairs
        for call in _calls(prompt, branches, [b for b in blocks if b.start in prompt])
    ]
    plan = Plan(calls, segments.longest, input_ids.device)
    made = input_ids.new_empty(1, 1, 1, 1, dtype=torch.bool)  # a mask of four dimensions is taken as it is: none is made
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": made, "mmpo_plan": plan}
    hidden = _states(model, inputs | model_inputs)
    layers = config.num_hidden_layers - skipped
    if plan.layers != layers:
        raise ValueError(f"{plan.layers} of {layers} layers computed the packed row's attention: score with layout: padded")
    return hidden[0]


def forward_padded(model: nn.Module, input_ids: Tensor, segments: Segments, **model_inputs: Any) -> Tensor:
    """As `forward_hidden`, one padded row per branch: for models that cannot run packed rows. (L, D), packed order.

    input_ids, segments: from `pack(..., share=False)`, so that every pair of the row is one prompt with one branch. Padded on
    the right, where causal and recurrent models alike do not see it.
    """
    mask = padded_mask(segments).to(input_ids.device)
    ids = input_ids.new_zeros(mask.shape).masked_scatter(mask, input_ids[0])
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    hidden = _states(model, inputs | model_inputs)
    return hidden[:, -mask.shape[1] :][mask]  # soft prompts come first


def padded_mask(segments: Segments) -> Tensor:
    """Where padded rows hold the tokens of a packed one, one row per branch, (N, width) bool."""
    rows = [range(prompt.start, max([prompt.stop, *(b.stop for b in branches)])) for prompt, branches in segments.pairs]
    if any(len(branches) > 1 for _, branches in segments.pairs):
        raise ValueError("padded rows have one branch each: pack with share=False")
    return torch.tensor([[i < len(row) for i in range(max(map(len, rows)))] for row in rows])


def causal(model: nn.Module) -> Any:
    """The transformers model inside DistributedDataParallel and peft."""
    inner: Any = unwrap(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _states(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Run the whole model without logits and take the final states where its decoder returns them."""
    inner = causal(model)
    found: list[Any] = []
    if "logits_to_keep" in inspect.signature(type(inner).forward).parameters:
        inputs = inputs | {"logits_to_keep": torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)}
    handle = inner.get_decoder().register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def why_not(model: nn.Module, longest: int = 0) -> str | None:
    """Why this model cannot run packed rows, or None. Cheap after the first call per model, which tries a row of 14 tokens.

    longest: tokens of the longest prompt with a branch; a sliding window matters only where it is shorter than that.
    """
    inner = causal(model)
    config = inner.config.get_text_config()
    peft = getattr(unwrap(model), "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        return f"{type(peft).__name__} puts virtual tokens before every row"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ATTENTION)
    if other := sorted(kinds - ATTENTION):
        return f"it has {', '.join(other)} layers, which carry a state along the row"
    if getattr(inner, "_is_stateful", False):
        return f"{type(inner).__name__} carries a state along the row"
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{type(inner).__name__} takes no other attention implementation"
    window = getattr(config, "sliding_window", None)
    if window and longest > window and "sliding_attention" in kinds:
        return f"its sliding window of {window} tokens is shorter than the longest row of {longest}"
    if inner not in _tried:
        own = config._attn_implementation
        _tried[inner] = _trial(model)
        if _tried[inner]:  # its own may be one that sdpa cannot stand in for
            config._attn_implementation = own
    return _tried[inner]


_tried: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode: no dropout and no checkpointing, each as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _trial(model: nn.Module) -> str | None:
    """Whether a small packed row equals the same tokens in rows of their own: what no list of architectures can promise."""
    device = next(model.parameters()).device
    three, two, one = (torch.arange(n, device=device) for n in (3, 2, 1))
    rows = [three, two], [[two, three], [three, one]]
    try:
        with evaluating(model), torch.no_grad():
            ids, positions, segments = pack(*rows, share=True)
            packed = forward_hidden(model, ids, positions, segments)[segments.units().to(device)].float()
            ids, _, segments = pack(*rows, share=False)
            plain = forward_padded(model, ids, segments)[segments.units().to(device)].float()
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        return f"a trial row failed: {error}"
    away = ((packed - plain).norm() / plain.norm()).item()
    return None if away < 0.05 else f"a packed row gives other states than rows of their own, {away:.0%} away"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, mmpo_plan: Plan | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: the packed row's calls where there is one, sdpa otherwise.

    query (1, H, L, E), key and value (1, K, L, E) with K dividing H. Returns (1, L, H, E).
    """
    if mmpo_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _refuse(mmpo_plan, dropout, kwargs)
    mmpo_plan.layers += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    return SharedPrompt.apply(query, key, value, mmpo_plan, scale), None


def _refuse(plan: Plan, dropout: float, kwargs: dict[str, Any]) -> None:
    if found := [text for name, text in UNSUPPORTED.items() if kwargs.get(name) is not None]:
        raise ValueError(f"packed rows cannot have {found[0]}: score with layout: padded")
    if dropout:
        raise ValueError(
            f"packed rows have no attention dropout, received {dropout}: set it to 0, or score with layout: padded"
        )
    window = kwargs.get("sliding_window")
    if window is not None and plan.longest > window:
        raise ValueError(
            f"a sliding window of {window} tokens is shorter than a row of {plan.longest}: score with layout: padded"
        )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
