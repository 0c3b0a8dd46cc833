"""Shards (train.fsdp): two processes end where one does, go on where they were killed, and hold half of everything each."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmpo import checkpoint, find, launch, planner, sharding
from mmpo import recipe as recipes
from mmpo import train as loop
from mmpo.errors import RecipeError
from mmpo.progress import Run
from mmpo.reference import unwrap
from mmpo.rounds import fresh_pairs
from mmpo.runlog import read
from mmpo.saving import resume
from mmpo.train import train
from tests.modalities.tiny_text import make as make_text
from tests.tiny_run import SMALL, make_world
from tests.two_processes import in_two_processes

STEPS = 3
SHARED = (  # eps: Adam's steps are then smooth in the gradient, as equality to rounding needs
    f"train.steps={STEPS}", "train.save_every=2", "train.accumulate=2", "train.lr=1e-2", "train.eps=1e-2", "train.keep=9",
    "train.clip=0.5", "eval.every=3",
)  # fmt: skip
IMAGE = (*SMALL, "objective=[{loss: dpo, beta_dpo: 20}]", "judge.name=tests.tiny_run:brightness")
TEXT = (
    "data={format: trl, heldout: 0.2}", "eval.draws=1", "model.sample.max_new_tokens=4",
    "objective=[{loss: tdpo2, beta: 0.5}, {loss: nll, weight: 0.2}]",
)  # fmt: skip
SMOOTH = (  # numbers of the log that do not jump where rounding decides a tie
    "loss", "grad_norm", "rewards/margins", "rewards/chosen", "eval/margin", "eval/judge", "eval/drift_chosen", "eval/kl",
)  # fmt: skip
DIFFERENCES = ("eval/margin", "eval/drift_chosen")  # of float32 log-likelihoods: known to the last bit of those at best
CASES: dict[str, tuple[str, ...]] = {
    "sd_lora": ("train.ema=0.5", "train.round_prompts=2", "train.round_candidates=3"),
    "sd_full": ("model.adapter=full", "model.gradient_checkpointing=true", "train.lr=1e-3"),
    "llama_lora": ("model.adapter=lora", "model.lora.rank=2", "model.layout=shared", "reference.kind=adapter_off"),
    "llama_full": ("model.adapter=full", "model.gradient_checkpointing=true", "reference.kind=start"),
    "llama_padded": ("model.adapter=full", "model.layout=padded", "train.optimizer=sgd", "reference.kind=ema"),
    "qwen2_full": ("model.adapter=full", "reference.cache=states"),  # whose head is its embedding
}


def words(world: Path, case: str, out: str, processes: int) -> list[str]:
    """The settings of a case: of two processes each has half of the batch."""
    family = case.partition("_")[0]
    data = world / ("rows.parquet" if family == "sd" else "rows.jsonl")
    places = [f"model.path={world / family}", f"data.path={data}", f"out={world / out / case}"]
    share = [f"train.batch_size={4 // processes}", f"train.fsdp={'true' if processes > 1 else 'false'}"]
    return [*(IMAGE if family == "sd" else TEXT), *SHARED, *CASES[case], *places, *share]


def built(world: Path, case: str, out: str, processes: int) -> tuple[Run, Any]:
    """A run of a case, begun or resumed."""
    torch.set_num_threads(1)
    resolved = recipes.load(None, words(world, case, out, processes), "diffusion" if case.startswith("sd") else "text")
    (folder := world / out / case).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    launch.set_seed(0)
    run, data = launch.build(resolved, folder, launch.build_objective(resolved))
    if not resume(run):
        launch._begin(run, data)
    return run, data


def weights(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None and found.step == step
    return {f"{group}/{name}": v for group in found.tensors if group != "rng" for name, v in found.tensors[group].items()}


def back_to(folder: Path, step: int) -> None:
    """As after a kill: the newest checkpoint is the one of that step."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:11]) > step:
            shutil.rmtree(path)
    (folder / "checkpoints" / "CURRENT").unlink()


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((other[name].double() - value.double()).abs().max()) for name, value in one.items())


def last_bit(log: list[dict[str, Any]]) -> float:
    """What one unit in the last place of a log-likelihood of this run is worth, in nats."""
    return float(max(np.spacing(np.float32(abs(e["logps/chosen"]))) for e in log if "logps/chosen" in e))


def two_processes(world: Path, task: str) -> list[int]:
    """Run `worker` in two processes; how they ended."""
    code = f"from tests.test_sharding import worker; from pathlib import Path; worker(Path({str(world)!r}), {task!r})"
    return [status for status, _ in in_two_processes(code, endings=(0, -signal.SIGKILL))]


def worker(world: Path, task: str) -> None:
    """train: every case, one of them twice, the last killed in the middle. finish: the killed one, to its report."""
    find.PLUGINS.add("tests.tiny_run")
    if task == "finish":
        resolved = recipes.load(None, words(world, "sd_lora", "killed", 2), "diffusion")
        launch.run(replace(resolved, allow_drift=("recipe.yaml",)))  # `train` alone, as below, claims no recipe
        return
    for case in CASES:
        run, data = built(world, case, "two", 2)
        train(run, STEPS)
        (world / f"{case}.{run.accelerator.process_index}.json").write_text(json.dumps(held_bytes(run)))
        if case in ("llama_full", "sd_lora"):
            if run.accelerator.is_main_process:
                shutil.copytree(world / "two" / case, world / "again" / case)
            run.accelerator.wait_for_everyone()
        if case == "llama_full":
            if run.accelerator.is_main_process:
                back_to(world / "again" / case, 2)
            run.accelerator.wait_for_everyone()
            run, _ = built(world, case, "again", 2)
            loop.forward(run, 0, 0)  # and no backward pass, as in a step that is refused
            train(run, STEPS)
        if case == "sd_lora":
            run.folder = world / "again" / case
            fresh_pairs(run, data, 2)
            train(run, STEPS + 1)
        del run
        gc.collect()
    run, _ = built(world, "sd_lora", "killed", 2)
    train(run, 2)
    loop.forward(run, 2, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def held_bytes(run: Run) -> list[int]:
    """Bytes of parameters and optimizer state that this process keeps, and of the whole."""
    sharding.settle(unwrap(run.model))
    tensors: list[Any] = [*unwrap(run.model).parameters()]
    tensors += [v for state in run.optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    assert all(t.untyped_storage().nbytes() <= 2 * t.numel() * t.element_size() + 64 for t in local if t.numel())
    return [sum(t.numel() * t.element_size() for t in part) for part in (local, tensors)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases by two processes, and the files they read."""
    folder = make_world(tmp_path_factory.mktemp("shards"))
    (folder / "pipe").rename(folder / "sd")
    for family in ("llama", "qwen2"):
        make_text(folder / family, family)
    rows = [{"prompt": f"what is {i} + {i}?", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1} dogs"} for i in range(15)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert two_processes(folder, "train") == [-signal.SIGKILL] * 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_does(world: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, averages, moments, losses, margins and measurements; each process keeps half of the bytes."""
    monkeypatch.setattr(find, "PLUGINS", {"tests.tiny_run"})
    run, _ = built(world, case, "one", 1)
    start = weights(world / "one" / case, 0)
    train(run, STEPS)
    one, two = (weights(world / name / case) for name in ("one", "two"))
    moved = {name: v for name, v in start.items() if name.startswith("policy/")}
    assert apart(moved, {name: one[name] for name in moved}) > 2e-4
    assert apart(one, two) < 1e-6
    logs = [read(world / name / case / "log.jsonl") for name in ("one", "two")]
    for mine, theirs in zip(*([e for e in log if e["event"] in ("train", "eval")][: STEPS + 2] for log in logs), strict=True):
        numbers = {k: v for k, v in mine.items() if k in SMOOTH}
        for name, value in numbers.items():
            bound = max(1e-5, last_bit(logs[0])) if name in DIFFERENCES else 1e-5
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=bound), name
        assert len(numbers) >= 2
    held = [json.loads((world / f"{case}.{rank}.json").read_text()) for rank in (0, 1)]
    assert held[0][0] + held[1][0] == held[0][1] and max(h[0] for h in held) < 0.56 * held[0][1]


@pytest.mark.slow
def test_going_on_from_a_checkpoint_of_shards(world: Path) -> None:
    """By as many processes it ends with the same bits; by one process, which shards nothing, within rounding."""
    two = weights(world / "two" / "llama_full")
    assert apart(weights(world / "again" / "llama_full"), two) == 0
    shutil.copytree(world / "two" / "llama_full", world / "alone" / "llama_full")
    back_to(world / "alone" / "llama_full", 2)
    run, _ = built(world, "llama_full", "alone", 1)
    assert run.progress.step == 2
    train(run, STEPS)
    assert apart(weights(world / "alone" / "llama_full"), two) < 1e-5


@pytest.mark.slow
def test_a_killed_run_is_finished_by_whole_modules(world: Path) -> None:
    """Comparison, samples and export come from the first process, after the others have left."""
    assert two_processes(world, "finish") == [0, 0]
    run = world / "killed" / "sd_lora"
    assert apart(weights(run), weights(world / "two" / "sd_lora")) == 0
    assert (run / "report.html").exists() and (run / "export" / "pytorch_lora_weights.safetensors").exists()
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


# ---- without processes


@pytest.mark.parametrize(
    ("modality", "setting"),
    [
        ("diffusion", "train.optimizer=adafactor"),
        ("diffusion", "train.precision=fp16"),
        ("diffusion", "draw.mode=renoise"),
        ("text", "model.quantize=4bit"),
        ("text", "model.train_layers=1"),
        ("vlm", "model.train=language"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_recipe(modality: str, setting: str) -> None:
    given = ["model.adapter=lora", setting]
    recipes.load(None, given, modality)
    key, _, value = setting.partition("=")
    with pytest.raises(RecipeError, match=rf"command line {key}: does not go with train.fsdp: .* \(got {value}\)"):
        recipes.load(None, [*given, "train.fsdp=true"], modality)


def test_blocks() -> None:
    """The outermost of those that the library never splits; without its word, of a model's lists those that hold anything."""
    layer = nn.TransformerEncoderLayer(4, 1)
    model = nn.TransformerEncoder(layer, 2)
    assert sharding.blocks(model) == list(model.layers)
    model._no_split_modules = ["Linear"]  # type: ignore[assignment]
    assert {type(block) for block in sharding.blocks(model)} == {nn.Linear} and len(sharding.blocks(model)) == 4
    assert sharding.blocks(nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.ModuleList([nn.Linear(2, 2)])]))[1:] != []
    assert sharding.blocks(nn.Linear(2, 2)) == []


def test_free_memory_after_sharding() -> None:
    """The other process's half comes free, but for what is gathered at a time: the largest block and all outside of blocks."""
    outside, large, small = (nn.Linear(n, n, bias=False) for n in (4, 8, 2))  # 64, 256 and 16 bytes
    model = nn.ModuleDict({"outside": outside, "layers": nn.ModuleList([large, small])})
    assert planner.free_after(1000, model, 2) == 1000 + (64 + 256 + 16) // 2 - 256 - 64
    assert planner.free_after(1000, model, 1) == 1000 and planner.free_after(None, model, 2) is None


def test_nothing_happens_to_what_is_whole() -> None:
    model, value = nn.Linear(2, 2), torch.ones(2, 2)
    own = model.weight.data_ptr()
    sharding.settle(model)
    assert not sharding.sharded(model) and sharding.held(model) == 6 and sharding.whole(value) is value
    assert sharding.told(model, 1).startswith("train.fsdp: one process, which holds everything")
    assert sharding.part(value, model.weight) is value
    assert sharding.exchange(model.weight, value).data_ptr() == own and model.weight.data_ptr() == value.data_ptr()
    assert sharding.collect({"a": value}, keep=False) == {} and sharding.collect({"a": value}, keep=True)["a"] is not None
