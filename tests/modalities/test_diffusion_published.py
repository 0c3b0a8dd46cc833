"""The losses through the adapter against the published training scripts, written down here from raw modules.

Diffusion-DPO is diffusers' train_diffusion_dpo_sdxl.py, with its own scheduler; flow matching is Flow-DPO's; KTO and MaPO
are the authors' formulas in mean squared errors. Only the random numbers are shared, from the documented streams. Both
sides run in fp64 here, so that what is compared is the formula: a published beta amplifies fp32's rounding to 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as D
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from mmpo import reference as references
from mmpo.cache import Cache
from mmpo.modalities.diffusion import Adapter, Batch
from mmpo.objective import Objective, make_term, rows_of
from mmpo.pair import Pair
from mmpo.schema import ReferenceConfig
from tests.modalities import tiny
from tests.modalities.adapters import adapter, calls, gradients, keys, make_pairs, perturb, stream

TARGETS = ["epsilon", "v_prediction", "flow"]
BETA_DPO = 5000.0
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[str, Path] = {}

    def get(target: str) -> Path:
        if target not in made:
            torch.manual_seed(0)
            folder, parts = tmp_path_factory.mktemp(target), {}
            if target != "flow":  # dropout, as some checkpoints have it: in training it stays off on all sides
                parts = {"scheduler": tiny.ddim(prediction_type=target), "unet": tiny.unet(dropout=0.3)}
            made[target] = tiny.make("sd3" if target == "flow" else "sd", folder, **parts)
        return made[target]

    return get


@pytest.fixture
def fp64(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A switch that lets everything run in fp64 until the test ends, casts to fp32 included."""

    def switch() -> None:
        torch.set_default_dtype(torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    yield switch
    torch.set_default_dtype(torch.float32)


class Script:
    """What the scripts do by hand, with modules of their own from the same directory."""

    def __init__(self, folder: Path, flow: bool):
        self.flow = flow
        kind = D.StableDiffusion3Pipeline if flow else D.StableDiffusionPipeline
        self.pipe = kind.from_pretrained(folder)
        self.denoiser = self.pipe.transformer if flow else self.pipe.unet
        self.schedule: Any = None if flow else D.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    @torch.no_grad()
    def inputs(self, pairs: list[Pair], times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """noisy, target and conditions of [winners; losers]."""
        pictures = [p.chosen[0].data for p in pairs] + [p.rejected[0].data for p in pairs]
        pixels = torch.stack([torch.from_numpy(x).permute(2, 0, 1) for x in pictures]).float() / 127.5 - 1
        vae = self.pipe.vae
        latents = vae.encode(pixels).latent_dist.mode()
        latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        captions = [p.caption for p in pairs] * 2
        if self.flow:
            sigma = times.view(-1, 1, 1, 1).float()
            embeds, _, pooled, _ = self.pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
            return (1 - sigma) * latents + sigma * noise, noise - latents, [embeds, pooled]
        embeds = self.pipe.text_encoder(self.pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids)[0]
        kind = self.schedule.config.prediction_type
        target = noise if kind == "epsilon" else self.schedule.get_velocity(latents, noise, times)
        return self.schedule.add_noise(latents, noise, times), target, [embeds]

    def errors(self, noisy: Tensor, times: Tensor, target: Tensor, conditions: list[Tensor]) -> Tensor:
        """Mean squared errors of the rows, over all their dimensions."""
        if self.flow:
            embeds, pooled = (c.to(noisy.dtype) for c in conditions)
            prediction = self.denoiser(noisy, embeds, pooled, 1000 * times.float(), return_dict=False)[0]
        else:
            prediction = self.denoiser(noisy, times, conditions[0].to(noisy.dtype)).sample
        error = F.mse_loss(prediction, target, reduction="none")
        return error.mean(dim=list(range(1, error.ndim)))


def as_lora(denoiser: Any, policy: Any) -> None:
    """The script's denoiser with diffusers' own LoRA, holding the policy's weights."""
    targets = sorted(policy.peft_config["default"].target_modules)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    with torch.no_grad():
        own = dict(denoiser.named_parameters())
        for name, value in policy.named_parameters():
            own[name.removeprefix("base_model.model.")].copy_(value)


def setup(
    folder: Path, target: str, kind: str, draw: dict[str, Any], scale: float = 1.0
) -> tuple[Adapter, Any, Script, Script, Batch, list[Tensor]]:
    """Ours and the script's policy and reference, the policy moved away from the start, and one batch for both."""
    ours = adapter(folder, adapter=kind, draw=draw)
    reference = references.build(ReferenceConfig(kind="start"), ours, ours.model)
    perturb(ours.model, scale * (0.05 if kind == "lora" else 0.0005))
    pairs = make_pairs()
    batch = ours.draw(ours.encode(pairs), keys(pairs), ours.model)
    for module in (ours.model, *([reference.module] if isinstance(reference, references.Frozen) else [])):
        module.double()
    ours.loaded.dtype = torch.float64
    theirs, frozen = Script(folder, target == "flow"), Script(folder, target == "flow")
    if kind == "lora":
        as_lora(theirs.denoiser, ours.model)
    else:
        theirs.denoiser.load_state_dict(ours.model.state_dict())
    members = ["", ""] if draw.get("mode") != "independent" else ["chosen", "rejected"]
    shape = batch.noisy.shape[1:]
    noise = torch.cat(
        [torch.stack([torch.randn(shape, generator=stream(k, "noise/" + m)) for k in keys(pairs)]) for m in members]
    )
    noisy, wanted, conditions = theirs.inputs(pairs, batch.t, noise)
    mine = [batch.condition[name] for name in ("prompt_embeds", "pooled") if name in batch.condition]
    for own, other in zip((batch.noisy, batch.target, *mine), (noisy, wanted, *conditions), strict=True):
        close(own, other)
    theirs.denoiser.double()
    frozen.denoiser.double()
    times = batch.t.double() if target == "flow" else batch.t
    precise = replace(batch, noisy=batch.noisy.double(), target=batch.target.double(), t=times)
    return ours, reference, theirs, frozen, precise, mine  # from here on both read the same inputs, to the last bit


def close(mine: Tensor, other: Tensor) -> None:
    """Equal to a relative 1e-6, as vectors."""
    off, size = (float(x.detach().double().norm()) for x in (mine - other, other))
    assert off <= 1e-6 * size, f"relative difference {off / size:.2g}"


def close_gradients(mine: dict[str, Tensor], published: dict[str, Tensor]) -> None:
    """The whole gradient to a relative 1e-6, and every tensor of it."""
    assert mine.keys() == published.keys() and len(mine) > 10
    whole = [torch.cat([g[n].double().flatten() for n in published]) for g in (mine, published)]
    close(whole[0], whole[1])
    for name, gradient in published.items():
        close(mine[name], gradient)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_dpo_is_the_published_one(target: str, kind: str, checkpoint: Checkpoint, fp64: Callable[[], None]) -> None:
    """Loss, margins and gradients, in two steps of gradient descent on the same draw; the second one has its own gradient."""
    ours, reference, theirs, frozen, batch, conditions = setup(checkpoint(target), target, kind, {})
    fp64()
    models, steps = (ours.model, theirs.denoiser), []
    for _ in range(2):
        policy = ours.score(ours.model, batch)
        ref = references.score(reference, ours, ours.model, batch)
        result = Objective([make_term("dpo", beta=BETA_DPO / 1000)])(policy, ref, rows_of(make_pairs(), "cpu"))
        result.loss.mean().backward()

        model_w, model_l = theirs.errors(batch.noisy, batch.t, batch.target, conditions).chunk(2)
        with torch.no_grad():
            ref_w, ref_l = frozen.errors(batch.noisy, batch.t, batch.target, conditions).chunk(2)
        logits = 0.5 * BETA_DPO * ((ref_w - ref_l) - (model_w - model_l))
        loss = -F.logsigmoid(logits).mean()
        loss.backward()

        close(result.loss.mean(), loss)
        close(result.metrics["rewards/margins"], logits)
        steps.append([gradients(m) for m in models])
        close_gradients(*steps[-1])
        assert 0.05 < float(logits.detach().abs().max()) < 20, "away from the start, and not saturated"
        descend(models, 0.005)
    moved = [torch.cat([g.flatten() for g in mine.values()]) for mine, _ in steps]
    assert float((moved[1] - moved[0]).norm() / moved[0].norm()) > 1e-2, "the second step has to see the first"


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_start_has_no_margin(target: str, kind: str, checkpoint: Checkpoint) -> None:
    """Exactly 0, and a loss of exactly log 2, at a published beta: the reference computed, stored, and replayed."""
    ours, pairs = adapter(checkpoint(target), adapter=kind), make_pairs()
    batch = ours.draw(ours.encode(pairs), keys(pairs), ours.model)
    objective = Objective([make_term("dpo", beta=BETA_DPO / 1000)])
    plain = references.build(ReferenceConfig(kind="start"), ours, ours.model)
    assert plain is not None
    cached = references.Cached(plain, Cache(None), ours.model)
    for reference, computed in ((plain, 2), (cached, 2), (cached, 1)):
        denoiser = ours.loaded.denoiser
        with calls(denoiser) as seen:
            policy = ours.score(ours.model, batch)
            ref = references.score(reference, ours, ours.model, batch)
        own = isinstance(plain, references.AdapterOff)  # one module for both; a frozen copy is another one
        assert len(seen) == (computed if own else 1)
        result = objective(policy, ref, rows_of(pairs, "cpu"))
        assert torch.equal(result.metrics["rewards/margins"], torch.zeros(3))
        assert torch.equal(result.loss, torch.full((3,), 2.0).log())


@torch.no_grad()
def descend(models: Iterable[Any], length: float) -> None:
    """A step of this length against the gradient, for each model its own."""
    for model in models:
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(length / norm * parameter.grad)
                parameter.grad = None


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.2, -0.2])
def test_kto_is_the_published_one(scale: float, checkpoint: Checkpoint, fp64: Callable[[], None]) -> None:
    """Diffusion-KTO: g = -(mse - mse_ref), kl = max(0, mean g), 1 - sigmoid(+-beta (g - kl)), the published beta 1000."""
    ours, reference, theirs, frozen, batch, conditions = setup(
        checkpoint("epsilon"), "epsilon", "lora", {"mode": "independent"}, scale
    )
    fp64()
    ref = references.score(reference, ours, ours.model, batch)
    result = Objective([make_term("kto", beta=2.0)])(ours.score(ours.model, batch), ref, rows_of(make_pairs(), "cpu"))
    result.loss.mean().backward()

    with torch.no_grad():
        before = frozen.errors(batch.noisy, batch.t, batch.target, conditions)
    gain = before - theirs.errors(batch.noisy, batch.t, batch.target, conditions)
    kl = gain.mean().clamp(min=0).detach()
    label = torch.tensor([1.0] * 3 + [-1.0] * 3)
    loss = (1 - torch.sigmoid(1000 * label * (gain - kl))).mean()
    loss.backward()
    assert bool(kl > 0) == (scale > 0), "one case with a baseline, one where it is cut off"
    close(result.loss.mean(), loss)
    close_gradients(gradients(ours.model), gradients(theirs.denoiser))


def test_mapo_is_the_published_one(checkpoint: Checkpoint, fp64: Callable[[], None]) -> None:
    """MaPO: mse_w - 0.1 log sigmoid(1000 (s(mse_w) - s(mse_l))), s(x) = 0.5 x / (exp(0.5 x) - 1)."""
    ours, _, theirs, _, batch, conditions = setup(checkpoint("epsilon"), "epsilon", "lora", {})
    fp64()
    result = Objective([make_term("mapo", beta=0.1)])(ours.score(ours.model, batch), None, rows_of(make_pairs(), "cpu"))
    result.loss.mean().backward()
    win, lose = theirs.errors(batch.noisy, batch.t, batch.target, conditions).chunk(2)
    s_win, s_lose = (0.5 * x / (torch.exp(0.5 * x) - 1) for x in (win, lose))
    loss = (win - 0.1 * F.logsigmoid(1000 * (s_win - s_lose))).mean()
    loss.backward()
    close(result.loss.mean(), loss)
    close_gradients(gradients(ours.model), gradients(theirs.denoiser))
