"""Out of memory: told with numbers and with what to do; the batch is made smaller only where the recipe says so.

A step over half the pairs, twice, has the same gradient as one over all of them, except for losses that read statistics of
the batch. Nothing else may change an effective batch: the same command would mean different runs on different machines.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator

import torch

from mmpo.errors import RunFailed

_CPU = re.compile(r"can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)  # torch has no class of its own for it


def exhausted(error: BaseException) -> str | None:
    """What the allocator said, when `error` means that memory ran out on a device or here; otherwise None."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return str(error).strip().splitlines()[0] if str(error).strip() else "no memory left"
    if isinstance(error, RuntimeError) and _CPU.search(str(error)):
        return next(line for line in str(error).splitlines() if _CPU.search(line)).strip()
    return None


def in_use() -> str:
    """The most that tensors took on the CUDA device, and what is free of it; without one, the most that was resident."""
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        return f"tensors took up to {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, {free:.1f} of {total:.1f} GiB are free"
    return f"up to {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB were resident"


@contextlib.contextmanager
def explained(advice: str) -> Iterator[None]:
    """Turns exhaustion inside it into RunFailed with the numbers and `advice`; any other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = exhausted(error)
        if said is None or isinstance(error, RunFailed):
            raise
        raise RunFailed(f"out of memory: {said} ({in_use()}). {advice}") from error
