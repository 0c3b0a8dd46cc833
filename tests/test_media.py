"""The door for images: no name leaves the root, no bad bytes become a picture."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmpo import media, pair
from mmpo.errors import DataError

RED = np.full((4, 6, 3), (200, 10, 10), np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset root with pictures, beside a secret, and links of every sort."""
    (tmp_path / "secret.png").write_bytes(media.encode(RED))
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(media.encode(RED))
    (folder / "sub" / "b.png").write_bytes(media.encode(RED))
    (folder / "inside.png").symlink_to("sub/b.png")
    (folder / "escape.png").symlink_to("../secret.png")
    (folder / "absolute.png").symlink_to(tmp_path / "secret.png")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "chain.png").symlink_to("escape.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "zero").symlink_to("/dev/zero")
    (tmp_path / "root-twin").mkdir()
    (tmp_path / "root-twin" / "c.png").write_bytes(media.encode(RED))
    (folder / "twin").symlink_to(tmp_path / "root-twin")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize("name", ["a.png", "sub/b.png", "./a.png", "sub//b.png", "inside.png"])
def test_names_under_the_root_are_read(root: Path, name: str) -> None:
    assert np.array_equal(media.pixels(media.read(root, name)), RED)


ATTACKS = [
    "", " ", ".", "/etc/passwd", "//etc/passwd", "../secret.png", "sub/../../secret.png", "sub/../a.png", "..", "a.png/..",
    "..\\secret.png", "sub\\b.png", "C:/secret.png", "c:secret.png", "\\\\host\\share\\x.png", "file:///etc/passwd",
    "file:a.png", "http://host/a.png", "data:image/png;base64,AAAA", "a.png\0.txt", "\0", "escape.png", "absolute.png",
    "chain.png", "loop.png", "dangling.png", "outside/secret.png", "twin/c.png", "zero", "pipe.png", "sub", "missing.png",
    "a.png/b.png", "x" * 5000, "\ud800.png", "~/secret.png", "a.png ",
]  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS, ids=[f"{i}" for i in range(len(ATTACKS))])
def test_attacks_are_refused(root: Path, name: str) -> None:
    with pytest.raises(DataError):
        media.read(root, name)


@pytest.mark.parametrize("name", [None, 3, b"a.png", Path("a.png")])
def test_names_that_are_not_text_are_refused(root: Path, name: object) -> None:
    with pytest.raises(DataError, match="not text"):
        media.read(root, name)  # type: ignore[arg-type]


def test_absolute_names_are_refused_even_under_the_root(root: Path) -> None:
    with pytest.raises(DataError, match="absolute"):
        media.read(root, str(root / "a.png"))


def test_a_large_file_is_refused_before_it_is_read(root: Path) -> None:
    with open(root / "large.png", "wb") as file:
        file.truncate(media.MAX_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(DataError, match="expected at most"):
        media.read(root, "large.png")


def saved(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", media.FORMATS)
def test_every_format_decodes(format: str) -> None:
    array = media.pixels(saved(Image.fromarray(RED), format))
    assert array.shape == RED.shape and array.dtype == np.uint8
    assert np.abs(array.astype(int) - RED).max() < 12


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "PDF", "EPS", "TGA"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        media.pixels(saved(Image.fromarray(RED), format))


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG file of RGB pixels with any header one likes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("side", "words"), [(5001, "5001x5001 pixels"), (9_600, "9600x9600 pixels"), (20_000, "Bomb"), (2**30, "Bomb")]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_from_the_header(side: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        media.pixels(png(side, side, b"\0" * 1000))


def test_animations_are_refused() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (0, 120, 250)]
    for format in ("GIF", "WEBP", "PNG"):
        with pytest.raises(DataError, match="animated"):
            media.pixels(saved(frames[0], format, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_truncated_files_are_refused(format: str, keep: float) -> None:
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), format)
    with pytest.raises(DataError):
        media.pixels(whole[: int(len(whole) * keep)])


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"GIF89a", b"not an image", b"\xff\xd8\xff" + b"\0" * 99, b"<svg/>"])
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        media.pixels(data)


def test_cmyk_grey_palette_and_alpha_become_rgb() -> None:
    source = Image.fromarray(RED)
    cmyk = media.pixels(saved(source.convert("CMYK"), "JPEG", quality=95))
    assert cmyk.shape == RED.shape and np.abs(cmyk.astype(int) - RED).max() < 12
    assert np.array_equal(media.pixels(saved(source.convert("P"), "PNG")), np.array(source.convert("P").convert("RGB")))
    assert np.array_equal(media.pixels(saved(source.convert("RGBA"), "PNG")), RED)
    grey = media.pixels(saved(source.convert("L"), "PNG"))
    assert (grey[..., 0] == grey[..., 2]).all()


def test_sixteen_bit_greyscale_is_refused_rather_than_clipped() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(DataError, match="8 bits"):
        media.pixels(saved(deep, "PNG"))


def test_exif_orientation_is_applied() -> None:
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, :8] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise: the left edge comes to the top
    turned = media.pixels(saved(Image.fromarray(array), "PNG", exif=exif))
    assert turned.shape == (16, 8, 3)
    assert turned[:8].mean() == 255 and turned[8:].mean() == 0


def test_arrays_pass_and_wrong_arrays_do_not() -> None:
    assert np.array_equal(media.pixels(pair.image(RED)), RED)
    wrongs: list[Any] = [RED[..., 0], RED.astype(np.float32), RED[..., :2], RED[:0]]
    for wrong in wrongs:
        with pytest.raises(DataError, match="uint8"):
            media.pixels(wrong)
    with pytest.raises(DataError, match="found str"):
        media.pixels(pair.text("a"))


def test_png_round_trip_is_exact_and_errors_name_the_file() -> None:
    array = np.random.default_rng(1).integers(0, 255, (9, 7, 3), np.uint8)
    assert np.array_equal(media.pixels(media.encode(array)), array)
    with pytest.raises(DataError, match="'broken.png'"):
        media.pixels(pair.image(b"x", "broken.png"))
