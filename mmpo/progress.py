"""What a run consists of while it goes on, and how it speaks: on the screen and in its log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from mmpo.evaluate import Trial
from mmpo.interruption import Request
from mmpo.judging import Judge
from mmpo.modality import Modality
from mmpo.objective import Objective
from mmpo.pair import Pair
from mmpo.reference import Cached, Reference, Values
from mmpo.runlog import RunLog
from mmpo.schema import Recipe


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors. best_*: the evaluation with the best selection metric so far."""

    step: int = 0
    best_step: int = 0
    best_metric: float = -math.inf
    base_metric: float = -math.inf
    seconds: float = 0.0
    skipped_steps: int = 0
    round: int = 1
    due: bool = False  # the evaluation of this step, which a signal broke off; a resumed run makes it up
    halvings: int = 0  # of the batch, each with twice the accumulation, after memory ran out
    base_scores: list[float] = field(default_factory=list)  # the judge's scores of the base's samples, for win rates


@dataclass
class Run:
    """Everything a run holds. `train` is the loop over it; `mmpo.launch` builds it from a recipe."""

    recipe: Recipe
    folder: Any
    accelerator: Accelerator
    modality: Modality
    model: nn.Module
    optimizer: torch.optim.Optimizer
    reference: Reference | Cached | None
    objective: Objective
    pairs: list[Pair]
    heldout: list[Pair]
    judge: Judge | None
    select: list[Trial]
    log: RunLog
    ema: Values | None = None
    start: Values | None = None  # the weights before the run, where no fixed reference keeps them
    shifted: list[Pair] = field(default_factory=list)  # pairs of another distribution, only measured
    progress: Progress = field(default_factory=Progress)
    request: Request = field(default_factory=Request)  # to stop, while the loop listens


def record(run: Run, entry: dict[str, Any]) -> None:
    """Write a line of the log, once for all processes."""
    if run.accelerator.is_main_process:
        run.log.append(entry)


def say(run: Run, line: str) -> None:
    """Print beside the progress bar, once for all processes."""
    if run.accelerator.is_main_process:
        tqdm.write(line)
