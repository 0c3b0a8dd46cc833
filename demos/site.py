"""A page and its server: Gradio inside of a guard, on this machine alone unless there are accounts.

Nothing is fetched and nothing is told to anybody: analytics, update checks, sharing, monitoring and the API's pages are
off. One process serves pages and votes; it imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import ipaddress
import logging
import os
import shutil
import signal
import socket
import stat
import tempfile
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING, Any

from mmpo import masking, network
from mmpo.demos import accounts, theme
from mmpo.demos.accounts import Accounts
from mmpo.demos.doors import LOOPBACK, WHO, Doors, canonical
from mmpo.errors import MissingExtra, RecipeError
from mmpo.lock import RunBusy, RunLock

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI
    from starlette.routing import BaseRoute

PORT = 7860
QUEUE, AT_ONCE = 64, 2  # events that wait, and that run, at most
CACHE_SECONDS = 3600
_CACHE = ".demo-cache-"
_SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SSR_MODE": "False", "GRADIO_MCP_SERVER": "False",
    "GRADIO_RUN_HISTORY": "False", "GRADIO_SHARE": "False",
}  # fmt: skip
_OTHERS = ("GRADIO_ALLOWED_PATHS", "GRADIO_BLOCKED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_WATCH_DIRS", "GRADIO_VIBE_MODE")


@dataclass(frozen=True)
class Site:
    """One page. blocks: makes it, called when Gradio has its settings. media: the only folder whose files may be served;
    private: what is not, even there. routes: further HTTP routes. scripts: files, loaded from /static/<name>. uploads:
    whether the page takes files. close: called at the end."""

    title: str
    blocks: Callable[[], gr.Blocks]
    media: Path
    private: tuple[Path, ...] = ()
    routes: tuple[BaseRoute, ...] = ()
    scripts: tuple[Path, ...] = ()
    close: Callable[[], None] = lambda: None
    uploads: bool = False


def build(site: Site, *, names: frozenset[str] = LOOPBACK, people: Accounts | None = None) -> FastAPI:
    """The ASGI app of a page. names: what this server is called, in requests' Host header.

    Raises MissingExtra without Gradio. The cache lies beside `site.media`, closed to other users. It is gone, and the site
    closed, when the app's lifespan ends or when there is no app.
    """
    with contextlib.ExitStack() as ends:
        ends.callback(site.close)
        app = _built(site, names, people, ends)
        app.state.ends = ends.pop_all()
    return app


def _built(site: Site, names: frozenset[str], people: Accounts | None, ends: contextlib.ExitStack) -> FastAPI:
    media, private = site.media.resolve(), tuple(path.resolve() for path in site.private)
    lock, cache = private_folder(media.parent)
    ends.callback(shutil.rmtree, cache, ignore_errors=True)
    ends.callback(lock.release)
    network.close()
    for name in _OTHERS:
        os.environ.pop(name, None)
    os.environ.update(_SETTINGS, GRADIO_TEMP_DIR=str(cache))
    require_gradio()
    import gradio as gr
    from fastapi import FastAPI

    from mmpo.demos.guard import Guard

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with app.state.ends:
            yield

    app = FastAPI(routes=[*site.routes, *static(site)], lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    own = tuple(route.path_regex for route in site.routes if hasattr(route, "path_regex"))
    doors = Doors(media, cache, private, own, site.uploads)
    scripts = [script.name for script in site.scripts]
    app.add_middleware(
        Guard, doors=doors, names=names, accounts=people, dress=lambda page: theme.dress(page, site.title, scripts)
    )
    blocks = closed(site.blocks(), site.title)
    return gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, show_error=False,
        allowed_paths=[str(media)], blocked_paths=[str(path) for path in private],
        max_file_size="20mb", ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, theme=theme.theme(),
    )  # fmt: skip


def require_gradio() -> None:
    """Raises MissingExtra where Gradio, with which FastAPI and Starlette come, is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtra("gradio", "demo")


def closed(blocks: gr.Blocks, title: str) -> gr.Blocks:
    """The page with its functions private, a queue with a bound, and a cache that is emptied."""
    blocks.title, blocks.analytics_enabled, blocks.share = title, False, False
    blocks.delete_cache = (CACHE_SECONDS, CACHE_SECONDS)
    for function in blocks.fns.values():
        function.api_visibility = "private"
    blocks.queue(api_open=False, max_size=QUEUE, default_concurrency_limit=AT_ONCE)
    return blocks


def visitor(request: Any) -> str:
    """Who asks: the account's name, or the random id of the browser's cookie. request: Gradio's, or Starlette's."""
    inner = getattr(request, "request", None) or request
    return str(inner.scope[WHO])


def static(site: Site) -> list[BaseRoute]:
    """Routes of the style sheet and of the page's scripts."""
    from starlette.requests import Request
    from starlette.responses import FileResponse
    from starlette.routing import Route

    def route(path: Path, kind: str) -> BaseRoute:
        async def answer(_: Request) -> FileResponse:
            return FileResponse(path, media_type=kind)

        return Route(f"/static/{path.name}", answer)

    return [route(theme.STYLE, "text/css"), *(route(script, "text/javascript") for script in site.scripts)]


def private_folder(beside: Path) -> tuple[RunLock, Path]:
    """A new folder that only this user can open, and its lock; those of servers that died are removed first."""
    place = beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())
    for left in place.glob(f"{_CACHE}*"):
        with contextlib.suppress(RunBusy, OSError):
            if _is_own(left):  # a folder for all users may hold what others have made to be found here
                with RunLock(left):
                    shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=_CACHE, dir=place.resolve()))
    return RunLock(made), made


def _is_own(folder: Path) -> bool:
    """Whether it is a folder of this user, and no link to one."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def serve(
    make: Callable[[], Site],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth_file: Path | None = None,
    show: bool = False,
) -> None:
    """Serve a page until it is interrupted, and print its address. port: default 7860, or the next one that is free.

    make: makes the site, once it is known that it can be served, so that a start that is refused leaves nothing behind.
    show: open it in the browser. Raises RecipeError when the host is not this machine alone and there are no accounts, and
    when the accounts or the address cannot be used.
    """
    import uvicorn

    if not is_loopback(host) and auth_file is None:
        raise RecipeError(
            f"--host {host} lets other machines in: give --auth-file too (`mmpo demo password NAME` prints its lines)"
        )
    people = accounts.read(auth_file) if auth_file else None
    names = LOOPBACK | {canonical(host)} | (set() if is_loopback(host) else {socket.gethostname().lower()})
    with listening(host, port) as bound, ended_by_sigterm():
        where = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/"
        _log_to_stderr()
        site = make()
        app = build(site, names=names, people=people)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, ws="none", lifespan="on",
            limit_concurrency=512, timeout_keep_alive=15, timeout_graceful_shutdown=2,
        )  # fmt: skip
        print(f"{site.title}: {where}  (Ctrl-C ends it)", flush=True)
        if show:
            Timer(1.0, webbrowser.open, (where,)).start()
        with empty_directory():
            uvicorn.Server(config).run(sockets=[bound])


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves this block as an exception does, so that what is temporary goes, and ends the process then."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int | None) -> socket.socket:
    """A socket at this address; without a port the first free one from 7860 on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [port] if port is not None else range(PORT, PORT + 100):
        try:
            return socket.create_server((host, candidate), family=family, backlog=128)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port is not None:
                raise RecipeError(f"cannot listen on {host}, port {candidate}: {error.strerror or error}") from error
    raise RecipeError(f"all ports from {PORT} to {PORT + 99} are taken; give --port")


@contextlib.contextmanager
def empty_directory() -> Iterator[None]:
    """Work in an empty folder: Gradio may serve files of the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="mmpo-demo-") as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masking.in_text(super().format(record))


def _is_news(record: logging.LogRecord) -> bool:
    """Not that streams to open pages end when the server does."""
    ended = record.exc_info and record.exc_info[0] and issubclass(record.exc_info[0], asyncio.CancelledError)
    return not ended and "timeout graceful shutdown" not in str(record.msg)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_is_news)
    handler.setFormatter(_Masked("mmpo: %(message)s"))
    for name in ("mmpo.demo", "uvicorn.error"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False
