"""From a run to a better run in one test: look at every modality, vote with the keyboard, write the votes, train on them.

README's picture of two models is made here, of the whole run of the default: MMPO_RUNS=FOLDER MMPO_SCREENSHOTS=docs/images.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("gradio")
pytest.importorskip("axe_playwright_python")
from playwright.sync_api import Browser, Page, expect

from mmpo import cli
from mmpo.demos import pool
from mmpo.demos.compare import compare_site, open_source
from mmpo.demos.vote import vote_site
from mmpo.find import names
from tests.demos.conftest import SHORT, serving
from tests.demos.test_axe import findings

pytestmark = pytest.mark.slow
LONG = os.environ.get("MMPO_RUNS", "")  # a folder of whole runs by modality, for screenshots that show something
KEYS = ["1", "2", "ArrowLeft", "ArrowRight"] * 4 + ["1", "2", "0", "9"]  # 18 that prefer one, a tie, and both bad


def compare(page: Page, url: str, modality: str, shots: Path) -> None:
    """A held-out prompt, both answers to it, and how much likelier each has become."""
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(url)
    status = page.locator("#compare-status textarea, #compare-status input")
    expect(status).to_have_value(re.compile("Ready"), timeout=240_000)
    page.wait_for_timeout(1500)  # the list of prompts, which comes with the same answer, closes when it is filled
    page.click("#compare-held input")
    page.get_by_role("option").nth(1).click()
    expect(page.locator("#compare-prompt textarea")).not_to_have_value("")
    page.click("#compare-run")
    expect(status).to_have_value(re.compile("Done"), timeout=240_000)
    expect(page.locator("#compare-run")).to_be_enabled()
    expect(page.locator(".compare-card:visible h2")).to_have_text(["base", "aligned"])
    for told in page.locator(".compare-told:visible").all():
        expect(told).to_contain_text("Log-ratio")
    expect(page.locator("#compare-curves img").first).to_be_visible()
    page.set_viewport_size({"width": 1280, "height": 1400})
    page.screenshot(path=shots / f"demo_compare_{modality}.png")
    assert findings(page) == []


def vote(page: Page, url: str) -> None:
    """One vote a key; one of them taken back and given again."""
    page.goto(url)
    for done, key in enumerate(KEYS):
        expect(page.locator("#vote-progress")).to_contain_text(f"{done} of {len(KEYS)}", timeout=60_000)
        if done == 3:
            page.keyboard.press("u")
            expect(page.locator("#vote-progress")).to_contain_text("2 of")
            page.keyboard.press(KEYS[2])
            expect(page.locator("#vote-progress")).to_contain_text("3 of")
        page.keyboard.press(key)
    expect(page.locator("#vote-progress")).to_contain_text(f"{len(KEYS)} of {len(KEYS)}")
    page.click("#vote-finish")
    expect(page.locator("#vote-results")).to_contain_text("aligned")


def test_look_vote_write_train(browser: Browser, finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    shots = Path(os.environ.get("MMPO_SCREENSHOTS") or tmp_path)
    assert names("modalities") == sorted(SHORT), "every modality that exists"
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for modality in SHORT:
        whole = Path(LONG, modality)
        run = whole if LONG and whole.is_dir() else finished_run(modality)
        with serving(compare_site(open_source(run=run))) as url:
            compare(page, url, modality, shots)
    votes = tmp_path / "votes"
    with serving(vote_site(pool.open_pool(finished_run("diffusion"), "vote"), votes, "vote")) as url:
        vote(page, url)
    page.close()
    assert cli.main(["demo", "export", str(votes), "--to", "mmpo", "--out", str(tmp_path / "pairs")]) == 0
    assert cli.main(["data", "validate", str(tmp_path / "pairs")]) == 0
    out = tmp_path / "run"
    words = [word for word in SHORT["diffusion"] if not word.startswith(("eval.pairs", "data."))]
    given = [f"data.path={tmp_path / 'pairs'}", "data.pairing=null", "data.heldout=0.05", f"out={out}"]
    assert cli.main(["train", "--modality", "diffusion", *words, *given]) == 0
    ledger = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert ledger["pairs"]["train"] + ledger["pairs"]["heldout"] == len(KEYS) - 2, "a tie and both bad are no pairs"
