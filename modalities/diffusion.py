"""Image diffusion and flow models: SD, SDXL, PixArt, SD3, FLUX, Sana, and class-conditional pixel UNets.

The likelihood is a surrogate: for latents x0, time t and noise eps,

    logp = -(T/2) w(t) err,   err = mean((prediction - target)^2) in the model's native target,   T = 1000,

so that the token losses apply unchanged: `dpo` with beta is Diffusion-DPO (arXiv 2311.12908 eq. 14) with
beta_dpo = 1000 beta, and its coefficient on the margin of mean squared errors is kappa = 500 beta. Winner and loser
share (t, eps), and so do policy and reference: all of it is drawn once, in `draw`, from (seed, pair, draw index) alone.

    draw.mode   shared        Diffusion-DPO: x_t = a(t) x0 + s(t) eps, one (t, eps) for both members
                independent   one (t, eps) per member: unpaired losses (Diffusion-KTO)
                inversion     DDIM-InPO: x_t by deterministic inversion, the target is the noise it implies
                renoise       SmPO: the same by ReNoise steps that average two predictions
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmpo import __version__
from mmpo.cache import Cache, digest_module, key
from mmpo.checkpoint import write_atomic
from mmpo.evaluate import Samples
from mmpo.media import open_image
from mmpo.modalities import diffusion_ratios, families, lora
from mmpo.modalities.diffusion_config import ModelConfig
from mmpo.modalities.diffusion_draw import Draw
from mmpo.modalities.diffusion_ratios import T, surrogate
from mmpo.modalities.inversion import invert
from mmpo.modalities.sheet import contact_sheet, to_png
from mmpo.modality import DrawKey, LogRatios, Step, Watch
from mmpo.pair import Block, Pair, image, text
from mmpo.prepare import ASSETS
from mmpo.reference import Reference
from mmpo.schema import DrawConfig
from mmpo.scores import NOTHING, Scores

SAMPLE_BATCH = 64
EMBEDDED = ASSETS / "shapes"


@dataclass(frozen=True)
class Encoded:
    """One pair after the frozen encoders. latents: (C, H, W) by branch, absent where the pair lacks that side."""

    digest: str
    latents: dict[str, Tensor]
    condition: dict[str, Tensor]
    empty: dict[str, Tensor]  # without entries where prompts are never dropped: not every class model has a null class
    sizes: dict[str, families.Size]  # SDXL's micro-conditions of each member: original size, crop, target size


@dataclass(frozen=True)
class Batch:
    """Everything `score` needs, and nothing random. N rows: the chosen members, then the rejected ones.

    noisy, target: (N, C, H, W) fp32. t: (N,) model time. weight: (N,) w(t). rows: pair index of each row, by branch.
    time: (B,) in [0, 1), the place on the noise schedule, for reports per bucket. keys: what each pair's draw is.
    """

    noisy: Tensor
    target: Tensor
    t: Tensor
    weight: Tensor
    condition: Any
    rows: dict[str, Tensor]
    time: Tensor
    keys: tuple[bytes, ...]

    @property
    def device(self) -> torch.device:
        return self.noisy.device


class Adapter:
    """The diffusion modality (see `mmpo.modality.Modality`)."""

    PROVIDES = frozenset({"err"})
    branches: tuple[str, ...] = ("chosen", "rejected")
    takes_further = False
    embedded_data = EMBEDDED / "candidates.parquet"
    embedded_judge = "shapes"

    def __init__(self, config: ModelConfig, draw: DrawConfig, cache: Cache, device: torch.device, prompt_dropout: float = 0.0):
        self.config, self.spec, self.cache, self.device, self.prompt_dropout = config, draw, cache, device, prompt_dropout
        self._path = str(EMBEDDED) if config.path == "embedded" else config.path
        self.loaded = families.load(
            self._path,
            family=config.family,
            dtype=_DTYPES[config.dtype],
            allow_download=config.allow_download,
        )
        self.loaded.to(device)
        self.resolution = config.resolution or _own_resolution(self.loaded)
        self.is_embedded = config.path == "embedded"
        self.starts_from_adapter = bool(config.lora.path)
        self._encoders = self.loaded.digest()
        settings = hashlib.sha256(self.loaded.settings().encode()).hexdigest()  # the noise schedule is among them
        self.weights = {"encoders": self._encoders, "denoiser": digest_module(self.loaded.denoiser), "settings": settings}
        self.model = self._trainable()
        if self.starts_from_adapter:
            self.weights["adapter"] = digest_module(self.model)
        self._stamp = repr((draw, prompt_dropout, self._encoders, self.resolution, self.loaded.settings(), config.lora))
        target = self.loaded.process.target
        if draw.mode == "inversion" and target == "x0":
            raise ValueError(
                "draw.mode: a model that predicts x0 implies no noise at the clean end, where inversion starts: use shared"
            )
        if draw.mode == "renoise" and target not in ("epsilon", "flow"):
            raise ValueError(
                f"draw.mode: renoise averages two predictions, which means something for eps and flow models; this one "
                f"predicts {target}: use inversion"
            )

    def _trainable(self) -> nn.Module:
        denoiser: Any = self.loaded.denoiser.eval()  # dropout off: policy and reference must be one function at the start
        if self.config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            denoiser.train()
            for module in denoiser.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if self.config.adapter == "full":
            self.loaded.dtype = torch.float32  # of the weights that train, whatever the frozen parts are kept in
            return denoiser.requires_grad_(True).float()
        return lora.wrap(self.loaded, self.config.lora)

    def load_reference(self, path: str) -> nn.Module:
        """The denoiser of another directory, for reference.kind: path."""
        other = families.load(
            path, family=self.loaded.family.name, dtype=self.loaded.dtype, allow_download=self.config.allow_download
        )
        return other.denoiser.to(self.device)

    # ---- encode: frozen, cached by content

    def admit(self, pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, int]]:
        """All of them: a picture is cut to its size."""
        return list(pairs), {}

    def plan(self, pairs: Sequence[Pair], batch_size: int, reference: bool, shards: int = 1) -> str:
        """Nothing to choose: all of a batch's pictures have one size."""
        return ""

    @torch.no_grad()
    def encode(self, pairs: Sequence[Pair]) -> list[Encoded]:
        pictures = {b.digest: b for p in pairs for side in (p.chosen, p.rejected) for b in side}
        latents = self._cached("latents", list(pictures), lambda ds: self._encode_images([pictures[d] for d in ds]))
        prompts = list(dict.fromkeys([*([""] if self.prompt_dropout else []), *(p.caption for p in pairs)]))
        conditions = self._cached("prompt", prompts, self.loaded.encode_prompts)
        return [self._encoded(p, latents, conditions) for p in pairs]

    def _encoded(self, pair: Pair, latents: dict[str, dict], conditions: dict[str, dict]) -> Encoded:
        sides = {name: latents[getattr(pair, name)[0].digest] for name in self.branches if getattr(pair, name)}
        digest = hashlib.sha256("\0".join([pair.caption, *(f"{n}:{getattr(pair, n)[0].digest}" for n in sides)]).encode())
        return Encoded(
            digest.hexdigest(),
            {name: s["latent"] for name, s in sides.items()},
            conditions[pair.caption],
            conditions[""] if self.prompt_dropout else {},
            {name: families.Size(*s["size"].tolist()) for name, s in sides.items()},
        )

    def _cached(self, what: str, items: list[str], compute: Any) -> dict[str, dict[str, Tensor]]:
        """Results by item, computed once per distinct content and encoder and then read from disk."""
        keys = [key(what, __version__, self._encoders, self.resolution, self.spec.vae, item) for item in items]
        found = dict(zip(items, self.cache.get_many(keys), strict=True))
        missing = [item for item in items if found[item] is None]
        for start in range(0, len(missing), SAMPLE_BATCH):
            chunk = missing[start : start + SAMPLE_BATCH]
            results = [{k: v.cpu().contiguous() for k, v in r.items()} for r in compute(chunk)]
            found.update(zip(chunk, results, strict=True))
            of = dict(zip(items, keys, strict=True))
            self.cache.put_many([(of[i], r) for i, r in zip(chunk, results, strict=True)])
        return found  # type: ignore[return-value]

    def _encode_images(self, blocks: list[Block]) -> list[dict[str, Tensor]]:
        pixels, sizes = zip(*(_fit(open_image(b), self.resolution) for b in blocks), strict=True)
        # one generator per picture: a sampled latent is a function of its own content, not of what is encoded with it
        generators = [torch.Generator().manual_seed(int(b.digest[:14], 16)) for b in blocks]
        latents = self.loaded.encode_images(torch.stack(pixels).to(self.device), self.spec.vae, generators)
        return [{"latent": z.float(), "size": torch.tensor(s)} for z, s in zip(latents, sizes, strict=True)]

    # ---- draw: the only place with randomness

    @torch.no_grad()
    def draw(self, encoded: Sequence[Encoded], keys: Sequence[DrawKey], model: nn.Module) -> Batch:
        draws = [Draw(k, self.spec, self.prompt_dropout) for k in keys]
        rows = {b: torch.tensor([i for i, e in enumerate(encoded) if b in e.latents], dtype=torch.long) for b in self.branches}
        members = [(b, int(i)) for b in self.branches for i in rows[b]]
        clean = torch.stack([encoded[i].latents[b] for b, i in members]).to(self.device)
        own = self.spec.mode == "independent"
        streams = [(i, b if own else "") for b, i in members]  # of each row; shared numbers are drawn once for both sides
        times = {(i, member): draws[i].time(member) for i, member in dict.fromkeys(streams)}
        noises = {(i, member): draws[i].noise(clean.shape[1:], member) for i, member in times}
        time, noise = (torch.stack([drawn[s] for s in streams]).to(self.device) for drawn in (times, noises))
        dropped = [encoded[i].empty if draws[i].dropped else encoded[i].condition for _, i in members]
        condition = self.loaded.collate(dropped, [encoded[i].sizes[b] for b, i in members])
        t = self.loaded.process.time(time)
        if inverted := self.spec.mode in ("inversion", "renoise"):
            seeds = [draws[i].seed("eta/" + b) for b, i in members]
            t, noisy, noise = invert(self.loaded, model, clean, time, condition, seeds, self.spec)
            time = self.loaded.process.place(t)  # of the level, which is a coarser number than the one that picked it
        else:
            noisy = self.loaded.process.add_noise(clean, noise, t)
        target = self.loaded.process.target_of(clean, noise, t)
        first = {i: row for row, (_, i) in reversed(list(enumerate(members)))}  # a pair may have a rejected side only
        pair_time = time[[first[i] for i in range(len(encoded))]]
        names = tuple(key("draw", self._stamp, e.digest, k.seed, k.sample, k.index) for e, k in zip(encoded, keys, strict=True))
        if inverted:  # x_t moves with the model that inverts, so the name has to as well
            names = tuple(key(n, *_bytes_of(noisy, members, i)) for i, n in enumerate(names))
        weight = self._weight(t)
        return Batch(noisy, target, t, weight, condition, {b: r.to(self.device) for b, r in rows.items()}, pair_time, names)

    def _weight(self, t: Tensor) -> Tensor:
        """w(t) on the native error: constant (the published choice), eps-equivalent, or min-SNR (arXiv 2303.09556)."""
        process = self.loaded.process
        if self.spec.weight == "constant":
            return torch.ones_like(t, dtype=torch.float32)
        if self.spec.weight == "eps":
            return process.eps_weight(t).float()
        snr = process.snr(t).float()
        return process.eps_weight(t).float() * snr.clamp(max=self.spec.min_snr_gamma) / snr.clamp(min=1e-8)

    # ---- score: pure

    def score(
        self, model: nn.Module, batch: Batch, wants: frozenset[str] = NOTHING, against: Mapping[str, Scores] | None = None
    ) -> dict[str, Scores]:
        """The error comes with the likelihood, so it is given whether it is asked for or not."""
        err = self.squares(model, batch).flatten(1).mean(1)
        logp = surrogate(batch.weight, err)
        scores, start = {}, 0
        for branch, rows in batch.rows.items():
            part = slice(start, start + len(rows))
            scores[branch] = _scatter(logp[part], err[part], rows, len(batch.keys))
            start += len(rows)
        return scores

    def squares(self, model: nn.Module, batch: Batch) -> Tensor:
        """The squared errors whose mean is `err`, (N, C, H, W): fp32 before the square, because beta amplifies rounding."""
        output = self.loaded.denoise(model, batch.noisy, batch.t, batch.condition)
        return (output.float() - batch.target).square()

    def drops(self, name: DrawKey) -> bool:
        """Whether this draw is one without the prompt."""
        return Draw(name, self.spec, self.prompt_dropout).dropped

    def log_ratios(self, model: nn.Module, base: Reference, prompt: tuple[Block, ...], answer: Block, seed: int) -> LogRatios:
        return diffusion_ratios.by_region(self, model, base, prompt, answer, seed)

    # ---- sample, describe, save

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[Block, ...]],
        seeds: Sequence[int],
        watch: Watch | None = None,
        steps: int | None = None,
    ) -> list[Block]:
        captions = [" ".join(str(b.data) for b in p if b.kind == "text") for p in prompts]
        asked = list(dict.fromkeys([*([""] if self._guides else []), *captions]))
        conditions = self._cached("prompt", asked, self.loaded.encode_prompts)
        dropped = conditions[""] if self._guides else None
        blocks: list[Block] = []
        for start in range(0, len(captions), SAMPLE_BATCH):
            part = slice(start, start + SAMPLE_BATCH)
            blocks += self._sample([conditions[c] for c in captions[part]], dropped, seeds[part], model, watch, steps)
        return blocks

    def _sample(
        self, conditions: list[dict], empty: dict | None, seeds: Sequence[int], model: nn.Module, watch: Watch | None,
        steps: int | None,
    ) -> list[Block]:  # fmt: skip
        steps = min(steps or self.config.sample_steps, self.config.sample_steps)
        size = families.Size.square(self.resolution)
        shape = self.loaded.latent_shape(self.resolution)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(self.device)
        latents = self.loaded.sample(
            model,
            self.loaded.collate(conditions, [size] * len(conditions)),
            noise,
            steps=steps,
            guidance=self.config.guidance,
            uncond=self.loaded.collate([empty] * len(conditions), [size] * len(conditions)) if empty is not None else None,
            watch=None if watch is None else lambda done: watch(Step(done, steps, {})),
        )
        pixels = (self.loaded.decode(latents).float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [image(p) for p in pixels]

    @property
    def _guides(self) -> bool:
        """Whether sampling needs the dropped condition; guidance-distilled models take the scale as an input."""
        return self.config.guidance != 1 and not self.loaded.config.get("guidance_embeds")

    def describe(self, beta: float) -> str:
        kappa, target = beta * T / 2, self.loaded.process.target
        return f"beta {beta:g} = beta_dpo {1000 * beta:g}: kappa {kappa:g} on the margin of mean squared errors ({target})"

    def dummy(self) -> list[Pair]:
        rng = np.random.default_rng(0)
        noise = [image(rng.integers(0, 255, (self.resolution, self.resolution, 3), dtype=np.uint8)) for _ in range(4)]
        unlabelled = "0" if self.loaded.config.get("num_class_embeds") else ""
        caption = "a picture" if self.loaded.vae is not None else next(iter(self.loaded.labels), unlabelled)
        return [Pair(f"dummy{i}", (text(caption),), (noise[2 * i],), (noise[2 * i + 1],)) for i in range(2)]

    def save(self, model: nn.Module, folder: Path, merge: bool = False) -> None:
        """Write what plain diffusers loads: `pytorch_lora_weights.safetensors`, or the whole pipeline (full, or merged)."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.adapter == "full":
            self.loaded.save_full(folder)
        elif merge:
            lora.save_merged(self.loaded, model, folder)
        else:
            self.loaded.save_lora(model, folder)

    @torch.no_grad()
    def check_export(self, model: nn.Module, folder: Path, merge: bool = False) -> tuple[float, float, float]:
        """Reload by plain diffusers: largest difference from the policy's output, from the base's, and the output's size."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((2, *self.loaded.latent_shape(self.resolution)), generator=generator).to(self.device)
        t = self.loaded.process.time(torch.tensor([0.3, 0.7], device=self.device))
        pairs = self.dummy()
        condition = self.loaded.collate([e.condition for e in self.encode(pairs)], [families.Size.square(self.resolution)] * 2)
        whole = self.config.adapter == "full" or merge
        base = families.load(self._path, family=self.loaded.family.name, dtype=self.loaded.dtype).to(self.device)
        before = base.denoise(base.denoiser, x, t, condition)
        theirs = lora.reload(base, folder, whole).to(self.device)
        after = base.denoise(theirs, x, t, condition)
        policy = self.loaded.denoise(model, x, t, condition)
        return float((after - policy).abs().max()), float((after - before).abs().max()), float(policy.abs().max())

    def how_to_load(self, folder: Path, merge: bool = False) -> str:
        """Two lines of Python for the user, after `import peft` and `from diffusers import DiffusionPipeline`."""
        if self.config.adapter == "full" or merge:
            return f"  pipe = DiffusionPipeline.from_pretrained({str(folder)!r})"
        base = f"  pipe = DiffusionPipeline.from_pretrained({self._path!r})\n"
        if hasattr(self.loaded.pipe, "load_lora_weights"):
            return base + f"  pipe.load_lora_weights({str(folder)!r})"
        name = self.loaded.family.denoiser  # PixArt's: diffusers has no way to load a LoRA into it, peft has
        return base + f"  pipe.{name} = peft.PeftModel.from_pretrained(pipe.{name}, {str(folder)!r}).merge_and_unload()"

    def write_samples(self, folder: Path, prompts: Sequence[tuple[Block, ...]], base: Samples, aligned: Samples) -> None:
        """base/NNN.png and aligned/NNN.png in one order, captions.json, and sheet.png of the first ones, base above aligned."""
        captions = [" ".join(str(b.data) for b in p) for p in prompts]
        for name, samples in (("base", base), ("aligned", aligned)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i, block in enumerate(samples.blocks):
                write_atomic(folder / name / f"{i:03d}.png", to_png(block))
        write_atomic(folder / "captions.json", json.dumps(captions, ensure_ascii=False, indent=0).encode())
        write_atomic(folder / "sheet.png", contact_sheet(captions, base, aligned))


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _own_resolution(loaded: families.Loaded) -> int:
    """The side in pixels that a checkpoint was made for."""
    side = int(loaded.config["sample_size"])
    return side if loaded.vae is None else side * int(loaded.pipe.vae_scale_factor)


def _bytes_of(rows: Tensor, members: Sequence[tuple[str, int]], pair: int) -> list[bytes]:
    """The content of the rows that belong to one pair."""
    return [row.cpu().numpy().tobytes() for row, (_, i) in zip(rows, members, strict=True) if i == pair]


def _scatter(logp: Tensor, err: Tensor, rows: Tensor, pairs: int) -> Scores:
    """(rows,) values to (B, 1), with the mask false where a pair has no such side."""
    mask = torch.zeros(pairs, dtype=torch.bool, device=logp.device).index_fill(0, rows, True)
    zero = torch.zeros(pairs, device=logp.device)
    return Scores(zero.index_copy(0, rows, logp)[:, None], mask[:, None], {"err": zero.index_copy(0, rows, err)[:, None]})


def _fit(picture: Image.Image, size: int) -> tuple[Tensor, tuple[int, ...]]:
    """Short side to `size` (Lanczos), centre crop. Returns (3, size, size) in [-1, 1] and SDXL's size numbers."""
    width, height = picture.size
    scale = size / min(width, height)
    scaled = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.LANCZOS)
    top, left = (scaled.height - size) // 2, (scaled.width - size) // 2
    pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), (height, width, top, left, size, size)
