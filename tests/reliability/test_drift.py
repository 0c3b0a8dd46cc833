"""T12: a run goes on only with what it was started from; whatever else has changed is named, and refused unless allowed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

import mmpo
from mmpo import cli, drift, launch
from mmpo.checkpoint import load_latest
from mmpo.errors import RecipeError
from tests.reliability.counters import counter
from tests.tiny_run import load, make_world, settings

pytestmark = pytest.mark.slow
SHORT = ("train.steps=2", "train.save_every=1", "eval.every=2")
CHANGES = (
    "seed=7", "model.resolution=64", "model.sample_steps=3", "model.guidance=2", "model.lora.rank=2", "model.adapter=full",
    "data.heldout=0.4", "data.pairing.strategy=best_worst", "data.prompt_dropout=0.1", "data.limit=20", "data.on_bad=skip",
    "draw.mode=independent", "draw.timesteps=grid", "draw.t_max=0.5", "draw.weight=eps", "reference.kind=adapter_off",
    "objective=[{loss: dpo, beta_dpo: 2000}]", "train.steps=3", "train.batch_size=2", "train.lr=0.01", "train.optimizer=sgd",
    "train.weight_decay=0", "train.clip=2", "train.precision=bf16", "eval.draws=2",
)  # fmt: skip
PARTS = {  # what is changed in the model's folder, and the name of the difference
    "unet/diffusion_pytorch_model.safetensors": "weights.denoiser",
    "vae/diffusion_pytorch_model.safetensors": "weights.encoders",
    "text_encoder/model.safetensors": "weights.encoders",
    "scheduler/scheduler_config.json": "weights.settings",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world in which one run has finished all but its last words."""
    found = make_world(tmp_path_factory.mktemp("drift"))
    launch.run(load(found, found / "run", *SHORT))
    (found / "run" / "summary.json").unlink()
    return found


def files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and p.name != "run.lock"}


def test_every_changed_setting_is_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began, before = time.monotonic(), files(world / "run")
    for change in CHANGES:
        key = change.partition("=")[0]
        named = "data.pairing" if key.startswith("data.pairing") else key
        assert cli.main(["train", "--modality", "diffusion", *settings(world, world / "run", *SHORT, change)]) == 2
        said = capsys.readouterr().err
        assert f"different: {named}" in said and f"--allow-drift {named}" in said and said.count("--allow-drift") == 1, said
    assert files(world / "run") == before
    counter("T12", "changed settings", len(CHANGES), "refused, named, nothing written", time.monotonic() - began)


def test_another_version_of_mmpo_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is noted where it is allowed; a run that began before versions were recorded has none to differ."""
    began, run = time.monotonic(), tmp_path / "run"
    shutil.copytree(world / "run", run)
    known = json.loads((run / "inputs.json").read_text())
    digests = {name: value for name, value in known["digests"].items() if name != "mmpo"}
    assert known["digests"]["mmpo"] == mmpo.__version__

    def claim(was: dict[str, str], *allowed: str) -> list[dict[str, str]]:
        (run / "inputs.json").write_text(json.dumps({"digests": was, "drift": []}))
        drift.claim_inputs(run, digests, allowed)
        return list(json.loads((run / "inputs.json").read_text())["drift"])

    with pytest.raises(RecipeError, match=r"a run of other inputs; different: mmpo\. .*--allow-drift mmpo$"):
        claim({**digests, "mmpo": "0.0.1"})
    noted = {"key": "mmpo", "was": "0.0.1", "now": mmpo.__version__}
    assert claim({**digests, "mmpo": "0.0.1"}, "mmpo") == [noted] and claim(digests) == []
    counter("T12", "another version of mmpo", 1, "refused, named", time.monotonic() - began)


def test_a_changed_judge_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder, and a file that one of its options names."""
    began, head, folder = time.monotonic(), tmp_path / "head.bin", tmp_path / "judge"
    (folder / "inner").mkdir(parents=True)
    (weights := folder / "inner" / "model.bin").write_bytes(b"one")
    head.write_bytes(b"head")
    judge = f"judge={{name: tests.tiny_run:lenient, path: {folder}, options: {{head: {head}, scale: 2.0}}}}"
    words = [
        "train",
        "--modality",
        "diffusion",
        "--plugin",
        "tests.tiny_run",
        *settings(world, tmp_path / "run", *SHORT, judge),
    ]
    assert cli.main(words) == 0
    (tmp_path / "run" / "summary.json").unlink()
    for file, name in ((weights, "weights.judge.path"), (head, "weights.judge.head")):
        whole = file.read_bytes()
        file.write_bytes(b"other")
        assert cli.main(words) == 2
        assert f"a run of other inputs; different: {name}. " in capsys.readouterr().err
        file.write_bytes(whole)
    assert cli.main(words) == 0
    counter("T12", "changed judge", 2, "refused, named", time.monotonic() - began)


@pytest.mark.parametrize("part", PARTS)
def test_changed_weights_are_named(world: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    began, file, name = time.monotonic(), world / "pipe" / part, PARTS[part]
    whole = file.read_bytes()
    shutil.copytree(world / "run", tmp_path / "run")
    changed = whole.replace(b"0.012", b"0.013") if part.endswith("json") else whole[:-1] + bytes([whole[-1] ^ 1])
    assert changed != whole
    words = ["train", "--modality", "diffusion", *settings(world, tmp_path / "run", *SHORT)]
    try:
        file.write_bytes(changed)
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert f"a run of other inputs; different: {name}. " in said and f"--allow-drift {name}" in said
        found = load_latest(tmp_path / "run" / "checkpoints")
        assert found is not None and found.step == 2 and not (tmp_path / "run" / "summary.json").exists()
        if name == "weights.denoiser":
            assert cli.main([*words, "--allow-drift", name]) == 0
            (noted,) = json.loads((tmp_path / "run" / "inputs.json").read_text())["drift"]
            assert noted["key"] == name and noted["was"] != noted["now"]
    finally:
        file.write_bytes(whole)
    counter("T12", f"changed {part.partition('/')[0]}", 1, f"refused, {name} named", time.monotonic() - began)
