"""What happens in the worker's process: a source's models are opened, asked, judged and compared. Imports torch."""

from __future__ import annotations

import inspect
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpo import export, media
from mmpo import recipe as recipes
from mmpo import reference as references
from mmpo.demos import heat
from mmpo.demos.blinding import blinded
from mmpo.demos.systems import Model, Source, recipe_of
from mmpo.errors import DataError
from mmpo.judging import Judge
from mmpo.launch import make_judge, make_modality
from mmpo.modality import LogRatios, Step
from mmpo.pair import Block, Pair, image, text
from mmpo.prepare import prepare
from mmpo.recipe import Resolved

HELD = 64  # held-out prompts that are offered
KEPT = 256  # files of samples that are kept; older ones go
OFTEN = 0.1  # seconds between two messages about progress
PICTURE = re.compile(r"[0-9a-f]{32}\.png")
SUFFIX = {"image/png": ".png", "audio/wav": ".wav", "video/mp4": ".mp4", "video/webm": ".webm"}

Prompt = tuple[Block, ...]
Tell = Callable[..., None]  # kind of the event, and its fields


@dataclass(frozen=True)
class System:
    """One column of the page. active: the module that samples. compared: adapter, model and base whose ratio
    explains its samples."""

    name: str
    modality: Any
    active: Callable[[], AbstractContextManager[nn.Module]]
    compared: tuple[Any, nn.Module, references.Reference] | None = None


@dataclass
class Opened:
    """A source with its models in memory. files: the folder that samples are written to."""

    systems: Sequence[System]
    judge: Judge | None
    files: Path
    prepared: Callable[[], list[Prompt]]
    prompts: list[Prompt] = field(default_factory=list)
    _recent: deque[str] = field(default_factory=deque)

    def held_out(self) -> list[dict[str, Any]]:
        """Held-out prompts in words, with files of their pictures; none where the data are not at hand."""
        self.prompts = self.prepared()[:HELD]
        pictures = [[self.written(*_coded(b)) for b in p if b.kind != "text"] for p in self.prompts]
        return [{"words": wording(p), "pictures": names} for p, names in zip(self.prompts, pictures, strict=True)]

    def answer(self, request: dict[str, Any], tell: Tell, check: Callable[[], None]) -> None:
        """Sample every system under the same seeds, then judge and explain; each is told as soon as it is known.

        request: held (number of a held-out prompt, or None), words, seeds, steps, pictures (names of files, which take the
        held-out prompt's place). check: raises when nobody waits any more.
        """
        brought = [self._picture(str(name)) for name in request.get("pictures", ())]
        prompt = (*brought, text(str(request["words"]))) if brought else self.asked(request.get("held"), str(request["words"]))
        seeds = [int(s) for s in request["seeds"]]
        made = []
        for i, system in enumerate(self.systems):
            check()
            blocks = self._sampled(i, system, prompt, seeds, request.get("steps"), tell, check)
            for j, block in enumerate(blocks):
                tell("sample", system=i, index=j, **self.stored(block))
            made.append(blocks)
        self._judged(prompt, made, tell)
        self._explained(prompt, made, seeds, tell, check)

    def asked(self, held: int | None, words: str) -> Prompt:
        """A held-out prompt as it is where its words are, else these words, with its pictures if it has any."""
        if held is None:
            return (text(words),)
        prompt = self.prompts[held]
        if "".join(words.split()) == "".join(wording(prompt).split()):
            return prompt
        return (*(Block(b.kind, b.data) for b in prompt if b.kind != "text"), text(words))

    def _picture(self, name: str) -> Block:
        """A picture that a visitor brought. Raises DataError where it has gone."""
        if not PICTURE.fullmatch(name) or not (self.files / name).is_file():
            raise DataError("a picture of this prompt is not kept any more; choose it again")
        return image((self.files / name).read_bytes())

    def _sampled(
        self, number: int, system: System, prompt: Prompt, seeds: list[int], steps: int | None, tell: Tell,
        check: Callable[[], None],
    ) -> list[Block]:  # fmt: skip
        last = 0.0

        def watch(step: Step) -> None:
            nonlocal last
            check()
            if time.monotonic() - last > OFTEN:
                last = time.monotonic()
                share = (number + step.done / step.of) / len(self.systems)
                tell("progress", done=share, note=f"{system.name}: step {step.done} of at most {step.of}")
                for index, words in step.texts.items():
                    tell("partial", system=number, index=index, text=words)

        watched = {"watch": watch, "steps": steps} if "watch" in inspect.signature(system.modality.sample).parameters else {}
        tell("progress", done=number / len(self.systems), note=f"{system.name}: sampling")
        with torch.no_grad(), system.active() as model:
            return list(system.modality.sample(model, [prompt] * len(seeds), seeds, **watched))

    def _judged(self, prompt: Prompt, made: Sequence[Sequence[Block]], tell: Tell) -> None:
        if self.judge is None:
            return
        for i, blocks in enumerate(made):
            try:
                verdict = self.judge([prompt] * len(blocks), [(block,) for block in blocks])
            except ValueError as error:
                return tell("note", text=f"The judge cannot score answers to this prompt: {error}")
            for j, score in enumerate(verdict.scores.tolist()):
                right = None if verdict.correct is None else bool(verdict.correct[j])
                tell("judged", system=i, index=j, score=score, correct=right)

    def _explained(
        self, prompt: Prompt, made: Sequence[Sequence[Block]], seeds: list[int], tell: Tell, check: Callable[[], None]
    ) -> None:
        """Where the likelihood of each sample has moved; the seed of the draws is the same for all of them."""
        found: dict[tuple[int, int], LogRatios] = {}
        for i, (system, blocks) in enumerate(zip(self.systems, made, strict=True)):
            for j, block in enumerate(blocks):
                if system.compared is None or not hasattr(system.compared[0], "log_ratios"):
                    continue
                modality, model, base = system.compared
                check()
                tell("progress", done=1.0, note=f"{system.name}: comparing likelihoods, seed {seeds[j]}")
                try:
                    found[i, j] = modality.log_ratios(model, base, prompt, block, 0)
                except ValueError as error:
                    tell("note", text=f"The likelihood of an answer of {system.name} cannot be compared: {error}")
        scale = heat.scale_of([r.regions for r in found.values() if r.regions is not None])
        bars = {place: heat.by_time(ratios.times) for place, ratios in found.items()}
        longest = max((abs(v) for values in bars.values() for v in values if v is not None), default=0.0) or 1.0
        for (i, j), ratios in found.items():
            drawn: dict[str, Any] = {"total": ratios.total, "tokens": [list(token) for token in ratios.tokens]}
            if ratios.regions is not None:
                pixels = media.pixels(made[i][j])
                drawn["full"] = scale
                drawn["map"] = self.kept(heat.overlay(pixels, ratios.regions, scale), ".png")
            if ratios.times:
                drawn |= {"bars": bars[i, j], "strip": self.kept(heat.strip(bars[i, j], longest), ".svg")}
            tell("explained", system=i, index=j, **drawn)

    def stored(self, block: Block) -> dict[str, str]:
        """An answer as an event's field: its text, or the name of its file."""
        return {"text": str(block.data)} if block.kind == "text" else {"file": self.kept(*_coded(block))}

    def kept(self, data: bytes, suffix: str) -> str:
        """The name of a file of these bytes, which goes when KEPT newer ones have come."""
        name = self.written(data, suffix)
        self._recent.append(name)
        while len(self._recent) > KEPT:
            (self.files / self._recent.popleft()).unlink(missing_ok=True)
        return name

    def written(self, data: bytes, suffix: str) -> str:
        """The name of a file of these bytes, which nobody can guess."""
        name = secrets.token_hex(16) + suffix
        (self.files / name).write_bytes(data)
        return name


def _coded(block: Block) -> tuple[bytes, str]:
    """A medium as browsers show it, and the suffix of its file."""
    kind, data = blinded(block)
    return data, SUFFIX[kind]


def wording(prompt: Prompt) -> str:
    """A prompt's text; of a conversation, each turn with who says it."""
    turns = [b for b in prompt if b.kind == "text"]
    if len(turns) > 1 and any(b.role for b in turns):
        return "\n".join(f"{b.role}: {b.data!s}" for b in turns)
    return Pair("", prompt).caption


def open_source(source: Source, files: Path, cache: Path) -> Opened:
    """Load what a source names. cache: folder for what frozen encoders make of prompts."""
    return _run(source.run, files, cache) if source.run is not None else _models(source.models, files, cache)


def _run(folder: Path, files: Path, cache: Path) -> Opened:
    resolved, modality, start = export.open_run(folder, cache)
    judge = make_judge(resolved.recipe, modality, modality.device)
    compared = (modality, modality.model, start)
    systems = (
        System("base", modality, lambda: start.active(modality.model), compared),
        System("aligned", modality, lambda: nullcontext(modality.model), compared),
    )
    return Opened(systems, judge, files, lambda: _held_out(resolved, modality, judge))


def _models(models: Sequence[Model], files: Path, cache: Path) -> Opened:
    """Each model with its adapter switched on; one that has none is explained by another's adapter on the same weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = []
    for model in models:
        resolved = recipe_of(model)
        torch.manual_seed(resolved.recipe.seed)
        loaded.append((model, resolved, make_modality(recipes.with_cache(resolved.recipe, cache), files, device)))
    systems = []
    for model, _, modality in loaded:
        near = [(m, other) for m, _, other in loaded if m.adapter and (m.modality, m.path) == (model.modality, model.path)]
        own = modality if model.adapter else near[0][1] if near else None
        compared = None if own is None else (own, own.model, references.AdapterOff())
        systems.append(System(model.name, modality, _always(modality.model), compared))
    _, resolved, modality = next((parts for parts in loaded if parts[2].is_embedded), loaded[0])
    judge = make_judge(resolved.recipe, modality, device)
    return Opened(systems, judge, files, lambda: _held_out(resolved, modality, judge) if modality.is_embedded else [])


def _always(model: nn.Module) -> Callable[[], AbstractContextManager[nn.Module]]:
    return lambda: nullcontext(model)


def _held_out(resolved: Resolved, modality: Any, judge: Judge | None) -> list[Prompt]:
    """Prompts that no training has seen: those of the final comparison, or of the choice of the checkpoint."""
    data = prepare(resolved.recipe, str(modality.embedded_data), judge)
    return data.test or data.select
