"""Answers for people: a page with the prompts and the base's and the aligned model's answers beside each other."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpo.checkpoint import write_atomic
from mmpo.evaluate import Samples
from mmpo.pair import Block

STYLE = "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:4px 8px;text-align:left;white-space:pre-wrap}"
HEAD = f'<!doctype html><meta charset="utf-8"><title>Base and aligned</title><style>{STYLE}</style>'


def lines(prompts: Sequence[tuple[Block, ...]], samples: Samples) -> list[dict[str, Any]]:
    """One record per generation: prompt, text, the judge's score (None without one), its verdict where it has one, and nats.

    A prompt that is more than one text without a role also has its turns, from which it can be made again.
    """
    found: list[dict[str, Any]] = []
    for i, (prompt, block) in enumerate(zip(prompts, samples.blocks, strict=True)):
        asked = "\n".join((f"{b.role}: " if b.role else "") + str(b.data) for b in prompt)
        score = float(samples.scores[i])
        found.append({"prompt": asked, "text": block.data, "score": None if math.isnan(score) else score})
        if len(prompt) > 1 or prompt[0].role:
            found[-1]["turns"] = [{"role": b.role, "text": b.data} for b in prompt]
        if samples.correct is not None:
            found[-1]["correct"] = bool(samples.correct[i])
        found[-1] |= {name: float(values[i]) for name, values in samples.nats.items()}
    return found


def write(folder: Path, sheet: str, **lines: Sequence[dict[str, Any]]) -> None:
    """One .jsonl for each set of records, by its name, and sheet.html."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in lines.items():
        written = [json.dumps(line, ensure_ascii=False) for line in own]
        write_atomic(folder / f"{name}.jsonl", ("\n".join(written) + "\n").encode())
    write_atomic(folder / "sheet.html", sheet.encode())


def page(base: Sequence[dict[str, Any]], aligned: Sequence[dict[str, Any]]) -> str:
    """HTML of one table; base and aligned: records of `lines` on the same prompts."""
    cells = [(b["prompt"], b["text"], a["text"]) for b, a in zip(base, aligned, strict=True)]
    rows = ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in cells]
    title = "<tr><th>prompt</th><th>base</th><th>aligned</th></tr>"
    return "\n".join([HEAD, "<table>", title, *rows, "</table>", ""])
