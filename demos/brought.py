"""Pictures that visitors bring: opened under the limits of every picture, kept as pixels of a moderate size, not for ever."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmpo import media
from mmpo.errors import DataError
from mmpo.pair import image

MOST = 8  # of one visitor
VISITORS = 32  # whose pictures are kept; those of whoever brought some the longest time ago go
LARGEST = 20 * 2**20  # bytes of a file
PIXELS = 2**21  # of a kept picture; models see no more, and larger ones take seconds to encode
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


class Brought:
    """The folder that a page shows its pictures from, and those in it that visitors brought."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._of: OrderedDict[str, list[str]] = OrderedDict()

    def take(self, visitor: str, paths: Sequence[str], known: Sequence[str] = ()) -> list[str]:
        """`known` and the names of new files with the pixels of these, at most MOST in all; what is beyond is not opened.

        Other pictures that the visitor has brought go. Raises DataError, naming the file, for one that is no picture within
        the limits of `media`.
        """
        made = [_pixels(Path(path)) for path in paths[: MOST - len(known)]]
        names = [*known, *(self.keep(data) for data in made)]
        before = self._of.pop(visitor, [])
        self._of[visitor] = names
        self._remove(name for name in before if name not in names)
        while len(self._of) > VISITORS:
            self._remove(self._of.popitem(last=False)[1])
        return names

    def keep(self, data: bytes) -> str:
        """The name of a file of these bytes, which nobody can guess."""
        name = f"{secrets.token_hex(16)}.png"
        (self.folder / name).write_bytes(data)
        return name

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def _pixels(path: Path) -> bytes:
    try:
        picture = media.open_image(image(media.read(path.parent, path.name, LARGEST)))
    except DataError as error:
        raise DataError(f"{path.name} cannot be used: {error}") from error
    shrink = (PIXELS / (picture.width * picture.height)) ** 0.5
    if shrink < 1:
        size = max(1, int(picture.width * shrink)), max(1, int(picture.height * shrink))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return media.encode(np.asarray(picture), compress_level=1)
