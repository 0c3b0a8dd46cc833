"""The losses through the adapter against the published training scripts, written down here from raw modules.

Diffusion-DPO is diffusers' train_diffusion_dpo_sdxl.py, with its own scheduler; flow matching is Flow-DPO's; KTO and MaPO
are the authors' formulas in mean squared errors. Only the random numbers are shared, from the documented streams. Networks
run in fp64 here, so that what is compared is the formula: with fp32 networks and beta_dpo 2000 rounding alone is 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable
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
from mmpo.modalities.diffusion import Adapter, Batch
from mmpo.objective import Objective, make_term, rows_of
from mmpo.pair import Pair
from mmpo.schema import ReferenceConfig
from tests.modalities import tiny
from tests.modalities.adapters import adapter, gradients, keys, make_pairs, perturb, stream

TARGETS = ["epsilon", "v_prediction", "flow"]
BETA_DPO = 2.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(target: str) -> Path:
        if target not in made:
            folder, parts = tmp_path_factory.mktemp(target), {}
            if target == "v_prediction":
                parts = {"scheduler": tiny.ddim(prediction_type="v_prediction")}
            made[target] = tiny.make("sd3" if target == "flow" else "sd", folder, **parts)
        return made[target]

    return get


class Script:
    """What the scripts do by hand, with modules of their own from the same directory."""

    def __init__(self, folder: Path, flow: bool):
        self.flow = flow
        kind = D.StableDiffusion3Pipeline if flow else D.StableDiffusionPipeline
        self.pipe = kind.from_pretrained(folder)
        self.denoiser = self.pipe.transformer if flow else self.pipe.unet
        self.schedule: Any = None if flow else D.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    @torch.no_grad()
    def inputs(self, pairs: list[Pair], times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Any]:
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
            return (1 - sigma) * latents + sigma * noise, noise - latents, (embeds, pooled)
        embeds = self.pipe.text_encoder(self.pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids)[0]
        kind = self.schedule.config.prediction_type
        target = noise if kind == "epsilon" else self.schedule.get_velocity(latents, noise, times)
        return self.schedule.add_noise(latents, noise, times), target, embeds

    def errors(self, noisy: Tensor, times: Tensor, target: Tensor, conditions: Any) -> Tensor:
        """Mean squared errors of the rows, over all their dimensions."""
        if self.flow:
            embeds, pooled = (c.to(noisy.dtype) for c in conditions)
            prediction = self.denoiser(noisy, embeds, pooled, 1000 * times.float(), return_dict=False)[0]
        else:
            prediction = self.denoiser(noisy, times, conditions.to(noisy.dtype)).sample
        error = F.mse_loss(prediction, target.to(noisy.dtype), reduction="none")
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


def setup(folder: Path, target: str, kind: str, draw: dict[str, Any]) -> tuple[Adapter, Any, Script, Script, Batch, Any]:
    """Ours and the script's policy and reference, the policy moved away from the start, and one batch for both."""
    ours = adapter(folder, adapter=kind, draw=draw)
    reference = references.build(ReferenceConfig(kind="start"), ours, ours.model)
    perturb(ours.model, 0.5 if kind == "lora" else 0.03)
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
    close(batch.noisy, noisy)
    close(batch.target, wanted)
    theirs.denoiser.double()
    frozen.denoiser.double()
    precise = replace(batch, noisy=batch.noisy.double())
    return ours, reference, theirs, frozen, precise, conditions


def close(mine: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    """Equal to a relative 1e-6, as vectors."""
    off, size = (float(x.detach().double().norm()) for x in (mine - other, other))
    assert off <= tolerance * size, f"relative difference {off / size:.2g}"


def close_gradients(mine: dict[str, Tensor], published: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """The whole gradient to a relative 1e-6, single tensors, where winner and loser nearly cancel in fp32, to 5e-6."""
    assert mine.keys() == published.keys() and len(mine) > 10
    whole = [torch.cat([g[n].double().flatten() for n in published]) for g in (mine, published)]
    close(whole[0], whole[1], tolerance)
    for name, gradient in published.items():
        close(mine[name].double(), gradient.double(), 5 * tolerance)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("target", TARGETS)
def test_dpo_is_the_published_one(target: str, kind: str, checkpoint: Callable[[str], Path]) -> None:
    ours, reference, theirs, frozen, batch, conditions = setup(checkpoint(target), target, kind, {})
    policy = ours.score(ours.model, batch)
    ref = references.score(reference, ours, ours.model, batch)
    result = Objective([make_term("dpo", beta=BETA_DPO / 1000)])(policy, ref, rows_of(make_pairs(), "cpu"))
    result.loss.mean().backward()

    model_w, model_l = theirs.errors(batch.noisy, batch.t, batch.target, conditions).chunk(2)
    with torch.no_grad():
        ref_w, ref_l = frozen.errors(batch.noisy, batch.t, batch.target, conditions).chunk(2)
    logits = (ref_w - ref_l) - (model_w - model_l)
    loss = -F.logsigmoid(0.5 * BETA_DPO * logits).mean()
    loss.backward()

    assert float(logits.detach().abs().max()) > 1e-4, "the policy has to differ from the reference"
    close(result.loss.mean(), loss)
    torch.testing.assert_close(result.metrics["rewards/margins"].double(), 0.5 * BETA_DPO * logits.detach(), rtol=0, atol=1e-6)
    close_gradients(gradients(ours.model), gradients(theirs.denoiser))


def test_kto_is_the_published_one(checkpoint: Callable[[str], Path]) -> None:
    """Diffusion-KTO: g = -(mse - mse_ref), its mean cut at 0 as baseline, 1 - sigmoid(+-beta (g - kl)), here with beta 10."""
    ours, reference, theirs, frozen, batch, conditions = setup(
        checkpoint("epsilon"), "epsilon", "lora", {"mode": "independent"}
    )
    ref = references.score(reference, ours, ours.model, batch)
    result = Objective([make_term("kto", beta=0.02)])(ours.score(ours.model, batch), ref, rows_of(make_pairs(), "cpu"))
    result.loss.mean().backward()

    with torch.no_grad():
        before = frozen.errors(batch.noisy, batch.t, batch.target, conditions)
    gain = before - theirs.errors(batch.noisy, batch.t, batch.target, conditions)
    kl = gain.mean().clamp(min=0).detach()
    sign = torch.tensor([1.0] * 3 + [-1.0] * 3)
    loss = (1 - torch.sigmoid(10 * sign * (gain - kl))).mean()
    loss.backward()
    close(result.loss.mean(), loss)
    close_gradients(gradients(ours.model), gradients(theirs.denoiser))


def test_mapo_is_the_published_one(checkpoint: Callable[[str], Path]) -> None:
    """MaPO: mse_w - 0.1 log sigmoid(1000 (s(mse_w) - s(mse_l))), s(x) = 0.5 x / (exp(0.5 x) - 1)."""
    ours, _, theirs, _, batch, conditions = setup(checkpoint("epsilon"), "epsilon", "lora", {})
    result = Objective([make_term("mapo", beta=0.1)])(ours.score(ours.model, batch), None, rows_of(make_pairs(), "cpu"))
    result.loss.mean().backward()
    win, lose = theirs.errors(batch.noisy, batch.t, batch.target, conditions).chunk(2)
    s_win, s_lose = (0.5 * x / (torch.exp(0.5 * x.double()) - 1) for x in (win, lose))
    loss = (win - 0.1 * F.logsigmoid(1000 * (s_win - s_lose))).mean()
    loss.backward()
    close(result.loss.mean(), loss, 1e-5)
    close_gradients(gradients(ours.model), gradients(theirs.denoiser), 1e-4)  # T = 1000 amplifies the rounding of the errors
