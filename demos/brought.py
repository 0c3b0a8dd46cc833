"""Pictures that a visitor brings: opened under the limits of every picture, kept as pixels alone, and not for ever."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmpo import media
from mmpo.errors import DataError
from mmpo.pair import image

MOST = 8  # of one prompt
KEPT = 64  # of all visitors together; the oldest go
LARGEST = 20 * 2**20  # bytes of a file
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


class Brought:
    """The folder that a page shows its pictures from, and those in it that visitors brought."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._recent: deque[str] = deque()

    def take(self, paths: Sequence[str]) -> list[str]:
        """Names of new files with the pixels of these, which are removed, whatever becomes of them.

        Raises DataError, naming the file, for one that is no picture within the limits of `media`.
        """
        try:
            return [self._written(media.encode(np.asarray(_opened(Path(path))))) for path in paths]
        finally:
            for path in paths:
                Path(path).unlink(missing_ok=True)

    def _written(self, data: bytes) -> str:
        name = f"{secrets.token_hex(16)}.png"
        (self.folder / name).write_bytes(data)
        self._recent.append(name)
        while len(self._recent) > KEPT:
            (self.folder / self._recent.popleft()).unlink(missing_ok=True)
        return name


def _opened(path: Path) -> media.Image.Image:
    try:
        return media.open_image(image(media.read(path.parent, path.name, LARGEST)))
    except DataError as error:
        raise DataError(f"{path.name} cannot be used: {error}") from error
