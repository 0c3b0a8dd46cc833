"""A page with some pairs of a folder to look at: images with their boxes, both answers, scores, and what was left out.

The page is one file, asks nothing of the network and runs no script; what people or models wrote is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from mmpo import media
from mmpo.checkpoint import write_atomic
from mmpo.datasets.formats.mmpo import TABLE, pair_of
from mmpo.datasets.tables import parquet_rows
from mmpo.pair import Block, Pair, Span

SHOWN = 24
SIDE = 480  # pixels of the longer side of a picture on the page
LONGEST = 4000  # characters of a text on the page


def write_preview(folder: Path, page: Path, count: int = SHOWN) -> int:
    """Write a page of `count` pairs of a folder that `mmpo pairs` wrote, drawn by their ids; returns how many are on it.

    `meta["regions"]` of a pair says what is where in its prompt: [{"image": which image of the prompt, from 0, "label": ...,
    "box": [left, top, right, bottom] in pixels, "target": whether it is the one that is asked about}, ...].
    """
    names = pq.read_table(folder / TABLE, columns=["id"]).column("id").to_pylist()
    wanted = set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
    rows = (row for _, row in parquet_rows(folder / TABLE) if isinstance(row, dict) and row["id"] in wanted)
    story = json.loads((folder / "build.json").read_text(encoding="utf-8")) if (folder / "build.json").is_file() else {}
    cards = [_card(pair_of(row, folder)) for row in rows]
    write_atomic(page, _page(cards, len(names), story).encode())
    return len(cards)


def _page(cards: Sequence[Mapping[str, Any]], total: int, story: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("mmpo") / "preview.html.j2").read_text(encoding="utf-8"))
    counts = {name: story[name] for name in ("source", "records") if name in story}
    settings = {name: value for name, value in story.items() if name not in ("source", "records", "examples")}
    return template.render(
        cards=cards, total=total, builder=story.get("builder", "hand"), counts=counts, reasons=list(_reasons(counts)),
        sums=", ".join(f"{c['used']} of {c['rows']} {name} used" for name, c in _named(counts)),
        settings=json.dumps(settings, indent=1, ensure_ascii=False),
    )  # fmt: skip


def _named(counts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    names = {"source": "rows of the source", "records": "records of the builder"}
    return ((names[name], value) for name, value in counts.items())


def _reasons(counts: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    for name, found in _named(counts):
        for kind in ("skipped", "refused", "notes"):
            yield from ((f"{name}, {kind}", reason, count) for reason, count in found[kind].items())


def _card(pair: Pair) -> dict[str, Any]:
    scores = {f"score of {side}": f"{value:.4g}" for side, value in pair.scores.items()}
    plain = {"weight": 1.0, "margin": 0.0, "label": 1.0}
    special = {name: f"{getattr(pair, name):.4g}" for name, usual in plain.items() if getattr(pair, name) != usual}
    told = {name: _short(value) for name, value in pair.meta.items() if isinstance(value, (str, int, float))}
    regions = pair.meta.get("regions", [])
    return {
        "id": pair.id,
        "prompt": _parts(pair.prompt, regions=regions),
        "answers": [(side, _parts(getattr(pair, side), pair.spans.get(side, ()))) for side in ("chosen", "rejected")],
        "branches": [(name, _parts((*b.prompt, *b.response))) for name, b in pair.branches.items()],
        "numbers": list((scores | special | told).items()),
        "provenance": [json.dumps(entry, ensure_ascii=False) for entry in pair.meta.get("provenance", [])],
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


def _parts(
    blocks: Sequence[Block], spans: Sequence[Span] = (), regions: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Texts and pictures in their order; texts of labels alone (`Image1:`) become the caption of the picture after them."""
    parts: list[dict[str, Any]] = []
    seen = 0
    for block in blocks:
        if block.kind == "image":
            if not (parts and "images" in parts[-1]):
                parts.append({"images": []})
            parts[-1]["images"].append(_picture(block, [r for r in regions if r["image"] == seen]))
            seen += 1
        elif not (regions and str(block.data).strip().rstrip(":") in {r["label"] for r in regions}):
            parts.append({"role": block.role, "runs": _runs(str(block.data).strip("\n"), spans)})
    return parts


def _runs(words: str, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """A text cut at its spans of another weight."""
    runs, at = [], 0
    for span in sorted(spans, key=lambda s: s.start):
        runs += [{"words": words[at : span.start], "marked": False}]
        runs += [{"words": words[max(at, span.start) : span.end], "marked": span.weight != 1, "weight": f"{span.weight:g}"}]
        at = max(at, span.end)
    rest = words[at : at + LONGEST]
    return [*runs, {"words": rest + (" ..." if len(words) > at + LONGEST else ""), "marked": False}]


def _picture(block: Block, regions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    picture = media.open_image(block)
    width, height = picture.size
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = media.encode(np.asarray(picture), "JPEG", quality=80)
    whole = [r for r in regions if "box" not in r]
    return {
        "uri": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}",
        "width": width,
        "height": height,
        "boxes": [_box(r) for r in regions if "box" in r],
        "label": ", ".join(str(r["label"]) for r in regions),
        "caption": ", ".join(str(r["label"]) for r in whole) or ", ".join(str(r["label"]) for r in regions if r.get("target")),
        "asked": any(r.get("target") for r in regions),
    }


def _box(region: Mapping[str, Any]) -> dict[str, Any]:
    left, top, right, bottom = region["box"]
    sides = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return sides | {"label": region["label"], "asked": bool(region.get("target"))}
