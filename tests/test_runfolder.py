"""Whose a folder is before a run writes into it, what is removed from it, and what is said of its damaged files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mmpo import cli, drift, launch, runfolder
from mmpo.errors import RecipeError
from mmpo.lock import RunBusy, RunLock
from tests.tiny_run import load, make_world, settings

SHORT = ("train.steps=2", "train.save_every=1", "eval.every=2")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        (".notes.tmp-old", "sub/.a.tmp-b/thesis.txt"),
        ("recipe.yaml", "log.jsonl", "report.html", "quarantine.jsonl"),
        ("run.lock", "votes.sqlite"),  # of a vote
        ("checkpoints/other.bin",),
        (".notes.tmp-1",),
    ],
)
def test_a_folder_of_other_things_is_refused_and_left_alone(names: tuple[str, ...], tmp_path: Path) -> None:
    before = tree(put(tmp_path, *names))
    shown = sorted(p.name for p in tmp_path.iterdir() if p.name != "run.lock")[0]
    with pytest.raises(
        RecipeError, match=rf"out={tmp_path}: holds other things and no run \({shown}.*Name a folder that is new"
    ):
        runfolder.claim(tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("run.lock",),
        ("run.lock", ".recipe.yaml.tmp-71"),  # killed before the recipe was written
        ("cache/encoded.sqlite",),
        ("run.lock", "recipe.yaml", "samples/own.txt", "notes.txt"),
        ("run.lock", "checkpoints/CURRENT", "log.jsonl"),
        ("recipe.yaml", "log.jsonl", "checkpoints/step-000000.0123456789ab/MANIFEST.json"),  # a copy without its lock
        ("recipe.yaml", "summary.json", "best/policy.safetensors"),
    ],
)
def test_a_folder_of_a_run_is_taken(names: tuple[str, ...], tmp_path: Path) -> None:
    with runfolder.claim(put(tmp_path, *names)), pytest.raises(RunBusy):
        RunLock(tmp_path)


def test_only_what_mmpo_names_so_is_removed_and_no_link_is_followed(tmp_path: Path) -> None:
    run, other = tmp_path / "run", put(tmp_path / "other", "kept.txt", ".policy.safetensors.tmp-5")
    left = [".recipe.yaml.tmp-1", ".export.tmp-22/a/b", "checkpoints/.step-000004.tmp-3/state.json"]
    left += ["checkpoints/.step-000004.0123456789ab.tmp-3/x", "checkpoints/.CURRENT.tmp-4", "best/.policy.safetensors.tmp-5"]
    left += ["samples/.sheet.png.tmp-6", "samples/base/.000.png.tmp-6"]
    mine = [".notes.tmp-old", ".notes.tmp-1", "sub/.a.tmp-b/thesis.txt", "sub/.recipe.yaml.tmp-1", ".recipe.yaml.tmp-1x"]
    put(run, *left, *mine)
    (run / ".l.tmp-1").symlink_to(other)
    (run / ".inputs.json.tmp-9").symlink_to(other)
    (run / "samples" / "pictures").symlink_to(other)
    (run / "linked").symlink_to(other)
    shutil.rmtree(run / "best")
    (run / "best").symlink_to(other)
    runfolder.clear_leftovers(run)
    assert sorted(tree(run)) == sorted(mine) and (run / ".l.tmp-1").is_symlink()
    assert not (run / ".inputs.json.tmp-9").is_symlink()
    assert sorted(tree(other)) == [".policy.safetensors.tmp-5", "kept.txt"]


# ---- the command line


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world in which one run has finished."""
    found = make_world(tmp_path_factory.mktemp("world"))
    launch.run(load(found, found / "run", *SHORT))
    return found


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


def again(world: Path, run: Path, *more: str) -> int:
    return cli.main(["train", "--modality", "diffusion", *settings(world, run, *SHORT), *more])


@pytest.mark.slow
def test_training_into_the_folder_of_the_recipe_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(world / "run" / "recipe.yaml", tmp_path / "recipe.yaml")
    before = tree(put(tmp_path, "log.jsonl", "report.html"))
    assert cli.main(["train", "./recipe.yaml", "out=."]) == 2
    assert "out=.: holds other things and no run (log.jsonl, recipe.yaml, report.html)" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_finished_run_without_its_checkpoints_keeps_its_recipe(
    world: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    before = (run / "recipe.yaml").read_bytes()
    assert again(world, run, "train.lr=0.5") == 2 and "different: train.lr." in capsys.readouterr().err
    assert (run / "recipe.yaml").read_bytes() == before
    assert again(world, run) == 0 and "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_lost_its_checkpoints_is_not_begun_anew_over_its_best_weights(
    world: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    before = {name: (run / name).read_bytes() for name in ("log.jsonl", "best/policy.safetensors")}
    assert again(world, run) == 1 and "no checkpoint to go on from" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_first_save_that_failed_leaves_the_recipe_to_be_corrected(world: Path, run: Path) -> None:
    put(run, "checkpoints/.step-000000.tmp-71/policy.safetensors")
    shutil.rmtree(run / "best")
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not runfolder.begun(run)
    drift.claim_recipe(run, load(world, run, *SHORT, "train.lr=0.5"))
    assert "lr: 0.5" in (run / "recipe.yaml").read_text()


@pytest.mark.parametrize("command", [["export"], ["sample", "--prompt", "x", "--out", "samples"], ["eval"]])
def test_a_folder_that_is_no_run_is_not_made_one_by_what_reads_runs(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock left there would let the next `mmpo train out=.` replace what it holds."""
    monkeypatch.chdir(tmp_path)
    before = tree(put(tmp_path, "recipe.yaml", "log.jsonl"))
    assert cli.main([command[0], ".", *command[1:]]) != 0
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_recipe_that_could_not_be_read_back_is_not_begun_with(tmp_path: Path, world: Path) -> None:
    many = "model.lora.targets=[" + ", ".join(f"layer{i}" for i in range(900)) + "]"
    with pytest.raises(RecipeError, match="recipe.yaml, with all defaults.*too many values"):
        drift.claim_recipe(tmp_path, load(world, tmp_path, many))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_without_its_recipe_goes_on_only_when_told_to(world: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").unlink()
    (run / "recipe.yaml").unlink()
    assert again(world, run, "train.lr=0.5") == 2
    assert "a run of a recipe that is missing; different: recipe.yaml." in capsys.readouterr().err
    assert not (run / "recipe.yaml").exists()
    drift.claim_recipe(run, replace(load(world, run, *SHORT), allow_drift=("recipe.yaml",)))
    assert (run / "recipe.yaml").exists() and '"key": "recipe.yaml"' in (run / "inputs.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("recipe.yaml", b"train: [1\n", r"recipe.yaml:2:1"),
        ("recipe.yaml", b"\xff\xfe\x00train", "byte 0 is not UTF-8"),
        ("recipe.yaml", b"", "expected a mapping of settings, found nothing"),
        ("recipe.yaml", b"[1, 2]", "expected a mapping of settings, found list"),
        ("summary.json", b"{", "Expecting property name"),
        ("summary.json", b"{}", "it has no verdict"),
        ("summary.json", b"\xff", "can't decode byte 0xff"),
        ("inputs.json", b"[]", "expected an object, found list"),
        ("inputs.json", b"{}", "it has no digests"),
        ("inputs.json", b'{"digests": {}, "drift": 3}', "drift is int"),
    ],
)
def test_a_damaged_file_is_named_with_its_damage_and_what_to_do(
    name: str, data: bytes, said: str, world: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_bytes(data)
    if name == "inputs.json":
        (run / "summary.json").unlink()
    assert again(world, run) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"mmpo: {run / name}: damaged (") and said in told and ("put it back" in told or "remove it" in told)


@pytest.mark.slow
def test_a_cache_that_is_a_file_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text("{}")
    assert again(world, tmp_path / "new", f"data.cache={tmp_path / 'p.jsonl'}") == 2
    assert f"data.cache={tmp_path / 'p.jsonl'}: cannot be a folder (File exists" in capsys.readouterr().err
