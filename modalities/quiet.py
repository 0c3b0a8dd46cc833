"""Keeps off the screen what diffusers and transformers say while loading and saving, and what is of no use to a user."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly(downloads: bool = False) -> Iterator[None]:
    """Silences the libraries' progress bars and two notices that are always there; every other warning passes.

    The notices: that `torch_dtype` got another name, and that an adapter of the denoiser has no keys for the text encoder.
    downloads: keep the bars, as a download may be among them. MMPO_DEBUG=1 in the environment shows everything.
    """
    if os.environ.get("MMPO_DEBUG") == "1":
        yield
        return
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    silenced = [] if downloads else [m for m in (of_diffusers, of_transformers) if m.is_progress_bar_enabled()]
    notices = logging.getLogger("diffusers.loaders.lora_base")
    notices.addFilter(_is_news)
    for module in silenced:
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            yield
    finally:
        notices.removeFilter(_is_news)
        for module in silenced:
            module.enable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No LoRA keys associated to")
