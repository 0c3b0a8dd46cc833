"""Candidates whose prompts have images: what is written is read back, in its places, and what could not be is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmpo import media
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.load import detect, load, load_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.errors import DataError
from mmpo.pair import Block, image, text

RED, BLUE = (image(media.encode(np.full((4, 4, 3), c, np.uint8))) for c in ((255, 0, 0), (0, 0, 255)))
PROMPTS: list[tuple[Block, ...]] = [
    (RED, text("Which colour?")),
    (text("Image1:"), RED, text("\nImage2:"), BLUE, BLUE, text("\nIn Image2, which colour?")),
    (text("Which is "), BLUE),
]


def test_prompts_with_images_are_read_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "c.parquet"
    rows = [Candidate(p, text(w), s, i) for p in PROMPTS for i, (w, s) in enumerate((("red", 1.0), ("blue", 0.0)))]
    assert write_candidates(rows, file) == 6 and detect(file) == "candidates"
    groups, ledger = load_candidates(file)
    assert [c for group in groups.values() for c in group] == rows and ledger.used == 6
    pairs, _ = load(file)
    assert {p.prompt for p in pairs} == set(PROMPTS)


def test_images_by_path_and_placeholders_without_them(tmp_path: Path) -> None:
    assert isinstance(RED.data, bytes)
    (tmp_path / "red.png").write_bytes(RED.data)
    rows = [{"prompt": "<image>?", "images": ["red.png"], "response": "red"}, {"prompt": "the <image> tag", "response": "html"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = (group[0] for group in load_candidates(tmp_path / "c.jsonl")[0].values())
    assert [b.digest for b in first.prompt] == [RED.digest, text("?").digest]
    assert second.prompt == (text("the <image> tag"),)  # no images: these are words
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "<image><image>", "images": ["red.png"], "response": "x"}))
    with pytest.raises(DataError, match="<image> for each of 1 images"):
        load_candidates(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    "prompt", [(text("no image"),), (RED, text("a"), text("b")), (RED, text("an <image>")), (RED, text("said", "user"))]
)
def test_what_would_not_be_read_back_is_refused(tmp_path: Path, prompt: tuple[Block, ...]) -> None:
    rows = [Candidate((RED, text("?")), text("a"), 1.0), Candidate(prompt, text("b"), 0.0)]
    with pytest.raises(DataError, match="candidate 1: expected a prompt of images and texts without <image>"):
        write_candidates(rows, tmp_path / "c.parquet")
