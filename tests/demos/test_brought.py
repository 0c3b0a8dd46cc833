"""Pictures that visitors bring: pixels alone are kept, and of originals, bombs and old ones nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmpo import media
from mmpo.demos import brought
from mmpo.demos.brought import Brought
from mmpo.errors import DataError
from tests.vlm_families import photo as pixels


def photo(seed: int, size: tuple[int, int] = (28, 28)) -> bytes:
    return media.encode(pixels(seed, size))


def given(folder: Path, name: str, data: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return str(folder / name)


def test_only_pixels_are_kept(tmp_path: Path) -> None:
    told, buffer = PngInfo(), io.BytesIO()
    told.add_text("Comment", "secret place")
    Image.open(io.BytesIO(photo(3, (40, 30)))).save(buffer, "PNG", pnginfo=told)
    original = given(tmp_path / "up", "a.png", buffer.getvalue())
    (name,) = Brought(tmp_path).take("tim", [original])
    kept = (tmp_path / name).read_bytes()
    assert b"secret" in buffer.getvalue() and b"secret" not in kept
    assert np.array_equal(np.asarray(media.open_image(kept)), np.asarray(media.open_image(photo(3, (40, 30)))))


def test_large_pictures_are_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brought, "PIXELS", 100)
    (name,) = Brought(tmp_path).take("tim", [given(tmp_path / "up", "a.png", photo(1, (40, 10)))])
    assert media.open_image((tmp_path / name).read_bytes()).size == (5, 20)


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>", b"GIF89a" + bytes(20), photo(1)[:150]])
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    paths = [given(tmp_path / "up", "good.png", photo(1)), given(tmp_path / "up", "bad.png", data)]
    with pytest.raises(DataError, match=r"bad\.png cannot be used"):
        Brought(tmp_path).take("tim", paths)
    assert not list(tmp_path.glob("*.png"))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    secret = given(tmp_path / "private", "secret.png", photo(1))
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "link.png").symlink_to(secret)
    with pytest.raises(DataError, match=r"link\.png"):
        Brought(tmp_path).take("tim", [str(tmp_path / "up" / "link.png")])


def test_what_is_too_many_is_not_even_opened(tmp_path: Path) -> None:
    paths = [given(tmp_path / "up", f"{i}.png", photo(i)) for i in range(brought.MOST)]
    kept = Brought(tmp_path)
    names = kept.take("tim", [*paths, str(tmp_path / "absent.png")])
    assert len(names) == brought.MOST and kept.take("tim", ["absent.png"], names) == names


def test_nobody_loses_pictures_to_somebody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A visitor's own old ones go, then those of whoever came the longest time ago."""
    monkeypatch.setattr(brought, "VISITORS", 2)
    kept, path = Brought(tmp_path), given(tmp_path / "up", "a.png", photo(1))
    (tim,) = kept.take("tim", [path])
    for _ in range(5):
        (eve,) = kept.take("eve", [path])
    assert {p.name for p in tmp_path.glob("*.png")} == {tim, eve}
    two = kept.take("eve", [path], [eve])
    assert two[0] == eve and {p.name for p in tmp_path.glob("*.png")} == {tim, *two}
    (amy,) = kept.take("amy", [path])
    assert {p.name for p in tmp_path.glob("*.png")} == {*two, amy}
