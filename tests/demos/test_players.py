"""Players side by side stay together: play, seek, pause and rate of one are those of its row, and one of them is loud."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, expect

from mmpo.demos.compare import compare_site
from mmpo.demos.systems import open_source
from tests import clips
from tests.demos.conftest import serving

pytestmark = pytest.mark.slow
APART = 0.1  # seconds
MADE = {
    "video": (".webm", lambda i: clips.video("webm", frames=72 + 12 * i)),  # 6 and 7 seconds
    "audio": (".wav", lambda i: clips.sound(seconds=6.0 + i)),
}


@pytest.fixture(params=list(MADE))
def page(browser: Browser, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page with two clips of one prompt."""
    suffix, make = MADE[request.param]
    for i, system in enumerate(("base", "aligned")):
        (tmp_path / "s" / system).mkdir(parents=True)
        (tmp_path / "s" / system / f"clip{suffix}").write_bytes(make(i))
    (tmp_path / "s" / "prompts.jsonl").write_text(json.dumps({"item": "clip", "prompt": "a walking square"}))
    with serving(compare_site(open_source(samples=tmp_path / "s"))) as url:
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.goto(url)
        players = opened.locator(f"{request.param}.shown")
        expect(players).to_have_count(2)
        wait(opened, lambda s: all(p["ready"] >= 3 for p in s))
        opened.mouse.click(5, 5)  # a page that nobody has touched may not play
        yield opened
        opened.close()


def state(page: Page) -> list[dict[str, Any]]:
    fields = "at: p.currentTime, paused: p.paused, muted: p.muted, rate: p.playbackRate, ready: p.readyState"
    return list(page.evaluate(f"Array.from(document.querySelectorAll('video.shown, audio.shown'), p => ({{{fields}}}))"))


def wait(page: Page, holds: Any, seconds: float = 20.0) -> list[dict[str, Any]]:
    for _ in range(int(seconds / 0.1)):
        if holds(found := state(page)):
            return found
        page.wait_for_timeout(100)
    raise AssertionError(f"it did not happen: {state(page)}")


def do(page: Page, which: int, what: str) -> None:
    page.evaluate(f"(() => {{ const player = document.querySelectorAll('video.shown, audio.shown')[{which}]; {what}; }})()")


def together(found: list[dict[str, Any]]) -> bool:
    return abs(found[0]["at"] - found[1]["at"]) <= APART


def test_players_stay_together(page: Page) -> None:
    do(page, 0, "player.play()")
    found = wait(page, lambda s: not any(p["paused"] for p in s) and s[0]["at"] > 0.8 and together(s))
    assert [p["muted"] for p in found] == [False, True]
    do(page, 0, "player.currentTime = 3.0")
    wait(page, lambda s: all(p["at"] >= 3.0 for p in s) and together(s))
    do(page, 0, "player.playbackRate = 0.5")
    wait(page, lambda s: all(p["rate"] == 0.5 for p in s))
    do(page, 0, "player.pause()")
    found = wait(page, lambda s: all(p["paused"] for p in s) and together(s))
    page.wait_for_timeout(300)
    assert [p["at"] for p in state(page)] == pytest.approx([p["at"] for p in found], abs=1e-3), "a pause is a pause"


def test_the_other_one_can_lead(page: Page) -> None:
    """Whoever is played while all are quiet takes the lead, and the sound."""
    do(page, 1, "player.currentTime = 2.0")
    wait(page, lambda s: all(abs(p["at"] - 2.0) <= APART for p in s))
    do(page, 1, "player.play()")
    found = wait(page, lambda s: not any(p["paused"] for p in s) and s[1]["at"] > 2.5 and together(s))
    assert [p["muted"] for p in found] == [True, False]
    do(page, 0, "player.muted = false")
    wait(page, lambda s: [p["muted"] for p in s] == [False, True])
    do(page, 1, "player.pause()")
    wait(page, lambda s: all(p["paused"] for p in s) and together(s))
