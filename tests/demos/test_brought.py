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
    (name,) = Brought(tmp_path).take([original])
    kept = (tmp_path / name).read_bytes()
    assert b"secret" in buffer.getvalue() and b"secret" not in kept and not Path(original).exists()
    assert np.array_equal(np.asarray(media.open_image(kept)), np.asarray(media.open_image(photo(3, (40, 30)))))


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>", b"GIF89a" + bytes(20), photo(1)[:150]])
def test_what_is_no_picture_is_refused_by_name_and_removed(tmp_path: Path, data: bytes) -> None:
    paths = [given(tmp_path / "up", "good.png", photo(1)), given(tmp_path / "up", "bad.png", data)]
    with pytest.raises(DataError, match=r"bad\.png cannot be used"):
        Brought(tmp_path).take(paths)
    assert not list((tmp_path / "up").iterdir())


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    secret = given(tmp_path / "private", "secret.png", photo(1))
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "link.png").symlink_to(secret)
    with pytest.raises(DataError, match=r"link\.png"):
        Brought(tmp_path).take([str(tmp_path / "up" / "link.png")])
    assert Path(secret).exists()


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brought, "KEPT", 3)
    kept = Brought(tmp_path)
    names = [kept.take([given(tmp_path / "up", "a.png", photo(i))])[0] for i in range(5)]
    assert {path.name for path in tmp_path.glob("*.png")} == set(names[2:])
