"""The sentiment world: its prompts, how its candidates are made, and the shipped ones against VADER itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmpo.datasets.load import load_candidates
from mmpo.datasets.worlds import make_sentiment, sentiment
from mmpo.prepare import ASSETS

vader = pytest.importorskip("vaderSentiment.vaderSentiment")


def test_prompts_are_distinct_and_do_not_ask_for_cheer() -> None:
    prompts, analyzer = sentiment.prompts(), vader.SentimentIntensityAnalyzer()
    assert len(prompts) == len(set(prompts)) == 128
    assert all(abs(analyzer.polarity_scores(p)["compound"]) < 0.3 for p in prompts)


def test_candidates_are_sampled_and_judged(tmp_path: Path) -> None:
    make_sentiment.make(tmp_path, model="embedded", prompts=2, candidates=3)
    groups, _ = load_candidates(tmp_path / "candidates.parquet")
    rows = [c for group in groups.values() for c in group]
    assert len(groups) == 2 and len({c.seed for c in rows}) == len(rows) <= 6
    assert all(c.score is not None and -1 <= c.score <= 1 for c in rows)


def test_the_shipped_candidates_carry_vaders_scores() -> None:
    groups, ledger = load_candidates(ASSETS / "sentiment" / "candidates.parquet")
    rows, analyzer = [c for group in groups.values() for c in group], vader.SentimentIntensityAnalyzer()
    assert not ledger.skipped and {str(c.prompt[0].data) for c in rows} == set(sentiment.prompts())
    assert all(abs(c.value - analyzer.polarity_scores(str(c.block.data))["compound"]) <= 5e-5 for c in rows)
