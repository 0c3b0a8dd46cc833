"""Finding rooms by name: nothing is imported that was not asked for, and a recipe alone imports no outside code."""

from __future__ import annotations

import sys
import types

import pytest

from mmpo import find
from mmpo.errors import RecipeError


def test_a_loss_is_the_function_of_its_file() -> None:
    from mmpo.losses.dpo import dpo

    assert find.find("losses", "dpo") is dpo


def test_names_are_the_files_and_importing_none_of_them() -> None:
    before = set(sys.modules)
    listed = find.names("losses")
    assert "dpo" in listed and listed == sorted(listed)
    assert not {m for m in set(sys.modules) - before if m.startswith("mmpo.losses.")}


def test_modalities_are_the_files_with_a_config() -> None:
    listed = find.names("modalities")
    assert "diffusion" in listed
    assert not {"diffusion_config", "families", "noise"} & set(listed)
    assert find.model_config("diffusion").__name__ == "ModelConfig"


@pytest.mark.parametrize("room", find.ROOMS)
def test_every_room_can_be_listed(room: str) -> None:
    assert find.names(room)


@pytest.mark.parametrize(
    ("room", "name", "parts"),
    [
        ("losses", "dppo", ["no 'dppo' in losses", "did you mean", "'dpo'", "ipo"]),
        ("judges", "nothing_like_it", ["no 'nothing_like_it' in judges (there are: "]),
        ("losess", "dpo", ["no room 'losess'", "did you mean 'losses'"]),
        ("losses", "../cli", ["no '../cli'"]),
        ("losses", "os", ["no 'os'"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(room: str, name: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        find.find(room, name)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_plugin_is_imported_only_when_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("outsider")
    module.loss = len  # type: ignore[attr-defined]
    monkeypatch.setattr(find, "PLUGINS", set())
    with pytest.raises(RecipeError, match="--plugin outsider"):
        find.find("losses", "outsider:loss")
    assert "outsider" not in sys.modules
    monkeypatch.setitem(sys.modules, "outsider", module)
    monkeypatch.setattr(find, "PLUGINS", {"outsider"})
    assert find.find("losses", "outsider:loss") is len
    with pytest.raises(RecipeError, match="has no 'other'"):
        find.find("losses", "outsider:other")
