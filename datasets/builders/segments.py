"""RLHF-V: what people corrected in an answer, as spans that count more than the rest (dense DPO, DDPO; arXiv 2312.00849).

The rejected answer is the model's, the chosen one the same with its errors corrected. The two are aligned; where a run of
units was replaced by another one, both runs weigh gamma in the likelihoods of policy and reference and everything else 1. The
objective's slot `weights: spans` does the rest. The paper's likelihood, divided by N = |unchanged| + gamma |changed|, is

    objective: [{loss: dpo, beta: 0.5, weights: spans, reduce: mean}]      # preset paper, gamma 5

and that of its code, which does not divide, `[{loss: dpo, beta: 0.1, weights: spans}]` (preset code, gamma 1.1).

Behaviour checked against thunlp/Muffin@77abdf5 utils/diff_lib.py, which aligns token ids; so does preset code. Preset paper
aligns words unless it is given a tokenizer, so that pairs belong to no model. One thing is not as there: difflib's heuristic
for long sequences, by which every unit that makes up more than 1 % of 200 or more (articles, full stops) is taken for junk, is
off.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpo.datasets.stages import Dropped, Record, Stage, each
from mmpo.datasets.tools import Tools
from mmpo.pair import Pair, Span

NEEDS: frozenset[str] = frozenset()
FOLDERS = ("tokenizer",)
GAMMA = {"paper": 5.0, "code": 1.1}
WORD = re.compile(r"\w+|[^\w\s]")

Run = tuple[int, int]  # units, or characters, from the first to behind the last
Units = Callable[[str], tuple[list[Any], list[Run]]]  # a text as comparable units, and the characters of each


def segments(
    tools: Tools,
    *,
    preset: Literal["paper", "code"] = "paper",
    segment_weight: float | None = None,
    units: Literal["words", "characters", "tokens"] | None = None,
    tokenizer: str | None = None,
    min_block: int = 3,
    count_insert_delete: bool = False,
) -> list[Stage]:
    """Pairs with spans of what differs, from rows that have two sides.

    preset: whose gamma; segment_weight: another one. units: what is aligned: words and signs, characters (for writing without
    blanks), or the tokens of the `tokenizer` in a local folder or in the hub's cache; None: tokens where there is a tokenizer,
    words otherwise. Preset code needs one of the two said, as the code aligns token ids. min_block: runs of equal units shorter
    than this are taken for a part of the change around them. count_insert_delete: what was only inserted or deleted weighs
    gamma too, which the code does not do. Raises ValueError for a weight that is no finite number >= 0, for min_block < 1, for
    tokens without a tokenizer, or the reverse, and for a folder that holds none.
    """
    weight = GAMMA[preset] if segment_weight is None else segment_weight
    Span(0, 1, weight)  # refuses what no span can weigh
    if min_block < 1:
        raise ValueError(f"min_block: expected at least 1, found {min_block}")
    if preset == "code" and units is None and tokenizer is None:
        raise ValueError("preset code: aligns token ids: give tokenizer=DIR, the model's folder, or units=words to align words")
    units = units or ("tokens" if tokenizer else "words")
    if (units == "tokens") != (tokenizer is not None):
        raise ValueError(f"units: {units!r} with tokenizer {tokenizer!r}: tokens need a tokenizer, and nothing else does")
    split = _tokens(tokenizer) if tokenizer else _characters if units == "characters" else _words

    def mark(record: Record, random: np.random.Generator) -> Record:
        pair = _source(record)
        rejected, chosen = (str(side[0].data) for side in (pair.rejected, pair.chosen))
        found = changes(rejected, chosen, split, min_block, count_insert_delete)
        spans = {side: tuple(Span(a, b, weight) for a, b in found[side]) for side in ("chosen", "rejected")}
        told = {"segments": {side: len(s) for side, s in spans.items()}, "segment_weight": weight}
        return record.having(told, pair=dataclasses.replace(pair, spans=spans))

    return [each("spans", mark)]


def _source(record: Record) -> Pair:
    """The row's two sides, one text each and not the same."""
    pair = record.fields.get("source")
    if not isinstance(pair, Pair) or not pair.chosen or not pair.rejected:
        raise Dropped("no two sides to compare")
    if any(len(side) != 1 or side[0].kind != "text" for side in (pair.chosen, pair.rejected)):
        raise Dropped("a side that is not one text")
    if pair.chosen[0].data == pair.rejected[0].data:
        raise Dropped("identical sides")
    return pair


def changes(rejected: str, chosen: str, split: Units, min_block: int, count_insert_delete: bool) -> dict[str, list[Run]]:
    """The characters of each side that were changed, in order and apart from each other."""
    (before, places), (after, their_places) = split(rejected), split(chosen)
    marked: dict[str, list[Run]] = {"rejected": [], "chosen": []}
    for a, b in gaps(before, after, min_block):
        if (a[0] < a[1] and b[0] < b[1]) or count_insert_delete:
            marked["rejected"] += _spelled(a, places)
            marked["chosen"] += _spelled(b, their_places)
    return marked


def gaps(before: Sequence[Any], after: Sequence[Any], min_block: int) -> list[tuple[Run, Run]]:
    """What lies between the common blocks of at least `min_block` units: (first, behind the last) on both sides."""
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    found, i, j = [], 0, 0
    for block in [b for b in blocks[:-1] if b.size >= min_block] + [blocks[-1]]:
        if (i, j) != (block.a, block.b):
            found.append(((i, block.a), (j, block.b)))
        i, j = block.a + block.size, block.b + block.size
    return found


def _spelled(run: Run, places: Sequence[Run]) -> list[Run]:
    """The characters of a run of units, as a list with at most one item."""
    inside = [place for place in places[run[0] : run[1]] if place[0] < place[1]]
    return [(inside[0][0], inside[-1][1])] if inside else []


def _words(words: str) -> tuple[list[Any], list[Run]]:
    found = list(WORD.finditer(words))
    return [m.group() for m in found], [m.span() for m in found]


def _characters(words: str) -> tuple[list[Any], list[Run]]:
    return list(words), [(i, i + 1) for i in range(len(words))]


def _tokens(folder: str) -> Units:
    """The token ids of a fast tokenizer and what they spell. Raises ValueError for a slow one, which does not tell."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        found = "what is there is none" if Path(folder).is_dir() else "there is no such folder"
        raise ValueError(f"tokenizer: expected a local folder with a fast tokenizer, found {folder}: {found}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {folder} has no fast tokenizer, which tells what each token spells; use units: words")

    def split(words: str) -> tuple[list[Any], list[Run]]:
        found = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], [tuple(place) for place in found["offset_mapping"]]

    return split
