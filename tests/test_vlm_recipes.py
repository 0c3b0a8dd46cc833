"""Recipes of the vision-language modality: published numbers, the commands of their headers in small, and the default's run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmpo import checkpoint, cli
from mmpo.modalities.vlm import EMBEDDED
from mmpo.prepare import is_heldout, prepare
from mmpo.recipe import load, loss_parameters
from mmpo.runlog import read

# pairs a step on 8 devices, learning rate, steps, rank and alpha of the LoRA
PUBLISHED = {
    "mia_dpo_llava_7b": (64, 5e-5, 452, (128, 256)),
    "mdpo_llava_7b": (32, 1e-5, 938, (64, 128)),
    "realign_llava_7b": (64, 1e-6, 172, (128, 256)),
    "bdhs_offline_llava_7b": (32, 1e-6, 469, (128, 256)),
    "bdhs_online_mix_llava_7b": (32, 1e-6, 469, (128, 256)),
    "rlhf_v_llava_7b": (32, 5e-7, 306, None),
}
TERMS = {
    "mia_dpo": [("dpo", None, 1.0), ("nll", ["chosen"], 0.1)],
    "mdpo": [("dpo", None, 1.0), ("dpo", ["chosen", "chosen@crop"], 1.0), ("reward_anchor", ["chosen"], 1.0)],
    "realign": [("dpo", None, 1.0), ("dpo", ["chosen", "chosen@retrieved"], 1.0)],
    "bdhs_offline": [("dpo", None, 1.0)],
    "bdhs_online_mix": [("dpo", None, 1.0)],
    "rlhf_v": [("dpo", None, 1.0)],
}
MADE = {"mdpo": "runs/collages-crop", "realign": "runs/collages-retrieved", "rlhf_v": "runs/collages-segments"}
MADE |= {"bdhs_offline": "runs/collages-bdhs"}
SHORT = ["train.steps=2", "train.batch_size=8", "train.warmup=0", "eval.every=2", "eval.prompts=6", "eval.test_prompts=6"]
SHORT += ["eval.pairs=8", "eval.draws=1", "train.save_every=2"]
SGD = ["train.optimizer=sgd", "train.lr=0.1"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name: str) -> None:
    recipe = load(name).recipe
    batch, lr, steps, lora = PUBLISHED[name]
    spec = recipe.train
    assert (spec.batch_size * spec.accumulate * 8, spec.lr, spec.steps, spec.weight_decay) == (batch, lr, steps, 0)
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == lora if lora else recipe.model.adapter == "full"
    assert (spec.precision, recipe.model.train) == ("bf16", "language")


@pytest.mark.parametrize("name", TERMS)
def test_embedded_and_published_recipes_have_one_objective(name: str) -> None:
    found = [[(t.loss, t.of, t.weight) for t in load(n).recipe.objective] for n in (name, f"{name}_llava_7b")]
    assert found == [TERMS[name]] * 2
    names = (name, f"{name}_llava_7b")
    parameters = [[loss_parameters(t)["beta"] for t in load(n).recipe.objective if t.loss != "nll"] for n in names]
    assert parameters[0] == parameters[1] and set(parameters[0]) == ({0.5} if name == "rlhf_v" else {0.1})


def test_held_out_collages_are_all_of_the_split_and_not_only_those_with_pairs() -> None:
    recipe = load(modality="vlm").recipe
    data = prepare(recipe, str(EMBEDDED / "candidates.parquet"), None)
    assert len(data.select) == recipe.eval.prompts and len(data.test) == recipe.eval.test_prompts == 800
    assert all(is_heldout(p, recipe.data.heldout) for p in data.select + data.test)
    assert len(data.train) > 500 and len({p.prompt[0].digest for p in data.train}) == len(data.train)
    assert len({p.prompt for p in data.heldout}) < len(data.select) + len(data.test)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default, two steps of gradient descent."""
    folder = tmp_path_factory.mktemp("short")
    assert cli.main(["train", "--modality", "vlm", *SHORT, *SGD, f"out={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_a_short_run_of_the_default_measures_and_shows_everything(short_run: Path) -> None:
    records = [json.loads(line) for line in (short_run / "log.jsonl").read_text().splitlines()]
    evals = [r for r in records if r["event"] == "eval"]
    measured = {"eval/correct", "eval/wrong_image", "eval/blind_correct", "eval/judge", "eval/pair_accuracy", "eval/kl"}
    assert all(measured <= r.keys() for r in evals) and evals[0]["eval/kl"] == 0
    summary = json.loads((short_run / "summary.json").read_text())
    assert all({"correct", "wrong_image", "blind_correct"} <= summary[side].keys() for side in ("base", "aligned"))
    page = (short_run / "report.html").read_text()
    assert "right for another image of the prompt" in page and "exactly right with the images hidden" in page
    assert page.count('alt="image 1 of the prompt"') == 6


@pytest.mark.slow
def test_two_processes_equal_one_of_twice_the_batch(short_run: Path, tmp_path: Path) -> None:
    """Also with images encoded once in each process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmpo", "train"]
    words = ["--modality", "vlm", *SHORT, *SGD, "train.batch_size=4", f"out={tmp_path}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (checkpoint.load_latest(folder / "checkpoints") for folder in (short_run, tmp_path))
    assert one is not None and two is not None and one.step == two.step == 2
    apart = [float((two.tensors["policy"][name] - value).abs().max()) for name, value in one.tensors["policy"].items()]
    assert max(apart) < 1e-5
    losses = [[r["loss"] for r in read(folder / "log.jsonl") if "loss" in r] for folder in (short_run, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][0] != losses[0][1]


@pytest.mark.slow
def test_the_second_round_of_mixed_bdhs_has_pairs_of_both_sorts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here with the default's pairs in the place of BDHS's, which `MADE` makes."""
    words = ["modality=vlm", "data.path=embedded", "train.rounds=2", "train.round_prompts=64", "train.round_candidates=6"]
    assert cli.main(["train", "bdhs_online_mix", *SHORT, *words, f"out={tmp_path}"]) == 0
    found = re.search(r"round 2: (\d+) pairs of the policy's own samples and (\d+) of the data's", capsys.readouterr().out)
    assert found and int(found[1]) > 0 and int(found[2]) > 500
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_the_commands_of_an_embedded_recipe_make_its_pairs_and_train(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = re.sub(r"\\\n#", "", "".join(line for line in (_file(name)).read_text().splitlines(True) if line.startswith("#")))
    commands = [shlex.split(line[1:])[1:] for line in head.splitlines() if line.startswith("#   mmpo ")]
    assert commands[0] == ["make-base", "vlm", "--out", "runs/collages"] and commands[-1] == ["train", name]
    Path("runs").mkdir()
    Path("runs/collages").symlink_to(EMBEDDED)
    for words in commands[1:-1]:
        more = ["--limit", "60"] if words[0] == "pairs" else []
        assert cli.main([*words, *more]) == 0, words
    assert cli.main(["train", name, *SHORT, "out=runs/x"]) == 0
    assert json.loads(Path("runs/x/summary.json").read_text())["pairs"]["train"] > 10


def _file(name: str) -> Path:
    return Path(cli.__file__).parent / "configs" / f"{name}.yaml"
