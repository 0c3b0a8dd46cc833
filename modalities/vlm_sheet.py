"""Answers about images for people: what the model saw, as pictures, with the base's and the aligned model's answers."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmpo.checkpoint import write_atomic
from mmpo.evaluate import Samples
from mmpo.media import open_image
from mmpo.modalities import text_sheet
from mmpo.pair import Block, text

PICTURES = "pictures"  # folder beside the answers; a line of theirs names its files
LARGEST = 320  # pixels of a shown picture's longer side
SHOWN = 100  # rows of the page
STYLE = (
    f"{text_sheet.STYLE}td{{vertical-align:top}}"
    "img{display:block;min-height:96px;max-width:320px;image-rendering:pixelated;margin-bottom:4px}"
)
HEAD = f'<!doctype html><meta charset="utf-8"><title>Base and aligned</title><style>{STYLE}</style>'


def write(folder: Path, prompts: Sequence[tuple[Block, ...]], base: Samples, aligned: Samples) -> None:
    """base.jsonl and aligned.jsonl in one order, the prompts' images under pictures/, and sheet.html, which needs neither."""
    write_pictures(folder, prompts)
    told = {name: lines(prompts, samples) for name, samples in (("base", base), ("aligned", aligned))}
    text_sheet.write(folder, page(folder, **told), **told)


def lines(prompts: Sequence[tuple[Block, ...]], samples: Samples) -> list[dict[str, Any]]:
    """Those of the text modality; a prompt's images are `[image 1]`, ... in its words and their files under `pictures`."""
    found = text_sheet.lines([_worded(prompt) for prompt in prompts], samples)
    for line, prompt in zip(found, prompts, strict=True):
        line["pictures"] = [file_of(block) for block in prompt if block.kind == "image"]
        line["turns"] = [{"role": b.role} | ({"text": b.data} if b.kind == "text" else {"picture": file_of(b)}) for b in prompt]
    return found


def _worded(prompt: Sequence[Block]) -> tuple[Block, ...]:
    number = itertools.count(1)
    return tuple(text(f"[image {next(number)}]", b.role) if b.kind == "image" else b for b in prompt)


def file_of(block: Block) -> str:
    """The name of a picture's file, by its content."""
    return f"{block.digest}.png"


def write_pictures(folder: Path, prompts: Iterable[tuple[Block, ...]]) -> None:
    """Every image of the prompts once, as PNG of at most LARGEST pixels a side."""
    images = {file_of(b): b for prompt in prompts for b in prompt if b.kind == "image"}
    if images:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for name, block in images.items():
        write_atomic(folder / PICTURES / name, _small(block))


def _small(block: Block) -> bytes:
    picture, out = open_image(block), io.BytesIO()
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def page(folder: Path, base: Sequence[dict[str, Any]], aligned: Sequence[dict[str, Any]]) -> str:
    """HTML of the first SHOWN rows, pictures inlined; base and aligned: records of `lines` on the same prompts."""
    rows = []
    for before, after in list(zip(base, aligned, strict=True))[:SHOWN]:
        asked = "".join(_inlined(folder / PICTURES / name) for name in before["pictures"]) + html.escape(str(before["prompt"]))
        said = "".join(f"<td>{html.escape(str(line['text']))}</td>" for line in (before, after))
        rows.append(f"<tr><td>{asked}</td>{said}</tr>")
    told = f"<p>The first {len(rows)} of {len(base)} answers; all are in base.jsonl and aligned.jsonl.</p>"
    return "\n".join([HEAD, told, "<table>", "<tr><th>prompt</th><th>base</th><th>aligned</th></tr>", *rows, "</table>", ""])


def _inlined(file: Path) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode("ascii")}">'
