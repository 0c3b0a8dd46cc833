"""Several answers to each prompt (parquet, JSON, JSON lines or CSV), to be paired by their scores: prompt, answer, score, seed.

The answer is in the column image or in the column response, as text. A prompt is text, or a list of messages. The images of
a prompt of text, in the column images, stand where it says <image>.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmpo.datasets.conversations import Dialect, answer
from mmpo.datasets.fields import image_field, list_field, number_field, shown, text_field, whole_field
from mmpo.datasets.ledger import BadField, Ledger, Row, import_rows
from mmpo.datasets.media_files import file_bytes
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.tables import rows_of, write_parquet
from mmpo.errors import DataError
from mmpo.pair import Block, text

CANDIDATES = True  # what this format holds are candidates, not pairs
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
Asked = Callable[[Sequence[Block]], tuple[str, dict[str, Any] | None]]  # what is expected, and the cells of a prompt
PLACE = "<image>"  # where an image of a prompt stands
SCORED = [("score", pa.float64()), ("seed", pa.int64())]


def recognises(kind: str, columns: frozenset[str]) -> bool:
    others = columns & {"chosen", "rejected", "rejected_response", "completions"}
    return (
        kind in ("parquet", "json", "jsonl", "csv")
        and "prompt" in columns
        and bool(columns & {"image", "response"})
        and not others
    )


def candidates(
    path: Path, *, root: Path | None = None, ties: Literal["drop", "soft"] = "drop", ledger: Ledger
) -> Iterator[Candidate]:
    """One Candidate a row. image: bytes, Hugging Face's {"bytes", "path"}, or a path under `root`. response: text.

    `score` may be absent (a judge is then needed before pairing) and `seed` is 0 when absent. A blank response is skipped.
    ties: not used here; equal scores are the business of the pairing strategy.
    """
    base = root or (path if path.is_dir() else path.parent)
    return import_rows(rows_of(path), lambda row: [_candidate(row, base)], ledger)


def _candidate(row: Row, root: Path) -> Candidate:
    score = None if row.get("score") is None else number_field(row, "score")
    said = row.get("prompt")
    prompt = Dialect().blocks(said, "prompt") if isinstance(said, list) else _prompt(row, root)
    if row.get("image") is not None or "response" not in row:
        block = image_field(row, "image", root)
    else:  # an answer in a conversation is the assistant's
        (block,) = answer(row["response"], "response", "assistant" if isinstance(said, list) else None)
    return Candidate(prompt, block, score, whole_field(row, "seed", 0))


def _prompt(row: Row, root: Path) -> tuple[Block, ...]:
    """A prompt of text, with its images in their places."""
    first, *words = text_field(row, "prompt").split(PLACE) if row.get("images") else [text_field(row, "prompt")]
    given = list_field(row, "images") if row.get("images") else []
    if len(words) != len(given):
        raise BadField("prompt", f"{PLACE} for each of {len(given)} images", shown(row["prompt"]), "wrong number of images")
    blocks = [text(first)] if first else []
    for i, after in enumerate(words):
        blocks += [image_field({"images": given[i]}, "images", root), *([text(after)] if after else [])]
    return tuple(blocks)


def write_candidates(rows: Iterable[Candidate], path: Path, ledger: Ledger | None = None) -> int:
    """Write candidates as one parquet file, replaced as a whole; returns the number of rows. Arrays become PNG.

    ledger: counts what is left out of them. Raises DataError when an answer is neither image nor text or not of the kind of
    the first one, and when a prompt is not one text, or not a conversation where the first is one, or has no images where the
    first has some.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    kind = "image" if first is None else first.block.kind
    spoken = first is not None and any(b.role for b in first.prompt)
    seen = first is not None and any(b.kind == "image" for b in first.prompt)
    answers = {"image": ("image", pa.binary()), "text": ("response", pa.string())}
    if kind not in answers:
        raise DataError(f"candidate 0: expected an image or a text as the answer, found {kind}")
    images = [("images", pa.list_(pa.binary()))] if seen else []
    schema = pa.schema([("prompt", MESSAGES if spoken else pa.string()), *images, answers[kind], *SCORED])
    everything = itertools.chain([] if first is None else [first], iterator)
    asked = _messages if spoken else _pictured if seen else _plain
    return write_parquet(path, schema, (_cells(row, i, kind, asked, ledger) for i, row in enumerate(everything)))


def _cells(row: Candidate, place: int, kind: str, asked: Asked, ledger: Ledger | None) -> dict[str, Any]:
    expected, prompt = asked(row.prompt)
    if row.block.kind != kind or prompt is None:
        raise DataError(f"candidate {place}: expected a prompt of {expected} and one {kind}")
    if row.meta and ledger is not None:
        ledger.notes["aspects left out: candidates have one score"] += 1
    answered = {"image": file_bytes(row.block)} if kind == "image" else {"response": row.block.data}
    return {**prompt, **answered, "score": row.score, "seed": row.seed}


def _plain(prompt: Sequence[Block]) -> tuple[str, dict[str, Any] | None]:
    good = len(prompt) == 1 and prompt[0].kind == "text" and not prompt[0].role
    return "one text", {"prompt": prompt[0].data} if good else None


def _messages(prompt: Sequence[Block]) -> tuple[str, dict[str, Any] | None]:
    good = all(b.kind == "text" and b.role for b in prompt)
    return "messages", {"prompt": Dialect().messages(prompt)} if good else None


def _pictured(prompt: Sequence[Block]) -> tuple[str, dict[str, Any] | None]:
    """What reads back as the same blocks: no two texts in a row, and no text that has PLACE in it."""
    words = [str(b.data) for b in prompt if b.kind == "text"]
    apart = all("image" in (a.kind, b.kind) for a, b in itertools.pairwise(prompt))
    images = [file_bytes(b) for b in prompt if b.kind == "image"]
    kinds = bool(images) and len(images) + len(words) == len(prompt) and not any(b.role for b in prompt)
    cell = "".join(PLACE if b.kind == "image" else str(b.data) for b in prompt)
    good = kinds and apart and not any(PLACE in w for w in words)
    return f"images and texts without {PLACE}", {"prompt": cell, "images": images} if good else None
