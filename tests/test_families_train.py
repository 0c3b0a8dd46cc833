"""Every family, and every option of a run, from a directory that diffusers wrote to an export that diffusers loads."""

from __future__ import annotations

import csv
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers as D
import numpy as np
import peft
import pytest
import torch
from accelerate.state import AcceleratorState

from mmpo import checkpoint, cli, media
from mmpo import recipe as recipes
from mmpo.datasets.formats.pick_a_pic import write_pick_a_pic
from mmpo.datasets.worlds import shapes
from mmpo.export import open_run
from mmpo.launch import run
from mmpo.modalities.families import Loaded, Size
from mmpo.pair import Pair, image, text
from mmpo.runlog import read
from tests.modalities import tiny

RECIPE = """
modality: diffusion
data: {heldout: 0.4}
model: {lora: {rank: 2}, resolution: 16}
objective: [{loss: dpo, beta_dpo: 2000}]
train: {steps: 2, batch_size: 2, lr: 1.0e-2, save_every: 1}
eval: {every: 2, draws: 1}
"""
pytestmark = pytest.mark.slow  # a minute and a half together; tests/test_launch.py trains the embedded model in the fast suite

FAMILIES = ["sd", "sdxl", "pixart", "sd3", "flux", "sana"]
CAPTIONS = ["a red dog", "the blue cat", "a circle", "the square on the left", "a dog on a cat", "red and blue"]
SGD = ("train.optimizer=sgd", "train.lr=1", "train.weight_decay=0", "train.clip=1000")  # weights move by the gradient itself

Launch = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes each family's checkpoint once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def picture(seed: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side - 4, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """A function that writes Pick-a-Pic files: one pair of random pictures for each caption."""

    def write(captions: list[str]) -> Path:
        path = tmp_path_factory.mktemp("data") / "pairs.parquet"
        write_pick_a_pic(
            [Pair(f"p{i}", (text(c),), (image(picture(2 * i)),), (image(picture(2 * i + 1)),)) for i, c in enumerate(captions)],
            path,
        )
        return path

    return write


@pytest.fixture
def launch(model: Any, data: Any, tmp_path: Path) -> Launch:
    """A function that runs the recipe above on a family with some settings changed, and returns the run's folder."""

    def start(family: str, *settings: str, name: str = "run", path: Path | None = None) -> Path:
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        path = path or data([*tiny.LABELS[:3]] if family == "unet" else CAPTIONS)
        given = [f"model.path={model(family)}", f"data.path={path}", f"out={tmp_path / name}", *settings]
        assert run(recipes.load(tmp_path / "recipe.yaml", given, losses=True)) == 0
        return tmp_path / name

    return start


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.from_bytes((folder / "best" / "policy.safetensors").read_bytes())


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read(folder / "log.jsonl") if r["event"] == "train"]


@torch.no_grad()
def output(loaded: Loaded, module: torch.nn.Module) -> torch.Tensor:
    """The denoiser's prediction on fixed noise at two times, for a prompt and the empty one."""
    x = torch.randn(2, *loaded.latent_shape(16), generator=torch.Generator().manual_seed(0))
    prompts = [loaded.labels[0] if loaded.labels else "a red dog", ""]
    condition = loaded.collate(loaded.encode_prompts(prompts), [Size.square(16)] * 2)
    return loaded.denoise(module.eval(), x, loaded.process.time(torch.tensor([0.3, 0.7])), condition)


def check(folder: Path, denoiser: Callable[[Loaded], torch.nn.Module]) -> None:
    """Plain diffusers' denoiser gives the trained policy's output, which is not the base's."""
    _, modality, start = open_run(folder)
    with start.active(modality.model) as module:
        base = output(modality.loaded, module)
    policy = output(modality.loaded, modality.model)
    theirs = output(modality.loaded, denoiser(modality.loaded))
    torch.testing.assert_close(theirs, policy, rtol=1e-4, atol=1e-5)
    assert (policy - base).abs().max() > 1e-3 * base.abs().max()


def pipeline(folder: Path) -> Any:
    return D.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, safety_checker=None)


def as_told(run: Path, folder: Path, merge: bool = False) -> Any:
    """The pipeline that the printed lines make."""
    scope: dict[str, Any] = {"DiffusionPipeline": D.DiffusionPipeline, "peft": peft}
    exec(textwrap.dedent(open_run(run)[1].how_to_load(folder, merge)), scope)
    return scope["pipe"]


def pictures(pipe: Any) -> np.ndarray:
    """What a plain pipeline paints from fixed noise, (1, 32, 32, 3) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "generator": torch.Generator().manual_seed(0)}
    plain = {"clean_caption": False, "use_resolution_binning": False}
    known = inspect.signature(type(pipe).__call__).parameters
    return pipe("a red dog", output_type="np", **call, **{k: v for k, v in plain.items() if k in known}).images


# Families --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str, launch: Launch, model: Any) -> None:
    """Two steps from the directory, then the very lines that `mmpo export` prints: a plain pipeline with other pictures."""
    folder = launch(family)
    files = {p.name for p in (folder / "export").iterdir()}
    assert files == {"pytorch_lora_weights.safetensors"} or (family == "pixart" and "adapter_model.safetensors" in files)
    assert not [n for n in files if n.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
    pipe = as_told(folder, folder / "export")
    check(folder, lambda loaded: getattr(pipe, loaded.family.denoiser))
    assert np.abs(pictures(pipe) - pictures(pipeline(model(family)))).max() > 1e-4
    found, rows = summary(folder), steps_of(folder)
    assert found["steps"] == 2 and found["pairs"]["train"] + found["pairs"]["heldout"] == len(CAPTIONS)
    assert sum(row["n"] for row in found["by_timestep"]) == found["pairs"]["heldout"] > 0
    assert len(rows) == 2 and rows[0]["rewards/margins"] == 0 != rows[1]["rewards/margins"]
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("family", ["unet", "sd", "sd3"])
def test_full_fine_tuning(family: str, launch: Launch) -> None:
    folder = launch(family, "model.adapter=full", "train.lr=1e-3")
    check(folder, lambda loaded: getattr(pipeline(folder / "export"), loaded.family.denoiser))


@pytest.mark.parametrize(("family", "dtype"), [("sd", "bf16"), ("pixart", "fp32")])
def test_merged_export(family: str, dtype: str, launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = launch(family, f"model.dtype={dtype}")
    assert cli.main(["export", str(folder), "--merge"]) == 0
    assert "equal to the trained policy" in capsys.readouterr().out
    if dtype == "fp32":  # the command itself has compared at the weights' own precision
        pipe = as_told(folder, folder / "merged", merge=True)
        check(folder, lambda loaded: getattr(pipe, loaded.family.denoiser))


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_an_adapter_continues(family: str, launch: Launch) -> None:
    """A run may start from another run's export: its self-check sees the reference at that start, margin 0."""
    first = launch(family)
    second = launch(family, f"model.lora.path={first / 'export'}", name="second")
    assert steps_of(second)[0]["rewards/margins"] == 0 and steps_of(second)[1]["rewards/margins"] != 0
    _, modality, start = open_run(second)
    ends = [as_told(f, f / "export") for f in (first, second)]
    with start.active(modality.model) as module:
        began = output(modality.loaded, module)
    theirs = [output(modality.loaded, getattr(p, modality.loaded.family.denoiser)) for p in ends]
    torch.testing.assert_close(theirs[0], began, rtol=1e-4, atol=1e-5)
    check(second, lambda loaded: getattr(ends[1], loaded.family.denoiser))
    with pytest.raises(ValueError, match="trained with alpha 2, this one has alpha 8"):
        launch(family, f"model.lora.path={first / 'export'}", "model.lora.alpha=8", name="refused")


# Precision and memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(adapter: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent, so that equal weights mean equal gradients; the second step sees the first one's update."""
    settings = [f"model.adapter={adapter}", *SGD]
    plain = trained(launch("sd", *settings))
    calls, original = [], torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    saved = trained(launch("sd", *settings, "model.gradient_checkpointing=true", name="saved"))
    assert calls
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture
def fresh_precision() -> Iterator[None]:
    """accelerate fixes the precision once per process; a test that changes it puts it back."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_bf16(adapter: str, launch: Launch, fresh_precision: None) -> None:
    """Two finite steps whose first margin is exactly 0, an evaluation under the same precision, and a whole export."""
    folder = launch("sd", "train.precision=bf16", f"model.adapter={adapter}", "train.lr=1e-3")
    rows = steps_of(folder)
    assert rows[0]["rewards/margins"] == 0 and rows[0]["loss"] == pytest.approx(np.log(2))
    assert all(np.isfinite(r["loss"]) and np.isfinite(r["grad_norm"]) and r["grad_norm"] > 0 for r in rows)
    start = next(r for r in read(folder / "log.jsonl") if r["event"] == "eval")
    assert start["eval/pair_accuracy"] == 0.5 and start["eval/margin"] == 0
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in trained(folder).values())


def test_bf16_frozen_parts(launch: Launch) -> None:
    folder = launch("sd", "model.dtype=bf16")
    assert all(np.isfinite(r["loss"]) for r in steps_of(folder))


# References ------------------------------------------------------------------------------------------------------------


def test_cached_reference_changes_nothing(launch: Launch) -> None:
    """One draw per pair, four steps over four pairs: the second epoch replays the first one's scores."""
    settings = [*SGD, "train.steps=4", "train.draws_per_pair=1", "eval.every=4"]
    plain = trained(launch("sd", *settings))
    cached = launch("sd", *settings, "reference.cache=true", name="cached")
    assert (cached / "cache" / "reference.sqlite").is_file()
    for name, value in trained(cached).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


def test_reference_ema(launch: Launch) -> None:
    """A reference that follows closely keeps the margin nearer to 0 than one that stays at the start."""
    settings = [*SGD, "train.steps=3", "eval.every=3", "objective.0.beta_dpo=200"]
    fixed = launch("sd", *settings)
    moving = launch("sd", *settings, "reference.kind=ema", "reference.ema_decay=0.01", name="moving")
    margins = [[abs(r["rewards/margins"]) for r in steps_of(f)] for f in (fixed, moving)]
    assert margins[0][0] == margins[1][0] == 0 and 0 < sum(margins[1]) < sum(margins[0])


def test_reference_path(launch: Launch, tmp_path: Path) -> None:
    other = tiny.make("sd", tmp_path / "other", seed=1)
    folder = launch("sd", "reference.kind=path", f"reference.path={other}")
    assert steps_of(folder)[0]["rewards/margins"] != 0
    assert summary(folder)["steps"] == 2


def test_reference_adapter_off_needs_an_adapter(launch: Launch) -> None:
    assert summary(launch("sd", "reference.kind=adapter_off"))["steps"] == 2
    with pytest.raises(ValueError, match="use reference.kind: start"):
        launch("sd", "reference.kind=adapter_off", "model.adapter=full", name="full")


def test_mapo_without_reference(launch: Launch) -> None:
    folder = launch("sd", "objective=[{loss: mapo, beta: 0.1}]", "reference.kind=none")
    assert all(np.isfinite(r["loss"]) for r in steps_of(folder))
    with pytest.raises(ValueError, match="loss dpo needs ref"):
        launch("sd", "reference.kind=none", name="refused")


# Draws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "mode"), [("sd", "inversion"), ("sd", "renoise"), ("sd3", "inversion"), ("sd3", "renoise")])
def test_inverted_noise(family: str, mode: str, launch: Launch) -> None:
    folder = launch(family, f"draw.mode={mode}", "draw.inversion_steps=3")
    rows = steps_of(folder)
    assert rows[0]["rewards/margins"] == 0 and all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)


def test_inversion_by_the_reference(launch: Launch) -> None:
    """The same as by the policy while both are equal, and not afterwards."""
    settings = ["draw.mode=inversion", "draw.inversion_steps=3"]
    runs = [launch("sd", *settings, f"draw.inversion_model={m}", name=m) for m in ("policy", "reference")]
    (a0, a1), (b0, b1) = (steps_of(f) for f in runs)
    assert a0["logps/chosen"] == b0["logps/chosen"] and a1["logps/chosen"] != b1["logps/chosen"]


# Other rows and rounds -------------------------------------------------------------------------------------------------


def test_kto_on_unpaired_rows(launch: Launch, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_path", "caption", "label"])
        for i, caption in enumerate(CAPTIONS):
            (tmp_path / f"{i}.png").write_bytes(media.encode(picture(i)))
            table.writerow([f"{i}.png", caption, i % 2])
    folder = launch("sd", "objective=[{loss: kto, beta: 1.0}]", "draw.mode=independent", path=rows)
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in steps_of(folder))
    with pytest.raises(ValueError, match="for unpaired rows use loss: kto"):
        launch("sd", path=rows, name="refused")


def test_moving_average_is_what_is_evaluated_and_exported(launch: Launch) -> None:
    """Gradient descent from B = 0, decay 0.9: after two steps the average lags far behind the weights."""
    plain = trained(launch("sd", *SGD))
    averaged = launch("sd", *SGD, "train.ema=0.9", name="averaged")
    exported = trained(averaged)
    b = [name for name in plain if "lora_B" in name]
    assert 0 < sum(float(exported[n].norm()) for n in b) < 0.5 * sum(float(plain[n].norm()) for n in b)


def test_without_held_out_pairs_the_last_weights_count(launch: Launch) -> None:
    folder = launch("sd", "data.heldout=0")
    assert summary(folder)["heldout_pair_accuracy"] is None and summary(folder)["best_step"] == 2
    assert cli.main(["export", str(folder)]) == 0


@pytest.mark.parametrize("keeps", [False, True])
def test_two_rounds(launch: Launch, data: Any, keeps: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Round 2 trains on the policy's own samples, ranked by the shapes world's exact judge, and if asked on the data too."""
    captions = shapes.captions()[::150]
    folder = launch(
        "sd", "model.resolution=64", "model.sample_steps=2", "model.guidance=1", "judge.name=shapes", "train.rounds=2",
        "train.round_prompts=3", "train.round_candidates=4", "data.pairing={strategy: best_worst}", "eval.prompts=1",
        "eval.seeds=1", "eval.test_prompts=1", "eval.test_seeds=1", f"train.round_keeps_data={keeps}", path=data(captions),
    )  # fmt: skip
    told = capsys.readouterr().out
    found = re.search(r"round 2: (\d+) pairs of the policy's own samples(?: and (\d+) of the data's)?; dropped", told)
    assert found and (found[2] is not None) == keeps, told
    assert int(found[1]) + int(found[2] or 0) == summary(folder)["pairs"]["train"]
    assert summary(folder)["steps"] == 4 and (folder / "rounds" / "2.parquet").is_file()
    assert len(steps_of(folder)) == 4 and 0 <= summary(folder)["win_rate"]["value"] <= 1
