"""The text adapter on tiny models: likelihoods of plain transformers, in every layout, and answers that are their own."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from mmpo import launch
from mmpo import reference as references
from mmpo.errors import DataError, MissingExtra, RecipeError
from mmpo.evaluate import Samples
from mmpo.find import names
from mmpo.modalities import families, text_model, text_sample
from mmpo.modalities.text import Adapter, Batch
from mmpo.modalities.text_config import ModelConfig, SampleConfig
from mmpo.modality import DrawKey
from mmpo.objective import Objective, make_term, rows_of
from mmpo.pair import Pair, Span, text
from mmpo.schema import ReferenceConfig
from mmpo.scores import Scores
from tests.modalities.tiny_text import adapter, make, make_pairs
from tests.two_processes import in_two_processes

LAYOUTS = ("shared", "packed", "padded")
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[tuple[Any, ...], Path] = {}

    def get(family: str = "llama", template: str = "chatml", **options: Any) -> Path:
        name = (family, template, *sorted(options.items()))
        if name not in made:
            made[name] = make(tmp_path_factory.mktemp(family), family, template, **options)
        return made[name]

    return get


def test_prompts_are_dropped_only_where_a_token_stands_before_them(checkpoint: Checkpoint) -> None:
    """Otherwise it is an error of the setting, and not of every row."""
    with pytest.raises(RecipeError, match=r"data\.prompt_dropout: this model's tokenizer puts no token before a text"):
        adapter(checkpoint(template="none"), dropout=0.5)
    for kept in (checkpoint(template="none", bos=True), checkpoint(template="chatml")):
        ours = adapter(kept, dropout=0.5)
        assert ours.admit(make_pairs())[0] == make_pairs()


def perturb(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in references.trainable(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def drawn(ours: Adapter, pairs: list[Pair], index: int = 0) -> Batch:
    return ours.draw(ours.encode(pairs), [DrawKey(0, p.id, index) for p in pairs], ours.model)


def scored(ours: Adapter, pairs: list[Pair], against: nn.Module | None = None) -> dict[str, Scores]:
    """All that the adapter provides, against the states of another model, by default its own without the adapter."""
    batch = drawn(ours, pairs)
    with (
        references.AdapterOff().active(ours.model) if against is None else references.Frozen(against).active(ours.model) as off
    ):
        ref = ours.score(off, batch, frozenset({"states"}))
    return ours.score(ours.model, batch, ours.PROVIDES, ref)


def plain(model: Any, ours: Adapter, pair: Pair, branch: str) -> Tensor:
    """(U, V) log-probabilities of the scored tokens by the model's own forward pass on the conversation's ids."""
    row = ours.encode([pair])[0].rows[branch]
    logits = model(input_ids=row.ids[None]).logits[0].double()
    return logits.log_softmax(-1)[row.units - 1]


# Likelihoods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "layout"), [*(("llama", x) for x in LAYOUTS), ("qwen2", "shared"), ("gemma", "shared")])
@torch.no_grad()
def test_likelihoods_and_statistics_are_those_of_plain_transformers(family: str, layout: Any, checkpoint: Checkpoint) -> None:
    """The model is loaded and adapted by the libraries alone; the sums are written down from their definitions."""
    ours, pairs = adapter(checkpoint(family), layout=layout), make_pairs(3)
    perturb(ours.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval()
    ours.save(ours.model, folder := checkpoint(family) / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family)), folder
    ).eval()
    scores = scored(ours, pairs)
    for branch, s in scores.items():
        for i, pair in enumerate(pairs):
            labels = ours.encode([pair])[0].rows[branch]
            log_p, log_q = plain(theirs, ours, pair, branch), plain(base, ours, pair, branch)
            p, q = log_p.exp(), log_q.exp()
            top = p.topk(10).values
            expected = {
                "kl_ref": (q * (log_q - log_p)).sum(-1),
                "kl_policy": (p * (log_p - log_q)).sum(-1),
                "entropy": -(p * log_p).sum(-1),
                "log_sum_p2": p.square().sum(-1).log(),
                "top_mass": top.sum(-1),
                "top_entropy": -(top * top.log()).sum(-1),
            }
            own = log_p.gather(-1, labels.ids[labels.supervised][:, None])[:, 0]
            assert s.mask[i].sum() == len(own) and float((s.logp[i][s.mask[i]] - own).abs().max()) < 1e-5
            assert not s.logp[i][~s.mask[i]].any()
            for name, values in expected.items():
                assert float((s.extras[name][i][s.mask[i]] - values).abs().max()) < 1e-5, name
    assert float(scores["chosen"].extras["kl_ref"].max()) > 0.01  # the two models differ


@pytest.mark.parametrize("family", ["gemma2", "mamba"])
@torch.no_grad()
def test_models_that_cannot_share_are_scored_in_rows_of_their_own(
    family: str, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """Soft-capped attention and a recurrence: the same likelihoods, the reason said once, and no silence where it was asked."""
    ours, pairs = adapter(checkpoint(family), adapter="full"), make_pairs(3)
    assert ours.layout == "padded" and capsys.readouterr().out.count("layout: padded, one row per answer, because") == 1
    scores, theirs = (
        scored(ours, pairs, ours.model),
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval(),
    )
    for branch, s in scores.items():
        for i, pair in enumerate(pairs):
            labels = ours.encode([pair])[0].rows[branch]
            own = plain(theirs, ours, pair, branch).gather(-1, labels.ids[labels.supervised][:, None])[:, 0]
            assert float((s.logp[i][s.mask[i]] - own).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="model.layout: shared is not possible"):
        adapter(checkpoint(family), adapter="full", layout="shared")


@torch.no_grad()
def test_hidden_sum_is_the_sum_of_the_states_that_predict(checkpoint: Checkpoint) -> None:
    ours, pairs = adapter(checkpoint()), make_pairs(2)
    scores = scored(ours, pairs)
    states = ours.score(ours.model, drawn(ours, pairs), frozenset({"states"}))
    for i, pair in enumerate(pairs):
        row = ours.encode([pair])[0].rows["rejected"]
        hidden = ours.model(input_ids=row.ids[None], output_hidden_states=True).hidden_states[-1][0][row.units - 1]
        torch.testing.assert_close(scores["rejected"].extras["hidden_sum"][i], hidden.sum(0), rtol=1e-5, atol=1e-4)
        kept = states["rejected"].states
        assert kept is not None
        torch.testing.assert_close(kept.hidden[i, : len(hidden)], hidden, rtol=1e-5, atol=1e-4)


def test_a_divergence_without_the_references_states_is_refused(checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint())
    batch = drawn(ours, make_pairs(1))
    with pytest.raises(ValueError, match="needs its states"):
        ours.score(ours.model, batch, frozenset({"kl_ref"}), ours.score(ours.model, batch))
    assert not ours.score(ours.model, batch)["chosen"].extras


# Layouts ---------------------------------------------------------------------------------------------------------------


def terms(provides: frozenset[str]) -> list[Any]:
    """Every loss that the modality can serve, under every way to reduce a branch."""
    found = []
    for name in names("losses"):
        term = make_term(name)
        if term.needs - {"ref"} <= provides:
            found += [make_term(name, reduce=how) for how in ("sum", "mean", "ld")]
            found.append(make_term(name, weights="spans"))
    return found


def test_every_loss_is_the_same_in_every_layout(checkpoint: Checkpoint) -> None:
    """Scores, the gradient of all of them in the weights along one random direction, and value and gradient in the scores of
    every loss under every reduction, with and without spans: together, the gradient of every loss in the weights."""
    spans = {"chosen": (Span(0, 3, 0.0),), "rejected": (Span(1, 5, 2.0),)}
    pairs = [Pair(p.id, p.prompt, p.chosen, p.rejected, spans=spans) for p in make_pairs(3)]
    scores, slopes, losses = zip(*(measured(adapter(checkpoint(), layout=layout), pairs) for layout in LAYOUTS), strict=True)
    assert len(losses[0]) > 80
    for layout, same, slope, others in zip(LAYOUTS[1:], scores[1:], slopes[1:], losses[1:], strict=True):
        for name, values in scores[0].items():
            assert float((same[name] - values).abs().max()) <= 1e-5 * max(1.0, float(values.abs().max())), f"{layout} {name}"
        assert float((slope - slopes[0]).norm()) <= 1e-5 * float(slopes[0].norm()), layout
        for name, (loss, gradient) in losses[0].items():
            assert torch.allclose(others[name][0], loss, rtol=3e-4, atol=3e-5), f"{layout} {name}"
            assert float((others[name][1] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-6, f"{layout} {name}"


def measured(ours: Adapter, pairs: list[Pair]) -> tuple[dict[str, Tensor], Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Scores by name, their gradient in the weights along a random direction, and loss and its gradient in them by term."""
    perturb(ours.model, 0.05)
    policy, batch = scored(ours, pairs), drawn(ours, pairs)
    with references.AdapterOff().active(ours.model) as off, torch.no_grad():
        ref = ours.score(off, batch)
    flat = {f"{b} {n}": v for b, s in policy.items() for n, v in {"logp": s.logp, **s.extras}.items()}
    moving, generator = {n: v for n, v in flat.items() if v.requires_grad}, torch.Generator().manual_seed(1)
    along = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in moving.values())
    parts = torch.autograd.grad(along, list(references.trainable(ours.model).values()))  # type: ignore[arg-type]
    for s in policy.values():
        s.logp = s.logp.detach().requires_grad_()
        s.extras = {n: v.detach().requires_grad_(v.requires_grad) for n, v in s.extras.items()}
    leaves = [v for s in policy.values() for v in (s.logp, *s.extras.values()) if v.requires_grad]
    losses = {}
    for term in terms(ours.PROVIDES):
        loss = Objective([term])(policy, ref, rows_of(pairs, "cpu")).loss
        gradient = torch.autograd.grad(loss.mean(), leaves, allow_unused=True)
        name = f"{term.name} {term.reduce} {term.weights}"
        losses[name] = (loss.detach(), torch.cat([g.flatten() for g in gradient if g is not None]))
    return {n: v.detach() for n, v in flat.items()}, torch.cat([g.flatten() for g in parts]), losses


def test_padding_and_company_move_nothing(checkpoint: Checkpoint) -> None:
    ours, pairs = adapter(checkpoint(), layout="padded"), make_pairs(6)
    with torch.no_grad():
        together = ours.score(ours.model, drawn(ours, pairs))
        for i, pair in enumerate(pairs):
            alone = ours.score(ours.model, drawn(ours, [pair]))
            for branch, s in alone.items():
                torch.testing.assert_close(together[branch].logp[i][together[branch].mask[i]], s.logp[0], rtol=0, atol=1e-5)


def test_a_missing_side_has_an_empty_mask(checkpoint: Checkpoint) -> None:
    ours, pairs = adapter(checkpoint()), make_pairs(2)
    lone = Pair("u", pairs[1].prompt, (), pairs[1].rejected)
    with torch.no_grad():
        scores, whole = ours.score(ours.model, drawn(ours, [pairs[0], lone])), ours.score(ours.model, drawn(ours, pairs))
    assert scores["chosen"].mask.any(-1).tolist() == [True, False]
    torch.testing.assert_close(scores["rejected"].logp, whole["rejected"].logp, rtol=0, atol=1e-5)
    kept = scores["chosen"].mask[0]
    torch.testing.assert_close(
        scores["chosen"].logp[0][kept], whole["chosen"].logp[0][whole["chosen"].mask[0]], rtol=0, atol=1e-5
    )


def test_an_objective_of_one_branch_has_both_in_one_call(checkpoint: Checkpoint) -> None:
    """One call of the model, and the shared layout reads every prompt once."""
    ours, pairs = adapter(checkpoint(), layout="shared"), make_pairs(3)
    rows = [r for e in ours.encode(pairs) for r in (e.rows["chosen"],)]
    answers = sum(int(r.units[-1]) - r.prompt_length for e in ours.encode(pairs) for r in e.rows.values())
    batch = drawn(ours, pairs)
    assert batch.input_ids.shape == (1, sum(r.prompt_length for r in rows) + answers)
    assert len(batch.labels) == sum(int(m.sum()) for m in batch.masks.values())


# Weights of units, dropped prompts, names ------------------------------------------------------------------------------


def test_spans_weigh_units(checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint())
    pairs = [
        Pair("a", (text("Who?"),), (text("12345"),), (text("0"),), spans={"chosen": (Span(1, 3, 0.0),), "rejected": ()}),
        Pair("b", (text("Who?"),), (text("6"),), (text("78"),)),
    ]
    scores = ours.score(ours.model, drawn(ours, pairs))
    chosen, rejected = scores["chosen"].weights, scores["rejected"].weights
    assert chosen is not None and rejected is not None
    assert chosen.tolist() == [[1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]] and rejected.unique().tolist() == [1]
    assert ours.score(ours.model, drawn(ours, pairs[1:]))["chosen"].weights is None
    with pytest.raises(DataError, match="pair c, chosen: span 0 to 9 ends beyond"):
        ours.encode([Pair("c", pairs[0].prompt, (text("1"),), (text("2"),), spans={"chosen": (Span(0, 9, 0.0),)})])


def test_a_dropped_prompt_is_the_empty_one(checkpoint: Checkpoint) -> None:
    ours, pair = adapter(checkpoint(), dropout=0.5), make_pairs(1)[0]
    bare = Pair("bare", (text(""),), pair.chosen, pair.rejected)
    kept, none = (drawn(adapter(checkpoint()), [p]).input_ids for p in (pair, bare))
    found = [drawn(ours, [pair], i).input_ids for i in range(40)]
    assert all(torch.equal(f, kept) or torch.equal(f, none) for f in found)
    assert 8 < sum(torch.equal(f, none) for f in found) < 32
    assert drawn(ours, [pair], 3).keys == drawn(ours, [pair], 3).keys


def test_keys_name_tokens_and_layout(checkpoint: Checkpoint) -> None:
    """What a reference scored is found again in every epoch, and by nothing that would have other bits."""
    ours, pairs = adapter(checkpoint()), make_pairs(2)
    first = drawn(ours, pairs).keys
    assert first == drawn(ours, pairs, index=7).keys == drawn(ours, pairs[::-1]).keys[::-1] and len(set(first)) == 2
    assert drawn(adapter(checkpoint(), layout="padded"), pairs).keys[0] != first[0]
    assert drawn(adapter(checkpoint(), end_of_turn="leave_out"), pairs).keys[0] != first[0]
    assert drawn(ours, [Pair("p0", pairs[0].prompt, pairs[0].rejected, pairs[0].chosen)]).keys[0] != first[0]


def test_a_plan_says_what_a_step_costs(checkpoint: Checkpoint) -> None:
    """Long prompts are shared, prompts of a word are not worth it; a likelihood does not depend on the plan."""
    long = [Pair(p.id, (text("What is the capital of France? " * 4),), p.chosen, p.rejected) for p in make_pairs(3)]
    short = [Pair(p.id, (text("a"),), (text("the lazy dog " * 9),), (text("the quick fox " * 9),)) for p in make_pairs(3)]
    ours = adapter(checkpoint(template="none"))
    with torch.no_grad():
        before = ours.score(ours.model, drawn(ours, short))["chosen"].logp
        assert ours.plan(long, 2, reference=True).startswith("layout shared: ") and ours.layout == "shared"
        assert ours.plan(short, 2, reference=True).startswith("layout packed: ") and ours.layout == "packed"
        torch.testing.assert_close(ours.score(ours.model, drawn(ours, short))["chosen"].logp, before, rtol=0, atol=1e-5)
    assert adapter(checkpoint("mamba"), adapter="full").plan(long, 2, reference=True) == ""


def test_memory_that_does_not_do_is_saved(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpo.planner.free_bytes", lambda device: 10_000)
    ours, without = adapter(checkpoint()), adapter(checkpoint(), gradient_checkpointing=False)
    assert "with checkpointing" in ours.plan(make_pairs(3), 2, reference=True) and any(m.training for m in ours.model.modules())
    assert "without checkpointing" in without.plan(make_pairs(3), 2, reference=True)


def test_a_window_shorter_than_a_row_is_a_reason(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """Short rows are packed, longer ones are not, and that is said once."""
    options = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}
    folder = checkpoint("qwen2", "none", **options)
    ours, pairs = adapter(folder), make_pairs(1)
    long = Pair("long", (text("0 1 2 3 " * 8),), (text("1"),), (text("2"),))
    assert drawn(ours, pairs).layout == "shared" and not capsys.readouterr().out
    assert drawn(ours, [*pairs, long]).layout == drawn(ours, [long]).layout == "padded"
    assert capsys.readouterr().out.count("sliding window") == 1
    with pytest.raises(ValueError, match="model.layout: packed is not possible: .*sliding window"):
        drawn(adapter(folder, layout="packed"), [long])


def test_admit_counts_what_it_leaves_out(checkpoint: Checkpoint) -> None:
    long = Pair("long", (text("0 1 2 3 " * 100),), (text("1"),), (text("2"),))
    pairs = [*make_pairs(2), long]
    kept, counts = adapter(checkpoint()).admit(pairs)  # over the model's context of 256
    assert kept == pairs[:2] and counts == {"pairs left out: longer than max_length": 1}
    kept, counts = adapter(checkpoint(), too_long="keep_end").admit(pairs)
    assert kept == pairs and counts == {"prompts cut at their start": 1}
    with pytest.raises(DataError, match="pair long: .* the limit is 256"):
        adapter(checkpoint(), too_long="refuse").admit(pairs)


# Models ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["start", "adapter_off", "path", "ema"])
def test_references_start_at_the_policy(kind: Any, checkpoint: Checkpoint) -> None:
    """To the last bit; and they stay there while the policy moves."""
    ours, pairs = adapter(checkpoint()), make_pairs(3)
    config = ReferenceConfig(kind=kind, path=str(checkpoint()) if kind == "path" else None)
    reference = references.build(config, ours, ours.model)
    batch = drawn(ours, pairs)
    with torch.no_grad():
        before = ours.score(ours.model, batch)
        assert torch.equal(before["chosen"].logp, references.score(reference, ours, ours.model, batch)["chosen"].logp)  # type: ignore[index]
        perturb(ours.model)
        after = references.score(reference, ours, ours.model, batch)
        assert after is not None and torch.equal(before["rejected"].logp, after["rejected"].logp)
        assert not torch.allclose(ours.score(ours.model, batch)["chosen"].logp, before["chosen"].logp)


def test_full_fine_tuning_trains_every_weight_and_keeps_a_frozen_copy(checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint("qwen2"), adapter="full", dtype="bf16")
    reference = references.build(ReferenceConfig(kind="start"), ours, ours.model)
    assert isinstance(reference, references.Frozen) and {p.dtype for p in ours.model.parameters()} == {torch.float32}
    sum(s.logp.sum() for s in ours.score(ours.model, drawn(ours, make_pairs(2))).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.model.parameters())  # the tied head too
    with pytest.raises(ValueError, match="tokens, the policy has"):
        ours.load_reference(str(checkpoint("llama", vocab_size=340)))


def test_checkpointing_changes_no_gradient_and_wakes_no_dropout(checkpoint: Checkpoint) -> None:
    """The model's own configuration says attention_dropout 0.3."""
    grads = []
    for on in (False, True):
        ours = adapter(checkpoint(), gradient_checkpointing=on)
        perturb(ours.model)
        loss: Any = sum(s.logp.sum() for s in ours.score(ours.model, drawn(ours, make_pairs(3))).values())
        grads.append(torch.autograd.grad(loss, list(references.trainable(ours.model).values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    first, second = (ours.sample(ours.model, [make_pairs(1)[0].prompt], [1])[0].data for _ in range(2))
    assert first == second == adapter(checkpoint()).sample(ours.model, [make_pairs(1)[0].prompt], [1])[0].data
    assert any(m.training for m in ours.model.modules())  # sampling has put it back


def test_an_adapter_goes_on_where_it_was_saved(checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = adapter(checkpoint())
    perturb(first.model)
    first.save(first.model, tmp_path)
    again = adapter(checkpoint(), lora={"rank": 2, "path": str(tmp_path)})
    batch = drawn(first, make_pairs(2))
    assert again.starts_from_adapter and again.weights.keys() == {"model", "tokenizer", "settings", "adapter"}
    assert torch.equal(first.score(first.model, batch)["chosen"].logp, again.score(again.model, batch)["chosen"].logp)
    with pytest.raises(ValueError, match="trained with alpha 2, this one has alpha 4"):
        adapter(checkpoint(), lora={"rank": 2, "alpha": 4.0, "path": str(tmp_path)})
    with pytest.raises(ValueError, match="does not fit this adapter"):
        adapter(checkpoint(), lora={"rank": 3, "alpha": 2.0, "path": str(tmp_path)})
    with pytest.raises(ValueError, match="expected a directory with adapter_model.safetensors"):
        adapter(checkpoint(), lora={"path": str(checkpoint())})


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/nowhere", "/nowhere: no such folder"),
        ("../nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        (__file__, "expected a folder, found a file"),
        pytest.param("nobody/nothing", "of hub ids only those in the local cache are read; allow_download: true", id="hub id"),
    ],
)
def test_a_model_that_is_not_there_is_told_in_our_words(path: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # as the command line has it; else it tries five times
    for load in (lambda: text_model.load_model(path, torch.float32), lambda: families.load(path)):
        with pytest.raises(ValueError, match=re.escape(told)) as caught:
            load()
        assert "http" not in str(caught.value) and "Repo id" not in str(caught.value)


def test_weights_that_could_run_code_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a causal language model as safetensors"):
        adapter(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="expected a causal language model as safetensors"):
        adapter(tmp_path)


def test_a_head_that_is_not_the_whole_way_to_the_logits_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="leave it out of model.lora.targets"):
        adapter(checkpoint(), lora={"rank": 2, "targets": ["q_proj", "lm_head"]})
    model = text_model.load_model(str(checkpoint()), torch.float32)
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="its logits are not those of its last states and its head"):
        text_model.check_head(model)


def test_quantization_names_what_to_install(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bitsandbytes is not installed; install it with: pip install 'mmpo\[quantize\]'"):
        text_model._quantization("4bit", torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert text_model._quantization("8bit", torch.bfloat16).load_in_8bit
    assert text_model._quantization("4bit", torch.bfloat16).bnb_4bit_quant_type == "nf4"
    with pytest.raises(ValueError, match="it goes with adapter: lora"):
        ModelConfig(quantize="4bit", adapter="full")


def test_a_template_of_ones_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    ours = adapter(checkpoint(template="none"), chat_template=str(file))
    row = ours.encode([Pair("p", (text("a", "user"),), (text("b", "assistant"),))])[0].rows["chosen"]
    assert ours.turns.tokenizer.decode(row.ids) == "[a]b<eos>"
    with pytest.raises(ValueError, match="model.chat_template .*missing.jinja: No such file"):
        adapter(checkpoint(), chat_template=str(tmp_path / "missing.jinja"))
    with pytest.raises(ValueError, match=r"model.chat_template \{\{ messages .{200,400}too long; expected a file"):
        adapter(checkpoint(), chat_template="{{ messages }}" * 400)
    file.write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ValueError, match="template.*: not UTF-8 text .*; expected a Jinja"):
        adapter(checkpoint(), chat_template=str(file))


# Samples ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_answers_are_those_of_generate(checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint(template="none"), sample={"max_new_tokens": 12, "temperature": 0})
    prompts = [(text(p),) for p in ("Who?", "What is the capital of France?", "12+30=")]
    for prompt, block in zip(prompts, ours.sample(ours.model, prompts, [0, 1, 2]), strict=True):
        ids = torch.tensor([ours.turns.prompt(prompt)])
        theirs = ours.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        assert block.data == ours.turns.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "mamba"])
@torch.no_grad()
def test_answers_do_not_depend_on_company(family: str, checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint(family, "none"), adapter="full", sample={"max_new_tokens": 10})
    prompts = [(text(p),) for p in ("Who?", "What is the capital of France?", "12+30=", "Who?")]
    together = [b.data for b in ours.sample(ours.model, prompts, [3, 4, 5, 6])]
    assert together == [ours.sample(ours.model, [p], [s])[0].data for p, s in zip(prompts, [3, 4, 5, 6], strict=True)]
    assert together[0] != together[3]  # another seed


@torch.no_grad()
def test_a_prompt_leaves_room_for_its_answer(checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    ours = adapter(checkpoint("llama", "none", max_position_embeddings=32), sample={"max_new_tokens": 12, "temperature": 0})
    long, cut = "0 1 2 3 4 5 6 7 8 9 " * 3, ours.turns.prompt((text("0 1 2 3 4 5 6 7 8 9 " * 3),))[-20:]
    found = [b.data for b in ours.sample(ours.model, [(text(long),), (text("Who?"),)], [0, 0])]
    told = text_sample.generate(ours.model, [cut], [0], ours.turns.stops(), ours.config.sample)[0]
    assert found[0] == ours.turns.decode(told) and capsys.readouterr().out.count("sampled without their start") == 1
    half = adapter(checkpoint("llama", "none", max_position_embeddings=32), sample={"max_new_tokens": 31})
    half.sample(half.model, [(text("Who?"),)], [0])
    assert "answers are at most 16 tokens" in capsys.readouterr().out


def test_generation_ends_at_the_stop_and_at_the_limit() -> None:
    """A model that says 1, 2, 3, ...: the next token is the last one and one more."""
    found = text_sample.generate(Counting(), [[4], [1, 2], [9]], [0, 0, 0], frozenset({6}), SampleConfig(max_new_tokens=3))
    assert found == [[5], [3, 4, 5], [10, 11, 12]]


class Counting(nn.Module):
    """Certain of its next token; it keeps no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return type("Out", (), {"logits": 50.0 * nn.functional.one_hot(input_ids + 1, 20)})


def test_draws_have_their_distribution() -> None:
    """Temperature 2 on logits log(1, 4, 16), and a nucleus of 0.8 without it."""
    logits = torch.tensor([1.0, 4.0, 16.0]).log().expand(4000, 3)
    uniform = (torch.arange(4000) + 0.5) / 4000
    hot = text_sample.choose(logits, uniform, 2.0, 1.0).bincount(minlength=3) / 4000
    assert np.allclose(hot, [1 / 7, 2 / 7, 4 / 7], atol=1e-3)
    nucleus = text_sample.choose(logits, uniform, 1.0, 0.8).bincount(minlength=3) / 4000
    assert np.allclose(nucleus, [0, 0.2, 0.8], atol=1e-3)  # 16/21 < 0.8, so the second has to come along
    assert set(text_sample.choose(logits, uniform, 1.0, 0.7).tolist()) == {2}
    assert set(text_sample.choose(logits, uniform, 0.0, 1.0).tolist()) == {2}


def test_samples_are_written_for_people_and_programs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours, asked = adapter(checkpoint()), [(text("a < b?"),), (text("c", "user"),)]
    base = Samples([text("yes"), text("no & so")], np.array([0.5, np.nan]), np.array([1.0, 0.0]), 0.0)
    ours.write_samples(tmp_path, asked, base, Samples.unjudged([text("1"), text("2")]))
    lines = [json.loads(line) for line in (tmp_path / "base.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": "a < b?", "text": "yes", "score": 0.5, "correct": True}
    turns = [{"role": "user", "text": "c"}]
    assert lines[1] == {"prompt": "user: c", "turns": turns, "text": "no & so", "score": None, "correct": False}
    assert json.loads((tmp_path / "aligned.jsonl").read_text().splitlines()[1])["text"] == "2"
    page = (tmp_path / "sheet.html").read_text()
    assert "<td>a &lt; b?</td><td>yes</td><td>1</td>" in page and "no &amp; so" in page


# Exports ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "merge"), [("lora", False), ("lora", True), ("full", False)])
@torch.no_grad()
def test_exports_load_by_the_lines_that_are_printed(kind: Any, merge: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    ours, pair = adapter(checkpoint(), adapter=kind), make_pairs(1)[0]
    drawn(ours, [pair])
    perturb(ours.model)
    ours.score(ours.model, drawn(ours, [pair]))
    ours.save(ours.model, tmp_path, merge)
    lines = inspect.cleandoc(ours.how_to_load(tmp_path, merge))
    # one by one: transformers has a class only once it was asked for
    classes = {name: getattr(transformers, name) for name in re.findall(r"\bAuto\w+", lines)}
    found: dict[str, Any] = {**classes, "peft": peft}
    exec(lines, found)
    row = ours.encode([pair])[0].rows["chosen"]
    theirs = found["model"].eval()(input_ids=row.ids[None]).logits
    torch.testing.assert_close(theirs, ours.model(input_ids=row.ids[None]).logits, rtol=1e-5, atol=1e-5)
    assert found["tokenizer"].chat_template == ours.turns.tokenizer.chat_template
    assert "mmpo" not in "".join(p.read_text() for p in tmp_path.glob("*.json"))


# Two processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_as_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The packed forward runs through the wrapper: gradients of both halves of a batch meet."""
    whole = trained(checkpoint(), tmp_path / "one", batch=4)
    in_two_processes(f"from tests.modalities.test_text import worker; worker({str(checkpoint())!r}, {str(tmp_path)!r})")
    both = [json.loads((tmp_path / f"weights.{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    for name, values in whole.items():
        torch.testing.assert_close(torch.tensor(both[0][name]), torch.tensor(values), rtol=0, atol=1e-5)
    start = references.trainable(perturb(adapter(checkpoint()).model, 0.05))
    assert max(float((start[n].detach() - torch.tensor(v)).abs().max()) for n, v in whole.items()) > 1e-3


def worker(model: str, folder: str) -> None:
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    (Path(folder) / f"weights.{rank}.json").write_text(json.dumps(trained(Path(model), Path(folder) / "two", batch=2)))
    torch.distributed.destroy_process_group()


def trained(model: Path, folder: Path, batch: int) -> dict[str, Any]:
    """The adapter's weights after three steps of DPO with a divergence and an anchor, on four pairs in all."""
    from mmpo import recipe as recipes
    from mmpo.train import train

    folder.mkdir(exist_ok=True, parents=True)
    rows = [{"prompt": p.prompt[0].data, "chosen": p.chosen[0].data, "rejected": p.rejected[0].data} for p in make_pairs(4)]
    (data := folder / f"rows{os.environ.get('RANK', '')}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [
        f"model={{path: {model}, layout: shared, adapter: lora, lora: {{rank: 2}}}}",
        f"data={{path: {data}, format: trl, heldout: 0}}",
        f"train={{steps: 3, batch_size: {batch}, lr: 0.5, warmup: 0, optimizer: sgd}}",
        "objective=[{loss: tdpo2, beta: 0.5}, {loss: nll}]",
        f"out={folder}",
    ]
    resolved = recipes.load(None, given, "text")
    torch.manual_seed(0)
    run, _ = launch.build(resolved, folder, launch.build_objective(resolved))
    perturb(references.unwrap(run.model), 0.05)
    train(run, 3)
    return {n: p.detach().tolist() for n, p in references.trainable(references.unwrap(run.model)).items()}
