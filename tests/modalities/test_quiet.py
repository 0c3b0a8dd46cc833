"""What is kept off the screen while models load, and what is not."""

from __future__ import annotations

import logging
import warnings

import pytest
from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers

from mmpo.modalities.quiet import quietly

LORA = logging.getLogger("diffusers.loaders.lora_base")


def speak() -> None:
    LORA.warning("No LoRA keys associated to CLIPTextModel found with the prefix='text_encoder'.")
    LORA.warning("a real problem")
    warnings.warn("`torch_dtype` is deprecated and will be removed", FutureWarning, stacklevel=2)
    warnings.warn("another real problem", UserWarning, stacklevel=2)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    monkeypatch.delenv("MMPO_DEBUG", raising=False)
    return caplog


def test_only_the_two_notices_are_silenced(heard: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quietly():
            speak()
    assert heard.messages == ["a real problem"]
    assert [str(w.message) for w in seen] == ["another real problem"]


def test_debug_lets_everything_through(heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPO_DEBUG", "1")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quietly():
            assert of_diffusers.is_progress_bar_enabled()
            speak()
    assert len(heard.messages) == len(seen) == 2


def test_progress_bars_come_back_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMPO_DEBUG", raising=False)
    bars = (of_diffusers, of_transformers)
    before = [b.is_progress_bar_enabled() for b in bars]
    with pytest.raises(KeyError), quietly():
        assert not any(b.is_progress_bar_enabled() for b in bars)
        raise KeyError
    assert [b.is_progress_bar_enabled() for b in bars] == before
    with quietly(downloads=True):
        assert [b.is_progress_bar_enabled() for b in bars] == before
    of_diffusers.disable_progress_bar()
    try:
        with quietly():
            pass
        assert not of_diffusers.is_progress_bar_enabled()  # what was off stays off
    finally:
        of_diffusers.enable_progress_bar()
