"""The door where weights of strangers are opened: tensors come in, code never does, and what is refused is named."""

from __future__ import annotations

import pickle
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


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) or "pickle" in str(error).lower():
        return "it holds pickled objects, which could run code and are never loaded; convert it to safetensors"
    if "remote_code" in str(error) or "custom code" in str(error):
        return "it needs code of its own, and code that comes with a model is never run"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
