"""What stands between the network and the page: every request passes here before Gradio, or a page's own routes, see it.

In order: the name the request was sent to, the page it comes from, its size, who sends it, how often, and whether the path
is one that a page needs. Gradio's other doors (its API's documentation, recordings, proxies, monitoring) stay shut, and no
path or URL that a client names is opened unless it is a medium below the folder that was set free.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmpo import masking
from mmpo.demos import login, policy
from mmpo.demos.accounts import NAME, SESSION, Accounts, Sessions
from mmpo.demos.doors import LOOPBACK, WHO, Doors, Refused, canonical
from mmpo.demos.rates import Rates

ANY = frozenset({"0.0.0.0", "::"})  # bound to every address of the machine: any address will do, but no foreign name
MAX_BODY = 256 * 2**10  # bytes of a request that brings no file
MAX_UPLOAD = 20 * 2**20
MAX_TEXT = 4000  # characters of one text
BODY_SECONDS = 20.0
VISITOR, SESSION_COOKIE = "mmpo_visitor", "mmpo_session"
_RANDOM_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_CALLS = ("/gradio_api/queue/join", "/gradio_api/run/")  # through the queue, and of functions that stand outside of it
_UPLOAD = "/gradio_api/upload"

log = logging.getLogger("mmpo.demo")


@dataclass
class Guard:
    """The ASGI app around `app`. dress: makes Gradio's page ours; it gets the page's text and gives it back."""

    app: ASGIApp
    doors: Doors
    names: frozenset[str] = LOOPBACK
    accounts: Accounts | None = None
    dress: Callable[[str], str] = lambda page: page
    sessions: Sessions = field(default_factory=Sessions)
    visits: Rates = field(default_factory=lambda: Rates(burst=300, per_second=60))  # of one visitor
    arrivals: Rates = field(default_factory=lambda: Rates(burst=200, per_second=20))  # new visitors from one address
    guesses: Rates = field(default_factory=lambda: Rates(burst=5, per_second=0.2))  # wrong ones, of one name's password
    attempts: Rates = field(default_factory=lambda: Rates(burst=40, per_second=1))  # wrong ones, from one address
    checking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))  # each holds 16 MiB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        try:
            response, receive = await self._examine(scope, headers, receive)
        except Refused as refusal:
            where = masking.in_text(ascii(scope["path"][:200]))
            log.warning("%s %s refused, %d: %s", scope["method"], where, refusal.status, refusal.reason)
            response = JSONResponse({"detail": str(refusal)}, refusal.status, refusal.headers)
            if refusal.status in (408, 411, 413):  # the rest of the body is not read
                response.headers["connection"] = "close"
        answered = _Answer(self, scope, send)
        if response is not None:
            return await response(scope, receive, answered)
        await self.app(scope, receive, answered)

    async def _examine(self, scope: Scope, headers: Headers, receive: Receive) -> tuple[Response | None, Receive]:
        """The answer, where it is already known, and what the app is to read; raises Refused."""
        host = check_host(headers, self.names)
        if _from_elsewhere(scope, headers):
            return bounce(), receive
        check_origin(headers, host)
        path = scope["path"]
        if path == _UPLOAD and self.doors.uploads:
            check_length(headers, MAX_UPLOAD + 2**16, needed=True)
            body = None
        else:
            check_length(headers, MAX_BODY)
            body = await read(receive)
        if not self.doors.constant(path):
            if self.accounts is not None and (name := self.sessions.name(cookie(headers, SESSION_COOKIE))):
                scope[WHO] = scope["mmpo.account"] = name
            self._count(scope, headers)
            if self.accounts is not None and (answer := await self._let_in(scope, headers, body)):
                return answer, receive
        self.doors.check(path)
        if path.startswith(_CALLS):
            check_texts(body or b"", self.doors)
        scope["headers"] = [(k, v) for k, v in scope["headers"] if k not in _dropped(path)]
        return None, receive if body is None else replay(body, receive)

    async def _let_in(self, scope: Scope, headers: Headers, body: bytes | None) -> Response | None:
        """Who is in passes; others see the page that asks for a name and a password."""
        if scope["path"] == login.PATH:
            return await self._log_in(scope, body or b"") if scope["method"] == "POST" else HTMLResponse(login.page())
        if WHO in scope:
            return None
        if scope["method"] in ("GET", "HEAD") and "text/html" in headers.get("accept", ""):
            return RedirectResponse(login.PATH, 303)
        raise Refused(401, "not logged in", f"log in at {login.PATH} first")

    async def _log_in(self, scope: Scope, body: bytes) -> Response:
        fields = parse_qs(body.decode(errors="replace"), max_num_fields=4)
        name, password = (fields.get(field, [""])[0] for field in ("name", "password"))
        accounts, kept = self.accounts, name if NAME.fullmatch(name) else ""
        assert accounts is not None
        counted = ((self.guesses, f"{address(scope)} {kept}"), (self.attempts, address(scope)))
        for number, (rates, who) in enumerate(counted):
            if wait := rates.wait(who):
                for earlier, known in counted[:number]:  # what is not tried is no attempt
                    earlier.give_back(known)
                raise Refused(429, "too many guesses", f"too many attempts; wait {wait:.0f} seconds", wait)
        async with self.checking:
            right = await asyncio.to_thread(accounts.check, name, password)
        if not right:
            log.warning("login refused for %s", ascii(kept) if kept else "a name that cannot exist")
            return HTMLResponse(login.page("Wrong name or password."), 401)
        for rates, who in counted:
            rates.give_back(who)
        answer = RedirectResponse("/", 303)
        set_cookie(answer.headers, scope, SESSION_COOKIE, self.sessions.start(name), int(SESSION))
        return answer

    def _count(self, scope: Scope, headers: Headers) -> None:
        """Rate limits; a visitor not seen before counts for the address as well, so that new names give no new room.

        Where there are accounts, those who are not in are one visitor for each address.
        """
        if self.accounts is not None and WHO not in scope:
            arrived, who = False, f"{address(scope)}, not in"
        else:
            who = scope.setdefault(WHO, _known(headers) or secrets.token_urlsafe(16))
            arrived = not self.visits.knows(who)
        wait = (self.arrivals.wait(address(scope)) if arrived else 0.0) or self.visits.wait(who)
        if wait:
            raise Refused(429, "too many requests", f"too many requests; wait {wait:.0f} seconds", wait)


@dataclass
class _Answer:
    """`send` with our headers on every response; an HTML page is held back until its scripts are known."""

    guard: Guard
    scope: Scope
    send: Send
    start: Message | None = None
    body: bytes = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._common(headers)
            if headers.get("content-type", "").startswith("text/html"):
                self.start = message
            else:
                headers["content-security-policy"] = policy.content_security()
                await self.send(message)
        elif self.start is None:
            await self.send(message)
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                await self._page(self.start)

    def _common(self, headers: MutableHeaders) -> None:
        for name, value in policy.HEADERS.items():
            headers[name] = value
        constant = self.guard.doors.constant(self.scope["path"])
        headers["cache-control"] = "private, max-age=3600" if constant else "no-store"
        visitor = self.scope.get(WHO)
        if visitor and self.guard.accounts is None and _known(Headers(scope=self.scope)) != visitor:
            set_cookie(headers, self.scope, VISITOR, visitor, 30 * 86400)

    async def _page(self, start: Message) -> None:
        own = self.scope["path"] == "/" and start["status"] == 200 and WHO in self.scope
        text = self.body.decode()
        page = (self.guard.dress(text) if own else text).encode()
        headers = MutableHeaders(scope=start)
        headers["content-security-policy"] = policy.content_security(list(policy.trusted(text)) if own else ())
        headers["content-length"] = str(len(page))
        await self.send(start)
        await self.send({"type": "http.response.body", "body": b"" if self.scope["method"] == "HEAD" else page})


def check_host(headers: Headers, names: frozenset[str]) -> str:
    """The Host header, which must name this server: a page of another name that was rebound to this address has its own."""
    host = headers.get("host", "")
    name = host_name(host)
    if name in names or (names & ANY and _is_address(name)):
        return host
    raise Refused(421, f"host {ascii(host[:100])}", "this server does not answer to that name; use the address that it printed")


def host_name(host: str) -> str:
    """Of `name:port`, IPv6 without its brackets, as it is compared."""
    return canonical(host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0])


def check_origin(headers: Headers, host: str) -> None:
    """Refuses what another site's page sends: by Origin where a browser tells it, and by Sec-Fetch-Site."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    other = origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")
    if other or (site not in ("same-origin", "none") and headers.get("sec-fetch-mode") != "navigate"):
        raise Refused(403, f"origin {ascii((origin or site)[:100])}", "requests from other sites are refused")


def _from_elsewhere(scope: Scope, headers: Headers) -> bool:
    """A link on another site was followed; the browser has kept the cookies back."""
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-site") == "cross-site"
    return scope["method"] == "GET" and navigates


def bounce() -> Response:
    """A page that opens the start page again: that request comes from here, and brings the cookies."""
    return HTMLResponse('<!doctype html><meta http-equiv="refresh" content="0;url=/"><title>Opening</title>')


def check_length(headers: Headers, most: int, needed: bool = False) -> None:
    """Refuses a body by its announced length, before any of it is read."""
    length = headers.get("content-length")
    if length is None and not needed:
        return
    if length is None or not length.isdecimal():
        raise Refused(411, "no length", "an upload must announce its length")
    if int(length) > most:
        raise Refused(413, f"{int(length)} bytes", f"{int(length):,} bytes; at most {most:,} are taken")


async def read(receive: Receive) -> bytes:
    """The whole body, at most MAX_BODY bytes in BODY_SECONDS."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise Refused(413, "a long body", f"at most {MAX_BODY:,} bytes are taken")
                if not message.get("more_body"):
                    return body
    except TimeoutError:
        raise Refused(408, "a slow body", f"the request took more than {BODY_SECONDS:.0f} seconds to arrive") from None


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` for the app: the body that was read, then whatever follows (that the client is gone)."""
    rest = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        return next(rest, None) or await receive()

    return again


def check_texts(body: bytes, doors: Doors) -> None:
    """Of what a page sends to its functions: no text over MAX_TEXT characters, no file that is not ours."""
    try:
        found = json.loads(body)
        waiting: list[Any] = list(found["data"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(400, "no JSON", "expected JSON with data") from None
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise Refused(
                413, f"{len(value)} characters", f"a text of {len(value):,} characters; at most {MAX_TEXT:,} are taken"
            )
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                doors.check_file(value["path"])
            waiting.extend(v for k, v in value.items() if k != "url")
        elif isinstance(value, list):
            waiting.extend(value)


def _dropped(path: str) -> frozenset[bytes]:
    """Headers that the app is not to see: a proxy's, which anybody can send, and for the page those that compress it."""
    proxied = {
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-forwarded-for",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"forwarded",
    }
    return frozenset(proxied | ({b"accept-encoding"} if path == "/" else set()))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _known(headers: Headers) -> str | None:
    """The visitor's id, as its cookie has it."""
    found = cookie(headers, VISITOR)
    return found if found and _RANDOM_ID.fullmatch(found) else None


def cookie(headers: Headers, name: str) -> str | None:
    """The value of a cookie, if the request has it."""
    for part in headers.get("cookie", "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == name:
            return value
    return None


def set_cookie(headers: MutableHeaders, scope: Scope, name: str, value: str, seconds: int) -> None:
    """A cookie that scripts cannot read and that other sites' pages cannot send."""
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    headers.append("set-cookie", f"{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}")


def address(scope: Scope) -> str:
    """Of the other side of the connection."""
    return scope["client"][0] if scope.get("client") else ""
