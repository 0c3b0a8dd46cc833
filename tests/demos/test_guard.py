"""The guard around a page, on an app that answers everything: what it lets through and what it refuses, and what it logs."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from mmpo.demos import accounts, guard, policy
from mmpo.demos.accounts import Accounts
from mmpo.demos.doors import WHO, Doors, Refused
from mmpo.demos.guard import Guard
from mmpo.demos.rates import Rates
from mmpo.demos.site import is_loopback, listening, private_folder, serve, visitor
from mmpo.errors import RecipeError
from mmpo.lock import RunLock

ADDRESS = "http://127.0.0.1:7860"
PASSWORD = "correct horse battery"


async def echo(request: Request) -> Any:
    body = await request.body()
    if request.url.path == "/":
        return HTMLResponse("<head></head><p>page</p>")
    return JSONResponse(
        {"visitor": visitor(request) if WHO in request.scope else None, "bytes": len(body), "path": request.url.path}
    )


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """media/ and cache/ with a picture each, votes.db and a checkpoint inside media/, a secret beside both."""
    for name in ("media/a.png", "media/votes.db", "media/page.html", "media/private/b.png", "cache/c.png", "secret.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG canary")
    (tmp_path / "media" / "out.png").symlink_to(tmp_path / "secret.png")
    return tmp_path


@pytest.fixture
def client(folders: Path) -> Iterator[Callable[..., TestClient]]:
    def make(**options: Any) -> TestClient:
        doors = Doors(
            folders / "media", folders / "cache", (folders / "media" / "private",), uploads=options.pop("uploads", False)
        )
        app = Guard(Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])]), doors, **options)
        return TestClient(app, base_url=ADDRESS, raise_server_exceptions=False, follow_redirects=False)

    yield make


@pytest.fixture(scope="module")
def people() -> Accounts:
    line = accounts.line("tim", PASSWORD)
    return Accounts({"tim": accounts._parse(line, "here")[1]})


# --- names, origins, sizes ---


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860", "localhost.", "[0:0::1]"])
def test_answers_to_its_names(client: Any, host: str) -> None:
    assert client().get("/config", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:7860", "2130706433", "10.0.0.1"]
)
def test_refuses_a_rebound_name(client: Any, host: str) -> None:
    assert client().get("/config", headers={"host": host}).status_code == 421


def test_on_all_addresses_any_address_will_do_but_no_foreign_name(client: Any) -> None:
    browser = client(names=frozenset({"0.0.0.0", "workstation"}))
    status = {
        h: browser.get("/config", headers={"host": h}).status_code for h in ("10.0.0.7:7860", "workstation", "evil.example")
    }
    assert status == {"10.0.0.7:7860": 200, "workstation": 200, "evil.example": 421}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": ADDRESS}, 200),
        ({}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "http://localhost:7860"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": ADDRESS + ".evil.example"}, 403),
        ({"origin": "http://evil.example", "sec-fetch-mode": "navigate"}, 403),
    ],
)
def test_refuses_what_another_sites_page_sends(client: Any, headers: dict[str, str], status: int) -> None:
    assert client().post("/gradio_api/cancel", headers=headers, content=b"{}").status_code == status


def test_a_link_from_another_site_keeps_the_visitors_cookie(client: Any) -> None:
    """SameSite keeps it back on that one request, which therefore must not be answered by a new one."""
    answer = client().get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
    assert "set-cookie" not in answer.headers and 'content="0;url=/"' in answer.text


def test_refuses_200_megabytes_before_reading_them(client: Any) -> None:
    def never() -> Iterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    length = {"content-length": str(200 * 2**20)}
    for path, uploads in (("/gradio_api/upload", True), ("/gradio_api/upload", False), ("/vote", False)):
        answer = client(uploads=uploads).post(path, content=never(), headers=length)
        assert answer.status_code == 413 and "at most" in answer.json()["detail"] and answer.headers["connection"] == "close"


def test_uploads_are_closed_where_a_page_takes_none_and_need_a_length(client: Any) -> None:
    assert client().post("/gradio_api/upload", content=b"x").status_code == 403
    assert client(uploads=True).post("/gradio_api/upload", content=b"x").status_code == 200
    assert client(uploads=True).post("/gradio_api/upload", content=iter([b"x"])).status_code == 411


def test_a_body_without_a_length_is_counted(client: Any) -> None:
    chunks = (bytes(2**16) for _ in range(5))
    assert client().post("/gradio_api/cancel", content=chunks).status_code == 413
    assert client().post("/gradio_api/cancel", content=iter([b"ab", b"c"])).json()["bytes"] == 3


@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict"])
@pytest.mark.parametrize("length", [4000, 4001, 10_000])
def test_texts_are_at_most_4000_characters(client: Any, length: int, path: str) -> None:
    answer = client().post(path, json={"data": [1, {"deep": ["x" * length]}], "fn_index": 0})
    assert answer.status_code == (200 if length == 4000 else 413)
    assert length == 4000 or f"{length:,} characters" in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b'{"fn_index": 0}', b"[" * 100_000])
def test_what_is_no_call_of_a_function_is_refused(client: Any, body: bytes) -> None:
    assert client().post("/gradio_api/queue/join", content=body).status_code == 400


# --- files ---


def traversals(folder: Path) -> list[str]:
    """Fifty-odd ways to name a file that is not the page's."""
    media, secret = folder / "media", folder / "secret.png"
    up = "../" * 12
    plain = [
        "/etc/passwd", "/etc/hostname.png", "//etc/passwd", "/proc/self/environ", "/proc/self/cmdline", "/proc/self/fd/0",
        "/dev/zero", "/dev/stdin", "/root/.ssh/id_rsa", "~/.ssh/id_rsa", "~root/.bashrc", str(secret),
        f"{media}/../secret.png", f"{media}/out.png", f"{media}/./../secret.png", f"{media}/private/../../secret.png",
        f"{media}/private/b.png", f"{media}/votes.db", f"{media}/page.html", f"{media}", f"{media}/", f"{media}/private",
        f"{media}/nothing.png", f"{media}/a.png/../../secret.png", f"{media}/a.png\0.jpg", "a.png", "./a.png", "media/a.png",
        "../secret.png", f"{up}etc/passwd", f"{up}etc/hostname", "..\\..\\..\\etc\\passwd", "C:\\Windows\\win.ini",
        "\\\\server\\share\\a.png", "//server/share/a.png", "file:///etc/passwd", f"file://{media}/a.png",
        "http://127.0.0.1:7860/config", "http://169.254.169.254/latest/meta-data/a.png", "https://evil.example/a.png",
        "HTTP://evil.example/a.png", "ftp://evil.example/a.png", "data:image/png;base64,AAAA", "%2e%2e/secret.png",
        "..%2fsecret.png", f"{media}/%2e%2e/secret.png", f"{media}/..;/secret.png", f"{media}//..//secret.png", "", ".",
        "..", "/", "x" * 5000, str(Path(__file__)), f"{folder}/cache/../secret.png", f"{media}\u2215..\u2215secret.png",
        f" {media}/../secret.png",
    ]  # fmt: skip
    return plain


def test_no_form_of_a_path_leads_out_of_the_page(client: Any, folders: Path) -> None:
    browser, forms = client(), traversals(folders)
    assert len(forms) >= 50
    for form in forms:
        with pytest.raises(Refused):
            browser.app.doors.check_file(form)
        for prefix in ("/gradio_api/file=", "/gradio_api/file/"):
            quoted = form.replace("\0", "%00").replace("?", "%3f").replace("#", "%23").replace("\\", "%5c").replace(" ", "%20")
            assert browser.get(prefix + quoted).status_code in (403, 404), form
        posted = browser.post("/gradio_api/queue/join", json={"data": [{"path": form}], "fn_index": 0})
        assert posted.status_code == 403, form
    for name in ("media/a.png", "cache/c.png"):
        assert browser.get(f"/gradio_api/file={folders / name}").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json", "/docs", "/redoc", "/gradio_api/run/a/b",
        "/gradio_api/call/predict", "/gradio_api/api/predict", "/gradio_api/proxy=https://x.hf.space",
        "/gradio_api/component_server", "/gradio_api/vibe-code", "/gradio_api/runs", "/gradio_api/run-history/buckets",
        "/gradio_api/process_recording", "/gradio_api/deep_link", "/gradio_api/dev/reload", "/monitoring",
        "/monitoring/summary", "/login", "/logout", "/gradio_api/token", "/gradio_api/mcp/sse",
        "/gradio_api/custom_component/a/client/b/c", "/gradio_api/stream/a/b/1/playlist.m3u8", "/../etc/passwd",
    ],
)  # fmt: skip
def test_gradios_other_doors_are_shut(client: Any, path: str) -> None:
    assert client().get(path).status_code == 404


# --- who, and how often ---


def test_a_visitor_is_the_cookie_that_scripts_cannot_read(client: Any) -> None:
    browser = client()
    first = browser.get("/config")
    set_cookie = first.headers["set-cookie"]
    assert all(word in set_cookie for word in ("HttpOnly", "SameSite=Strict", "Path=/", guard.VISITOR))
    again = browser.get("/config")
    assert again.json()["visitor"] == first.json()["visitor"] and "set-cookie" not in again.headers
    forged = client().get("/config", headers={"cookie": f"{guard.VISITOR}=<script>"})
    assert forged.json()["visitor"] != "<script>" and "set-cookie" in forged.headers
    assert client().get("/config").json()["visitor"] != first.json()["visitor"]


def test_too_many_requests_are_told_how_long_to_wait(client: Any) -> None:
    browser = client(visits=Rates(burst=3, per_second=0.5))
    answers = [browser.get("/config") for _ in range(4)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429] and 1 <= int(answers[3].headers["retry-after"]) <= 2
    assert browser.get("/assets/x.js").status_code == 200, "what never changes is not counted"


def test_new_names_give_no_new_room(client: Any) -> None:
    browser = client(arrivals=Rates(burst=2, per_second=0.01))
    status = [browser.get("/config", headers={"cookie": f"{guard.VISITOR}={'a' * 21}{i}"}).status_code for i in range(3)]
    assert status == [200, 200, 429]
    assert browser.get("/config", headers={"cookie": f"{guard.VISITOR}={'a' * 21}0"}).status_code == 200


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(1, 5), st.floats(0.1, 5))
def test_a_bucket_lets_through_no_more_than_it_says(gaps: list[float], burst: int, rate: float) -> None:
    rates, now, through = Rates(burst, rate), 0.0, 0
    for gap in gaps:
        now += gap
        wait = rates.wait("a", now)
        through += not wait
        assert wait <= 1 / rate + 1e-9 and through <= burst + (now - gaps[0]) * rate + 1e-6
    assert rates.wait("another", now) == 0


def test_buckets_are_forgotten_rather_than_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpo.demos.rates.REMEMBERED", 5)
    rates = Rates(1, 1)
    for i in range(9):
        rates.wait(str(i), 0.0)
    assert list(rates.buckets) == ["4", "5", "6", "7", "8"]


# --- accounts ---


def test_nothing_is_seen_before_the_password(client: Any, people: Accounts) -> None:
    browser = client(accounts=people)
    assert browser.get("/", headers={"accept": "text/html"}).headers["location"] == "/login"
    assert browser.get("/config").status_code == browser.post("/vote", content=b"{}").status_code == 401
    assert browser.get("/login").status_code == 200 and "<script" not in browser.get("/login").text
    wrong = browser.post("/login", data={"name": "tim", "password": "wrong"}, headers={"origin": ADDRESS})
    assert wrong.status_code == 401 and "Wrong name or password" in wrong.text and "set-cookie" not in wrong.headers
    right = browser.post("/login", data={"name": "tim", "password": PASSWORD}, headers={"origin": ADDRESS})
    assert right.status_code == 303 and "HttpOnly; SameSite=Strict" in right.headers["set-cookie"]
    assert browser.get("/config").json()["visitor"] == "tim", "the account is the visitor"
    assert browser.get("/config", headers={"cookie": f"{guard.SESSION_COOKIE}=forged"}).status_code == 401


def test_passwords_cannot_be_tried_quickly(client: Any, people: Accounts) -> None:
    browser = client(accounts=people, guesses=Rates(burst=2, per_second=0.01))
    status = [browser.post("/login", data={"name": "tim", "password": PASSWORD[:i]}).status_code for i in range(3)]
    assert status == [401, 401, 429]
    assert browser.post("/login", data={"name": "tim", "password": PASSWORD}).status_code == 429


def test_right_passwords_use_up_no_guesses(client: Any, people: Accounts) -> None:
    """Nor do those of others: behind a proxy everybody has one address."""
    browser = client(accounts=people, guesses=Rates(burst=2, per_second=0.01), attempts=Rates(burst=4, per_second=0.01))

    def status(name: str, password: str) -> int:
        return int(browser.post("/login", data={"name": name, "password": password}).status_code)

    assert {status("tim", PASSWORD) for _ in range(6)} == {303}
    assert [status("ann", "wrong") for _ in range(5)] == [401, 401, 429, 429, 429]
    assert status("tim", PASSWORD) == 303, "what was refused untried does not count for the address"
    assert [status(f"{i} no name", "wrong") for i in range(3)] == [401, 401, 429]
    assert status("tim", PASSWORD) == 429, "who tries many names is stopped by the address"


def test_who_is_not_in_is_counted_too(client: Any, people: Accounts) -> None:
    browser = client(accounts=people, visits=Rates(burst=3, per_second=0.01))
    assert [browser.get("/vote").status_code for _ in range(5)] == [401, 401, 401, 429, 429]
    forged = {"cookie": f"{guard.VISITOR}={'a' * 22}"}
    assert browser.get("/vote", headers=forged).status_code == browser.get("/login").status_code == 429


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "workstation", "127.0.0.1.evil.example"])
def test_other_machines_come_in_with_a_password_only(host: str) -> None:
    assert not is_loopback(host) and is_loopback("127.0.0.3") and is_loopback("::1") and is_loopback("LocalHost")
    nothing: Any = None
    with pytest.raises(RecipeError, match="--auth-file"):
        serve(nothing, host=host)


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "127.1.2.3"])
def test_a_server_answers_at_the_address_that_it_prints(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    from mmpo.demos import site

    names: list[frozenset[str]] = []
    monkeypatch.setattr(site, "build", lambda made, **options: names.append(options["names"]))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(site, "_log_to_stderr", lambda: None)
    serve(lambda: site.Site("Title", lambda: None, Path("/nowhere")), host=host)  # type: ignore[arg-type, return-value]
    printed = capsys.readouterr().out.split()[1].removeprefix("http://").rstrip("/")
    assert printed.startswith(host) and guard.check_host(Headers({"host": printed}), names[0]) == printed


# --- what is said and written ---


def test_the_log_holds_no_secret_and_one_line_a_refusal(
    client: Any, people: Accounts, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-of-the-environment")
    caplog.set_level(logging.DEBUG, "mmpo.demo")
    browser = client(accounts=people)
    browser.post("/login", data={"name": "tim", "password": "canary-password"})
    browser.post("/login", data={"name": "canary\npassword as a name", "password": "x"})
    browser.post("/login", data={"name": "tim", "password": PASSWORD})
    browser.get("/gradio_api/file=/x/canary-of-the-environment")
    browser.get("/gradio_api/file=/x%0aforged line")
    browser.post("/gradio_api/queue/join", json={"data": ["canary-prompt" * 1000]})
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "canary" not in text and PASSWORD not in text and "login refused for 'tim'" in text
    assert len(text.splitlines()) == len(caplog.records) == 5


def test_every_answer_carries_the_policy(client: Any) -> None:
    for path in ("/", "/config", "/no/such/path", "/assets/x.js"):
        headers = client().get(path).headers
        assert (
            "script-src 'self';" in headers["content-security-policy"]
            and "unsafe-eval" not in headers["content-security-policy"]
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert client().get("/config").headers["cache-control"] == "no-store"


def test_only_gradios_own_inline_scripts_get_a_hash() -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    own = policy._shapes()[0].pattern
    assert own.startswith("window\\.gradio_config")
    for value, trusted in [('{"a": "b"}', 1), ("alert(1)", 0), ('{"a": 1}; alert(1)', 0), ("[" * 5000, 0), ('""', 1)]:
        page = f"<script>window.gradio_config = {value};</script>"
        assert len(list(policy.trusted(page))) == trusted, value
    assert list(policy.trusted("<script>alert(1)</script><script type=module>alert(1)</script>")) == []


# --- the server's folder and port ---


def test_the_cache_is_closed_to_others_and_left_ones_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".demo-cache-left"
    (left / "a").mkdir(parents=True)
    lock, made = private_folder(tmp_path)
    assert made.stat().st_mode & 0o777 == 0o700 and made.parent == tmp_path and not left.exists()
    other, second = private_folder(tmp_path)
    assert made.exists() and second != made, "a living server keeps its own"
    assert isinstance(other, RunLock)
    lock.release()
    private_folder(tmp_path)[0].release()
    assert not made.exists() and second.exists()
    other.release()


def test_folders_of_others_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a link to a folder of ours, nor what another user has made, is written into or removed."""
    (mine := tmp_path / "mine").mkdir()
    (tmp_path / ".demo-cache-link").symlink_to(mine)
    (theirs := tmp_path / ".demo-cache-theirs").mkdir()
    with monkeypatch.context() as other:
        other.setattr("mmpo.demos.site.os.getuid", lambda: theirs.stat().st_uid + 1)
        private_folder(tmp_path)[0].release()
    assert list(theirs.iterdir()) == []
    private_folder(tmp_path)[0].release()
    assert list(mine.iterdir()) == [] and not theirs.exists()


def test_the_next_free_port_unless_one_was_asked_for() -> None:
    first = listening("127.0.0.1", None)
    second = listening("127.0.0.1", None)
    assert 7860 <= first.getsockname()[1] < second.getsockname()[1]
    with pytest.raises(RecipeError, match="in use"):
        listening("127.0.0.1", first.getsockname()[1])
    first.close()
    second.close()
