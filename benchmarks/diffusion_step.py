"""One Diffusion-DPO step with a LoRA: mmpo against the order of operations of diffusers' `train_diffusion_dpo.py`.

    python -m benchmarks.diffusion_step [--rounds 21] [--out benchmarks/results/diffusion_step.json]

Three variants take turns in one process, on the same pairs, model and adapter:

    script      VAE encode of both pictures, add_noise, text encode, policy, reference, loss, backward, AdamW: every step
    latents     mmpo.train.advance with latents and text from the cache
    reference   the same with the reference's scores from the cache as well (draws_per_pair: 1)

Pictures are decoded and prompts tokenised for the script before the clock starts (its data loader's work); mmpo's side
includes all of its own: cache reads from the file, draws, collation, metrics, a line of the log. No time is measured
before all three give the same loss and gradients for the same draw; else the exit code is 1. README.md beside this file
says what the stored numbers mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import accelerate
import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rounds import machine, measure, ratio
from mmpo import recipe as recipes
from mmpo import reference as references
from mmpo.cache import Cache
from mmpo.datasets.worlds import shapes
from mmpo.launch import build_objective, make_modality, make_optimizer
from mmpo.modalities.diffusion import EMBEDDED, Adapter
from mmpo.modalities.quiet import quietly
from mmpo.pair import Pair, image, text
from mmpo.progress import Run
from mmpo.reference import Cached, trainable
from mmpo.runlog import RunLog
from mmpo.train import advance, batch_of, forward

PAIRS = 64
# mmpo multiplies the margin of mean squared errors by beta_dpo / 2. The script's 2500 would lift fp32's own rounding of
# the errors (1e-8) above the tolerance; the factor has no influence on time.
BETA_DPO = 100
VAE_BATCH = 8  # the script's default for --vae_encode_batch_size
TOLERANCE = 1e-6
INPUT_TOLERANCE = 5e-6  # of noisy latents: diffusers keeps the noise schedule in fp32, mmpo in fp64
BARS = {"latents": 1.2, "reference": 1.7}
# Stable Diffusion 1.5 at 512 px, TFLOP of one forward pass: what the same step would save there.
SD15 = {"vae": 1.12, "denoiser": 0.80, "text": 0.013}


class Script:
    """The script's step: its operations in its order, in fp32; every frozen encoder runs at every step."""

    def __init__(self, checkpoint: Path, adapter: Mapping[str, Tensor], run: Run):
        with quietly():
            pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, requires_safety_checker=False)
        self.pipe, self.unet, self.vae, self.text_encoder = pipe, pipe.unet.float(), pipe.vae.float(), pipe.text_encoder.float()
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        for module in (self.unet, self.vae, self.text_encoder):
            module.requires_grad_(False).eval()
        rank, targets = run.recipe.model.lora.rank, ["to_k", "to_q", "to_v", "to_out.0"]
        self.unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
        self.weights = {n: p for n, p in self.unet.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(adapter[name])
        self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=run.recipe.train.lr)
        self.schedule = get_scheduler("constant", self.optimizer)

    def inputs(self, batch: tuple[Tensor, Tensor], draw: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Noisy latents, noise, times and text states. batch: pixels (B, 6, H, W), a pair stacked on channels, and token ids
        (B, L). draw: noise and times to use, with the posterior's mode; None draws all three.
        """
        posteriors = [self.vae.encode(p).latent_dist for p in torch.cat(batch[0].chunk(2, dim=1)).split(VAE_BATCH)]
        latents = torch.cat([p.sample() if draw is None else p.mode() for p in posteriors]) * self.vae.config.scaling_factor
        if draw is None:
            noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
            t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents) // 2,)).repeat(2)
        else:
            noise, t = draw
        noisy = self.scheduler.add_noise(latents, noise, t)
        with torch.no_grad():
            states = self.text_encoder(batch[1], return_dict=False)[0].repeat(2, 1, 1)
        return noisy, noise, t, states

    def loss(self, noisy: Tensor, noise: Tensor, t: Tensor, states: Tensor) -> Tensor:
        chosen, rejected = self._errors(noisy, t, states, noise)
        self.logged = [0.5 * (chosen.mean() + rejected.mean())]
        self.unet.disable_adapters()
        with torch.no_grad():
            ref_chosen, ref_rejected = self._errors(noisy, t, states, noise)
        self.logged.append(0.5 * (ref_chosen.mean() + ref_rejected.mean()))
        self.unet.enable_adapters()
        logits = (ref_chosen - ref_rejected) - (chosen - rejected)
        loss = -F.logsigmoid(BETA_DPO / 2 * logits).mean()
        self.logged.append(((logits > 0).sum() + 0.5 * (logits == 0).sum()) / len(logits))
        return loss

    def _errors(self, noisy: Tensor, t: Tensor, states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.unet(noisy, t, states, return_dict=False)[0]
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])
        chosen, rejected = errors.chunk(2)
        return chosen, rejected

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.loss(*self.inputs(batch)).backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


@dataclass
class Variant:
    """One contestant: `step` takes the number of the step; `pipe` holds its encoders and denoiser."""

    name: str
    pipe: Any
    step: Callable[[int], object]
    gradients: Callable[[], tuple[Tensor, dict[str, Tensor]]]


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pictures of the shapes world: the right one is chosen, one of a corrupted caption is rejected."""
    rng, every = np.random.default_rng(seed), shapes.captions()
    wanted = [every[i] for i in rng.permutation(len(every))[:count]]
    return [Pair(c, (text(c),), (_drawn(c, rng),), (_drawn(shapes.corrupt(c, rng), rng),)) for c in wanted]


def _drawn(caption: str, rng: np.random.Generator) -> Any:
    return image((shapes.render(caption, rng) * 255).round().astype(np.uint8))


def mmpo_run(checkpoint: Path, folder: Path, rows: list[Pair], batch_size: int, cached: bool) -> Run:
    """The default recipe's run over `rows`, with an adapter that is no longer at its zero start."""
    settings = [f"train.batch_size={batch_size}", "train.draws_per_pair=1", f"objective.0.beta_dpo={BETA_DPO}"]
    settings += [f"model.path={checkpoint}", f"model.resolution={shapes.SIZE}"]
    resolved = recipes.load("diffusion_dpo", settings)
    recipe, folder = resolved.recipe, folder / ("cached" if cached else "online")
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    modality = make_modality(recipe, folder, accelerator.device)
    with torch.no_grad():
        for name, parameter in trainable(modality.model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    reference: Any = references.build(recipe.reference, modality, modality.model)
    if cached:
        reference = Cached(reference, Cache(folder / "reference.sqlite", memory=0), modality.model)
    modality.cache.memory = 0  # a real data set is larger than what a cache keeps in memory: every step reads the file
    optimizer = make_optimizer(recipe, modality.model)
    parts = (recipe, folder, accelerator, modality, modality.model, optimizer, reference, build_objective(resolved))
    run = Run(*parts, rows, [], None, [], RunLog(folder / "log.jsonl"))
    with torch.no_grad():
        for step in range(-(-len(rows) // batch_size)):
            forward(run, step, 0)  # one pass over the pairs fills the caches
    return run


def variants(folder: Path, rows: list[Pair], batch_size: int, checkpoint: Path = EMBEDDED) -> list[Variant]:
    """The script, and mmpo without and with the reference's scores cached, all with the same adapter weights."""
    cached = {"latents": False, "reference": True}
    runs = {name: mmpo_run(checkpoint, folder, rows, batch_size, reference) for name, reference in cached.items()}
    first = runs["latents"]
    adapter = {n.removeprefix("base_model.model."): p for n, p in trainable(first.model).items()}
    script = Script(checkpoint, adapter, first)
    batches = [_batch(script.pipe, first, step) for step in range(len(rows) // batch_size)]

    def script_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        drawn = forward(first, 0, 0)[1]
        noisy, noise, t, states = script.inputs(batches[0], (drawn.target, drawn.t))
        torch.testing.assert_close(noisy, drawn.noisy, rtol=0, atol=INPUT_TOLERANCE)
        loss = script.loss(drawn.noisy, noise, t, states)
        return loss, dict(zip(script.weights, torch.autograd.grad(loss, list(script.weights.values())), strict=True))

    ours = [Variant(n, cast(Adapter, r.modality).loaded.pipe, _stepper(r), _gradients(r)) for n, r in runs.items()]
    return [Variant("script", script.pipe, lambda step: script.step(batches[step]), script_gradients), *ours]


def _batch(pipe: Any, run: Run, step: int) -> tuple[Tensor, Tensor]:
    """The script's collated batch of the pairs that mmpo takes at this step."""
    rows, _ = batch_of(run, step, 0)
    chosen, rejected = ([np.asarray(getattr(p, side)[0].data) for p in rows] for side in ("chosen", "rejected"))
    pixels = torch.cat([torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in (chosen, rejected)], dim=1)
    ids = pipe.tokenizer([p.caption for p in rows], padding="max_length", truncation=True, return_tensors="pt").input_ids
    return (pixels / 127.5 - 1).contiguous(), ids


def _stepper(run: Run) -> Callable[[int], object]:
    def step(number: int) -> None:
        run.progress.step = number
        advance(run)

    return step


def _gradients(run: Run) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        loss = forward(run, 0, 0)[0].loss.mean()
        weights = trainable(run.model)
        found = torch.autograd.grad(loss, list(weights.values()))
        return loss, {n.removeprefix("base_model.model."): g for n, g in zip(weights, found, strict=True)}

    return gradients


def equality(contestants: Sequence[Variant]) -> dict[str, dict[str, float]]:
    """Differences from the script for one and the same draw: of the loss, and of gradients relative to the largest one."""
    loss, wanted = contestants[0].gradients()
    scale = max(float(g.abs().max()) for g in wanted.values())
    found = {}
    for variant in contestants[1:]:
        theirs, gradients = variant.gradients()
        worst = max(float((gradients[n] - g).abs().max()) for n, g in wanted.items())
        found[variant.name] = {"loss": float((theirs - loss).detach().abs() / loss.detach().abs()), "gradient": worst / scale}
    return found


def counts(variant: Variant, step: int = 0) -> dict[str, int]:
    """Floating-point operations and calls of one whole step, optimizer included."""
    calls, hooks = dict.fromkeys(("vae", "text", "denoiser"), 0), []
    modules = {"vae": variant.pipe.vae.encoder, "text": variant.pipe.text_encoder, "denoiser": variant.pipe.unet}
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1})))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which the counter sees through
        variant.step(step)
    for hook in hooks:
        hook.remove()
    return {"flops": int(counter.get_total_flops()), **calls}


def results(contestants: Sequence[Variant], found: dict[str, np.ndarray], counted: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What is written: medians, ratios to the script, counted operations beside them, and the machine's state."""
    out: dict[str, Any] = {}
    for variant in contestants:
        cpu, wall = found[variant.name].T
        medians = {"cpu_seconds": float(np.median(cpu)), "wall_seconds": float(np.median(wall))}
        out[variant.name] = medians | counted[variant.name]
        if variant.name in BARS:
            slow = found["script"].T
            in_cpu, in_wall, bar = ratio(slow[0], cpu), ratio(slow[1], wall), BARS[variant.name]
            operations = counted["script"]["flops"] / counted[variant.name]["flops"]
            met = min(in_cpu["low"], in_wall["low"]) >= bar
            out[variant.name] |= {"faster": {"cpu": in_cpu, "wall": in_wall, "operations": operations}, "bar": bar, "met": met}
    return out


def expected_sd15() -> dict[str, float]:
    """The same ratios for Stable Diffusion 1.5 at 512 px by operations: 2 [VAE + 3 U] + text over 2 [3 U], and over 2 [2 U]."""
    script = 2 * (SD15["vae"] + 3 * SD15["denoiser"]) + SD15["text"]
    return {"latents": script / (6 * SD15["denoiser"]), "reference": script / (4 * SD15["denoiser"])}


def report(record: dict[str, Any]) -> str:
    head = f"{'':10} {'CPU ms':>8} {'wall ms':>8} {'MFLOP':>8}  VAE text denoiser"
    lines = [head + "   faster than the script (95 %): CPU, wall, by operations"]
    for name, row in record["variants"].items():
        line = f"{name:10} {1e3 * row['cpu_seconds']:8.0f} {1e3 * row['wall_seconds']:8.0f} {row['flops'] / 1e6:8.0f}"
        line += f"  {row['vae']:3} {row['text']:4} {row['denoiser']:8}"
        if faster := row.get("faster"):
            cpu, wall = (f"{r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in (faster["cpu"], faster["wall"]))
            line += f"   {cpu}, {wall}, {faster['operations']:.2f}; bar {row['bar']}: {'met' if row['met'] else 'missed'}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One Diffusion-DPO step: mmpo against the order of the diffusers script.")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds, at least 15")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs per step")
    parser.add_argument("--out", type=Path, help="write the measurements here, as JSON")
    given = parser.parse_args(arguments)
    if given.rounds < 15:
        parser.error(f"--rounds: at least 15 are needed for an interval, got {given.rounds}")
    if PAIRS % given.batch_size:
        parser.error(f"--batch-size: expected a divisor of {PAIRS}, got {given.batch_size}")
    load = os.getloadavg()  # before this program adds its own
    with tempfile.TemporaryDirectory() as folder:
        contestants = variants(Path(folder), pairs(PAIRS), given.batch_size)
        equal = equality(contestants)
        print("same draw, relative difference from the script:", json.dumps(equal))
        if not all(d <= TOLERANCE for row in equal.values() for d in row.values()):
            print(f"not the same loss and gradients (tolerance {TOLERANCE:g}): nothing was timed", file=sys.stderr)
            return 1
        counted = {v.name: counts(v) for v in contestants}
        found = measure(contestants, given.rounds, PAIRS // given.batch_size)
    record: dict[str, Any] = {"equality": equal, "variants": results(contestants, found, counted)}
    record |= {
        "sd15_by_operations": expected_sd15(),
        "rounds": given.rounds,
        "batch_size": given.batch_size,
        "load_before": load,
        "machine": machine(torch, diffusers, peft, accelerate),
    }
    print(report(record))
    if given.out:
        given.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
