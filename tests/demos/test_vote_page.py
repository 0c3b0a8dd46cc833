"""Voting and labelling in Chromium: keys, buttons, undo, reload, a server that is killed, the end, hostile text."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmpo.datasets.load import load
from mmpo.demos.ballots import FILE, Ballots, opened, standing
from mmpo.demos.pool import Pool, entry_of, open_pool
from mmpo.demos.vote import vote_site
from mmpo.pair import text
from tests.demos.pools import picture_folder, text_pool
from tests.demos.test_votes_killed import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.slow
SECONDS = 60_000.0  # milliseconds, for machines that do other things, too


@contextlib.contextmanager
def visiting(browser: Browser, address: str) -> Iterator[Page]:
    """The page at an address, with its first comparison; in a visitor's own context."""
    context = browser.new_context()
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    page.on("dialog", lambda dialog: pytest.fail("a dialog was opened"))
    page.goto(address)
    page.locator("#vote-frame[data-comparison]").wait_for()
    yield page
    context.close()


def open_comparison(page: Page) -> str:
    return page.locator("#vote-frame").get_attribute("data-comparison") or ""


def press(page: Page, key: str) -> None:
    """Press a key, and wait until the page shows another comparison or the end."""
    before = open_comparison(page)
    page.keyboard.press(key)
    page.locator(f"#vote-frame:not([data-comparison='{before}']), #vote-frame:has(#vote-ballot[hidden])").wait_for()


def choices(folder: Path) -> list[str]:
    with closing(opened(folder / FILE, readonly=True)) as db:
        return [ballot.choice for ballot in standing(db)]


def test_keys_buttons_undo_reload_and_the_end(tmp_path: Path, browser: Browser, served: Callable[..., str]) -> None:
    pool = text_pool(7)
    with visiting(browser, served(vote_site(pool, tmp_path / "votes"))) as page:
        for key in ("1", "2", "0", "9", "ArrowLeft"):
            press(page, key)
        assert choices(tmp_path / "votes") == ["left", "right", "tie", "both_bad", "left"]
        press(page, "u")
        assert choices(tmp_path / "votes") == ["left", "right", "tie", "both_bad"]
        assert page.locator("#vote-progress").inner_text().strip() == "4 of 7 voted"
        before, sides = open_comparison(page), page.locator(".vote-sample").all_inner_texts()
        page.reload()
        page.locator(f"#vote-frame[data-comparison='{before}']").wait_for()
        assert page.locator(".vote-sample").all_inner_texts() == sides
        for button in ("#vote-right", "#vote-tie", "#vote-left"):
            page.locator(f"#vote-frame:not([data-comparison='{before}'])").wait_for() if button != "#vote-right" else None
            before = open_comparison(page)
            page.locator(button).click()
        page.get_by_text("You have voted on everything").wait_for()
        assert choices(tmp_path / "votes")[4:] == ["right", "tie", "left"]
        assert not page.get_by_text("aligned").count()  # nobody is named before the end
        page.locator("#vote-finish").click()
        page.locator("#vote-results table").first.wait_for()
        told = page.locator("#vote-results").inner_text()
        assert "7 votes by 1 voter" in told and "aligned wins" in told and "95 % interval" in told
        assert page.locator("#vote-results table").last.locator("tbody tr").count() == 7
        page.keyboard.press("1")
        page.locator("#vote-export button").first.click()
        page.locator("#vote-write").click()
        written = page.locator("#vote-written textarea")
        page.locator("#vote-written").wait_for()
        deadline = time.monotonic() + 60
        while "pairs" not in written.input_value() and time.monotonic() < deadline:
            page.wait_for_timeout(100)
    assert "7 rows = 4 used + 3 skipped" in written_of(tmp_path) and len(choices(tmp_path / "votes")) == 7


def written_of(tmp_path: Path) -> str:
    """What the export holds, as the ledger that the page showed would say it."""
    pairs, _ = load(tmp_path / "votes" / "pairs")
    said = choices(tmp_path / "votes")
    return f"{len(said)} rows = {len(pairs)} used + {len(said) - len(pairs)} skipped"


def test_early_end_has_to_be_confirmed(tmp_path: Path, browser: Browser, served: Callable[..., str]) -> None:
    with visiting(browser, served(vote_site(text_pool(3), tmp_path / "votes"))) as page:
        press(page, "1")
        page.locator("#vote-finish").click()
        page.get_by_text("2 are not voted on").wait_for()
        assert page.locator("#vote-ballot").is_visible()
        finished(page)
        page.reload()
        page.locator("#vote-results table").first.wait_for()  # the end stays the end


def finished(page: Page) -> str:
    """What the page tells at the end, which has to be confirmed within seconds, and a busy machine may take more."""
    table, deadline = page.locator("#vote-results table").first, time.monotonic() + SECONDS / 1000
    while not table.is_visible() and time.monotonic() < deadline:
        page.locator("#vote-finish").dispatch_event("click")  # which the button takes, too, when it is hidden by then
        page.wait_for_timeout(500)
    table.wait_for()
    return page.locator("#vote-results").inner_text().replace("\u00a0", " ")


@pytest.mark.parametrize("systems", [("base", "aligned"), ("a", "b", "c")])
def test_what_votes_that_agree_do_not_tell_is_said(
    tmp_path: Path, browser: Browser, served: Callable[..., str], systems: tuple[str, ...]
) -> None:
    """Two voters before, who always prefer the later name; of their votes some are on answers that are no more."""
    pool = text_pool(5, systems)
    ballots = Ballots(tmp_path / "votes", pool)
    for voter in ("ann", "bob"):
        while comparison := ballots.serve(voter):
            better = max(comparison.left, comparison.right, key=lambda entry: systems.index(entry.system))
            ballots.vote(voter, comparison.id, "left" if better == comparison.left else "right", "nonce-001")
    ballots.close()
    now = Pool(pool.source, tuple(entry for entry in pool.entries if entry.item != "4"))
    with visiting(browser, served(vote_site(now, tmp_path / "votes"))) as page:
        told = finished(page)
    each = len(systems) * (len(systems) - 1) // 2
    assert f"{10 * each} votes by 2 voters. {2 * each} of them are on answers that are not asked about any more" in told
    if len(systems) == 2:
        assert "not defined, every vote on what several people saw says the same" in told and " or more)" in told
        low = re.search(r"95 % interval (\d+ %) to 100 %", told)
        assert low and f"({low[1]} to 100 %)" in told, "one interval in the sentence and in the table"
    else:
        assert "Elo stands without an interval where the votes set no bound." in told and "(Krippendorff's alpha): 1.00" in told


def test_labelling_ranks_pictures(tmp_path: Path, browser: Browser, served: Callable[..., str]) -> None:
    source = picture_folder(tmp_path / "pictures", 4, ["all"]) / "all"
    with visiting(browser, served(vote_site(open_pool(source, "label"), tmp_path / "votes", "label"))) as page:
        for _ in range(6):
            page.locator(".vote-sample img").nth(1).wait_for()
            press(page, "1")
        page.locator("#vote-finish").click()
        page.locator("#vote-results table img").nth(3).wait_for()
        assert page.locator("#vote-results table").first.locator("tbody tr").count() == 4


SCRIPTS = (
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit=1'>",
    "javascript:window.hit=1",
    "</p><svg onload=window.hit=1>",
)


def test_hostile_text_is_text(tmp_path: Path, browser: Browser, served: Callable[..., str]) -> None:
    entries = [
        entry_of(f"{attack}{i}", f"{system}{attack}", (text(f"{attack} {i}"),), text(f"{attack} {system} {i}"), None)
        for i, attack in enumerate(SCRIPTS)
        for system in ("one", "two")
    ]
    pool = Pool(Path("/nowhere"), tuple(entries))
    with visiting(browser, served(vote_site(pool, tmp_path / "votes"))) as page:
        before = page.locator("script").count()
        for _ in SCRIPTS:
            assert page.locator("#vote-frame :is(script, svg, [onerror], [onload])").count() == 0
            assert any(attack in page.locator("#vote-prompt").inner_text() for attack in SCRIPTS)
            press(page, "2")
        page.locator("#vote-finish").click()
        page.locator("#vote-results table").first.wait_for()
        assert all(attack in page.locator("#vote-results").inner_text() for attack in SCRIPTS)
        assert page.locator("#vote-frame :is(script, svg, [onerror], [onload])").count() == 0
        assert page.locator("script").count() == before and page.locator("img[src=x]").count() == 0


def test_votes_alone_are_sent_again_after_a_login(tmp_path: Path, browser: Browser, served: Callable[..., str]) -> None:
    """Which may be another voter's: undo and finish, of no comparison, would be theirs."""
    sent: list[str] = []

    def turned_away(route: Route) -> None:
        """The first time; then the page is loaded anew, as after a login."""
        if route.request.method == "POST":
            sent.append(json.loads(route.request.post_data or "")["choice"])
        if route.request.method == "POST" and len(sent) == 1:
            route.fulfill(status=401, body="{}")
        else:
            route.continue_()

    with visiting(browser, served(vote_site(text_pool(2), tmp_path / "votes"))) as page:
        press(page, "1")
        page.route("**/vote", turned_away)
        for key, times in (("u", 1), ("2", 2)):
            sent.clear()
            with page.expect_event("load"):
                page.keyboard.press(key)
            page.locator("#vote-frame[data-comparison], #vote-frame:has(#vote-ballot[hidden])").wait_for()
            page.get_by_text(f"{times} of 2 voted").wait_for()
            assert sent == [{"u": "undo", "2": "right"}[key]] * times
    assert choices(tmp_path / "votes") == ["left", "right"]


@contextlib.contextmanager
def server(source: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`mmpo demo vote` in a process of its own, when it answers."""
    command = [sys.executable, "-m", "mmpo", "demo", "vote", str(source), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline: Any = time.monotonic() + 120
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/static/vote.js", timeout=30):
                break
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_server_comes_back_with_the_same_comparison(tmp_path: Path, browser: Browser) -> None:
    """A vote that is cast while the server is down is stored when it is back; the page never has to be loaded again by hand."""
    source, port = picture_folder(tmp_path / "samples"), free_port()
    with server(source, port) as first, visiting(browser, f"http://127.0.0.1:{port}/") as page:
        press(page, "1")
        before = open_comparison(page)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with server(source, port):
            page.wait_for_timeout(1000)
            page.locator(f"#vote-frame[data-comparison='{before}']").wait_for()
            press(page, "2")
            waiting = open_comparison(page)
        page.keyboard.press("0")  # while nobody answers
        page.get_by_text("Reconnecting").wait_for()
        with server(source, port):
            page.locator(f"#vote-frame:not([data-comparison='{waiting}'])[data-comparison]").wait_for()
        assert choices(source / "votes") == ["left", "right", "tie"]
