"""What a person is shown of answers about images: the pictures themselves, in the sheet and in the report."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from mmpo.evaluate import Samples
from mmpo.modalities import vlm_sheet
from mmpo.modalities.vlm_blind import GREY, blinded
from mmpo.pair import Block, image, text
from mmpo.report import write_report

RED, WIDE = np.full((8, 8, 3), (250, 0, 0), np.uint8), np.zeros((20, 900, 3), np.uint8)
PROMPTS = [(text("Image1:"), image(RED), text("and"), image(WIDE), text("which <b>?")), (text("no picture"),)]


def samples(*words: str) -> Samples:
    return Samples([text(w) for w in words], np.array([1.0, 0.0]), np.array([1.0, 0.0]), float("nan"))


def inlined(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_the_sheet_shows_the_pictures_of_each_prompt_beside_both_answers(tmp_path: Path) -> None:
    vlm_sheet.write(tmp_path, PROMPTS, samples("base & co", "b"), samples("aligned", "a"))
    page = (tmp_path / "sheet.html").read_text()
    red, wide = inlined(page)
    assert np.array_equal(red, RED) and wide.shape == (7, vlm_sheet.LARGEST, 3)  # large ones are made smaller
    assert "which &lt;b&gt;?" in page and "base &amp; co</td><td>aligned</td>" in page and "http" not in page
    line = json.loads((tmp_path / "base.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "Image1:\n[image 1]\nand\n[image 2]\nwhich <b>?"
    assert line["pictures"] == [vlm_sheet.file_of(PROMPTS[0][1]), vlm_sheet.file_of(PROMPTS[0][3])]


def test_the_report_shows_them_too_and_no_file_from_elsewhere(tmp_path: Path) -> None:
    vlm_sheet.write(tmp_path / "samples", PROMPTS, samples("base", "b"), samples("aligned", "a"))
    (tmp_path / "log.jsonl").write_text("")
    page = write_report(tmp_path).read_text()
    shown = inlined(page)
    assert np.array_equal(shown[0], RED) and len(shown) == 2 and 'alt="image 2 of the prompt"' in page
    lines = [json.loads(line) for line in (tmp_path / "samples" / "base.jsonl").read_text().splitlines()]
    (tmp_path / "secret.png").write_bytes(b"secret")
    lines[0]["pictures"] = ["../../secret.png", "gone.png", 3]
    (tmp_path / "samples" / "base.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert inlined(write_report(tmp_path).read_text()) == []


def test_blinded_prompts_keep_everything_but_what_the_images_show() -> None:
    photo = Block("image", RED, role="user")
    words, grey = blinded((text("q", "user"), photo))  # type: ignore[misc]
    assert words == text("q", "user") and grey.role == "user"
    assert grey.data.shape == RED.shape and (grey.data == GREY).all()  # type: ignore[union-attr]
    assert blinded((text("q"),)) is None
