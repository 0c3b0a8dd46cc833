"""Tiny random checkpoints of every family, written offline by diffusers itself: `make(family, folder)`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as D
import torch
import transformers as T
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = ["<pad>", "</s>", "<unk>", "<bos>", "a", "red", "blue", "circle", "square", "dog", "cat", "on", "the", "left"]
LABELS = ["circle", "square", "cross", ""]


def make(family: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny pipeline of `family` under `folder` and return the folder. overrides: replace pipeline components."""
    torch.manual_seed(seed)
    pipe = MAKERS[family](folder, overrides)
    pipe.save_pretrained(folder)
    if family == "unet":
        (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


def clip_tokenizer(folder: Path) -> T.CLIPTokenizer:
    """CLIP's byte-level tokenizer without merges: every text is spelled in bytes, 16 tokens at most."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    vocab = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return T.CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def word_tokenizer() -> T.PreTrainedTokenizerFast:
    """A word-level tokenizer in the places of T5's and Gemma's."""
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    raw.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<bos>"}
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=512, **tokens)


def clip(*, projection: bool = False, hidden: int = 32) -> Any:
    config = T.CLIPTextConfig(
        vocab_size=514, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=512, eos_token_id=513, pad_token_id=513, projection_dim=hidden,
    )  # fmt: skip
    return (T.CLIPTextModelWithProjection if projection else T.CLIPTextModel)(config).eval()


def t5(hidden: int = 32) -> T.T5EncoderModel:
    return T.T5EncoderModel(T.T5Config(vocab_size=32, d_model=hidden, d_kv=8, d_ff=32, num_layers=1, num_heads=4)).eval()


def kl(channels: int = 4, **scaling: Any) -> D.AutoencoderKL:
    """A KL autoencoder that halves the resolution once."""
    return D.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **scaling,
    )  # fmt: skip


def ddim(**changes: Any) -> D.DDIMScheduler:
    """Stable Diffusion's schedule, ending at clean."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return D.DDIMScheduler(**(settings | {"set_alpha_to_one": True, "steps_offset": 1} | changes))


def unet(**changes: Any) -> D.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32, "attention_head_dim": 4,
    }  # fmt: skip
    return D.UNet2DConditionModel(**(settings | changes))


def _sd(folder: Path, overrides: dict[str, Any]) -> Any:
    parts = {
        "vae": kl(), "text_encoder": clip(), "tokenizer": clip_tokenizer(folder / "tokenizer"), "unet": unet(),
        "scheduler": ddim(), "safety_checker": None, "feature_extractor": None,
    } | overrides  # fmt: skip
    return D.StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _sdxl(folder: Path, overrides: dict[str, Any]) -> Any:
    denoiser = unet(
        cross_attention_dim=64, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32, use_linear_projection=True,
    )  # fmt: skip
    tokenizer = clip_tokenizer(folder / "tokenizer")
    parts = {
        "vae": kl(scaling_factor=0.13025), "text_encoder": clip(), "text_encoder_2": clip(projection=True), "unet": denoiser,
        "tokenizer": tokenizer, "tokenizer_2": tokenizer, "scheduler": ddim(),
    } | overrides  # fmt: skip
    return D.StableDiffusionXLPipeline(**parts, add_watermarker=False)


def _sd3(folder: Path, overrides: dict[str, Any]) -> Any:
    transformer = D.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    tokenizer = clip_tokenizer(folder / "tokenizer")
    parts = {
        "transformer": transformer, "scheduler": D.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": kl(scaling_factor=1.5305, shift_factor=0.0609), "text_encoder": clip(projection=True), "tokenizer": tokenizer,
        "text_encoder_2": clip(projection=True), "tokenizer_2": tokenizer, "text_encoder_3": t5(64),
        "tokenizer_3": word_tokenizer(),
    } | overrides  # fmt: skip
    return D.StableDiffusion3Pipeline(**parts)


def _flux(folder: Path, overrides: dict[str, Any]) -> Any:
    transformer = D.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    parts = {
        "transformer": transformer, "scheduler": D.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": kl(scaling_factor=0.3611, shift_factor=0.1159), "text_encoder": clip(), "text_encoder_2": t5(),
        "tokenizer": clip_tokenizer(folder / "tokenizer"), "tokenizer_2": word_tokenizer(),
    } | overrides  # fmt: skip
    return D.FluxPipeline(**parts)


def pixart(**changes: Any) -> D.PixArtTransformer2DModel:
    return D.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, **changes,
    )  # fmt: skip


def _pixart(folder: Path, overrides: dict[str, Any]) -> Any:
    parts = {
        "transformer": pixart(), "scheduler": ddim(), "vae": kl(), "text_encoder": t5(), "tokenizer": word_tokenizer(),
    } | overrides  # fmt: skip
    return D.PixArtAlphaPipeline(**parts)


def _sana(folder: Path, overrides: dict[str, Any]) -> Any:
    transformer = D.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8,
        timestep_scale=0.5,
    )  # fmt: skip
    vae = D.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, encoder_layers_per_block=(1, 1),
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    gemma = T.Gemma2Model(
        T.Gemma2Config(
            head_dim=8, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
            num_key_value_heads=2, vocab_size=32,
        )
    ).eval()  # fmt: skip
    flow = D.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {
        "transformer": transformer, "scheduler": flow, "vae": vae, "text_encoder": gemma, "tokenizer": word_tokenizer(),
    } | overrides  # fmt: skip
    return D.SanaPipeline(**parts)


def _class_unet(folder: Path, overrides: dict[str, Any]) -> Any:
    unet = D.UNet2DModel(
        sample_size=16, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, num_class_embeds=len(LABELS),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    return D.DDPMPipeline(**({"unet": unet, "scheduler": D.DDPMScheduler()} | overrides))


MAKERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "unet": _class_unet, "flux": _flux, "pixart": _pixart, "sana": _sana,
}  # fmt: skip
