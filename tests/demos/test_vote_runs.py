"""Votes on the samples of real runs: the prompts that are exported are the ones the models were asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmpo.demos.pool import open_pool
from mmpo.pair import Block, text


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "vlm", "diffusion"])
def test_a_run_is_a_pool(modality: str, finished_run: Callable[[str], Path]) -> None:
    pool = open_pool(finished_run(modality))
    assert pool.systems == ["base", "aligned"] and pool.matchups and not pool.ledger.refused
    assert all(isinstance(entry.seed, int) for entry in pool.entries)
    assert all(a.seed == b.seed and a.prompt == b.prompt for a, b in pool.matchups)


def test_turns_are_what_was_asked(tmp_path: Path) -> None:
    """What vlm_sheet writes of a prompt is read as the same blocks, pictures by their pixels."""
    from mmpo import media
    from mmpo.evaluate import Samples
    from mmpo.modalities import vlm_sheet
    from tests.demos.pools import picture

    said = (text("Look:", "user"), Block("image", picture(3), role="user"), text("user: [image 1]\nassistant: no", "user"))
    before, after = (Samples.unjudged([text(answer, "assistant")]) for answer in ("a", "b"))
    vlm_sheet.write(tmp_path / "samples", [said], before, after)
    first = open_pool(tmp_path).entries[0]
    assert [(b.kind, b.role) for b in first.prompt] == [(b.kind, b.role) for b in said]
    assert [b.data for b in first.prompt if b.kind == "text"] == [b.data for b in said if b.kind == "text"]
    assert (media.pixels(first.prompt[1]) == picture(3)).all() and first.block == text("a", "assistant")
