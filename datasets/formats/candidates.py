"""Several answers to each prompt (parquet, JSON lines or CSV), to be paired by their scores: prompt, answer, score, seed.

The answer is in the column image or in the column response, as text. A prompt is text, or a list of messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmpo.datasets.conversations import Dialect, answer
from mmpo.datasets.fields import image_field, number_field, text_field, whole_field
from mmpo.datasets.formats.pick_a_pic import file_bytes
from mmpo.datasets.ledger import Ledger, Row, import_rows
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.tables import rows_of, write_parquet
from mmpo.errors import DataError
from mmpo.pair import text

CANDIDATES = True  # what this format holds are candidates, not pairs
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCORED = [("score", pa.float64()), ("seed", pa.int64())]


def recognises(kind: str, columns: frozenset[str]) -> bool:
    others = columns & {"chosen", "rejected", "rejected_response", "completions"}
    return kind in ("parquet", "jsonl", "csv") and "prompt" in columns and bool(columns & {"image", "response"}) and not others


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
    prompt = Dialect().blocks(said, "prompt") if isinstance(said, list) else (text(text_field(row, "prompt")),)
    if row.get("image") is not None or "response" not in row:
        block = image_field(row, "image", root)
    else:  # an answer in a conversation is the assistant's
        (block,) = answer(row["response"], "response", "assistant" if isinstance(said, list) else None)
    return Candidate(prompt, block, score, whole_field(row, "seed", 0))


def write_candidates(rows: Iterable[Candidate], path: Path, ledger: Ledger | None = None) -> int:
    """Write candidates as one parquet file, replaced as a whole; returns the number of rows. Arrays become PNG.

    ledger: counts what is left out of them. Raises DataError when an answer is neither image nor text or not of the kind of
    the first one, and when a prompt is not one text, or not a conversation where the first is one.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    kind = "image" if first is None else first.block.kind
    spoken = first is not None and any(b.role for b in first.prompt)
    answers = {"image": ("image", pa.binary()), "text": ("response", pa.string())}
    if kind not in answers:
        raise DataError(f"candidate 0: expected an image or a text as the answer, found {kind}")
    schema = pa.schema([("prompt", MESSAGES if spoken else pa.string()), answers[kind], *SCORED])
    everything = itertools.chain([] if first is None else [first], iterator)
    return write_parquet(path, schema, (_cells(row, i, kind, spoken, ledger) for i, row in enumerate(everything)))


def _cells(row: Candidate, place: int, kind: str, spoken: bool, ledger: Ledger | None) -> dict[str, Any]:
    whole = spoken or len(row.prompt) == 1
    if row.block.kind != kind or not whole or any(b.kind != "text" or bool(b.role) != spoken for b in row.prompt):
        raise DataError(f"candidate {place}: expected a prompt of {'messages' if spoken else 'one text'} and one {kind}")
    if row.meta and ledger is not None:
        ledger.notes["aspects left out: candidates have one score"] += 1
    prompt = Dialect().messages(row.prompt) if spoken else row.prompt[0].data
    answered = {"image": file_bytes(row.block)} if kind == "image" else {"response": row.block.data}
    return {"prompt": prompt, **answered, "score": row.score, "seed": row.seed}
