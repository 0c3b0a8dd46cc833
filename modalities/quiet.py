"""Keeps off the screen what diffusers and transformers say while loading and saving, and what is of no use to a user."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly(downloads: bool = False) -> Iterator[None]:
    """Silences the libraries' progress bars and three notices that are always there; every other warning passes.

    The notices: that `torch_dtype` and `is_gradient_checkpointing` got other names, and that an adapter of the denoiser has no
    keys for the text encoder.
    Import the library before: one that is not in use yet is left alone, because importing it takes seconds.
    downloads: keep the bars, as a download may be among them. MMPO_DEBUG=1 in the environment shows everything.
    """
    if os.environ.get("MMPO_DEBUG") == "1":
        yield
        return
    loaded = [name for name in ("diffusers", "transformers") if name in sys.modules]
    talkers = [importlib.import_module(f"{name}.utils.logging") for name in loaded]
    silenced = [] if downloads else [m for m in talkers if m.is_progress_bar_enabled()]
    notices = logging.getLogger("diffusers.loaders.lora_base")
    notices.addFilter(_is_news)
    for module in silenced:
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for renamed in ("torch_dtype", "is_gradient_checkpointing"):
                warnings.filterwarnings("ignore", message=f"`{renamed}` is deprecated", category=FutureWarning)
            yield
    finally:
        notices.removeFilter(_is_news)
        for module in silenced:
            module.enable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No LoRA keys associated to")
