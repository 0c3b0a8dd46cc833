"""What is drawn as a heat map adds up to the likelihoods that training sees, and sampling tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpo import reference as references
from mmpo.find import answers, names
from mmpo.modalities import diffusion_ratios, text_ratios
from mmpo.modality import DrawKey, Step
from mmpo.pair import Block, Pair, text
from mmpo.reference import AdapterOff
from tests import vlm_families
from tests.modalities import tiny, tiny_text, tiny_vlm
from tests.modalities.adapters import adapter, perturb, picture

BASE = AdapterOff()


def diffusion(folder: Path, dropout: float = 0.0) -> Any:
    return adapter(tiny.make("sd", folder), draw={"weight": "min_snr"}, dropout=dropout, sample_steps=3)


def words(folder: Path, dropout: float = 0.0) -> Any:
    return tiny_text.adapter(tiny_text.make(folder), dropout=dropout, sample={"max_new_tokens": 6})


def pictures(folder: Path) -> Any:
    return tiny_vlm.adapter(vlm_families.make("llava", folder), sample={"max_new_tokens": 6})


TINY: dict[str, Callable[[Path], Any]] = {"diffusion": diffusion, "text": words, "vlm": pictures}
RATIOS = {"diffusion": diffusion_ratios, "text": text_ratios, "vlm": text_ratios}


@pytest.fixture(scope="module", params=names("modalities"))
def moved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """An adapter whose policy has moved away from its base."""
    assert request.param in TINY, f"add a tiny model of {request.param} to TINY"
    made = TINY[request.param](tmp_path_factory.mktemp(request.param))
    perturb(made.model, 0.3)
    return request.param, made


def difference(modality: Any, prompt: tuple[Block, ...], answer: Block, keys: list[DrawKey]) -> float:
    """The mean over draws of log policy - log base, of `score` alone."""
    pair = Pair("explained", prompt, (answer,))
    batch = modality.draw(modality.encode([pair]) * len(keys), keys, modality.model)
    with torch.no_grad():
        before = references.score(BASE, modality, modality.model, batch)
        after = modality.score(modality.model, batch)
    assert before is not None
    ratio = torch.where(after["chosen"].mask, after["chosen"].logp - before["chosen"].logp, 0.0)
    return float(ratio.double().sum(-1).mean())


def test_parts_add_up_to_what_score_gives(moved: tuple[str, Any]) -> None:
    name, modality = moved
    pair = modality.dummy()[0]
    found = modality.log_ratios(modality.model, BASE, pair.prompt, pair.chosen[0], 3)
    draws = getattr(RATIOS[name], "DRAWS", 1)
    expected = difference(modality, pair.prompt, pair.chosen[0], [DrawKey(3, "explained", i) for i in range(draws)])
    assert abs(expected) > 1e-3
    assert found.total == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if answers(name) == "text":
        assert sum(value for _, _, value in found.tokens) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert found.regions is None and not found.times
    else:
        assert float(found.regions.sum()) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert sum(value for _, value in found.times) / len(found.times) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert all(0 <= place < 1 for place, _ in found.times) and len(found.times) == draws


def test_equal_models_have_no_ratio(moved: tuple[str, Any]) -> None:
    _, modality = moved
    pair = modality.dummy()[1]
    found = modality.log_ratios(modality.model, references.Values(modality.model), pair.prompt, pair.chosen[0], 0)
    assert found.total == 0.0
    assert all(value == 0 for _, _, value in found.tokens) and (found.regions is None or not found.regions.any())


def test_tokens_are_the_characters_of_the_answer(tmp_path: Path) -> None:
    modality = words(tmp_path)
    answer = "Twelve and thirty are forty-two."
    found = modality.log_ratios(modality.model, BASE, (text("12+30=", "user"),), text(answer), 0)
    assert "".join(answer[start:end] for start, end, _ in found.tokens if start >= 0) == answer
    assert [(start, end) for start, end, _ in found.tokens][-1] == (-1, -1)  # the end of the turn


def test_a_region_that_alone_differs_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = diffusion(tmp_path)
    own = modality.squares
    active: list[bool] = []

    class Base:
        fixed = True

        def active(self, model: Any) -> Any:
            active.append(True)
            return AdapterOff().active(model)

    def squares(model: Any, batch: Any) -> torch.Tensor:
        found = own(model, batch).detach()
        if active:
            active.clear()
            found[:, :, 1, 2] += 1.0  # the base errs here, so that the policy is more likely here
        return found

    monkeypatch.setattr(modality, "squares", squares)
    found = modality.log_ratios(modality.model, Base(), (text("a red circle"),), picture(0), 0)
    place = divmod(int(found.regions.argmax()), found.regions.shape[1])
    assert place == (1, 2) and found.regions[place] > 0
    found.regions[place] = 0
    assert not found.regions.any()  # a fresh adapter changes nothing anywhere else


@pytest.mark.parametrize("kind", ["diffusion", "text"])
def test_prompts_are_not_dropped_here(kind: str, tmp_path: Path) -> None:
    """With a dropout of a half, every one of the draws keeps its prompt."""
    modality = (diffusion if kind == "diffusion" else words)(tmp_path, dropout=0.5)
    seen: list[DrawKey] = []
    draw = modality.draw

    def noted(encoded: Any, keys: Any, model: Any) -> Any:
        seen.extend(keys)
        return draw(encoded, keys, model)

    modality.draw = noted
    pair = modality.dummy()[0]
    modality.log_ratios(modality.model, BASE, pair.prompt, pair.chosen[0], 1)
    assert seen and not any(modality.drops(key) for key in seen)
    assert any(modality.drops(replace(seen[0], index=i)) for i in range(16))


def test_sampling_tells_every_step_and_changes_nothing(moved: tuple[str, Any]) -> None:
    name, modality = moved
    prompts = [pair.prompt for pair in modality.dummy()]
    steps: list[Step] = []
    told = modality.sample(modality.model, prompts, [1, 2], steps.append)
    assert [b.digest for b in told] == [b.digest for b in modality.sample(modality.model, prompts, [1, 2])]
    assert [s.done for s in steps] == list(range(1, len(steps) + 1)) and steps[-1].done <= steps[-1].of
    if answers(name) == "text":
        assert all(str(told[i].data).startswith(said) for step in steps for i, said in step.texts.items())
        assert {i for step in steps for i in step.texts} == {0, 1}


def test_fewer_steps_are_taken_and_never_more(moved: tuple[str, Any]) -> None:
    _, modality = moved
    prompts = [modality.dummy()[0].prompt]
    seen: dict[int, list[Step]] = {2: [], 10_000: []}
    for steps, kept in seen.items():
        modality.sample(modality.model, prompts, [1], kept.append, steps)
    assert {s.of for s in seen[2]} == {2} and len(seen[2]) <= 2
    assert {s.of for s in seen[10_000]} == {modality.config.steps[0]}


def test_what_a_watcher_raises_ends_the_sampling(moved: tuple[str, Any]) -> None:
    _, modality = moved
    count = 0

    def stop(step: Step) -> None:
        nonlocal count
        count += 1
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        modality.sample(modality.model, [modality.dummy()[0].prompt], [1], stop)
    assert count == 1
