"""Every family on a tiny checkpoint that diffusers wrote: against the raw module by hand and against the pipelines."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers as D
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from mmpo.modalities.families import Loaded, Size, load
from mmpo.modalities.family_calls import FAMILIES, pack, unpack
from tests.modalities import tiny

EVERY = ["sd", "sdxl", "sd3", "unet", "flux", "pixart", "sana"]
LATENT = ["sd", "sdxl", "sd3", "flux", "pixart", "sana"]
SIZES = [Size(20, 30, 2, 4, 16, 16), Size.square(16)]
TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes each family's checkpoint once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def opened(folder: Any) -> Any:
    return lambda family: load(str(folder(family)), text_length=TOKENS)


def prompts(family: str) -> list[str]:
    return ["circle", "square"] if family == "unet" else ["a red circle", "the blue dog on the left"]


def ready(loaded: Loaded) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noisy latents, their times and collated conditions of two samples."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, *loaded.latent_shape(16))
    x0, eps = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    t = loaded.process.time(torch.tensor([0.25, 0.75]))
    conditions = loaded.collate(loaded.encode_prompts(prompts(loaded.family.name)), SIZES)
    return loaded.process.add_noise(x0, eps, t), t, conditions


@torch.no_grad()
def by_hand(loaded: Loaded, x: Tensor, t: Tensor) -> Tensor:
    """The raw diffusers module called with its documented inputs, prompts encoded by the pipeline's own method."""
    pipe, module, texts = loaded.pipe, loaded.denoiser, prompts(loaded.family.name)
    if loaded.family.name == "sd":
        return module(x, t, pipe.encode_prompt(texts, "cpu", 1, False)[0]).sample
    if loaded.family.name == "sdxl":
        embeds, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        time_ids = torch.tensor([[20.0, 30, 2, 4, 16, 16], [16, 16, 0, 0, 16, 16]])
        return module(x, t, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample
    if loaded.family.name == "unet":
        return module(x, t, torch.tensor([0, 1])).sample
    if loaded.family.name == "sd3":
        embeds, _, pooled, _ = pipe.encode_prompt(texts, texts, texts, max_sequence_length=TOKENS)
        return module(x, embeds, pooled, torch.tensor([250.0, 750.0])).sample
    if loaded.family.name == "flux":
        embeds, pooled, text_ids = pipe.encode_prompt(texts, max_sequence_length=TOKENS)
        packed = pipe._pack_latents(x, 2, *x.shape[1:])
        image_ids = pipe._prepare_latent_image_ids(2, x.shape[2] // 2, x.shape[3] // 2, "cpu", torch.float32)
        guidance = torch.tensor([3.5, 3.5])
        output = module(packed, embeds, pooled, t, image_ids, text_ids, guidance).sample
        return pipe._unpack_latents(output, 16, 16, pipe.vae_scale_factor)
    if loaded.family.name == "pixart":
        embeds, mask, _, _ = pipe.encode_prompt(texts, max_sequence_length=TOKENS)
        added = {"resolution": None, "aspect_ratio": None}
        return module(x, embeds, t, added, encoder_attention_mask=mask).sample[:, :4]
    instruction = inspect.signature(D.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    embeds, mask, _, _ = pipe.encode_prompt(texts, max_sequence_length=TOKENS, complex_human_instruction=instruction)
    scaled = torch.tensor([250.0, 750.0]) * 0.5  # the tiny checkpoint's timestep_scale
    return module(x, embeds, scaled, encoder_attention_mask=mask).sample


@pytest.mark.parametrize("family", EVERY)
def test_denoise_is_the_raw_module(family: str, opened: Any) -> None:
    loaded = opened(family)
    assert sum(p.numel() for p in loaded.denoiser.parameters()) < 2e6
    x, t, conditions = ready(loaded)
    torch.testing.assert_close(loaded.denoise(loaded.denoiser, x, t, conditions), by_hand(loaded, x, t))


@pytest.mark.parametrize("family", EVERY)
def test_conditions_and_members_matter(family: str, opened: Any) -> None:
    """A row of a batch is what it is alone, and swapping the prompts changes the prediction."""
    loaded = opened(family)
    x, t, conditions = ready(loaded)
    together = loaded.denoise(loaded.denoiser, x, t, conditions)
    alone = loaded.denoise(loaded.denoiser, x[:1], t[:1], {k: v[:1] for k, v in conditions.items()})
    swapped = loaded.denoise(loaded.denoiser, x, t, {k: v.flip(0) for k, v in conditions.items()})
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, swapped, atol=1e-6)


@pytest.mark.parametrize("family", LATENT)
def test_latents_are_scaled_as_the_family_scales_them(family: str, opened: Any) -> None:
    loaded = opened(family)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    scale, shift = {
        "sd": (0.18215, 0), "sdxl": (0.13025, 0), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159), "pixart": (0.18215, 0),
        "sana": (0.41407, 0),
    }[family]  # fmt: skip
    with torch.no_grad():
        encoded = loaded.vae.encode(pixels)
        raw = encoded.latent if family == "sana" else encoded.latent_dist.mode()
        decoded = loaded.vae.decode(raw).sample
    latents = loaded.encode_images(pixels)
    assert latents.shape[1:] == loaded.latent_shape(16)
    torch.testing.assert_close(latents, (raw - shift) * scale)
    torch.testing.assert_close(loaded.decode(latents), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_posterior_samples_follow_the_generator(opened: Any) -> None:
    loaded, pixels = opened("sd"), torch.zeros(1, 3, 16, 16)
    first, again = (loaded.encode_images(pixels, "sample", torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, loaded.encode_images(pixels))
    with pytest.raises(ValueError, match="'median' is not known"):
        loaded.encode_images(pixels, "median")


def test_pixel_models_have_no_latents(opened: Any) -> None:
    loaded, pixels = opened("unet"), torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode_images(pixels), pixels) and loaded.latent_shape(16) == (3, 16, 16)
    torch.testing.assert_close(loaded.decode(pixels), pixels / 2 + 0.5)


def test_dropped_prompts_follow_the_family(opened: Any, tmp_path: Path) -> None:
    zeros = opened("sdxl").encode_prompts(["", "a dog"])
    assert not zeros[0]["prompt_embeds"].any() and not zeros[0]["pooled"].any() and zeros[1]["pooled"].any()
    sd = opened("sd")
    torch.testing.assert_close(sd.encode_prompts([""])[0]["prompt_embeds"], sd.pipe.encode_prompt("", "cpu", 1, False)[0][0])
    assert opened("unet").encode_prompts([""])[0]["class_labels"] == tiny.LABELS.index("")
    sana = opened("sana")
    plain = sana.pipe.encode_prompt("", False, max_sequence_length=TOKENS)
    torch.testing.assert_close(sana.encode_prompts([""])[0]["prompt_embeds"], plain[0][0])


def test_class_labels(opened: Any) -> None:
    unet = opened("unet")
    assert [int(c["class_labels"]) for c in unet.encode_prompts(["square", "2"])] == [1, 2]
    with pytest.raises(ValueError, match="prompt 'star'"):
        unet.encode_prompts(["star"])
    unet.config = dict(unet.config) | {"num_class_embeds": None}
    assert len(unet.encode_prompts(["", ""])) == 2
    with pytest.raises(ValueError, match="would ignore it"):
        unet.encode_prompts(["", "circle"])


def test_sdxl_needs_a_size_per_picture(opened: Any) -> None:
    sdxl = opened("sdxl")
    conditions = sdxl.encode_prompts(["a dog", "a cat"])
    assert sdxl.collate(conditions, SIZES)["size"].tolist() == [[20, 30, 2, 4, 16, 16], [16, 16, 0, 0, 16, 16]]
    for sizes in (None, SIZES[:1]):
        with pytest.raises(ValueError, match="one size per picture: expected 2"):
            sdxl.collate(conditions, sizes)


def test_pixart_with_resolution_conditioning(tmp_path: Path) -> None:
    """Checkpoints of 1024 pixels are told the target's height and width and their ratio."""
    loaded = load(
        str(tiny.make("pixart", tmp_path, transformer=tiny.pixart(use_additional_conditions=True))), text_length=TOKENS
    )
    x, t, _ = ready(loaded)
    sizes = [Size(40, 40, 0, 0, 16, 32), Size.square(16)]
    conditions = loaded.collate(loaded.encode_prompts(prompts("pixart")), sizes)
    added = {"resolution": torch.tensor([[16.0, 32], [16, 16]]), "aspect_ratio": torch.tensor([[0.5], [1.0]])}
    embeds, mask = conditions["prompt_embeds"], conditions["mask"]
    with torch.no_grad():
        want = loaded.denoiser(x, embeds, t, added, encoder_attention_mask=mask).sample[:, :4]
    torch.testing.assert_close(loaded.denoise(loaded.denoiser, x, t, conditions), want)
    with pytest.raises(ValueError, match="pixart: needs one size per picture"):
        loaded.collate(loaded.encode_prompts(["a dog"]))


def test_pack_is_inverted() -> None:
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(unpack(pack(x), 3, 4), x) and torch.equal(pack(x), D.FluxPipeline._pack_latents(x, 2, 4, 6, 8))


# Sampling --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sd_sampling_is_the_pipelines(target: str, guidance: float, tmp_path: Path) -> None:
    loaded = load(str(tiny.make("sd", tmp_path, scheduler=tiny.ddim(prediction_type=target))))
    _sampling_matches(loaded, guidance, ["a dog"], height=16, width=16)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sd3_sampling_is_the_pipelines(guidance: float, opened: Any) -> None:
    _sampling_matches(opened("sd3"), guidance, ["a dog"], height=16, width=16, max_sequence_length=TOKENS)


@pytest.mark.slow
def test_sdxl_sampling_is_the_pipelines(opened: Any) -> None:
    _sampling_matches(opened("sdxl"), 5.0, ["a dog"], height=16, width=16)


def test_flux_sampling_is_the_pipelines(opened: Any) -> None:
    """FLUX: packed noise, guidance as an input, a grid shifted by the number of tokens."""
    loaded, noise = opened("flux"), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = loaded.collate(loaded.encode_prompts(["a dog"]))
    mine = loaded.sample(loaded.denoiser, conditions, noise, steps=4, guidance=2.0)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": TOKENS, "height": 16, "width": 16}
    theirs = loaded.pipe("a dog", latents=pack(noise), output_type="latent", **call).images
    torch.testing.assert_close(mine, unpack(theirs, 4, 4), rtol=1e-4, atol=1e-4)


def _sampling_matches(loaded: Loaded, guidance: float, texts: list[str], **call: Any) -> None:
    loaded.pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions, uncond = (loaded.collate(loaded.encode_prompts(p), [Size.square(16)]) for p in (texts, [""]))
    mine = loaded.sample(loaded.denoiser, conditions, noise, steps=5, guidance=guidance, uncond=uncond)
    call |= {"num_inference_steps": 5, "guidance_scale": guidance, "output_type": "latent"}
    theirs = loaded.pipe(texts, latents=noise.clone(), **call).images
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_needs_the_unconditional(opened: Any) -> None:
    loaded = opened("sd")
    conditions = loaded.collate(loaded.encode_prompts(["a dog"]))
    with pytest.raises(ValueError, match="guidance 5.0 needs"):
        loaded.sample(loaded.denoiser, conditions, torch.zeros(1, 4, 8, 8), steps=2, guidance=5.0)


# Files -----------------------------------------------------------------------------------------------------------------


def lora(loaded: Loaded) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=6, target_modules=loaded.lora_targets)


def perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "sana"])
@pytest.mark.slow
def test_lora_loads_in_plain_diffusers(family: str, wrapped: bool, folder: Any, tmp_path: Path) -> None:
    """Saved here, loaded by the pipeline's own load_lora_weights, the output is the trained policy's, alpha included."""
    trained, fresh = (load(str(folder(family)), text_length=TOKENS) for _ in range(2))
    x, t, conditions = ready(trained)
    before = trained.denoise(trained.denoiser, x, t, conditions)
    if wrapped:
        model: Any = get_peft_model(trained.denoiser, lora(trained))
    else:
        model = trained.denoiser
        model.add_adapter(lora(trained))
    perturb(model)
    after = trained.denoise(model, x, t, conditions)
    trained.save_lora(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh.pipe.load_lora_weights(tmp_path)
    got = fresh.denoise(fresh.denoiser, x, t, conditions)
    torch.testing.assert_close(got, after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-4)


def test_pixart_lora_loads_with_peft(folder: Any, tmp_path: Path) -> None:
    trained, fresh = (load(str(folder("pixart")), text_length=TOKENS) for _ in range(2))
    x, t, conditions = ready(trained)
    model = get_peft_model(trained.denoiser, lora(trained))
    perturb(model)
    trained.save_lora(model, tmp_path)
    restored = PeftModel.from_pretrained(fresh.denoiser, tmp_path)
    got = fresh.denoise(restored, x, t, conditions)
    torch.testing.assert_close(got, trained.denoise(model, x, t, conditions))


def test_lora_is_refused_where_nothing_loads_it(opened: Any, tmp_path: Path) -> None:
    unet, sd = opened("unet"), opened("sd")
    with pytest.raises(ValueError, match="UNet2DModel; train it in full"):
        unet.save_lora(unet.denoiser, tmp_path)
    with pytest.raises(ValueError, match="adapter 'default'"):
        sd.save_lora(sd.denoiser, tmp_path)
    sd.denoiser.add_adapter(lora(sd))
    with pytest.raises(ValueError, match="carries a LoRA"):
        sd.save_full(tmp_path)


@pytest.mark.parametrize("family", EVERY)
def test_full_checkpoint_loads_again(family: str, opened: Any, tmp_path: Path) -> None:
    loaded = opened(family)
    with torch.no_grad():
        next(loaded.denoiser.parameters()).add_(0.5)
    loaded.save_full(tmp_path)
    again = load(str(tmp_path), family=family, text_length=TOKENS)
    x, t, conditions = ready(loaded)
    mine, theirs = (m.denoise(m.denoiser, x, t, conditions) for m in (loaded, again))
    torch.testing.assert_close(mine, theirs)
    assert again.digest() == loaded.digest() and again.labels == loaded.labels


def test_digest_follows_the_encoders_only(opened: Any) -> None:
    loaded = opened("sd")
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(1)
        assert other.digest() == loaded.digest()
        next(other.pipe.text_encoder.parameters())[0, 0] += 1
    assert other.digest() != loaded.digest()


def test_bf16_keeps_the_vae_and_the_output_in_fp32(folder: Any) -> None:
    loaded = load(str(folder("sd")), dtype=torch.bfloat16)
    x, t, conditions = ready(loaded)
    assert loaded.vae.dtype == torch.float32 and loaded.denoiser.dtype == torch.bfloat16
    assert loaded.denoise(loaded.denoiser, x, t, conditions).dtype == torch.float32


def test_every_family_is_tested() -> None:
    assert sorted(FAMILIES) == sorted(EVERY) == sorted(tiny.MAKERS)


def test_bad_checkpoints_are_refused(folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no model_index.json"):
        load(str(tmp_path))
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="'KandinskyPipeline' is not supported"):
        load(str(tmp_path))
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["my_code", "MyUNet"]}))
    with pytest.raises(ValueError, match="component 'unet' comes from 'my_code'"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="of family 'sd', but family 'sdxl'"):
        load(str(folder("sd")), family="sdxl")


def test_pickled_weights_are_refused(folder: Any, tmp_path: Path) -> None:
    copied = shutil.copytree(folder("unet"), tmp_path / "copy")
    (copied / "unet" / "diffusion_pytorch_model.safetensors").rename(copied / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="from safetensors"):
        load(str(copied))


def test_resolution_must_divide(opened: Any) -> None:
    with pytest.raises(ValueError, match="multiple of 4 pixels, got 18"):
        opened("flux").latent_shape(18)
