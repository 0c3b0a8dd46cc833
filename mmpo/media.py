"""The one door where images, video and audio are opened.

Datasets come from strangers. A name inside one may only lead to a regular file under the dataset's root. An image may only
be one of five formats, at most 25 megapixels, one frame, and whole: a damaged file is an error and never a grey half
picture. What comes out is upright (EXIF orientation applied) RGB of 8 bits a channel, and nothing of the file beside it.
Video and audio are told by their first bytes, so that no playlist passes, and decoded in a process of their own
(`mmpo.decoding`). FFmpeg conceals most damage inside a video: only a sha256 to compare with finds that.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmpo.decoding import Limits, Undecodable, decode
from mmpo.errors import DataError
from mmpo.pair import Block

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 25_000_000
MAX_BYTES = 64 * 2**20

LIMITS = Limits()

SCHEMES = "file|data|https?|ftps?|s3|gs|hf|blob|javascript|concat|pipe"
SCHEME = re.compile(rf"\s*([a-z][a-z0-9+.-]+:/|({SCHEMES}):)", re.IGNORECASE)

# O_NONBLOCK: never wait on a pipe. Windows has none of these.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)

Pixels = NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class Video:
    """frames: (F, H, W, 3) uint8 RGB. timestamps: (F,) float64, seconds. rate: the file's frames per second, on average."""

    frames: NDArray[np.uint8]
    timestamps: NDArray[np.float64]
    rate: float
    decoder: str


@dataclass(frozen=True)
class Audio:
    """samples: (channels, N) float32, full scale is 1. rate: samples per second; sample n is heard at n / rate seconds."""

    samples: NDArray[np.float32]
    rate: int


class ForbiddenPath(DataError):
    """A name in a dataset that leads to no file there. reason: the kind of the problem, the same for all names of that kind."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Animated(DataError):
    """Several images where one still image is expected."""


def resolve(root: Path | str, name: str) -> Path:
    """The file that a dataset's row calls `name`, with every link followed, which must lie under `root`.

    Raises ForbiddenPath when the name is empty, absolute, a URL, holds `..`, a backslash or NUL, does not exist, or leaves
    the root through a symbolic link.
    """
    if found := _forbidden(name):
        message = f"path {name!r}: {found}; expected a path relative to the dataset root {str(root)!r}, with '/'"
        raise ForbiddenPath(message, "URL" if found == "is a URL" else "forbidden path")
    try:
        base = Path(root).resolve(strict=True)
        path = (base / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: not encodable
        problem = getattr(error, "strerror", None) or str(error)
        reason = "missing file" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else "unreadable file"
        raise ForbiddenPath(f"path {name!r} under {str(root)!r}: {problem}", reason) from error
    if not path.is_relative_to(base):
        message = f"path {name!r}: leads out of the dataset root {str(root)!r} through a symbolic link"
        raise ForbiddenPath(message, "path leaves the root")
    return path


def _forbidden(name: object) -> str | None:
    """Why a name is refused before the file system is asked, or None."""
    if not isinstance(name, str) or not name.strip():
        return "is empty or not text"
    if "\0" in name:
        return "contains a NUL"
    if SCHEME.match(name) or "://" in name:
        return "is a URL"
    if "\\" in name:
        return "contains a backslash"
    if name.startswith("/") or name[1:2] == ":":
        return "is absolute"
    return "contains '..'" if ".." in name.split("/") else None


def read(root: Path | str, name: str, limit: int = MAX_BYTES, sha256: str | None = None) -> bytes:
    """The bytes of a file under `root` (see `resolve`). Raises ForbiddenPath for devices, pipes, folders and over `limit`.

    limit: bytes, known before any of them is read. sha256: what the content has to be, in hexadecimal. Nothing that is swapped
    for a link after the check is followed.
    """
    path = resolve(root, name)
    try:
        with os.fdopen(_open_under(Path(root).resolve(), path, name), "rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(status, name)
            if status.st_size > limit:
                raise ForbiddenPath(f"path {name!r}: {status.st_size} bytes, expected at most {limit}", "file too large")
            data = file.read(limit)
    except OSError as error:
        raise ForbiddenPath(f"path {name!r}: {error.strerror}", "unreadable file") from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ForbiddenPath(f"path {name!r}: other content, sha256 {found}, expected {sha256}", "other content")
    return data


def _open_under(base: Path, path: Path, name: str) -> int:
    """A descriptor of a resolved file: it goes down from `base` one folder at a time, and no link is followed."""
    folders, last = path.parent.relative_to(base).parts if path != base else (), path.name
    if os.open not in os.supports_dir_fd:
        _check_regular(os.lstat(path), name)
        return os.open(path, _READ)
    at = os.open(base if path != base else base.parent, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        _check_regular(os.stat(last, dir_fd=at, follow_symlinks=False), name)  # to open a device may already do something
        return os.open(last, _READ, dir_fd=at)
    finally:
        os.close(at)


def _check_regular(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ForbiddenPath(f"path {name!r}: is not a regular file", "not a regular file")


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
        raise type(error)(f"{origin}: {error}") from None
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


def mode(image: Block) -> str:
    """Pillow's name for how the colours are stored ("RGB", "CMYK", ...), from the header alone, as for `size`."""
    if isinstance(image.data, np.ndarray):
        return "RGB"
    with Image.open(io.BytesIO(image.data), formats=FORMATS) as picture:  # type: ignore[arg-type]
        return picture.mode


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
    with _whole(), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:  # known from the header: nothing has been decompressed yet
            raise DataError(f"{width}x{height} pixels, expected at most {MAX_PIXELS}")
        # MPO is a phone's JPEG with its preview behind it: the first is the photo. Frames are not counted: that takes minutes.
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            raise Animated("animated; expected one still image")
        if picture.mode[0] in "IF":
            raise DataError(f"mode {picture.mode}; expected 8 bits a channel")
        picture.load()
        upright = ImageOps.exif_transpose(picture).convert("RGB")
        upright.info.clear()  # texts, colour profile, camera and place
        return upright


@contextmanager
def _whole() -> Iterator[None]:
    """Pillow refuses files that are cut short, whatever another library told it."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_video(source: Block | bytes | Path, frames: int | None = None, limits: Limits = LIMITS) -> Video:
    """Decode a video to RGB frames, by decord, or by PyAV where decord is missing or cannot (AV1); `Video.decoder` tells.

    source: a video Block, the bytes of a file, or a path that does not come from a dataset (those go through `read`).
    frames: how many frames, evenly spread; None: all. Raises DataError naming the file when it is no MP4, MOV, Matroska,
    WebM or AVI, over a limit, or when the decoder gives up, crashes, hangs or takes too much memory.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected at least 1 or None, found {frames}")
    data, container, origin = _video(source, limits)
    failures = []
    for decoder in ("decord", "av"):
        try:
            header, array = decode(decoder, data, limits, frames, container)
        except Undecodable as error:
            failures.append(str(error))
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        else:
            times = np.asarray(header["timestamps"], np.float64)
            if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or times.shape != array.shape[:1]:
                raise DataError(f"{origin}: {decoder} returned {array.shape} of {array.dtype} and {times.shape} times")
            return Video(array, times, float(header["rate"]), decoder)
    raise DataError(f"{origin}: cannot be decoded ({'; '.join(failures)})")


def repacked(source: Block | bytes | Path, limits: Limits = LIMITS) -> tuple[str, bytes]:
    """Container (mp4, webm) and bytes of a video whose streams are the same, and nothing else: no tags, names, tools, times.

    source: as for `open_video`. The pictures are not decoded. What a decoder needs stays, and with it what an encoder wrote
    there (HEVC, MPEG-4 part 2, AAC, Vorbis). Raises DataError naming the file as `open_video` does, but for damaged pictures.
    """
    data, container, origin = _video(source, limits)
    try:
        header, array = decode("repack", data, limits, None, container)
    except DataError as error:
        raise DataError(f"{origin}: cannot be repacked ({error})") from error
    if array.ndim != 1 or array.dtype != np.uint8 or header["container"] not in ("mp4", "webm"):
        raise DataError(f"{origin}: repacking returned {array.shape} of {array.dtype} in {header['container']!r}")
    return str(header["container"]), array.tobytes()


def open_audio(source: Block | bytes | Path, limits: Limits = LIMITS) -> Audio:
    """Decode an audio file to float32 samples, by soundfile.

    source: as for `open_video`. Raises DataError naming the file when it is no WAV, FLAC, OGG or MP3, over a limit, empty, not
    finite or shorter than its header says, or when the decoder gives up, crashes, hangs or takes too much memory.
    """
    data, origin = _source(source, "audio", limits)
    if not _is_audio(data):
        raise DataError(f"{origin}: expected WAV, FLAC, OGG or MP3, found a file that starts with {data[:12]!r}")
    try:
        header, array = decode("soundfile", data, limits)
    except DataError as error:
        raise DataError(f"{origin}: cannot be decoded ({error})") from error
    if array.ndim != 2 or array.dtype != np.float32:
        raise DataError(f"{origin}: soundfile returned {array.shape} of {array.dtype}")
    return Audio(array, int(header["rate"]))


def _source(source: Block | bytes | Path, kind: str, limits: Limits) -> tuple[bytes, str]:
    """The bytes, and the name for messages."""
    if isinstance(source, Path):
        path = source.resolve()  # what a user names may be a link, unlike what a dataset names
        return read(path.parent, path.name, limits.size), f"{kind} {str(source)!r}"
    data = source.data if isinstance(source, Block) else source
    origin = f"{kind} {source.path!r}" if isinstance(source, Block) and source.path else kind
    if not isinstance(data, bytes):
        raise DataError(f"{origin}: expected the bytes of a file, found {type(data).__name__}")
    if len(data) > limits.size:
        raise DataError(f"{origin}: {len(data)} bytes, expected at most {limits.size}")
    return data, origin


def _video(source: Block | bytes | Path, limits: Limits) -> tuple[bytes, str, str]:
    """The bytes, FFmpeg's name of their format, and the name for messages."""
    data, origin = _source(source, "video", limits)
    container = _video_container(data)
    if not container:
        raise DataError(f"{origin}: expected MP4, MOV, Matroska, WebM or AVI, found a file that starts with {data[:12]!r}")
    return data, container, origin


def _video_container(data: bytes) -> str | None:
    """FFmpeg's name of the format that the first bytes announce, or None when it is not one of ours."""
    if data[4:8] == b"ftyp":
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def _is_audio(data: bytes) -> bool:
    if data[:4] == b"RIFF":
        return data[8:12] == b"WAVE"
    return data[:4] in (b"fLaC", b"OggS") or data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")
