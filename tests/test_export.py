"""After the run: `mmpo sample`, `eval` and `export` on a tiny finished run, and the exports that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpo import checkpoint, cli, find, launch
from mmpo.lock import RunLock
from mmpo.modalities.diffusion import Adapter
from tests.tiny_run import load, make_world

pytestmark = pytest.mark.slow
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps with a large learning rate, judged by brightness."""
    folder = tmp_path_factory.mktemp("finished")
    find.PLUGINS.add("tests.tiny_run")
    more = ("train.steps=2", "train.lr=2e-2", "judge.name=tests.tiny_run:brightness")
    launch.run(load(make_world(folder / "world"), folder / "run", *more))
    yield folder / "run"
    find.PLUGINS.discard("tests.tiny_run")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_sample_writes_base_beside_aligned(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(finished), "--prompt", "a red circle", "--prompt", "a blue cross", "--seed", "3", "--out"]
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "one" / "sheet.png")
    assert cli.main([*words, str(tmp_path / "two")]) == 0
    names = ["base/000.png", "base/001.png", "aligned/000.png", "aligned/001.png", "captions.json", "sheet.png"]
    one, two = ({n: (tmp_path / folder / n).read_bytes() for n in names} for folder in ("one", "two"))
    assert one == two  # a function of the weights, the prompts and the seed
    assert one["base/000.png"] != one["aligned/000.png"]
    assert json.loads(one["captions.json"]) == ["a red circle", "a blue cross"]


def test_samples_of_consecutive_seeds_line_up(finished: Path, tmp_path: Path) -> None:
    prompts = ["--prompt", "a red circle", "--prompt", "a red circle"]
    for seed in (0, 1):
        assert cli.main(["sample", str(finished), *prompts, "--seed", str(seed), "--out", str(tmp_path / str(seed))]) == 0
    for model in ("base", "aligned"):
        assert (tmp_path / f"0/{model}/001.png").read_bytes() == (tmp_path / f"1/{model}/000.png").read_bytes()


def test_eval_measures_what_the_run_reported(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(finished), "--plugin", "tests.tiny_run"]) == 0
    found, summary = json.loads(capsys.readouterr().out), json.loads((finished / "summary.json").read_text())
    assert found["pairs"]["accuracy"] == pytest.approx(summary["heldout_pair_accuracy"])
    for model in ("base", "aligned"):
        assert found[model] == pytest.approx(summary[model])
    assert found["win_rate"] == summary["win_rate"]


def lines_to_load(printed: str) -> Any:
    """What a user gets who runs the lines that export printed."""
    from diffusers import DiffusionPipeline

    names = {"DiffusionPipeline": DiffusionPipeline}
    exec("\n".join(line.strip() for line in printed.splitlines() if line.startswith("  ")), names)
    return names["pipe"]


@torch.no_grad()
def output(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 16, 32, generator=generator)
    return pipe.unet(x, 500, states).sample


def test_both_kinds_of_export_give_one_and_the_same_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for more in ([], ["--merge"]):
        assert cli.main(["export", str(finished), "--out", str(tmp_path / f"{len(more)}"), *more]) == 0
        outputs.append(output(lines_to_load(capsys.readouterr().out)))
    base = output(lines_to_load(f"  pipe = DiffusionPipeline.from_pretrained({str(finished.parent / 'world/pipe')!r})"))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert (outputs[0] - base).abs().max() > 1e-3
    assert load_file(tmp_path / "0" / FILE).keys() == load_file(finished / "export" / FILE).keys()


def test_an_adapter_that_changes_nothing_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = copied / "best" / "policy.safetensors"
    weights = checkpoint.from_bytes(best.read_bytes())
    assert any(v.abs().max() > 0 for n, v in weights.items() if "lora_B" in n)
    inert = {n: torch.zeros_like(v) if "lora_B" in n else v for n, v in weights.items()}
    best.write_bytes(checkpoint.to_bytes(inert, sealed=True))
    assert cli.main(["export", str(copied), "--out", str(copied / "inert")]) == 1
    assert "gives the base model's output" in capsys.readouterr().err
    assert not (copied / "inert").exists() and not list(copied.glob(".inert*"))


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_a_file_that_is_not_the_policy_is_refused(
    copied: Path, merge: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Adapter.save

    def tampered(self: Adapter, model: torch.nn.Module, folder: Path, merge: bool = False) -> None:
        write(self, model, folder, merge)
        file = folder / "unet" / "diffusion_pytorch_model.safetensors" if merge else folder / FILE
        save_file({n: v * 3 if "to_q" in n or "to_out" in n else v for n, v in load_file(file).items()}, file)

    monkeypatch.setattr(Adapter, "save", tampered)
    assert cli.main(["export", str(copied), "--out", str(copied / "tampered"), *merge]) == 1
    assert "differs from the trained policy" in capsys.readouterr().err
    assert not (copied / "tampered").exists() and not list(copied.glob(".tampered*"))


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_folder_without_a_run_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run: expected recipe.yaml" in capsys.readouterr().err


def test_a_run_before_its_first_evaluation_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "best")
    assert cli.main(["export", str(copied)]) == 2
    assert "no weights under best/" in capsys.readouterr().err


def test_a_run_says_nothing_that_is_not_its_own(
    copied: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    for more in ([], ["--merge"]):
        assert cli.main(["export", str(copied), "--out", str(copied / f"quiet{len(more)}"), *more]) == 0
    assert capfd.readouterr().err == ""
    assert not caplog.messages
    assert not [w for w in recwarn if "torch_dtype" in str(w.message)]


def test_no_export_among_other_weights_or_in_a_run(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever loads the folder would load both."""
    out = tmp_path / "out"
    (out / "other").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    for _ in range(2):  # the same once more is the same
        assert cli.main(["export", str(copied), "--out", str(out)]) == 0
    (out / "model.safetensors").write_bytes(b"")
    assert cli.main(["export", str(copied), "--out", str(out)]) == 2
    assert "holds other weights, which would be loaded along: model.safetensors" in capsys.readouterr().err
    assert cli.main(["export", str(copied), "--out", str(copied)]) == 2
    assert "holds a run" in capsys.readouterr().err and not (copied / FILE).exists()
    assert cli.main(["export", str(copied), "--out", str(out / "notes.txt")]) == 2
    assert "is a file; an export is a folder" in capsys.readouterr().err


def test_a_run_without_held_out_pairs_says_what_measures_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    launch.run(load(make_world(tmp_path / "world"), run, "train.steps=2", "train.lr=2e-2", "data.heldout=0"))
    assert "No judge was given" in capsys.readouterr().out
    assert cli.main(["eval", str(run)]) == 3
    assert "no prompts were held out; `mmpo eval" in capsys.readouterr().err


def test_nothing_is_written_into_a_run_that_another_writer_holds(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export or samples elsewhere only read it."""
    before = sorted(p.name for p in copied.iterdir())
    sample = ["sample", str(copied), "--prompt", "a red circle", "--out"]
    inside = (["export", str(copied)], ["export", str(copied), "--merge"], [*sample, str(copied / "more")])
    with RunLock(copied):
        for words in inside:
            assert cli.main(words) == 2 and "is being written by another process: pid" in capsys.readouterr().err
        assert cli.main(["export", str(copied), "--out", str(tmp_path / "out")]) == 0
        assert cli.main([*sample, str(tmp_path / "samples")]) == 0
    assert sorted(p.name for p in copied.iterdir()) == before
    assert [cli.main(words) for words in inside] == [0, 0, 0]
