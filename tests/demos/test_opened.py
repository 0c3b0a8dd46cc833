"""Models of the command line, as the worker opens them: an adapter is switched on, and compared with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmpo.demos import opened
from mmpo.demos.systems import Model, of_models
from mmpo.errors import DataError
from tests.modalities import tiny_text
from tests.modalities.adapters import perturb

Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> opened.Opened:
    """A tiny language model, alone and under an adapter that changes it."""
    folder = tmp_path_factory.mktemp("models")
    trained = tiny_text.adapter(tiny_text.make(folder / "base"))
    trained.save(perturb(trained.model, 0.3), folder / "tuned")
    (files := folder / "files").mkdir()
    models = [Model("plain", "text", str(folder / "base")), Model("tuned", "text", str(folder / "base"), str(folder / "tuned"))]
    return opened.open_source(of_models(models), files, folder)


def asked(source: opened.Opened, **request: Any) -> Events:
    told: Events = []
    source.answer({"words": "12+30=", "seeds": [1, 2], **request}, lambda kind, **f: told.append((kind, f)), lambda: None)
    return told


def of_kind(events: Events, kind: str) -> list[dict[str, Any]]:
    return [fields for name, fields in events if name == kind]


def test_an_adapter_is_switched_on_and_explains_both(both: opened.Opened) -> None:
    events = asked(both, steps=6)
    samples, explained = of_kind(events, "sample"), of_kind(events, "explained")
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(s["system"], s["index"]) for s in samples] == [(e["system"], e["index"]) for e in explained] == places
    assert samples[0]["text"] != samples[2]["text"]  # the adapter says something else under the same seed
    assert all(abs(e["total"]) > 1e-3 and abs(sum(t[2] for t in e["tokens"]) - e["total"]) < 1e-9 for e in explained)
    assert of_kind(asked(both, steps=6), "sample") == samples


def test_held_out_prompts_keep_what_is_no_text(both: opened.Opened) -> None:
    both.prompts = [(opened.text("Who?", "system"), opened.text("You?", "user"))]
    whole = opened.wording(both.prompts[0])
    assert whole == "system: Who?\nuser: You?"
    assert both.asked(0, whole.replace("\n", "\r\n ")) == both.prompts[0]
    assert both.asked(0, "else") == both.asked(None, "else") == (opened.text("else"),)


def test_pictures_that_were_brought_stand_before_the_words(both: opened.Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    name, prompts = both.written(b"pixels", ".png"), []

    def sampled(self: Any, number: int, system: Any, prompt: opened.Prompt, *rest: Any) -> list[Any]:
        prompts.append(prompt)
        return []

    monkeypatch.setattr(type(both), "_sampled", sampled)
    asked(both, pictures=[name], held=0)
    assert [[(b.kind, b.data) for b in prompt] for prompt in prompts] == [[("image", b"pixels"), ("text", "12+30=")]] * 2
    for gone in ("0" * 32 + ".png", "../base/config.json", f"{name}/..", "/etc/passwd"):
        with pytest.raises(DataError, match="not kept any more"):
            asked(both, pictures=[gone])


def test_the_oldest_files_go(both: opened.Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "KEPT", 3)
    kept = both.written(b"prompt", ".png")
    names = [both.kept(b"x", ".png") for _ in range(5)]
    left = {path.name for path in Path(both.files).iterdir()}
    assert left & {kept, *names} == {kept, *names[2:]}
