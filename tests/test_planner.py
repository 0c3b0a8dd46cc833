"""The cost model against what is counted on a tiny Llama, and what is chosen from it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from mmpo.kernels.prefix import causal, forward_hidden, forward_padded, pack
from mmpo.kernels.token_stats import TILINGS, Head, Tiling, token_stats
from mmpo.planner import (
    Lengths,
    Sizes,
    activation_bytes,
    choose,
    counter,
    forward_flops,
    free_bytes,
    head_bytes,
    looks,
    rows,
    saved_bytes,
    sizes_of,
    step_flops,
)

PAIRS: Lengths = [(24, (8, 5)), (10, (3, 12, 1))]
CPU = TILINGS["cpu"]
LLAMA: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    attn_implementation="sdpa",
)  # fmt: skip


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA | settings)).eval()


def batch(lengths: Lengths, share: bool) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> Tensor:
        return torch.randint(96, (size,), generator=generator)

    return pack([draw(p) for p, _ in lengths], [[draw(b) for b in branches] for _, branches in lengths], share)


def states(model: nn.Module, lengths: Lengths, layout: str) -> tuple[Tensor, Tensor]:
    """States that predict the scored tokens, and these tokens."""
    ids, positions, segments = batch(lengths, layout == "shared")
    run = forward_padded(model, ids, segments) if layout == "padded" else forward_hidden(model, ids, positions, segments)
    return run[segments.predictors()], ids[0, segments.units()]


def counted_step(model: Any, reference: Any, lengths: Lengths, layout: str, tiling: Tiling = CPU) -> int:
    """Operations of a step: reference without gradient, policy, head, backward."""
    with counter() as count:
        for module in filter(None, (reference, model)):
            with torch.set_grad_enabled(module is model):
                hidden, labels = states(module, lengths, layout)
                logp = token_stats(hidden, Head(causal(module).lm_head.weight), labels, tiling=tiling).logp
        logp.sum().backward()
    return count.get_total_flops()


@pytest.mark.parametrize(
    ("layout", "checkpointing", "tiling"),
    [
        ("shared", False, CPU),
        ("shared", True, CPU),
        ("shared", False, Tiling(4096, 0)),
        ("packed", False, CPU),
        ("padded", False, CPU),
    ],
    ids=["shared", "checkpointing", "logits_again", "packed", "padded"],
)
def test_operations_of_a_full_step(layout: str, checkpointing: bool, tiling: Tiling) -> None:
    """Exact but for checkpointing, whose backward pass stops a layer's second forward pass at the last tensor it needs."""
    model, reference = llama(), llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    sizes = sizes_of(model)
    made = step_flops(sizes, PAIRS, layout, tiling, checkpointing=checkpointing, reference=True)
    counted = counted_step(model, reference, PAIRS, layout, tiling)
    assert 0.9 * sum(made.values()) < counted < sum(made.values()) if checkpointing else counted == sum(made.values())


def test_operations_of_an_adapter() -> None:
    """Frozen weights have no gradient. Nor has the first layer's input here, which the model does not know."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(num_hidden_layers=8), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    sizes = sizes_of(model)
    assert sizes.state_bytes == 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not sizes.head_trains and 0 < sizes.trained < sizes.linear / 4
    made = sum(step_flops(sizes, PAIRS, "shared", CPU, checkpointing=False, reference=False).values())
    assert 0.97 * made < counted_step(model, None, PAIRS, "shared") <= made


def test_operations_of_the_published_formula() -> None:
    """F_share = 2 M (P + Rc + Rr) + 2 P^2 E H + sum_R (4 R P + 2 R^2) E H, for a body of M weights and E H = 1000."""
    sizes = Sizes(7_000, 7_000, 1_000, 1, 1, 1, True, 4, 1)
    prompt, chosen, rejected = 900, 70, 30
    attention = 2 * prompt**2 + sum(4 * r * prompt + 2 * r**2 for r in (chosen, rejected))
    published = 2 * 7_000 * (prompt + chosen + rejected) + attention * 1_000
    assert forward_flops(sizes, [(prompt, (chosen, rejected))], "shared") == published


def test_a_shared_step_is_within_two_percent_of_the_model_and_half_of_plain_rows() -> None:
    """The gates of a long prompt: two answers of 64 tokens to 960, against rows with the prompt each, as TRL lays them out."""
    lengths: Lengths = [(960, (64, 64))]
    wide = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, vocab_size=128)
    model, plain = llama(**wide), llama(**wide)
    model_of_step = step_flops(sizes_of(model), lengths, "shared", CPU, checkpointing=False, reference=False)
    counted = counted_step(model, None, lengths, "shared")
    assert counted <= 1.02 * sum(model_of_step.values())
    ids = torch.stack([torch.cat([torch.zeros(960), torch.full((64,), n)]).long() for n in (1, 2)])
    with counter() as count, saved_bytes(plain) as trl:
        plain.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state.sum().backward()
    with saved_bytes(model) as ours:
        states(model, lengths, "shared")
    assert counted < 0.6 * count.get_total_flops()
    assert ours() <= 0.56 * trl()


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_activations_are_as_measured(layout: str) -> None:
    """Within the few bytes that a row needs whatever its length; a padded row keeps its mask besides."""
    model = llama()
    sizes, parameters = sizes_of(model), copy.deepcopy(model)
    with saved_bytes(parameters) as kept:
        states(parameters, PAIRS, layout)
    assert abs(activation_bytes(sizes, PAIRS, layout, False) - kept()) < (0.05 if layout != "padded" else 0.2) * kept()


def test_activations_with_checkpointing_are_the_layers_inputs() -> None:
    model = llama()
    sizes = sizes_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert sizes_of(model.train()) == sizes, "measured with checkpointing, or left in another mode"
    assert model.training
    with saved_bytes(model) as kept:
        states(model, PAIRS, "shared")
    again = rows(PAIRS, "shared") * (sizes.token_bytes // sizes.layers)
    assert abs(activation_bytes(sizes, PAIRS, "shared", True) - again - kept()) < 0.05 * kept()


def test_rows_and_looks() -> None:
    lengths: Lengths = [(3, (2, 1))]
    assert [rows(lengths, layout) for layout in ("shared", "packed", "padded")] == [6, 9, 10]
    assert looks(lengths, "shared") == 25 / 2 + 3 + 1 / 2  # five tokens causally, one on the prompt and on itself
    assert looks(lengths, "packed") == 25 / 2 + 16 / 2
    assert looks(lengths, "padded") == 50
    assert looks([(3, (2, 2))], "padded") == looks([(3, (2, 2))], "packed") == 25, "rows of one length have no mask"
    assert looks([(4, ())], "shared") == 8
    assert looks([(4, (0, 2))], "shared") == 18
    assert rows([], "padded") == looks([], "padded") == 0


SIZES = Sizes(10**6, 10**6, 2048, 8, 256, 32000, True, 4, 10**5)


def test_the_prompt_is_shared_where_it_pays() -> None:
    def chosen(*lengths: tuple[int, tuple[int, ...]], **settings: Any) -> str:
        return choose(SIZES, lengths, **settings).layout

    assert chosen((960, (64, 64))) == "shared"
    assert chosen((4, (512, 512))) == "packed"
    assert chosen((512, (64,))) == "packed", "nobody to share with"
    assert chosen((4, (512, 512)), (900, (20, 20))) == "shared", "of all pairs together"
    assert chosen((960, (64, 64)), layout="packed") == "packed"
    assert chosen((960, (64, 64)), unable="it is a Mamba") == "padded"
    assert chosen((960, (64, 64)), layout="padded") == "padded"
    with pytest.raises(
        ValueError, match="model.layout: shared is not possible, because it is a Mamba; set it to auto or padded"
    ):
        chosen((960, (64, 64)), layout="shared", unable="it is a Mamba")


def test_checkpointing_where_activations_do_not_fit() -> None:
    lengths: Lengths = [(960, (64, 64))]
    needed = activation_bytes(SIZES, lengths, "shared", False) + head_bytes(SIZES, 128, CPU)
    assert not choose(SIZES, lengths).checkpointing, "nobody knows what is free"
    assert not choose(SIZES, lengths, free=int(needed / 0.8) + 1).checkpointing
    step = choose(SIZES, lengths, free=needed)
    assert step.checkpointing and step.activations < needed / 4
    assert not choose(SIZES, lengths, free=needed, checkpointing=False).checkpointing
    later = replace(SIZES, state_bytes=needed)
    assert choose(later, lengths, free=2 * needed).checkpointing, "optimizer states come to the free memory first"
    again, once = (sum(choose(SIZES, lengths, checkpointing=c).flops.values()) for c in (True, False))
    assert again - once == forward_flops(SIZES, lengths, "shared")


def test_kept_logits_leave_room() -> None:
    lengths: Lengths = [(960, (64, 64))]
    assert choose(SIZES, lengths).head == 128 * 32000 * 4 + 4 * 2**20, "16.4 MB are kept, one tile is at work"
    assert choose(SIZES, lengths, free=2**27).head == 4 * 2**20
    small, large = (choose(SIZES, lengths, free=free).flops["head"] for free in (2**27, 2**40))
    assert small == large * 5 / 4, "logits, again, two gradients and the reference's"


def test_no_reference_costs_nothing() -> None:
    flops = choose(SIZES, [(960, (64, 64))], reference=False).flops
    assert flops["reference"] == 0
    assert "reference" not in choose(SIZES, [(960, (64, 64))], reference=False).describe()


def test_the_prediction_is_two_lines() -> None:
    step = choose(replace(SIZES, vocabulary=2048), [(960, (64, 64))], free=2**34)
    assert step.describe() == (
        "layout shared: 1088 token rows, 30.9 G operations per step (policy 23.4 G, reference 7.0 G, head 536.9 M), "
        "1.80x fewer than with a prompt per answer\n"
        "memory: 103.8 MiB of activations without checkpointing and 2.0 MiB for the head (tile 4.0 MiB) of 16.0 GiB free"
    )


def test_free_memory_is_what_the_machine_says() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
