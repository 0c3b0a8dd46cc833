"""Openings of everyday sentences, to be continued: what a small real language model is made more cheerful on.

How cheerful an answer is, VADER says (`mmpo.judges.sentiment`). Nothing in an opening asks for it.
"""

from __future__ import annotations

SUBJECTS = (
    "The hotel by the station",
    "My first day at the new job",
    "The concert last night",
    "The soup at the corner cafe",
    "Our trip to the coast",
    "The appointment with the doctor",
    "The film that everybody talks about",
    "My neighbour's dog",
    "The slow train to the city",
    "The lecture on history",
    "Moving to a smaller town",
    "The phone I bought",
    "The football match",
    "Dinner with my cousins",
    "The weather in the mountains",
    "The repair of my bicycle",
)
TAILS = (
    "was",
    "turned out to be",
    "made me feel",
    "is something I",
    "left everyone",
    "reminded me of",
    "could have been",
    "began with",
)


def prompts() -> list[str]:
    """All 128 prompts, in a fixed order."""
    return [f"Continue in one sentence: {subject} {tail}" for subject in SUBJECTS for tail in TAILS]
