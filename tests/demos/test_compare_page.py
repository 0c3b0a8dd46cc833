"""The page of `mmpo demo compare` in a browser, on answers that need no model, and on real runs of every modality."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Locator, Page, expect

from mmpo import media
from mmpo.demos import cards, compare
from mmpo.demos.asking import clamped, label_of
from mmpo.demos.compare import compare_site
from mmpo.demos.systems import Source, open_source
from mmpo.demos.worker import Event, Worker
from mmpo.find import names
from tests.demos.conftest import serving
from tests.demos.sample_folders import picture_samples, text_samples
from tests.demos.sources import PICTURES, WORDS, cannot, paints, says
from tests.vlm_families import photo

HOSTILE = "<script>document.title='x'</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) **b** $$c$$"


@contextmanager
def compared(browser: Browser, tmp_path: Path, source: Source, opener: Callable[..., Any] | None) -> Iterator[Page]:
    """The page, once its models are ready; nothing may be logged as an error by the browser."""
    worker = None
    if opener is not None:
        worker = Worker(source, tmp_path, tmp_path, opener=opener)
        worker.start()
    with serving(compare_site(source, worker)) as url:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: dialog.dismiss())
        page.on("dialog", lambda _: problems.append("a dialog"))
        page.goto(url)
        yield page
        page.close()
    assert not problems


def status(page: Page, words: str, seconds: float = 60) -> None:
    expect(page.locator("#compare-status textarea, #compare-status input")).to_have_value(
        re.compile(words), timeout=1000 * seconds
    )


def said(answer: Locator) -> str:
    """The text of an answer, whatever pieces it is coloured in."""
    return "".join(answer.locator(".textfield .text").all_text_contents())


def ask(page: Page, words: str) -> None:
    page.fill("#compare-prompt textarea", words)
    page.click("#compare-run")


@pytest.mark.slow
def test_answers_stand_side_by_side_with_their_tokens_in_colour(browser: Browser, tmp_path: Path) -> None:
    with compared(browser, tmp_path, WORDS, says) as page:
        status(page, "Ready")
        page.locator("#compare-seeds input[type=number]").fill("2")
        page.locator("#compare-seeds input[type=number]").press("Enter")
        ask(page, HOSTILE)
        status(page, "Done")
        answers = page.locator(".compare-words:visible")
        expect(answers).to_have_count(4)
        for index in range(4):  # a line for each seed, in it a card for each system
            assert said(answers.nth(index)) == f"{HOSTILE} {index // 2}"
        expect(page.locator(".compare-told:visible").first).to_contain_text("Log-ratio +0.50 nats")
        expect(page.locator(".compare-told:visible").first).to_contain_text("the end of the answer +0.50")
        expect(page.locator(".compare-card:visible h2")).to_have_text(["base", "aligned"] * 2)
        assert page.locator(".compare-words:visible script, .compare-words:visible img").count() == 0
        assert page.title() == "Compare models"


@pytest.mark.slow
def test_held_out_prompts_stop_and_errors(browser: Browser, tmp_path: Path) -> None:
    with compared(browser, tmp_path, WORDS, says) as page:
        status(page, "Ready")
        page.click("#compare-run")
        status(page, "Write a prompt")
        page.click("#compare-held input")
        page.get_by_role("option", name="a held-out prompt").click()
        expect(page.locator("#compare-prompt textarea")).to_have_value("a held-out prompt")
        page.click("#compare-run")
        status(page, "Done")
        ask(page, "long")
        expect(page.locator("#compare-run")).to_be_disabled()
        status(page, "step")
        for words in ("", "another one"):  # by the key, as the button is grey
            page.fill("#compare-prompt textarea", words)
            with page.expect_response(re.compile("/run/predict")):  # which sets the buttons anew
                page.press("#compare-prompt textarea", "Shift+Enter")
            expect(page.get_by_text("Your comparison still runs")).to_have_count(1)
            page.get_by_test_id("toast-close").dispatch_event("click")
            expect(page.get_by_text("Your comparison still runs")).to_have_count(0)  # one at a time, as they go by themselves
        expect(page.locator("#compare-run")).to_be_disabled()
        page.click("#compare-stop")
        status(page, "Stopped")
        expect(page.locator("#compare-run")).to_be_enabled()
        ask(page, "fail")
        status(page, "no such word")
        ask(page, "crash")
        status(page, "was ended by SIGKILL")
        ask(page, "again")
        status(page, "Done")


@pytest.mark.slow
def test_models_that_cannot_be_opened_are_a_message(browser: Browser, tmp_path: Path) -> None:
    with compared(browser, tmp_path, WORDS, cannot) as page:
        status(page, "this model is not there")


@pytest.mark.slow
def test_pictures_have_maps_and_rewards(browser: Browser, tmp_path: Path) -> None:
    with compared(browser, tmp_path, PICTURES, paints) as page:
        status(page, "Ready")
        ask(page, "a picture")
        status(page, "Done")
        pictures = page.locator(".compare-row:visible img.shown")
        expect(pictures).to_have_count(6)  # of each system the sample, its map and its strip
        expect(page.get_by_alt_text("Answer of aligned, seed 0")).to_be_visible()
        expect(
            page.get_by_alt_text("Log-ratio from nearly clean to nearly noise: +1.00, no draw, \N{MINUS SIGN}1.00 nats").first
        ).to_be_visible()
        expect(page.locator(".compare-told:visible")).to_contain_text(
            ["Reward 0.25, wrong. Log-ratio +1.50", "Reward 0.75, right."]
        )
        for index in range(6):
            assert pictures.nth(index).evaluate("image => image.complete && image.naturalWidth") > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "text"])
def test_ready_made_samples_are_browsed(browser: Browser, tmp_path: Path, kind: str) -> None:
    answers = [(f"t{i}", f"{HOSTILE} {i}", {"a <b>": f"{HOSTILE} a{i}", "c": f"c{i}"}) for i in range(2)]
    folder = tmp_path / "s"
    source = open_source(samples=picture_samples(folder) if kind == "image" else text_samples(folder, answers))
    with compared(browser, tmp_path, source, None) as page:
        expect(page.locator(".compare-card:visible h2")).to_have_text(list(source.systems))
        shown = page.locator("img.shown" if kind == "image" else ".compare-words:visible .textfield")
        expect(shown.last).to_be_visible(timeout=30_000)
        first = shown.last.get_attribute("src")
        page.click("#compare-item input")
        page.get_by_role("option").nth(1).click()
        if kind == "image":
            expect(shown.last).not_to_have_attribute("src", str(first), timeout=30_000)
            expect(page.locator(".compare-row:visible img.shown")).to_have_count(2)
            assert page.locator("img.shown").last.evaluate("image => image.complete && image.naturalWidth") > 0
        else:
            expect(page.locator(".compare-words:visible").first).to_contain_text(f"{HOSTILE} a1", use_inner_text=True)


@pytest.mark.slow
@pytest.mark.parametrize("modality", names("modalities"))
def test_a_real_run(browser: Browser, tmp_path: Path, finished_run: Callable[[str], Path], modality: str) -> None:
    """A held-out prompt and one's own words, with rewards, log-ratios, the verdict and the curves."""
    with compared(browser, tmp_path, open_source(finished_run(modality)), None) as page:
        expect(page.locator("#compare-curves img.shown").first).to_be_visible(timeout=60_000)
        status(page, "Ready", 180)
        page.click("#compare-held input")
        page.get_by_role("option").nth(1).click()
        expect(page.locator("#compare-prompt textarea")).not_to_have_value("")
        words = page.input_value("#compare-prompt textarea")
        page.click("#compare-run")
        status(page, "Done", 180)
        expect(page.locator(".compare-told:visible")).to_contain_text([re.compile(r"Reward .*Log-ratio .* nats")] * 2)
        if modality == "vlm":
            pictures = page.locator("#compare-pictures img.shown")
            expect(pictures.first).to_be_visible()
            assert pictures.first.evaluate("image => image.complete && image.naturalWidth") > 0
        ask(page, f"{words} ")
        expect(page.locator("#compare-run")).to_be_disabled()  # so that the word Done is not the first answer's
        status(page, "Done", 180)
        if modality == "vlm":
            own_pictures(page)
        else:
            expect(page.locator("#compare-upload")).to_have_count(0)


def coded(seed: int, size: tuple[int, int] = (28, 28), kind: str = "PNG") -> bytes:
    return media.encode(photo(seed, size), kind)


def own_pictures(page: Page) -> None:
    """Pictures that a visitor brings take the place of the held-out prompt's; one that is none is told by name."""
    shown, upload = page.locator("#compare-pictures img.shown"), "#compare-upload input[type=file]"
    before = shown.first.get_attribute("src")
    page.set_input_files(upload, {"name": "a <b>.png", "mimeType": "image/png", "buffer": coded(1, (56, 56))})
    expect(shown).to_have_count(1)
    expect(shown.first).not_to_have_attribute("src", str(before))
    assert shown.first.evaluate("image => image.complete && image.naturalWidth") == 56
    page.set_input_files(upload, {"name": "broken.png", "mimeType": "image/png", "buffer": coded(1)[:200]})
    status(page, "broken.png cannot be used")
    expect(shown).to_have_count(1)
    page.set_input_files(upload, {"name": "second.jpg", "mimeType": "image/jpeg", "buffer": coded(2, kind="JPEG")})
    expect(shown).to_have_count(2)
    ask(page, "Which digit is in Image 1?")
    expect(page.locator("#compare-run")).to_be_disabled()
    status(page, "Done", 180)
    expect(page.locator(".compare-told:visible")).to_contain_text([re.compile("Log-ratio .* nats")] * 2)
    page.click("#compare-without")
    expect(shown).to_have_count(0)


# Without a browser


def test_numbers_of_clients_are_kept_within_limits() -> None:
    given: list[Any] = [None, "9", True, math.nan, math.inf, -math.inf, 2.7, 10**30, -5]
    assert [clamped(value, 1, 4) for value in given] == [1, 1, 1, 1, 4, 1, 2, 4, 1]


def test_prompts_are_one_line_of_a_list() -> None:
    assert label_of(0, "a\n b") == "1. a b" and len(label_of(4, "x" * 300)) == 103
    assert len({label_of(i, "the same question of another picture") for i in range(9)}) == 9


def test_only_names_that_the_server_made_are_looked_up(tmp_path: Path) -> None:
    assert compare.SHOWN.fullmatch("0" * 32 + ".png")
    for name in ("../x.png", "0" * 32 + ".html", "0" * 31 + ".png", "0" * 32 + ".png\n", "/etc/passwd", ""):
        assert not compare.SHOWN.fullmatch(name), name


class Silent:
    """A card without a page."""

    def __init__(self, name: str) -> None:
        self.name, self.show, self.shown, self.told = name, cards.SHOWN["text"], f"{name} shown", f"{name} told"


def test_updates_that_come_fast_are_one() -> None:
    cell: Any = cards.Cell(Silent("base"), 7)  # type: ignore[arg-type]
    events = [Event("partial", value={"text": "a" * n}) for n in range(1, 50)]
    updates = list(cards.paced([*events, Event("note", value={"text": "odd"}), Event("done")], [[cell]], "status"))
    assert len(updates) <= 3
    assert updates[-1]["base shown"] == [("a" * 49, None)]
    assert updates[-1]["status"].startswith("Done in") and updates[-1]["status"].endswith("odd")


def test_a_score_that_is_not_finite_is_not_shown() -> None:
    cell: Any = cards.Cell(Silent("base"), 7)  # type: ignore[arg-type]
    cell.heard(Event("judged", value={"score": math.nan, "correct": None}))
    assert cell.told() == "Seed 7."
