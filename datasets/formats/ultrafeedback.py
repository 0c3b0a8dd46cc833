"""UltraFeedback: an instruction and its completions, each with a model's response, a score and ratings by aspect."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets.conversations import TABLES, Blocks, answer, note_others
from mmpo.datasets.fields import finite, list_field, shown, text_field
from mmpo.datasets.ledger import BadField, Ledger, Row, Skip, import_rows
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.tables import rows_of, write_json
from mmpo.errors import DataError
from mmpo.pair import text

CANDIDATES = ASPECTS = True  # what this format holds are candidates, with scores by aspect
COLUMNS = ("instruction", "prompt", "completions", "models")
KNOWN = ("model", "response", "annotations", "overall_score", "score", "fine-grained_score")
IMAGES = {"image", "img_path", "images"}  # with these it is VLFeedback
UNRATED = (None, "N/A", "")


def recognises(kind: str, columns: frozenset[str]) -> bool:
    return kind in TABLES and "completions" in columns and bool(columns & {"instruction", "prompt"}) and not columns & IMAGES


def ultrafeedback(
    path: Path,
    *,
    root: Path | None = None,
    ties: Literal["drop", "soft"] = "drop",
    aspect: str | None = None,
    ledger: Ledger,
) -> Iterator[Candidate]:
    """One Candidate a completion; `meta` keeps its model and its ratings by aspect.

    aspect: the rating that is the score, e.g. "helpfulness"; by default it is `overall_score` (or `score`), or the mean of
    the ratings where there is none. Completions without that score are left out and noted. ties: not used here; equal scores
    are the business of the pairing strategy. root: not used.
    """
    return import_rows(rows_of(path), lambda row: _candidates(row, aspect, ledger), ledger)


def _candidates(row: Row, aspect: str | None, ledger: Ledger) -> list[Candidate]:
    found = scored(row, (text(text_field(row, "instruction", "prompt")),), aspect, ledger)
    note_others(row, COLUMNS, ledger)
    return found


def scored(row: Row, prompt: Blocks, aspect: str | None, ledger: Ledger) -> list[Candidate]:
    """The completions of a row as Candidates; those without a score or text are left out and noted. Skips a row without any."""
    found = []
    for i, completion in enumerate(list_field(row, "completions")):
        if not isinstance(completion, dict):
            raise BadField(f"completions[{i}]", "an object with response and scores", shown(completion), "bad completions")
        given = _candidate(prompt, completion, f"completions[{i}]", aspect, ledger)
        if given is None or given.score is None:
            ledger.notes["completions without a score or text left out"] += 1
        else:
            found.append(given)
    if not found:
        raise Skip("no completion with a score" if aspect is None else f"no completion with a rating of {aspect}")
    return found


def _candidate(prompt: Any, completion: Row, where: str, aspect: str | None, ledger: Ledger) -> Candidate | None:
    ratings = _ratings(completion.get("annotations"), f"{where}.annotations", ledger)
    overall = next((completion[n] for n in ("overall_score", "score") if completion.get(n) not in UNRATED), None)
    score = None if overall is None else finite(overall, f"{where}.overall_score", written=True)
    if aspect is not None:
        score = ratings.get(aspect)
    elif score is None and ratings:
        score = sum(ratings.values()) / len(ratings)
    note_others(completion, KNOWN, ledger)
    meta: dict[str, Any] = {"model": completion["model"]} if completion.get("model") else {}
    meta |= {"aspects": ratings} if ratings else {}
    if overall is not None:
        meta["overall_score"] = finite(overall, f"{where}.overall_score", written=True)
    try:
        return Candidate(prompt, answer(completion.get("response"), f"{where}.response")[0], score, meta=meta)
    except Skip:
        return None


def _ratings(annotations: Any, where: str, ledger: Ledger) -> dict[str, float]:
    """Ratings by aspect, from {aspect: {"Rating": "4", ...}} or {aspect: 4}; those that are N/A are absent."""
    if annotations is None:
        return {}
    if not isinstance(annotations, dict):
        raise BadField(where, "an object of ratings by aspect", shown(annotations), "bad annotations")
    found = {}
    for aspect, told in annotations.items():
        rating = told.get("Rating") if isinstance(told, dict) else told
        if rating not in UNRATED:
            found[aspect] = finite(rating, f"{where}.{aspect}", written=True)
        if isinstance(told, dict) and any(v for k, v in told.items() if k != "Rating"):
            ledger.notes["rationales of ratings left out"] += 1
    return found


def write_ultrafeedback(rows: Iterable[Candidate], path: Path, ledger: Ledger | None = None) -> int:
    """Write candidates as JSON lines (or one list, by the name), those of a prompt in one row; returns the number of rows.

    Candidates of one prompt have to follow each other to share a row. Seeds other than 0 are left out and counted. Raises
    DataError for candidates that are not one text, and for prompts with roles.
    """
    grouped = itertools.groupby(rows, key=lambda c: tuple(b.digest for b in c.prompt))
    return write_json(path, (_row(list(group), ledger) for _, group in grouped))


def _row(group: list[Candidate], ledger: Ledger | None) -> dict[str, Any]:
    prompt = group[0].prompt
    if len(prompt) != 1 or prompt[0].role or any(b.kind != "text" for c in group for b in (*c.prompt, c.block)):
        raise DataError(f"prompt {shown(prompt[0].data)}: UltraFeedback holds one text and answers in text")
    completions = rated(group, "ultrafeedback", ledger)
    models = [c["model"] for c in completions if "model" in c]
    return {"instruction": prompt[0].data, "models": models, "completions": completions}


def rated(group: list[Candidate], format: str, ledger: Ledger | None) -> list[dict[str, Any]]:
    """Candidates as completions with their ratings; seeds other than 0 are left out and counted."""
    completions = []
    for candidate in group:
        ratings = {a: {"Rating": str(int(r) if r == int(r) else r)} for a, r in candidate.meta.get("aspects", {}).items()}
        completion = {"model": candidate.meta["model"]} if "model" in candidate.meta else {}
        completion |= {"response": candidate.block.data, "annotations": ratings}
        completions.append(completion | {"overall_score": candidate.meta.get("overall_score", candidate.score)})
        if candidate.seed and ledger is not None:
            ledger.notes[f"seeds left out: no place for them in {format}"] += 1
    return completions
