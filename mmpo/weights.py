"""The door where weights of strangers are opened: tensors come in, code never does, and what is refused is named."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loading(path: str | Path, expected: str) -> Iterator[None]:
    """Turns whatever a library raises at weights that are damaged, missing or hostile into one ValueError.

    path: the file, folder or hub id in the message. expected: what belongs there. What a library advises in its place, to
    trust the file, is left out. MemoryError and a missing package pass.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # on damaged bytes a reader may raise anything: SafetensorError, KeyError, EOFError, ...
        raise ValueError(f"{path}: expected {expected}; {_reason(error)}") from error


HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CLOSED = "no such folder, and of hub ids only those in the local cache are read; allow_download: true lets it be fetched"


def check_place(path: str) -> None:
    """Raise ValueError, before a hub's library is asked, for what is neither a folder nor could be a hub id."""
    if Path(path).is_dir() or (HUB_ID.fullmatch(path) and not Path(path).exists()):
        return
    raise ValueError(f"{path}: {'expected a folder, found a file' if Path(path).exists() else 'no such folder'}")


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) or "pickle" in str(error).lower():
        return "it holds pickled objects, which could run code and are never loaded; convert it to safetensors"
    if "remote_code" in str(error) or "custom code" in str(error):
        return "it needs code of its own, and code that comes with a model is never run"
    if type(error).__name__ == "LocalEntryNotFoundError" or "couldn't find them in the cached files" in str(error):
        return CLOSED
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
