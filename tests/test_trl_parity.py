"""Our objective in TRL's convention against TRL 1.16's own `DPOTrainer.compute_loss`, on its own collated batch.

Every loss type, divergence and option of `DPOConfig`. What differs on purpose is listed in docs/methods.md with its factor,
and tested here as a difference of exactly that size. The models are in fp64; TRL's log-probabilities are fp32 even so.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mmpo import reference as references
from mmpo.cache import Cache
from mmpo.modalities.text import Adapter
from mmpo.modalities.text_config import ModelConfig
from mmpo.modality import DrawKey
from mmpo.objective import Objective, make_term, rows_of
from mmpo.pair import Pair, text
from mmpo.reference import Frozen
from mmpo.schema import DrawConfig
from mmpo.scores import Scores

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install mmpo[parity]")
if trl.__version__.split(".")[:2] != ["1", "16"]:
    pytest.skip(f"TRL {trl.__version__} is not the version these numbers are about, 1.16", allow_module_level=True)

pytestmark = pytest.mark.slow  # importing TRL alone takes seconds

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = [  # prompt, chosen, rejected: answers of unequal length, one side a prefix of the other, one token against many
    ("how many legs has a spider", "it has eight legs", "six"),
    ("is the sky green", "no", "no it is the grass that is green, and the sky is blue"),
    ("name a colour", "blue", "green and blue and red"),
    ("what is two and two", "two and two is four", "two and two is five or six"),
]
BETA = 0.1


@dataclass(frozen=True)
class Case:
    """Settings of `DPOConfig` beside the terms of ours that mean the same; `of_trl` times TRL's loss is our loss."""

    trl: Mapping[str, Any]
    ours: list[dict[str, Any]]
    of_trl: float = 1.0


def same(loss_type: str, loss: str, of_trl: float = 1.0, smoothing: float = 0.0, **term: Any) -> Case:
    settings = {"loss_types": [loss_type], "label_smoothing": smoothing}
    return Case(settings, [{"loss": loss, "beta": BETA, **term}], of_trl)


LOSSES = {
    "sigmoid": same("sigmoid", "dpo"),
    "hinge": same("hinge", "hinge"),
    "ipo": same("ipo", "ipo", length_norm="mean"),
    "exo_pair": same("exo_pair", "exo", smoothing=0.01, label_smoothing=0.01),
    "nca_pair": same("nca_pair", "nca"),
    "robust": same("robust", "robust", smoothing=0.1, label_smoothing=0.1),
    "bco_pair": same("bco_pair", "bco", shift=False),
    "sppo_hard": same("sppo_hard", "sppo", of_trl=0.5),  # the paper's 1/2 of each square
    "aot": same("aot", "aot", smoothing=0.1, label_smoothing=0.1),
    "aot_unpaired": same("aot_unpaired", "aot_unpaired", smoothing=0.1, label_smoothing=0.1),
    "apo_zero": same("apo_zero", "apo_zero"),
    "apo_down": same("apo_down", "apo_down"),
    "discopop": same("discopop", "discopop", temperature=0.05),
    "sigmoid_norm": same("sigmoid_norm", "sigmoid_norm"),
}
LINKS = {"forward_kl": "forward_kl", "js_divergence": "jensen_shannon", "alpha_divergence": "alpha_divergence"}
BY_LINK = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")  # the others TRL refuses


def linked(name: str, divergence: str) -> Case:
    case = LOSSES[name]
    ours = [term | {"link": LINKS[divergence]} for term in case.ours]
    return Case({**case.trl, "f_divergence_type": divergence}, ours, case.of_trl)


SUMS = ("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "apo_zero", "discopop")
DIVERGENCES = {f"{name}, {divergence}": linked(name, divergence) for name in BY_LINK for divergence in LINKS}
PAPERS_ALPHA = Case(  # f_alpha_divergence_coef = 1 - link_alpha
    {"loss_types": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    [{"loss": "dpo", "beta": BETA, "link": "alpha_divergence", "link_alpha": 0.3}],
)
MIXED = Case(
    {"loss_types": ["sigmoid", "apo_zero"], "loss_weights": [0.8, 0.2]},
    [{"loss": "dpo", "beta": BETA, "weight": 0.8}, {"loss": "apo_zero", "beta": BETA, "weight": 0.2}],
)


@dataclass
class Setup:
    """A trainer of TRL's with its collated batch, and the same rows as ours."""

    folder: Path
    trainer: Any
    batch: dict[str, Tensor]
    pairs: list[Pair]

    def theirs(self, settings: Mapping[str, Any], grad: bool = False) -> Tensor:
        """DPOTrainer's own loss under other settings: all of them are read at each call."""
        defaults = {"beta": BETA, "loss_weights": [1.0], "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
        defaults |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
        for name, value in (defaults | dict(settings)).items():
            setattr(self.trainer, name, value)
        self.trainer.accelerator = Accelerator(cpu=True)  # whose state every test starts without (tests/conftest.py)
        with torch.set_grad_enabled(grad):
            return self.trainer.compute_loss(self.trainer.model, dict(self.batch))

    def scores(self, model: torch.nn.Module) -> dict[str, Scores]:
        """What a plain transformers forward of TRL's batch says of the answers' tokens."""
        ids, mask = self.batch["input_ids"], self.batch["completion_mask"][:, 1:].bool()
        logits = model(input_ids=ids, attention_mask=self.batch["attention_mask"]).logits[:, :-1]
        every = logits.log_softmax(-1)
        logp = every.gather(-1, ids[:, 1:, None]).squeeze(-1)
        collision = (2 * every).logsumexp(-1).detach()
        sides = zip(("chosen", "rejected"), *(x.chunk(2) for x in (logp, mask, collision)), strict=True)
        return {side: Scores(lp * m, m, {"log_sum_p2": c * m}) for side, lp, m, c in sides}

    def ours(self, terms: list[dict[str, Any]]) -> Tensor:
        """Our objective's loss per pair."""
        objective = Objective([make_term(**term) for term in terms])
        with torch.no_grad():
            policy, reference = self.scores(self.trainer.model), self.scores(self.trainer.ref_model)
            return objective(policy, reference, rows_of(self.pairs, "cpu")).loss


def tokenizer(folder: Path) -> Any:
    """Byte-level BPE learnt from the rows, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([part for row in ROWS for part in row], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=special[2:]
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return made


def model(family: str, size: int, folder: Path, seed: int, start: torch.nn.Module | None = None) -> torch.nn.Module:
    """A random model of a few thousand parameters; with `start`, that model moved a little."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": size, "initializer_range": 0.15, "tie_word_embeddings": family == "qwen2"}
    made = cls(config(**shape, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    if start is not None:
        with torch.no_grad():
            for old, new in zip(start.parameters(), made.parameters(), strict=True):
                new.mul_(0.1).add_(old)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp(request.param)
    tok = tokenizer(folder / "policy")
    reference = model(request.param, len(tok), folder / "reference", seed=1)
    policy = model(request.param, len(tok), folder / "policy", seed=2, start=reference)
    table = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in ROWS
    ]
    # use_weighting has TRL's head give what WPO needs; each test switches it on or off
    args = DPOConfig(
        str(folder / "out"), loss_type=["sigmoid"], use_weighting=True, use_cpu=True, report_to=[], bf16=False,
        per_device_train_batch_size=len(ROWS), gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list(table)
    trainer = DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tok)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    pairs = [
        Pair(str(i), (text(p, "user"),), (text(c, "assistant"),), (text(r, "assistant"),)) for i, (p, c, r) in enumerate(ROWS)
    ]
    return Setup(folder, trainer, batch, pairs)


def agree(setup: Setup, case: Case) -> None:
    setup.trainer.model.double(), setup.trainer.ref_model.double()
    theirs, ours = setup.theirs(case.trl), setup.ours(case.ours).mean()
    assert float(ours) == pytest.approx(case.of_trl * float(theirs), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_types(name: str, setup: Setup) -> None:
    agree(setup, LOSSES[name])


def test_no_loss_type_is_forgotten() -> None:
    from trl.trainer import dpo_trainer

    told = re.search(r"Should be one of \[(.*?)\]", re.sub(r"[\"\n]\s*[f\"]*", "", inspect.getsource(dpo_trainer)), re.S)
    assert told and set(re.findall(r"'(\w+)'", told[1])) == {*LOSSES, "sft"}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name: str, setup: Setup) -> None:
    agree(setup, DIVERGENCES[name])


def test_the_papers_alpha(setup: Setup) -> None:
    agree(setup, PAPERS_ALPHA)


@pytest.mark.parametrize("name", SUMS)
def test_discounted_length(name: str, setup: Setup) -> None:
    """ld_alpha, for losses that read sums; those that read means divide by the length itself in TRL."""
    case, alpha = LOSSES[name], 0.4
    ours = [term | {"reduce": "ld", "ld_alpha": alpha} for term in case.ours]
    agree(setup, Case({**case.trl, "ld_alpha": alpha}, ours, case.of_trl))


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_means_of_discounted_sums_are_ours_alone(name: str, setup: Setup) -> None:
    """We divide by what was counted, tail tokens at ld_alpha; TRL divides the discounted sum by the full length."""
    case, alpha = LOSSES[name], 0.4
    theirs = setup.theirs({**case.trl, "ld_alpha": alpha})
    ours = setup.ours([case.ours[0] | {"reduce": "ld", "ld_alpha": alpha}]).mean()
    assert abs(float(ours) - float(theirs)) > 1e-3


def test_weighting(setup: Setup) -> None:
    """use_weighting (WPO): TRL does not hold the product of the weights to at most 1, which is our default."""
    agree(setup, Case({"loss_types": ["sigmoid"], "use_weighting": True}, [{"loss": "wpo", "beta": BETA, "clamp": False}]))


def test_sft_weighs_tokens_alike_and_ours_rows(setup: Setup) -> None:
    theirs = float(setup.theirs({"loss_types": ["sft"]}))
    lengths = setup.batch["completion_mask"].sum(1)[: len(ROWS)]
    rows = setup.ours([{"loss": "nll"}])
    assert float((rows * lengths).sum() / lengths.sum()) == pytest.approx(theirs, rel=1e-6)
    assert float(rows.mean()) != pytest.approx(theirs, rel=1e-3)
    assert float(setup.ours([{"loss": "nll", "length_norm": "sum"}]).sum() / lengths.sum()) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_the_whole_way_from_rows_to_gradients(layout: str, setup: Setup) -> None:
    """Our own tokens, packing, head and loss, in fp32: TRL's labels, log-probabilities, loss and gradients."""
    config = ModelConfig(path=str(setup.folder / "policy"), adapter="full", layout=layout)  # type: ignore[arg-type]
    ours = Adapter(config, DrawConfig(), Cache(None), torch.device("cpu"))
    reference = Frozen(ours.load_reference(str(setup.folder / "reference")))
    batch = ours.draw(ours.encode(setup.pairs), [DrawKey(0, p.id, 0) for p in setup.pairs], ours.model)
    ids, mask = setup.batch["input_ids"], setup.batch["completion_mask"].bool()
    assert torch.equal(batch.labels, ids[mask])

    setup.trainer.model.float(), setup.trainer.ref_model.float()
    theirs = setup.theirs({"loss_types": ["sigmoid"], "use_weighting": True}, grad=True)
    theirs.backward()
    objective = Objective([make_term("wpo", beta=BETA, clamp=False)])
    scores = ours.score(ours.model, batch, objective.wants)
    for branch, want in setup.scores(setup.trainer.model).items():
        assert torch.allclose(scores[branch].logp[scores[branch].mask], want.logp[want.mask].detach(), rtol=0, atol=1e-5)
    ref = references.score(reference, ours, ours.model, batch)
    loss = objective(scores, ref, rows_of(setup.pairs, "cpu")).loss.mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6, abs=1e-6)
    want_gradients = {n: p.grad for n, p in setup.trainer.model.named_parameters()}
    scale = max(float(g.abs().max()) for g in want_gradients.values() if g is not None)
    for name, parameter in ours.model.named_parameters():
        want_gradient = want_gradients[name]
        assert parameter.grad is not None and want_gradient is not None, name
        assert float((parameter.grad - want_gradient).abs().max()) <= 1e-5 * scale, name
    setup.trainer.model.zero_grad()


def test_trl_has_no_conservative_dpo(setup: Setup) -> None:
    """Its `sigmoid` takes no notice of label_smoothing; ours adds label_smoothing times the margin."""
    plain, smoothed = (float(setup.theirs({"loss_types": ["sigmoid"], "label_smoothing": e})) for e in (0.0, 0.2))
    assert plain == smoothed
    dpo = {"loss": "dpo", "beta": BETA}
    margin = float(setup.ours([dpo | {"label_smoothing": 0.2}]).mean() - setup.ours([dpo]).mean()) / 0.2
    with torch.no_grad():
        reference, policy = setup.scores(setup.trainer.ref_model), setup.scores(setup.trainer.model)
    ratio = {side: (policy[side].logp - reference[side].logp).sum(-1) for side in policy}
    assert margin == pytest.approx(BETA * float((ratio["chosen"] - ratio["rejected"]).mean()), rel=1e-5)


def test_several_losses_with_weights(setup: Setup) -> None:
    agree(setup, MIXED)
