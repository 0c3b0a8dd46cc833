"""Every page at 360 and 1920 pixels, light and dark: nothing serious by axe-core, nothing wider than the window, no jump.

Screenshots go to the folder $MMPO_SCREENSHOTS; docs/images/demo_*.png are made that way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("axe_playwright_python")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FilePayload, Page, expect

from mmpo.demos import accounts, pool
from mmpo.demos.compare import compare_site
from mmpo.demos.site import Site
from mmpo.demos.systems import Source
from mmpo.demos.vote import vote_site
from mmpo.demos.worker import Worker
from mmpo.media import encode
from tests.demos.conftest import serving
from tests.demos.sample_folders import picture_samples, text_samples
from tests.demos.sources import PICTURES, WORDS, paints, says
from tests.vlm_families import photo

pytestmark = pytest.mark.slow
SIZES = {360: 740, 1920: 1080}
SCHEMES: tuple[Any, ...] = ("light", "dark")
ANSWERS = [(f"q{i}", f"What is {i} + {i}?", {"base": f"It is {2 * i}.", "aligned": f"{2 * i + 1}, I think."}) for i in range(3)]


def test_axe_would_find_something(browser: Browser) -> None:
    page = browser.new_page()
    page.set_content(
        "<html lang=en><title>t</title><main><input><img src=x><p style='color:#999;background:#fff'>pale</p></main>"
    )
    assert {found.split()[1].rstrip(":") for found in findings(page)} >= {"label", "image-alt", "color-contrast"}
    page.close()


def findings(page: Page) -> list[str]:
    """What axe-core calls serious or critical, with the elements."""
    found = Axe().run(page).response["violations"]
    return [
        f"{v['impact']} {v['id']}: "
        + " | ".join(n["html"][:160] + " :: " + n.get("failureSummary", "")[:160] for n in v["nodes"][:4])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


def too_wide(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextmanager
def opened(browser: Browser, url: str, width: int, scheme: Any) -> Iterator[Page]:
    context = browser.new_context(
        viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()


def look(browser: Browser, url: str, name: str, folder: Path, ready: Callable[[Page], None]) -> None:
    """All four looks at a page, each with a screenshot; all problems in one message."""
    shots = Path(os.environ.get("MMPO_SCREENSHOTS") or folder)
    shots.mkdir(parents=True, exist_ok=True)
    problems = []
    for width in SIZES:
        for scheme in SCHEMES:
            with opened(browser, url, width, scheme) as page:
                ready(page)
                page.screenshot(path=shots / f"demo_{name}_{width}_{scheme}.png")
                found = findings(page) + ([f"wider than the window by {over}"] if (over := too_wide(page)) > 0 else [])
                problems += [f"{width} {scheme}: {problem}" for problem in found]
    assert not problems, "\n".join(problems)


def vote_page(folder: Path, kind: str) -> Site:
    source = picture_samples(folder / "samples") if kind == "pictures" else text_samples(folder / "samples", ANSWERS)
    return vote_site(pool.open_pool(source, "vote"), folder / "votes", "vote")


def voting(page: Page) -> None:
    expect(page.locator("#vote-frame[data-comparison]")).to_be_visible(timeout=30_000)
    page.wait_for_timeout(300)  # pictures


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_vote(browser: Browser, tmp_path: Path, kind: str) -> None:
    with serving(vote_page(tmp_path, kind)) as url:
        look(browser, url, f"vote_{kind}", tmp_path, voting)


def test_votes_results(browser: Browser, tmp_path: Path) -> None:
    def ready(page: Page) -> None:
        voting(page)
        for left in range(3):
            expect(page.locator("#vote-progress")).to_contain_text(f"{left} of 3")
            page.keyboard.press("1")
        expect(page.locator("#vote-progress")).to_contain_text("3 of 3")
        page.click("#vote-finish")
        expect(page.locator("#vote-results")).to_be_visible()

    with serving(vote_page(tmp_path, "pictures")) as url:
        look(browser, url, "results", tmp_path, ready)


def test_label(browser: Browser, tmp_path: Path) -> None:
    source = picture_samples(tmp_path / "samples") / "base"
    with serving(vote_site(pool.open_pool(source, "label"), tmp_path / "votes", "label")) as url:
        look(browser, url, "label", tmp_path, voting)


@pytest.mark.parametrize(
    ("kind", "source", "opener"), [("text", replace(WORDS, pictures=True), says), ("pictures", PICTURES, paints)]
)
def test_compare(browser: Browser, tmp_path: Path, kind: str, source: Source, opener: Callable[..., Any]) -> None:
    def ready(page: Page) -> None:
        status = page.locator("#compare-status textarea, #compare-status input")
        expect(status).to_have_value(re.compile("Ready"), timeout=60_000)
        if source.pictures:
            picture: FilePayload = {"name": "a.png", "mimeType": "image/png", "buffer": encode(photo(1, (160, 120)))}
            page.set_input_files("#compare-upload input[type=file]", picture)
            expect(page.locator("#compare-pictures img.shown")).to_have_count(1)
        page.fill("#compare-prompt textarea", "a red square left of a blue circle")
        page.click("#compare-run")
        expect(status).to_have_value(re.compile("Done"), timeout=60_000)
        expect(page.locator("#compare-run")).to_be_enabled()

    (files := tmp_path / "files").mkdir()
    worker = Worker(source, files, files, opener=opener)
    worker.start()
    with serving(compare_site(source, worker)) as url:
        look(browser, url, f"compare_{kind}", tmp_path, ready)


def test_login(browser: Browser, tmp_path: Path) -> None:
    people = tmp_path / "accounts"
    people.touch(0o600)
    people.write_text(accounts.line("tim", "correct horse battery"))
    with serving(vote_page(tmp_path, "text"), people=accounts.read(people)) as url:
        look(browser, url, "login", tmp_path, lambda page: expect(page.locator("#password")).to_be_visible())


def test_votes_do_not_move_the_buttons(browser: Browser, tmp_path: Path) -> None:
    items = [(f"q{i}", "p", {"base": "word " * (400 if i else 1), "aligned": f"short {i}"}) for i in range(3)]
    site = vote_site(pool.open_pool(text_samples(tmp_path / "samples", items), "vote"), tmp_path / "votes", "vote")
    with serving(site) as url, opened(browser, url, 1920, "light") as page:
        voting(page)
        places = []
        for left in range(3):
            expect(page.locator("#vote-progress")).to_contain_text(f"{left} of 3")
            places.append(page.locator("#vote-left").bounding_box())
            page.keyboard.press("1")
        assert places[0] == places[1] == places[2]
