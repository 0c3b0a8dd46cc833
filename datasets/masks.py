"""Answers with holes: which words tell what a picture shows, and whether a model that masked them changed anything else."""

from __future__ import annotations

import re

import numpy as np

MASK = "[MASK]"
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

# English words that say nothing about a picture by themselves. Prepositions are among them: masked, they would join what stands
# on both sides of them, and a hole of half a sentence can be filled with anything.
_FUNCTION_WORDS = """
    a an the this that these those there here it its it's he she they them their his her him we us our you your i me my is
    are was were be been being am do does did done has have had having can could may might must shall should will would and
    or but nor so yet if then than as because while although though since when where which who whom whose what how why of to
    for by with from at in on into onto over under above below behind before beside between near through across around along
    against inside outside up down off out upon beneath toward towards within not no yes also too very more most some any
    each every both either neither all such same other another just only even still already appears appear seems seem looks
    look shows show shown see seen visible likely possibly probably image picture photo photograph scene answer
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def content_segments(text: str, share: float, random: np.random.Generator) -> list[tuple[int, int]]:
    """Character ranges of runs of words that are no function words, with only spaces inside; a `share` of them, at least one.

    Empty where the text has no such word.
    """
    runs: list[tuple[int, int]] = []
    for word in _WORD.finditer(text):
        if word[0].lower() in FUNCTION_WORDS:
            continue
        if runs and runs[-1][1] < word.start() and text[runs[-1][1] : word.start()].isspace():
            runs[-1] = (runs[-1][0], word.end())
        else:
            runs.append(word.span())
    if not runs:
        return []
    kept = random.permutation(len(runs))[: max(1, round(share * len(runs)))]
    return [runs[i] for i in sorted(kept)]


def masked(text: str, segments: list[tuple[int, int]]) -> str:
    """The text with each segment replaced by [MASK]."""
    for start, end in reversed(segments):
        text = text[:start] + MASK + text[end:]
    return text


def segments_of(masked: str, text: str) -> list[tuple[int, int]] | None:
    """Where the masks of `masked` stand in `text`; None where the two differ in anything but the masks, or there is none.

    A mask stands for at least one character, and for as few as possible.
    """
    pieces = masked.split(MASK)
    if len(pieces) == 1 or not text.startswith(pieces[0]):
        return None
    found, at = [], len(pieces[0])
    for piece in pieces[1:-1]:
        here = text.find(piece, at + 1)
        if here < 0:
            return None
        found.append((at, here))
        at = here + len(piece)
    last = len(text) - len(pieces[-1])
    return [*found, (at, last)] if last > at and text.endswith(pieces[-1]) else None


def fill(continuation: str, literal: str, words: int) -> str:
    """What a continuation puts into a hole: up to the words that follow it, else as many telling words as stood there.

    literal: the text between this hole and the next. words: how many the hole had. Nothing beyond the sentence is taken, and no
    function words at the end; empty where nothing telling was said.
    """
    first = _WORD.search(literal)
    follows = re.search(rf"\b{re.escape(first[0])}\b", continuation, re.IGNORECASE) if first else None
    cut = continuation[: follows.start()] if follows else continuation
    stop = re.search(r"[.!?;:\n]", cut)
    found = re.findall(r"\S+", cut[: stop.start()] if stop else cut)
    telling = [at for at, word in enumerate(found) if word.strip(",\"'()").lower() not in FUNCTION_WORDS]
    if not (follows and len(telling) <= 2 * words):
        telling = telling[:words]
    return " ".join(found[: telling[-1] + 1]).rstrip(",") if telling else ""
