"""The diffusion adapter: draws as pure functions of their key, encoders run once, the whole way from picture to score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logit
from torch import Tensor

from mmpo.cache import Cache
from mmpo.modalities.diffusion import Adapter, Batch
from mmpo.modality import DrawKey
from mmpo.pair import Pair, image, text
from tests.modalities import tiny
from tests.modalities.adapters import adapter, calls, keys, make_pairs, perturb, picture, stream

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made: dict[tuple[str, str], Path] = {}

    def get(family: str = "sd", target: str = "") -> Path:
        if (family, target) not in made:
            parts = {"scheduler": tiny.ddim(prediction_type=target)} if target else {}
            made[family, target] = tiny.make(family, tmp_path_factory.mktemp(family), **parts)
        return made[family, target]

    return get


def drawn(ours: Adapter, pairs: list[Pair], index: int = 0, seed: int = 0) -> Batch:
    return ours.draw(ours.encode(pairs), keys(pairs, index, seed), ours.model)


def many(ours: Adapter, count: int, pair: Pair | None = None) -> Batch:
    """One pair under many draw indices, in one batch."""
    encoded = ours.encode([pair or make_pairs(1)[0]])
    return ours.draw(encoded * count, [DrawKey(0, "p0", i) for i in range(count)], ours.model)


# Draws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_draw_depends_on_its_key_alone(family: str, mode: str, checkpoint: Checkpoint) -> None:
    """Alone, in a batch, in another order: the same noise and time to the last bit."""
    ours, pairs = adapter(checkpoint(family), draw={"mode": mode}, dropout=0.5), make_pairs(4)
    together = drawn(ours, pairs)
    order = [2, 0, 3, 1]
    shuffled = drawn(ours, [pairs[i] for i in order])
    for place, i in enumerate(order):
        alone = drawn(ours, [pairs[i]])
        for batch, rows in ((together, [i, i + 4]), (shuffled, [place, place + 4])):
            assert torch.equal(batch.noisy[rows], alone.noisy) and torch.equal(batch.target[rows], alone.target)
            assert torch.equal(batch.t[rows], alone.t)
            assert torch.equal(batch.condition["prompt_embeds"][rows], alone.condition["prompt_embeds"])
        assert together.keys[i] == shuffled.keys[place] == alone.keys[0]


def test_seed_sample_and_index_each_change_the_draw(checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint())
    encoded = ours.encode(make_pairs(1)) * 4
    batch = ours.draw(encoded, [DrawKey(0, "p", 0), DrawKey(1, "p", 0), DrawKey(0, "q", 0), DrawKey(0, "p", 1)], ours.model)
    assert len(set(batch.t[:4].tolist())) == 4 and len(set(batch.keys)) == 4
    assert len({row.numpy().tobytes() for row in batch.target[:4]}) == 4


def test_streams_are_the_documented_ones(checkpoint: Checkpoint) -> None:
    ours, pairs = adapter(checkpoint()), make_pairs(1)
    batch, key = drawn(ours, pairs), keys(pairs)[0]
    assert torch.equal(batch.target[0], torch.randn(batch.target[0].shape, generator=stream(key, "noise/")))
    assert batch.t[0] == int(1000 * float(torch.rand((), generator=stream(key, "time/"))))


def test_shared_members_share_time_and_noise(checkpoint: Checkpoint) -> None:
    batch = drawn(adapter(checkpoint()), make_pairs(3))
    assert torch.equal(batch.t[:3], batch.t[3:]) and torch.equal(batch.target[:3], batch.target[3:])
    assert not torch.equal(batch.noisy[:3], batch.noisy[3:])


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "grid"])
def test_independent_members_share_nothing(timesteps: str, checkpoint: Checkpoint) -> None:
    batch = drawn(adapter(checkpoint(), draw={"mode": "independent", "timesteps": timesteps}), make_pairs(3))
    assert bool((batch.t[:3] != batch.t[3:]).all())
    assert all(not torch.allclose(w, r) for w, r in zip(batch.target[:3], batch.target[3:], strict=True))


@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_prompts_are_dropped_once_per_pair(mode: str, checkpoint: Checkpoint) -> None:
    """Both members lose it together, with the right frequency, for the empty prompt's own encoding."""
    ours = adapter(checkpoint(), draw={"mode": mode}, dropout=0.3)
    empty = ours.encode(make_pairs(1))[0].empty["prompt_embeds"]
    embeds = many(ours, 1000).condition["prompt_embeds"]
    dropped = (embeds == empty).flatten(1).all(1)
    assert torch.equal(dropped[:1000], dropped[1000:])
    assert stats.binomtest(int(dropped[:1000].sum()), 1000, 0.3).pvalue > 1e-3
    assert not (many(adapter(checkpoint()), 50).condition["prompt_embeds"] == empty).flatten(1).all(1).any()


def test_dropout_leaves_noise_and_time_alone(checkpoint: Checkpoint) -> None:
    plain, dropping = (drawn(adapter(checkpoint(), dropout=p), make_pairs(3)) for p in (0.0, 0.5))
    assert torch.equal(plain.noisy, dropping.noisy) and torch.equal(plain.t, dropping.t) and plain.keys != dropping.keys


def test_sdxl_is_told_the_size_of_each_member(checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint("sdxl"))
    pair = Pair("p", (text("a dog"),), (picture(0, 16, 16),), (picture(1, 40, 64),))
    assert drawn(ours, [pair]).condition["size"].tolist() == [[16, 16, 0, 0, 16, 16], [40, 64, 0, 5, 16, 16]]


def test_unpaired_rows_have_only_the_rows_they_have(checkpoint: Checkpoint) -> None:
    both, good, bad = make_pairs(3)
    pairs = [both, Pair(good.id, good.prompt, good.chosen), Pair(bad.id, bad.prompt, (), bad.rejected)]
    ours = adapter(checkpoint(), draw={"mode": "independent"})
    batch = drawn(ours, pairs)
    assert {b: r.tolist() for b, r in batch.rows.items()} == {"chosen": [0, 1], "rejected": [0, 2]} and len(batch.noisy) == 4
    scores = ours.score(ours.model, batch)
    assert scores["chosen"].mask[:, 0].tolist() == [True, True, False]
    assert scores["rejected"].mask[:, 0].tolist() == [True, False, True]
    whole = ours.score(ours.model, drawn(ours, make_pairs(3)))
    torch.testing.assert_close(scores["chosen"].logp[1], whole["chosen"].logp[1], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scores["rejected"].logp[2], whole["rejected"].logp[2], rtol=1e-5, atol=1e-3)


# Time ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"timesteps": "uniform"}, stats.uniform.cdf),
        ({"timesteps": "logit_normal"}, lambda p: stats.norm.cdf(logit(p))),
        ({"timesteps": "logit_normal", "logit_mean": -1.0, "logit_std": 0.5}, lambda p: stats.norm.cdf(logit(p), -1, 0.5)),
        ({"timesteps": "grid"}, stats.uniform.cdf),
    ],
)  # fmt: skip
def test_densities(spec: dict[str, Any], place: Any, checkpoint: Checkpoint) -> None:
    """Inside [t_min, t_max], and there distributed as it says."""
    time = many(adapter(checkpoint(), draw=spec | {"t_min": 0.2, "t_max": 0.7}), 800).time.double().numpy()
    assert time.min() >= 0.2 - 1e-6 and time.max() <= 0.7 + 1e-6
    assert stats.kstest((time - 0.2) / 0.5, place).pvalue > 1e-3


def test_the_grid_leaves_no_gaps(checkpoint: Checkpoint) -> None:
    """Any first n draws of a pair cover the schedule evenly: no gap is over a golden-ratio step's bound."""
    time = many(adapter(checkpoint(), draw={"timesteps": "grid"}), 64).time.double().numpy()
    for n in (4, 8, 64):
        ordered = np.sort(time[:n])
        assert np.diff(ordered, append=ordered[0] + 1).max() < 2.62 / n


def test_times_are_whole_steps_for_vp_and_sigmas_for_flow(checkpoint: Checkpoint) -> None:
    vp, flow = (many(adapter(checkpoint(f)), 20) for f in ("sd", "sd3"))
    assert torch.equal(vp.t[:20], (vp.time.double() * 1000).floor().long())
    torch.testing.assert_close(flow.t[:20].float(), flow.time.clamp(1e-3, 1 - 1e-3))


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("weight", ["constant", "eps", "min_snr"])
def test_weights(weight: str, target: str, checkpoint: Checkpoint) -> None:
    """w(t) on the native error; min-SNR is min(snr, 5) on the error in x0, which is the paper's for each target."""
    folder = checkpoint("sd3") if target == "flow" else checkpoint("sd", target)
    ours = adapter(folder, draw={"weight": weight, "t_min": 0.02, "t_max": 0.95})
    batch, process = many(ours, 30), ours.loaded.process
    a, s = process.a(batch.t), process.s(batch.t)
    snr = (a / s) ** 2
    eps = {"epsilon": torch.ones_like(a), "v_prediction": a**2, "flow": (1 - s) ** 2}[target]
    paper = {
        "epsilon": snr.clamp(max=5) / snr, "v_prediction": snr.clamp(max=5) / (snr + 1), "flow": s**2 * snr.clamp(max=5),
    }[target]  # fmt: skip
    wanted = {"constant": torch.ones_like(a), "eps": eps, "min_snr": paper}[weight]
    torch.testing.assert_close(batch.weight.double(), wanted, rtol=1e-5, atol=1e-7)
    scores = ours.score(ours.model, batch)["chosen"]
    torch.testing.assert_close(scores.logp[:, 0], -500 * batch.weight[:30] * scores.extras["err"][:, 0])


# Pictures --------------------------------------------------------------------------------------------------------------


def pixels(ours: Adapter, array: np.ndarray) -> tuple[Tensor, Any]:
    """What a pixel-space model is given of one picture, and its sizes."""
    encoded = ours.encode([Pair("p", (text("circle"),), (image(array),))])[0]
    return encoded.latents["chosen"], encoded.sizes["chosen"]


def test_pictures_are_cut_from_the_centre(checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint("unet"), adapter="full")
    array = np.random.default_rng(0).integers(0, 256, (16, 26, 3), dtype=np.uint8)
    cut, size = pixels(ours, array)
    assert size == (16, 26, 0, 5, 16, 16)
    torch.testing.assert_close(cut, torch.from_numpy(array[:, 5:21]).permute(2, 0, 1) / 127.5 - 1)
    tall, size = pixels(ours, array.transpose(1, 0, 2).copy())
    assert size == (26, 16, 5, 0, 16, 16)
    torch.testing.assert_close(tall, cut.transpose(1, 2))


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 65), (7, 9), (16, 1000), (17, 17)])
def test_the_short_side_becomes_the_resolution(height: int, width: int, checkpoint: Checkpoint) -> None:
    ours = adapter(checkpoint("unet"), adapter="full")
    array = np.zeros((height, width, 3), np.uint8)
    array[..., 0], array[..., 1] = np.linspace(0, 255, width)[None], np.linspace(0, 255, height)[:, None]
    cut, size = pixels(ours, array)
    assert cut.shape == (3, 16, 16) and cut.dtype == torch.float32 and cut.min() >= -1 and cut.max() <= 1
    assert tuple(size[:2]) == (height, width) and tuple(size[4:]) == (16, 16)
    scaled = [round(side * 16 / min(height, width)) for side in (height, width)]
    assert tuple(size[2:4]) == ((scaled[0] - 16) // 2, (scaled[1] - 16) // 2)
    assert abs(float(cut[:2].mean())) < 0.08, "the crop is centred: ramps are grey on average"
    assert cut[2].eq(-1).all()


# Encoders --------------------------------------------------------------------------------------------------------------


def encoders(ours: Adapter) -> tuple[Any, Any]:
    return ours.loaded.vae.encoder, ours.loaded.pipe.text_encoder


def test_everything_is_encoded_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A picture in two pairs is one picture, a prompt one prompt; the second time, and the second run, read them."""
    first, second = make_pairs(2)
    pairs = [first, Pair("again", first.prompt, second.chosen, first.chosen), second]
    ours = adapter(checkpoint(), cache=Cache(tmp_path / "encoded.sqlite"))
    vae, words = encoders(ours)
    with calls(vae) as pictures, calls(words) as prompts:
        encoded = ours.encode(pairs)
        assert sum(pictures) == 4 and sum(prompts) == 2
        again = ours.encode(pairs)
        assert sum(pictures) == 4 and sum(prompts) == 2
    assert torch.equal(encoded[0].latents["chosen"], encoded[1].latents["rejected"])
    assert torch.equal(encoded[2].latents["rejected"], again[2].latents["rejected"])
    later = adapter(checkpoint(), cache=Cache(tmp_path / "encoded.sqlite"))
    with calls(encoders(later)[0]) as pictures, calls(encoders(later)[1]) as prompts:
        read = later.encode(pairs)
    assert pictures == [] and prompts == []
    assert torch.equal(read[1].latents["chosen"], encoded[1].latents["chosen"])
    assert torch.equal(read[1].condition["prompt_embeds"], encoded[1].condition["prompt_embeds"])


def test_a_cache_is_not_used_for_anything_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Another resolution, another way to take the latent, other encoder weights: each is computed anew."""
    cache, pairs = Cache(tmp_path / "encoded.sqlite"), make_pairs(1)
    other = tiny.make("sd", tmp_path / "other", seed=1)
    defaults: dict[str, Any] = {"folder": checkpoint(), "cache": cache}
    settings: list[dict[str, Any]] = [{}, {"resolution": 32}, {"draw": {"vae": "sample"}}, {"folder": other}]
    found = []
    for spec in settings:
        ours = adapter(**(defaults | spec))
        with calls(encoders(ours)[0]) as pictures:
            found.append(ours.encode(pairs)[0].latents["chosen"])
        assert sum(pictures) == 2, spec
    assert found[1].shape == (4, 16, 16) and not torch.allclose(found[0], found[2]) and not torch.allclose(found[0], found[3])
    with calls(encoders(ours := adapter(checkpoint(), cache=cache, lora={"rank": 4}))[0]) as pictures:
        assert torch.equal(ours.encode(pairs)[0].latents["chosen"], found[0])
    assert pictures == [], "the adapter is no part of what the frozen encoders do"


def test_a_sampled_latent_belongs_to_its_picture(checkpoint: Checkpoint) -> None:
    """The VAE's noise is a function of the picture alone, whatever is encoded with it."""
    spec, pairs = {"vae": "sample"}, make_pairs(3)
    together = adapter(checkpoint(), draw=spec).encode(pairs)
    alone = adapter(checkpoint(), draw=spec).encode(pairs[2:])
    mode = adapter(checkpoint()).encode(pairs)
    for branch in ("chosen", "rejected"):
        torch.testing.assert_close(together[2].latents[branch], alone[0].latents[branch], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[2].latents[branch], mode[2].latents[branch], atol=1e-4)
    noise = [(t.latents["chosen"] - m.latents["chosen"]) for t, m in zip(together, mode, strict=True)]
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)


def test_classes_without_a_null_class(tmp_path: Path) -> None:
    """They need one for dropped prompts and for guidance, and for nothing else."""
    folder = tiny.make("unet", tmp_path)
    (folder / "labels.json").unlink()
    pairs = [Pair("p", (text("3"),), (picture(0),), (picture(1),))]
    ours = adapter(folder, adapter="full", guidance=1, sample_steps=2)
    assert drawn(ours, pairs).condition["class_labels"].tolist() == [3, 3]
    assert len(ours.sample(ours.model, [pairs[0].prompt], [0])) == 1 and len(ours.encode(ours.dummy())) == 2
    guided = adapter(folder, adapter="full", guidance=2, sample_steps=2)
    for refused in (
        lambda: guided.sample(guided.model, [pairs[0].prompt], [0]),
        lambda: adapter(folder, adapter="full", dropout=0.1).encode(pairs),
    ):
        with pytest.raises(ValueError, match="no null class"):
            refused()


# Precision and sampling ------------------------------------------------------------------------------------------------


def test_bf16_networks_have_fp32_errors(checkpoint: Checkpoint) -> None:
    """Cast before the square: the scores are those of the network's own output, squared in fp32."""
    ours = adapter(checkpoint(), dtype="bf16")
    batch = drawn(ours, make_pairs(2))
    with torch.no_grad():
        scores = ours.score(ours.model, batch)
        output = ours.loaded.denoise(ours.model, batch.noisy, batch.t, batch.condition)
    assert batch.noisy.dtype == batch.target.dtype == scores["chosen"].logp.dtype == torch.float32
    error = (output.double() - batch.target.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(scores["chosen"].extras["err"][:, 0].double(), error[:2], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(checkpoint: Checkpoint) -> None:
    grads = []
    for flag in (False, True):
        torch.manual_seed(0)
        ours = adapter(checkpoint(), gradient_checkpointing=flag)
        perturb(ours.model)
        ours.score(ours.model, drawn(ours, make_pairs(2)))["chosen"].logp.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in ours.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_describe_says_what_beta_means(checkpoint: Checkpoint) -> None:
    described = adapter(checkpoint()).describe(2.0)
    assert "beta_dpo 2000" in described and "kappa 1000" in described and "epsilon" in described
