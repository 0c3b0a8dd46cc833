"""How the shipped base model of the shapes world was made: a real StableDiffusionPipeline, trained from scratch.

    mmpo make-base diffusion --out DIR            about 45 minutes on 2 cores; --vae-steps/--steps make it shorter

Its training captions are imperfect on purpose: a share (`WRONG`) has one attribute wrong, as scraped captions have. The
base therefore draws well but does not always draw what it was asked for, which is what preference pairs can mend.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmpo.datasets.worlds import shapes

WRONG = 0.30
PROMPT_TOKENS = 16


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell this world's words as one token each; any other text falls back to bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({w for c in shapes.captions() for w in c.split()})
    alphabet = sorted(ByteLevel.alphabet())
    vocab, merges = [*alphabet, *(a + "</w>" for a in alphabet)], []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # the same left-to-right merges that the encoder will apply
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocab.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    index = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    (folder / "vocab.json").write_text(json.dumps(index, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_TOKENS)


def make_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The untrained pipeline: KL-VAE 64 px -> 8x8x4, CLIP text encoder, UNet2DConditionModel; 1.9 M parameters."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(48, 80), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=shapes.SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pictures(count: int, rng: np.random.Generator, wrong: float) -> tuple[torch.Tensor, list[str]]:
    """`count` drawn pictures (count, 3, SIZE, SIZE) in [-1, 1] and captions, a share `wrong` of which is corrupted."""
    every = shapes.captions()
    relations, others = every[:1280], every[1280:]
    drawn, texts = [], []
    for _ in range(count):
        pool = relations if rng.random() < 0.72 else others
        caption = pool[rng.integers(len(pool))]
        drawn.append(shapes.render(caption, rng))
        texts.append(shapes.corrupt(caption, rng) if rng.random() < wrong else caption)
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    return pixels * 2 - 1, texts


def train_vae(vae: AutoencoderKL, steps: int, seed: int, log) -> None:
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        pixels, _ = pictures(24, rng, 0.0)
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.sample()).sample
        edges = F.l1_loss(output.diff(dim=-1), pixels.diff(dim=-1)) + F.l1_loss(output.diff(dim=-2), pixels.diff(dim=-2))
        loss = F.l1_loss(output, pixels) + edges + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel() * 10
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log(f"vae {step}/{steps} loss {loss.item():.4f}")


def train_denoiser(pipe: StableDiffusionPipeline, pool: int, steps: int, seed: int, log) -> None:
    rng = np.random.default_rng(seed + 1)
    torch.manual_seed(seed + 1)
    latents, ids = [], []
    with torch.no_grad():
        for _ in range(pool // 100):
            pixels, texts = pictures(100, rng, WRONG)
            latents.append(pipe.vae.encode(pixels).latent_dist.mode())
            ids.append(pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids)
    latents, ids = torch.cat(latents), torch.cat(ids)
    pipe.vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    latents = latents * pipe.vae.config.scaling_factor
    empty = pipe.tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    abar = pipe.scheduler.alphas_cumprod
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    average = torch.optim.swa_utils.AveragedModel(torch.nn.ModuleList([pipe.unet, pipe.text_encoder]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    for step in range(steps):
        rows = torch.randint(len(latents), (64,))
        tokens = torch.where(torch.rand(64, 1) < 0.1, empty, ids[rows])
        t = torch.randint(1000, (64,))
        noise = torch.randn(64, 4, 8, 8)
        a = abar[t].sqrt()[:, None, None, None]
        s = (1 - abar[t]).sqrt()[:, None, None, None]
        output = pipe.unet(a * latents[rows] + s * noise, t, pipe.text_encoder(tokens)[0]).sample
        loss = F.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(torch.nn.ModuleList([pipe.unet, pipe.text_encoder]))
        if step % 200 == 0:
            log(f"denoiser {step}/{steps} loss {loss.item():.4f}")
        if step and step % 1000 == 0:
            _copy(average, pipe, live=torch.nn.ModuleList([pipe.unet, pipe.text_encoder]), out=True)
    pipe.unet.load_state_dict(average.module[0].state_dict())
    pipe.text_encoder.load_state_dict(average.module[1].state_dict())


def _copy(average, pipe, live, out):
    from copy import deepcopy
    u, t = deepcopy(average.module[0]), deepcopy(average.module[1])
    StableDiffusionPipeline(vae=pipe.vae, text_encoder=t, tokenizer=pipe.tokenizer, unet=u, scheduler=pipe.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained('/work/base/mid')
