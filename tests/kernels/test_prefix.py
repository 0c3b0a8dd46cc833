"""Packed rows against the same tokens in plain rows, by transformers' own attention."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmpo.kernels import prefix, shared_attention
from mmpo.kernels.prefix import Segments, forward_hidden, forward_padded, pack, why_not
from mmpo.kernels.shared_attention import Plan, SharedPrompt

VOCABULARY = 61
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
)  # fmt: skip
GROUPS_OF_ONE = SMALL | {"num_key_value_heads": 4}
GPT2: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=256,
    attn_pdrop=0.0,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)
OPT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    init_std=0.2, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "llama_odd_head_width": lambda: tf.LlamaConfig(**SMALL, head_dim=12),
    "qwen2": lambda: tf.Qwen2Config(**SMALL),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=16),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=64),
    "gemma": lambda: tf.GemmaConfig(**SMALL, head_dim=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=64, query_pre_attn_scalar=20),
    "smollm3": lambda: tf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "phi": lambda: tf.PhiConfig(**GROUPS_OF_ONE, partial_rotary_factor=0.5),
    "phi3": lambda: tf.Phi3Config(**SMALL, sliding_window=None),
    "olmo2": lambda: tf.Olmo2Config(**SMALL),
    "gpt2": lambda: tf.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0),
    "opt": lambda: tf.OPTConfig(**OPT),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**GROUPS_OF_ONE, first_k_dense_replace=2, kv_lora_rank=8, q_lora_rank=8,
                                               qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12),
}  # fmt: skip
PROMPTS = (7, 1, 12, 3)
BRANCHES = ((3, 5), (4,), (2, 1, 6, 2), (0, 5, 0))


def model_of(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start as constants, which would hide a mistake in their place
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def tokens(prompts: Sequence[int] = PROMPTS, branches: Sequence[Sequence[int]] = BRANCHES) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (size,), generator=generator)

    return [draw(n) for n in prompts], [[draw(n) for n in several] for several in branches]


def plain_logps(model: nn.Module, prompts: list, branches: list) -> Tensor:
    """Log-probabilities of all branches' tokens, one plain row at a time, (T,)."""
    found = []
    for prompt, several in zip(prompts, branches, strict=True):
        for branch in filter(len, several):
            row = torch.cat([prompt, branch])
            logps = model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
            found.append(logps[len(prompt) - 1 : -1].gather(1, branch[:, None])[:, 0])
    return torch.cat(found)


def packed_logps(model: Any, prompts: list, branches: list, share: bool = True, padded: bool = False) -> Tensor:
    ids, positions, segments = pack(prompts, branches, share)
    hidden = forward_padded(model, ids, segments) if padded else forward_hidden(model, ids, positions, segments)
    logits = prefix.causal(model).get_output_embeddings()(hidden[segments.predictors()]).float()
    return logits.log_softmax(-1).gather(1, ids[0, segments.units()][:, None])[:, 0]


def gradients(model: nn.Module, logps: Tensor) -> Tensor:
    """Gradient of a sum of log-probabilities with unequal signs, over all trainable parameters, flat."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logps))
    (weights * logps).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(model: Any, plain: Any, share: bool = True, **rows: Any) -> None:
    """Log-probabilities to 1e-5, gradients to 1e-5 of their norm, and neither of them trivial."""
    texts = tokens(**rows)
    ours, theirs = packed_logps(model, *texts, share), plain_logps(plain, *texts)
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= 1e-5
    ours, theirs = gradients(model, ours), gradients(plain, theirs)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_plain_rows(family: str) -> None:
    model = model_of(FAMILIES[family]())
    plain = copy.deepcopy(model)
    assert why_not(model, longest=17) is None
    assert_same(model, plain)
    assert_same(model, plain, share=False)


def test_gradient_checkpointing() -> None:
    model = model_of(FAMILIES["qwen3"]())
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    runs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    assert_same(model, plain)
    assert len(runs) == 2, "the layer was not computed again in the backward pass"


def test_lora_and_adapter_off() -> None:
    from peft import LoraConfig, get_peft_model

    base = model_of(FAMILIES["llama"]())
    torch.manual_seed(2)
    spec = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), spec).eval()
    plain = copy.deepcopy(model)
    assert why_not(model) is None
    assert_same(model, plain)
    with model.disable_adapter(), torch.no_grad():
        assert (packed_logps(model, *tokens()) - plain_logps(base, *tokens())).abs().max() <= 1e-5


def test_through_distributed_data_parallel(tmp_path: Any) -> None:
    """The wrapper's own forward has to run, or processes would keep their gradients to themselves."""
    model = model_of(FAMILIES["llama"]())
    plain, calls = copy.deepcopy(model), list[int]()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(calls, _noted)
        assert_same(wrapped, plain)
        assert calls, "no gradients were exchanged"
    finally:
        torch.distributed.destroy_process_group()


def _noted(calls, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations, and knows no strings
    calls.append(bucket.index())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_bf16_is_no_worse_than_plain_rows() -> None:
    exact = model_of(FAMILIES["llama"]())
    texts = tokens()
    with torch.no_grad():
        right = plain_logps(exact, *texts)
        ours, theirs = (copy.deepcopy(exact).bfloat16() for _ in range(2))
        errors = [(f(m, *texts) - right).norm() for f, m in ((packed_logps, ours), (plain_logps, theirs))]
    assert errors[0] <= 1.3 * errors[1]


def test_autocast_computes_in_its_precision() -> None:
    """Qwen3 normalises queries and keys in fp32 under autocast, values are half of that: as sdpa does, all are cast."""
    model = model_of(FAMILIES["qwen3"]())
    plain, texts = copy.deepcopy(model), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = packed_logps(model, *texts), plain_logps(plain, *texts)
    assert (ours - theirs).abs().max() < 0.3
    assert not torch.equal(ours, packed_logps(model, *texts))


# ---- the row


def test_pack_lays_out_prompts_and_branches() -> None:
    ids, positions, segments = pack(
        [torch.tensor([5, 6]), torch.tensor([7])], [[torch.tensor([8]), torch.tensor([9, 10])], []], True
    )
    assert ids.tolist() == [[5, 6, 8, 9, 10, 7]]
    assert positions.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert segments == Segments(((range(0, 2), (range(2, 3), range(3, 5))), (range(5, 6), ())))
    assert segments.units().tolist() == [2, 3, 4]
    assert segments.predictors().tolist() == [1, 1, 3]
    assert (segments.length, segments.longest) == (6, 4)


def test_pack_apart_repeats_the_prompt_and_keeps_the_order() -> None:
    ids, positions, segments = pack([torch.tensor([5, 6])], [[torch.tensor([8]), torch.tensor([9, 10])]], False)
    assert ids.tolist() == [[5, 6, 8, 5, 6, 9, 10]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert segments.pairs == ((range(0, 2), (range(2, 3),)), (range(3, 5), (range(5, 7),)))
    assert ids[0, segments.units()].tolist() == [8, 9, 10]


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts cannot be paired with the branches of 1"):
        pack([torch.tensor([1])] * 2, [[torch.tensor([1])]], True)
    with pytest.raises(ValueError, match="without gaps"):
        Segments(((range(0, 2), (range(3, 4),)),))
    segments = pack([torch.tensor([], dtype=torch.long)], [[torch.tensor([1])]], True)[2]
    with pytest.raises(ValueError, match="prompt 0 of the row is empty"):
        segments.predictors()


# ---- attention


def dense(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, blocks: Sequence[range] = ()) -> Tensor:
    """The same by one mask over the whole row, expanded heads and autograd."""
    mask = torch.zeros(segments.length, segments.length, dtype=torch.bool)
    for prompt, branches in segments.pairs:
        for part in (prompt, *branches):
            for i in part:
                mask[i, part.start : i + 1] = True
                mask[i, prompt.start : min(prompt.stop, i + 1)] = True
    for block in blocks:
        mask[block.start : block.stop, block.start : block.stop] = True
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def plan_of(segments: Segments, blocks: Sequence[range] = ()) -> Plan:
    calls = [call for pair in segments.pairs for call in prefix._calls(*pair, [b for b in blocks if b.start in pair[0]])]
    return Plan(calls, segments.longest, torch.device("cpu"))


def both_ways(segments: Segments, seed: int) -> list[range]:
    """Some stretches of the prompts, next to each other as may be, whose tokens see each other in both directions."""
    chosen = random.Random(seed)
    found = []
    for prompt, _ in segments.pairs:
        ends = sorted(chosen.sample(range(prompt.start, prompt.stop + 1), chosen.randint(0, len(prompt)) // 2 * 2))
        found += [range(*ends[i : i + 2]) for i in range(0, len(ends), 2)]
    return found


ROWS = st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 4), max_size=4)), min_size=1, max_size=4).filter(
    lambda pairs: any(prompt + sum(branches) for prompt, branches in pairs)
)


@given(ROWS, st.sampled_from([(4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 4, 4), (4, 2, 8, 6)]), st.integers(0, 2**31))
@settings(max_examples=40)
def test_attention_equals_one_dense_mask(pairs: list, shape: tuple[int, int, int, int], seed: int) -> None:
    """Any number of pairs and branches, empty prompts and branches, stretches that see both ways, grouped heads. In fp64."""
    heads, groups, width, out_width = shape
    segments = pack([torch.zeros(p) for p, _ in pairs], [[torch.zeros(b) for b in bs] for _, bs in pairs], True)[2]
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        rows = torch.randn(1, segments.length, *size, generator=generator, dtype=torch.float64)
        return rows.transpose(1, 2).requires_grad_()

    given_ = draw(heads, width), draw(groups, width), draw(groups, out_width)
    blocks = both_ways(segments, seed)
    plan, tile = plan_of(segments, blocks), shared_attention.TILE
    shared_attention.TILE = 2  # more than one tile of queries even here
    try:
        ours = SharedPrompt.apply(*given_, plan, 0.7)
        theirs = dense(*given_, segments, 0.7, blocks)
        weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        pairs_of_gradients = zip(*(torch.autograd.grad(x, given_, weights) for x in (ours, theirs)), strict=True)
    finally:
        shared_attention.TILE = tile
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in pairs_of_gradients)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, row_starts: Tensor, key_starts: Tensor, *rest: Any, scale: float,
               **_: Any) -> tuple[Tensor, ...]:  # fmt: skip
    """What CUDA's kernel for sequences of many lengths computes, of (T, H, E), (S, K, E): outputs and log-sum-exps (H, T)."""
    outs, lses = [], []
    for i in range(len(row_starts) - 1):
        q = query[row_starts[i] : row_starts[i + 1]].transpose(0, 1)
        k, v = (
            x[key_starts[i] : key_starts[i + 1]].transpose(0, 1).repeat_interleave(len(q) // x.shape[1], 0)
            for x in (key, value)
        )
        scores = q @ k.mT * scale
        if rest[3]:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def one_by_one_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *rest: Any,
                        scale: float) -> tuple[Tensor, ...]:  # fmt: skip
    """Its gradients where out and lse are folded ones: those of the part, scaled by exp(part's lse - lse), folded mean out."""
    with torch.enable_grad():
        given_ = [x.detach().requires_grad_() for x in (query, key, value)]
        own, own_lse = one_by_one(*given_, *rest[:6], scale=scale)
        share = (own_lse - lse).exp().T[..., None].detach()
        # d out = share * (d own + (own - out) d own_lse): the fold's own derivative with the other part fixed
        change = ((own.detach() - out) * share * grad).sum(-1).T
        return torch.autograd.grad([own, own_lse], given_, [share * grad, change])


@given(ROWS, st.integers(0, 2**31))
@settings(max_examples=15)
def test_one_call_for_many_lengths_equals_one_per_part(pairs: list, seed: int) -> None:
    """The way of CUDA, its kernel played by a plain one: two calls per layer for the whole row, three with such stretches."""
    segments = pack([torch.zeros(p) for p, _ in pairs], [[torch.zeros(b) for b in bs] for _, bs in pairs], True)[2]
    generator = torch.Generator().manual_seed(seed)
    q, k, v, g = (torch.randn(1, n, segments.length, 4, generator=generator, dtype=torch.float64) for n in (4, 2, 2, 4))
    plan, g = plan_of(segments, both_ways(segments, seed)), g.transpose(1, 2)
    kernels = shared_attention._varlen, shared_attention._varlen_backward
    shared_attention._varlen, shared_attention._varlen_backward = one_by_one, one_by_one_backward  # type: ignore[assignment]
    try:
        out, lse = shared_attention._forward_lengths(q, k, v, plan, 0.7)
        ours = shared_attention._backward_lengths(g, q, k, v, out, lse, plan, 0.7)
    finally:
        shared_attention._varlen, shared_attention._varlen_backward = kernels
    expected, other = shared_attention._forward_calls(q, k, v, plan, 0.7)
    theirs = shared_attention._backward_calls(g, q, k, v, expected, other, plan, 0.7)
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(lse, other.flatten(0, 1), atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_no_mask_and_no_logits_exist() -> None:
    model = model_of(FAMILIES["llama"]())
    length, widest = 600, 48
    ids, positions, segments = pack([torch.zeros(400, dtype=torch.long)], [[torch.zeros(100, dtype=torch.long)] * 2], True)
    with Largest() as largest:
        forward_hidden(model, ids, positions, segments).sum().backward()
    assert largest.elements <= length * widest < length * VOCABULARY


# ---- other calls, and models that cannot


def test_the_model_still_does_everything_else() -> None:
    model = model_of(FAMILIES["gemma3"]())
    plain = copy.deepcopy(model)
    packed_logps(model, *tokens())
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids > 0).long()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain(input_ids=ids, attention_mask=mask).logits)
    answers = [m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*answers)
    assert "mmpo" not in model.config.to_json_string()


BLOOM: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4, initializer_range=0.2)
MAMBA: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.2)
JAMBA = SMALL | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, mamba_d_state=4)
EAGER = SMALL | {"attn_implementation": "eager", "head_dim": 8}
UNABLE: dict[str, tuple[Any, str]] = {
    "mamba": (lambda: tf.MambaConfig(**MAMBA), "it has linear_attention layers, which carry a state along the row"),
    "jamba": (lambda: tf.JambaConfig(**JAMBA), "it has linear_attention layers, which carry a state along the row"),
    "gemma2": (lambda: tf.Gemma2Config(**EAGER, final_logit_softcapping=None), "soft-capped attention scores"),
    "gpt_oss": (lambda: tf.GptOssConfig(**EAGER, num_local_experts=2, num_experts_per_tok=1), "attention sinks"),
    "bloom": (lambda: tf.BloomConfig(**BLOOM), "no other attention implementation"),
}


@pytest.mark.parametrize("family", UNABLE)
def test_models_that_cannot_say_why_and_run_padded_rows(family: str) -> None:
    config, reason = UNABLE[family]
    model = model_of(config())
    plain = copy.deepcopy(model)
    assert reason in str(why_not(model))
    assert why_not(model) == why_not(model)
    texts = tokens()
    with torch.no_grad():
        ours, theirs = packed_logps(model, *texts, share=False, padded=True), plain_logps(plain, *texts)
    assert (ours - theirs).abs().max() <= 5e-5  # recurrent layers let rounding grow


def test_a_sliding_window_matters_where_it_is_shorter_than_a_row() -> None:
    model = model_of(tf.MistralConfig(**SMALL, sliding_window=16))
    assert why_not(model) is None
    assert why_not(model, longest=16) is None
    assert "window of 16 tokens is shorter than the longest row of 17" in str(why_not(model, longest=17))
    assert_same(model, copy.deepcopy(model), prompts=(10,), branches=((6, 5),))
    with pytest.raises(ValueError, match="window of 16 tokens is shorter than a row of 17"):
        packed_logps(model, *tokens((10,), ((6, 7),)))


def test_soft_prompts_run_padded_rows() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        model_of(FAMILIES["llama"]()), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    assert why_not(model) == "PromptTuningConfig puts virtual tokens before every row"
    texts = tokens((7, 2), ((3, 5), (4,)))
    ours, found = packed_logps(model, *texts, share=False, padded=True), []
    for prompt, several in zip(*texts, strict=True):
        for branch in several:
            logps = model(input_ids=torch.cat([prompt, branch])[None]).logits[0].log_softmax(-1)
            found.append(logps[3 + len(prompt) - 1 : -1].gather(1, branch[:, None])[:, 0])
    assert (ours - torch.cat(found)).abs().max() <= 1e-5


def test_attention_dropout_is_refused_in_training() -> None:
    model = model_of(tf.LlamaConfig(**SMALL, attention_dropout=0.1))
    packed_logps(model, *tokens())
    with pytest.raises(ValueError, match="no attention dropout, received 0.1"):
        packed_logps(model.train(), *tokens())


def test_a_layer_that_attends_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["llama"]())
    monkeypatch.setattr(model.model.layers[1], "forward", lambda hidden, **_: hidden)
    with pytest.raises(ValueError, match="1 of 2 layers computed the packed row's attention"):
        packed_logps(model, *tokens())
    assert "1 of 2 layers" in str(why_not(model))


def test_a_model_that_mixes_along_the_row_is_noticed() -> None:
    """Something no list of architectures knows: here an embedding that adds its neighbour's."""
    model = model_of(FAMILIES["llama"]())
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + output.roll(1, 1))
    assert "other states than rows of their own" in str(why_not(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_on_a_gpu(family: str) -> None:
    """fp32 by plain tiles to 1e-4, bf16 by flash attention for many lengths no worse than plain rows."""
    model = model_of(FAMILIES[family]()).cuda()
    plain, texts = copy.deepcopy(model), ([p.cuda() for p in tokens()[0]], [[b.cuda() for b in bs] for bs in tokens()[1]])
    with torch.no_grad():
        right = plain_logps(plain, *texts)
        assert (packed_logps(model, *texts) - right).abs().max() <= 1e-4
    halves = model.bfloat16(), plain.bfloat16()
    runs = packed_logps(halves[0], *texts), plain_logps(halves[1], *texts)
    errors = [(x - right).norm() for x in runs]
    assert errors[0] <= 1.3 * errors[1]
    ours, theirs = (gradients(m, x) for m, x in zip(halves, runs, strict=True))
    assert nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=0) > 0.99
