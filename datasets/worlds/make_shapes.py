"""How the shipped base model and candidates of the shapes world were made: a real StableDiffusionPipeline, from scratch.

    mmpo make-base diffusion --out DIR            about an hour on 2 cores; --vae-steps and --steps make it shorter

Its training data are imperfect on purpose, as scraped data are: a share of the captions (`WRONG`) has one attribute wrong,
and in a second stage a share of the pictures (`SPECKLED`) carries stray specks. The base therefore draws well, but not
always what it was asked for and rarely without dirt, which is what preference pairs can mend. The candidates are its own
samples, unjudged: `mmpo train` judges and pairs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmpo import media
from mmpo.cache import Cache
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.worlds import shapes
from mmpo.modalities.diffusion import Adapter
from mmpo.modalities.diffusion_config import ModelConfig
from mmpo.modalities.quiet import quietly
from mmpo.pair import image, text
from mmpo.schema import DrawConfig

WRONG = 0.30  # share of training captions with one thing wrong
SPECKLED = 0.50  # share of the second stage's pictures with specks
BATCH = 32
GUIDANCE, SAMPLE_STEPS = 2.0, 12  # of the candidates; configs/diffusion_dpo.yaml samples the same way
RELATIONS = 0.72  # share of pictures with two objects in a relation; the rest are counts and single objects
PROMPT_TOKENS = 12  # the longest caption has eight words


@dataclass(frozen=True)
class Budget:
    """How much of everything. The defaults are what the shipped model was made with."""

    vae_steps: int = 1500
    steps: int = 9000
    scraped_steps: int = 3000
    pictures: int = 16_000
    prompts: int = 420
    candidates: int = 6


def make(out: Path | str, *, seed: int = 0, **budget: int) -> None:
    """Train the base and sample its candidates into `out`: a diffusers directory and candidates.parquet."""
    spec, out = Budget(**budget), Path(out)
    torch.manual_seed(seed)
    pipe = make_pipeline(out)
    train_vae(pipe.vae, spec.vae_steps, seed)
    train_denoiser(pipe, spec.pictures, spec.steps, seed + 1, speckled=0.0)
    train_denoiser(pipe, spec.pictures, spec.scraped_steps, seed + 2, speckled=SPECKLED)
    save(pipe, out)
    sample_candidates(out, spec.prompts, spec.candidates, seed)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that spells every word of this world as one token; any other text falls back to bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({w for c in shapes.captions() for w in c.split()})
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.train_from_iterator(
        words, BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    )
    alphabet = sorted(ByteLevel.alphabet())
    pairs = json.loads(learner.to_str())["model"]["merges"]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(p) for p in pairs), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(p) for p in pairs) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS)


def make_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The untrained pipeline: KL-VAE 64 px -> 8x8x4, CLIP text encoder, UNet2DConditionModel; 3.0 M parameters."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(48, 80), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=96, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=shapes.SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pictures(count: int, rng: np.random.Generator, wrong: float = 0.0, speckled: float = 0.0) -> tuple[Tensor, list[str]]:
    """`count` pictures (count, 3, SIZE, SIZE) in [-1, 1], a share of them `speckled`, and captions, a share `wrong`."""
    drawn, texts = [], []
    for caption in _captions(count, rng):
        picture = shapes.render(caption, rng)
        drawn.append(shapes.speckle(picture, rng) if speckled and rng.random() < speckled else picture)
        texts.append(shapes.corrupt(caption, rng) if rng.random() < wrong else caption)
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) * 2 - 1, texts


def _captions(count: int, rng: np.random.Generator) -> list[str]:
    every = shapes.captions()
    relations, others = every[:-60], every[-60:]
    pools = [relations if rng.random() < RELATIONS else others for _ in range(count)]
    return [pool[rng.integers(len(pool))] for pool in pools]


def train_vae(vae: AutoencoderKL, steps: int, seed: int) -> None:
    """L1 on pixels and on their differences (edges stay sharp), and a faint KL to keep the latents bounded."""
    rng = np.random.default_rng(seed)
    step = _stepper(vae.parameters(), 2e-3, steps, weight_decay=1e-4)
    for _ in trange(steps, desc="autoencoder"):
        pixels, _ = pictures(24, rng)
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.sample()).sample
        edges = sum(F.l1_loss(output.diff(dim=d), pixels.diff(dim=d)) for d in (-1, -2))
        step(F.l1_loss(output, pixels) + edges + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel())


def train_denoiser(pipe: StableDiffusionPipeline, pool: int, steps: int, seed: int, speckled: float) -> None:
    """Noise prediction on a pool of imperfect pictures and captions; text encoder included; weights averaged."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    latents, ids = _encode_pool(pipe, pool, rng, speckled)
    empty = pipe.tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    abar = pipe.scheduler.alphas_cumprod
    both = nn.ModuleList([pipe.unet, pipe.text_encoder])
    step = _stepper(both.parameters(), 1e-3, steps, weight_decay=1e-3)
    average = AveragedModel(both, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    for _ in trange(steps, desc="denoiser"):
        rows, t = torch.randint(len(latents), (BATCH,)), torch.randint(len(abar), (BATCH,))
        tokens = torch.where(torch.rand(BATCH, 1) < 0.1, empty, ids[rows])  # dropped prompts, for guidance
        noise = torch.randn_like(latents[rows])
        a, s = (c.sqrt()[:, None, None, None] for c in (abar[t], 1 - abar[t]))
        step(F.mse_loss(pipe.unet(a * latents[rows] + s * noise, t, pipe.text_encoder(tokens)[0]).sample, noise))
        average.update_parameters(both)
    both.load_state_dict(average.module.state_dict())


@torch.no_grad()
def _encode_pool(pipe: StableDiffusionPipeline, pool: int, rng: np.random.Generator, speckled: float) -> tuple[Tensor, Tensor]:
    latents, ids = [], []
    for _ in trange(pool // 100, desc="draw and encode", unit="hundred"):
        pixels, texts = pictures(100, rng, WRONG, speckled)
        latents.append(pipe.vae.encode(pixels).latent_dist.mode())
        ids.append(pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids)
    whole = torch.cat(latents)
    pipe.vae.register_to_config(scaling_factor=round(float(1 / whole.std()), 5))
    return whole * pipe.vae.config.scaling_factor, torch.cat(ids)


def save(pipe: StableDiffusionPipeline, out: Path) -> None:
    """Write the pipeline with its weights in half precision, to be loaded in single precision."""
    with quietly():
        pipe.to(dtype=torch.float16).save_pretrained(out)
    file = out / "text_encoder" / "config.json"  # transformers loads in the precision named there, diffusers in fp32
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def _stepper(parameters: Iterable[nn.Parameter], lr: float, steps: int, weight_decay: float) -> Callable[[Tensor], None]:
    """A function that takes one optimizer step down a loss: AdamW, one cycle of the learning rate, clipping at 1."""
    weights = list(parameters)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()

    return step


def sample_candidates(out: Path, prompts: int, per_prompt: int, seed: int) -> None:
    """The base's own answers, `per_prompt` for each of `prompts` distinct captions, to candidates.parquet (WebP)."""
    rng = np.random.default_rng(seed + 2)
    chosen: dict[str, None] = {}
    while len(chosen) < prompts:
        chosen.update(dict.fromkeys(_captions(1, rng)))
    config = ModelConfig(path=str(out), guidance=GUIDANCE, sample_steps=SAMPLE_STEPS)
    adapter = Adapter(config, DrawConfig(), Cache(None), torch.device("cpu"))
    jobs = [(caption, seed * 1_000_000 + i * per_prompt + k) for i, caption in enumerate(chosen) for k in range(per_prompt)]
    rows = []
    for start in tqdm(range(0, len(jobs), 60), desc="candidates", unit="batch"):
        part = jobs[start : start + 60]
        blocks = adapter.sample(adapter.model, [(text(c),) for c, _ in part], [s for _, s in part])
        packed = [image(media.encode(media.pixels(b), "WEBP", quality=92, method=6)) for b in blocks]
        rows += [Candidate((text(c),), b, seed=s) for (c, s), b in zip(part, packed, strict=True)]
    write_candidates(rows, out / "candidates.parquet")
