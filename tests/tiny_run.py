"""Whole runs in seconds: a random Stable Diffusion at 32 pixels on three dozen pictures; and a loop without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmpo import recipe as recipes
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.worlds import shapes
from mmpo.judging import Blocks, Judge, JudgeResult
from mmpo.media import open_image
from mmpo.modality import DrawKey
from mmpo.objective import Objective, make_term
from mmpo.pair import Pair, image, text
from mmpo.progress import Run
from mmpo.recipe import Resolved
from mmpo.reference import unwrap
from mmpo.runlog import RunLog
from mmpo.schema import Recipe
from mmpo.scores import Scores
from tests.modalities.tiny import make

SMALL = (
    "objective=[{loss: dpo, beta_dpo: 1000}]", "model.resolution=32", "model.sample_steps=2", "model.guidance=1",
    "data.pairing={strategy: all}", "data.heldout=0.3",
    "train.batch_size=4", "train.lr=1e-3", "train.save_every=5", "eval.every=5", "eval.prompts=2", "eval.seeds=1",
    "eval.draws=1", "eval.test_prompts=2", "eval.test_seeds=1",
)  # fmt: skip


def make_world(folder: Path) -> Path:
    """A pipeline under pipe/ and scored candidates of 12 prompts in rows.parquet."""
    make("sd", folder / "pipe")
    rng, rows = np.random.default_rng(0), []
    for caption in shapes.captions()[::40][:12]:
        for score in range(3):
            picture = (shapes.render(caption, rng)[::2, ::2] * 255).astype(np.uint8)
            rows.append(Candidate((text(caption),), image(picture), float(score), score))
    write_candidates(rows, folder / "rows.parquet")
    return folder


def settings(world: Path, out: Path, *more: str) -> list[str]:
    """`key=value` words of a small run on `make_world`'s files; later ones win."""
    return [*SMALL, f"model.path={world / 'pipe'}", f"data.path={world / 'rows.parquet'}", f"out={out}", *more]


def brightness(path: str | None = None, device: str = "cpu") -> Judge:
    """A judge that tells any two pictures apart: mean brightness in [0, 1]."""

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        scores = [float(np.asarray(open_image(answer[0]), np.float64).mean() / 255) for answer in answers]
        return JudgeResult(torch.tensor(scores, dtype=torch.float64))

    return judge


def lenient(path: str | None = None, device: str = "cpu", **options: Any) -> Judge:
    """The same judge, which takes any options and reads none of its files."""
    return brightness(path, device)


def load(world: Path, out: Path, *more: str) -> Resolved:
    return recipes.load(None, settings(world, out, *more), "diffusion")


@dataclass(frozen=True)
class Batch:
    chosen: Tensor
    rejected: Tensor
    noise: Tensor
    time: Tensor
    keys: tuple[bytes, ...]

    @property
    def device(self) -> torch.device:
        return self.noise.device


class Line:
    """A modality of one linear layer: logp = -|w (x + noise)|^2, x read from the pair's text as a number."""

    PROVIDES: frozenset[str] = frozenset()
    branches = ("chosen", "rejected")
    starts_from_adapter = False
    weights: dict[str, str] = {}

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.model: nn.Module = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([[0.5, -0.2], [0.1, 0.3], [-0.4, 0.2]]))

    def encode(self, pairs: Sequence[Pair]) -> list[Tensor]:
        return [torch.tensor([float(str(s[0].data)) for s in (p.chosen, p.rejected)]) for p in pairs]

    def draw(self, encoded: Sequence[Tensor], keys: Sequence[DrawKey], model: nn.Module) -> Batch:
        seeds = [hash((k.seed, int(k.sample), k.index)) % 2**31 for k in keys]  # hashes of whole numbers do not vary
        noise = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in seeds])
        values = torch.stack(list(encoded))
        time, names = torch.linspace(0, 0.99, len(keys)), tuple(str(k).encode() for k in keys)
        return Batch(values[:, :1] + noise, values[:, 1:] + noise, noise, time, names)

    def score(self, model: nn.Module, batch: Batch, wants: Any = (), against: Any = None) -> dict[str, Scores]:
        both = -model(torch.cat([batch.chosen, batch.rejected])).square().sum(-1, keepdim=True)
        chosen, rejected = both.chunk(2)
        return {"chosen": Scores(chosen, chosen < 1), "rejected": Scores(rejected, rejected < 1)}


def line_pairs(count: int, **fields: Any) -> list[Pair]:
    """Pairs "0", "1", ... whose two sides are numbers in [-1, 1]."""
    values = np.random.default_rng(0).uniform(-1, 1, (count, 2)).round(3).tolist()
    return [Pair(str(i), (text("p"),), (text(str(a)),), (text(str(b)),), **fields) for i, (a, b) in enumerate(values)]


def line_run(folder: Path, pairs: list[Pair] | None = None, loss: dict[str, Any] | None = None, **train: Any) -> Run:
    """A run of `Line` without judge and held-out pairs; train: settings of the recipe's train section."""
    given = {"steps": 6, "batch_size": 4, "lr": 0.05, "save_every": 1000, "optimizer": "sgd", **train}
    recipe = Recipe.model_validate({"modality": "line", "train": given, "eval": {"every": 1000}})
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.train.precision]
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    modality: Any = Line()
    start = torch.optim.SGD(modality.model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(modality.model, start)
    objective = Objective([make_term(**(loss or {"loss": "dpo", "beta": 1.0}))])
    from mmpo.reference import build

    reference: Any = build(recipe.reference, modality, accelerator.unwrap_model(model))
    parts = (recipe, folder, accelerator, modality, model, optimizer, reference, objective)
    return Run(*parts, pairs or line_pairs(24), [], None, [], RunLog(folder / f"log.{accelerator.process_index}.jsonl"))


def weight(run: Run) -> torch.Tensor:
    """The line's own parameter, as it is now."""
    return next(unwrap(run.model).parameters()).detach().clone()
