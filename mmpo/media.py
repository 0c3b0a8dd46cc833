"""The one door where images are opened.

Datasets come from strangers. A name inside one may only lead to a regular file under the dataset's root; bytes may only be
one of five formats, at most 25 megapixels, one frame, and whole: a damaged file is an error and never a grey half picture.
What comes out is upright (EXIF orientation applied) RGB of 8 bits a channel.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mmpo.errors import DataError
from mmpo.pair import Block

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 25_000_000
MAX_BYTES = 64 * 2**20

Pixels = NDArray[np.uint8]  # (H, W, 3)


def resolve(root: Path | str, name: str) -> Path:
    """The file that a dataset's row calls `name`, with every link followed, which must lie under `root`.

    Raises DataError when the name is empty, absolute, a URL, holds `..`, a backslash or NUL, does not exist, or leaves
    the root through a symbolic link.
    """
    if reason := _forbidden(name):
        raise DataError(f"path {name!r}: {reason}; expected a path relative to the dataset root {str(root)!r}, with '/'")
    try:
        base = Path(root).resolve(strict=True)
        path = (base / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: not encodable
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"path {name!r} under {str(root)!r}: {reason}") from error
    if not path.is_relative_to(base):
        raise DataError(f"path {name!r}: leads out of the dataset root {str(root)!r} through a symbolic link")
    return path


def _forbidden(name: object) -> str | None:
    """Why a name is refused before the file system is asked, or None."""
    if not isinstance(name, str) or not name.strip():
        return "is empty or not text"
    if "\0" in name:
        return "contains a NUL"
    if "\\" in name:
        return "contains a backslash"
    if name.startswith("/") or name[1:2] == ":":
        return "is absolute"
    if "://" in name or name.lower().startswith(("file:", "data:")):
        return "is a URL"
    return "contains '..'" if ".." in name.split("/") else None


def read(root: Path | str, name: str) -> bytes:
    """The bytes of a file under `root` (see `resolve`). Raises DataError for devices, pipes, folders and over 64 MiB."""
    path = resolve(root, name)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # O_NONBLOCK: never wait on a pipe
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"path {name!r}: is not a regular file")
            if status.st_size > MAX_BYTES:
                raise DataError(f"path {name!r}: {status.st_size} bytes, expected at most {MAX_BYTES}")
            return file.read(MAX_BYTES)
    except OSError as error:
        raise DataError(f"path {name!r}: {error.strerror}") from error


def open_image(source: Block | bytes | Pixels) -> Image.Image:
    """Decode one still image to an upright RGB PIL image.

    source: an image Block, the bytes of a file, or an array (H, W, 3) uint8. Transparency is dropped, CMYK and palettes
    are converted, colours of 16 bits are cut to 8. Raises DataError naming what is wrong when the bytes are another format,
    damaged or cut short, animated, over 25 megapixels, or greyscale of more than 8 bits, which would be clipped.
    """
    data = source.data if isinstance(source, Block) else source
    origin = f"image {source.path!r}" if isinstance(source, Block) and source.path else "image"
    if isinstance(data, np.ndarray):
        return Image.fromarray(_checked(data, origin))
    if not isinstance(data, bytes):
        raise DataError(f"{origin}: expected bytes or an array, found {type(data).__name__}")
    try:
        return _decode(data)
    except DataError as error:
        raise DataError(f"{origin}: {error}") from None
    except UnidentifiedImageError:  # whose own message is an address in memory
        raise DataError(f"{origin}: cannot be decoded as {', '.join(FORMATS)} (starts with {data[:12]!r})") from None
    except Exception as error:  # on damaged bytes a decoder may raise anything: struct.error, SyntaxError, zlib.error, ...
        raise DataError(f"{origin}: cannot be decoded as {', '.join(FORMATS)} ({type(error).__name__}: {error})") from error


def pixels(source: Block | bytes | Pixels) -> Pixels:
    """Like `open_image`, as an array (H, W, 3) uint8."""
    return np.array(open_image(source))


def size(image: Block) -> tuple[int, int]:
    """Width and height as stored, from the header alone, of an image that `open_image` accepts."""
    data = image.data
    if isinstance(data, np.ndarray):
        return data.shape[1], data.shape[0]
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:  # type: ignore[arg-type]
        return picture.size


def encode(array: Pixels, format: str = "PNG", **options: int) -> bytes:
    """The bytes of an image file. array: (H, W, 3) uint8; options are Pillow's, e.g. quality=5 for JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(_checked(array, "image")).save(buffer, format, **options)
    return buffer.getvalue()


def _checked(array: Pixels, origin: str) -> Pixels:
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
        raise DataError(f"{origin}: expected an array (H, W, 3) of uint8, found {array.shape} of {array.dtype}")
    return np.ascontiguousarray(array)


def _decode(data: bytes) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise DataError(f"{len(data)} bytes, expected at most {MAX_BYTES}")
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:  # known from the header: nothing has been decompressed yet
            raise DataError(f"{width}x{height} pixels, expected at most {MAX_PIXELS}")
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.format != "MPO":  # MPO is a phone's JPEG with its preview behind it: the first is the photo
            raise DataError(f"animated, {frames} frames; expected one still image")
        if picture.mode[0] in "IF":
            raise DataError(f"mode {picture.mode}; expected 8 bits a channel")
        picture.load()
        return ImageOps.exif_transpose(picture).convert("RGB")
