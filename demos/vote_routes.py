"""The HTTP side of voting: what is open, the samples of it, and a vote, which is acknowledged when it is on the disk.

The database is used by one thread of its own, so that nothing else in the server makes a vote wait. What an answer to a
request holds before the vote is the same for both sides, but for the content of the samples.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmpo.demos.ballots import UNDO, Ballot, Ballots, Refused, Served
from mmpo.demos.blinding import blinded
from mmpo.demos.pool import Entry, Mode, Pool, Prompt
from mmpo.demos.site import visitor
from mmpo.demos.standings import results, said
from mmpo.errors import DataError
from mmpo.pair import Block

T = TypeVar("T")
ACCOUNT = "mmpo.account"  # in the scope of a request, where its visitor's name is that of an account
KEPT = 16  # samples that are kept as browsers get them
FINISH = "finish"
EXPECTED = "expected JSON with the texts comparison, choice and nonce"


class Desk:
    """The votes on a pool, as the routes and the page of a site use them. `close` it at the end."""

    def __init__(self, pool: Pool, folder: Path, mode: Mode) -> None:
        self.pool, self.mode = pool, mode
        self.ballots = Ballots(folder, pool, mode)
        self._thread = ThreadPoolExecutor(1, "votes")
        self._media: OrderedDict[str, tuple[str, bytes]] = OrderedDict()

    async def ask(self, method: Callable[..., T], *arguments: Any) -> T:
        """Call a method of the ballots in their thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(method, *arguments))

    def close(self) -> None:
        self._thread.submit(self.ballots.close).result()
        self._thread.shutdown()

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("/vote", told(self._open), methods=["GET"]),
            Route("/vote", told(self._vote), methods=["POST"]),
            Route("/vote/results", told(self._tell), methods=["GET"]),
            Route("/vote/media/{comparison}/{part}", told(self._sample), methods=["GET"]),
            Route("/vote/entry/{entry}", told(self._entry), methods=["GET"]),
        )

    async def _open(self, request: Request) -> Response:
        """The voter's comparison, without a word on where its two sides come from."""
        return JSONResponse(await self.ask(self._opened, voter_of(request)))

    def _opened(self, voter: str) -> dict[str, Any]:
        return shown(self.ballots.serve(voter)) | self._progress(voter)

    def _progress(self, voter: str) -> dict[str, Any]:
        done, total, others = self.ballots.tally(voter)
        return {"done": done, "total": total, "others": others, "finished": self.ballots.finished(voter)}

    async def _vote(self, request: Request) -> Response:
        """Store {comparison, choice, nonce}; choice may also be undo, or finish, which need no comparison."""
        sent = await fields(request)
        return JSONResponse(await self.ask(self._stored, voter_of(request), sent))

    def _stored(self, voter: str, sent: dict[str, Any]) -> dict[str, Any]:
        choice, comparison, nonce, stored = sent.get("choice"), sent.get("comparison"), sent.get("nonce"), True
        if choice == UNDO:
            stored = self.ballots.undo(voter, nonce)
        elif choice == FINISH:
            self.ballots.finish(voter)
        elif isinstance(choice, str) and isinstance(comparison, str):
            self.ballots.vote(voter, comparison, choice, nonce)
        else:
            raise Refused(400, EXPECTED)
        return {"stored": stored} | self._progress(voter)

    async def _sample(self, request: Request) -> Response:
        """A picture, sound or video of a comparison that was served to this voter, and a picture of its prompt."""
        comparison, part = request.path_params["comparison"], request.path_params["part"]
        served = await self.ask(self.ballots.served, voter_of(request), comparison)
        if part in ("left", "right"):
            return await self._media_of(request, getattr(served, part))
        pictures = {f"prompt-{i}": block for i, block in enumerate(served.left.prompt) if block.kind != "text"}
        if part not in pictures:
            raise Refused(404, "there is no such sample")
        kind, data = await asyncio.to_thread(blinded, pictures[part])
        return ranged(request, kind, data)

    async def _entry(self, request: Request) -> Response:
        """The sample of an entry, for the ranking of a voter who has finished."""
        entry = self.pool.by_id.get(request.path_params["entry"])
        if entry is None or entry.kind == "text" or not await self.ask(self.ballots.finished, voter_of(request)):
            raise Refused(404, "there is no such sample")
        return await self._media_of(request, entry)

    async def _media_of(self, request: Request, entry: Entry) -> Response:
        """The sample of an entry, decoded beside the votes' thread, and kept for a while: players ask for it in parts."""
        found = self._media.get(entry.id)
        if found is None:
            found = self._media[entry.id] = await asyncio.to_thread(lambda: blinded(entry.block))
            while len(self._media) > KEPT:
                self._media.popitem(last=False)
        return ranged(request, *found)

    async def _tell(self, request: Request) -> Response:
        """Who was who, for a voter who has voted on everything, or has finished; no vote of theirs is taken after that."""
        voter = voter_of(request)
        ballots = await self.ask(self._ended, voter)
        return JSONResponse(await asyncio.to_thread(results, ballots, self.pool, self.mode, voter))

    def _ended(self, voter: str) -> list[Ballot]:
        """All votes, for a voter who has no more to give from now on."""
        done, total = self.ballots.progress(voter)
        if done < total and not self.ballots.finished(voter):
            raise Refused(403, "the systems are named when you have voted on everything, or finished")
        self.ballots.finish(voter)
        return self.ballots.standing()


def voter_of(request: Request) -> str:
    """A voter's name in the database: the account's, or of the id in a cookie, as good as a password, a digest."""
    name = visitor(request)
    return name if ACCOUNT in request.scope else f"anonymous-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


async def fields(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises Refused."""
    try:
        found = await request.json()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(400, EXPECTED)
    return found


def shown(served: Served | None) -> dict[str, Any]:
    """A comparison as JSON: the prompt, and for either side its text or where its sample is."""
    if served is None:
        return {"comparison": None}
    place = f"/vote/media/{served.id}"
    asked = _asked(served.left.prompt, place)
    sides = {name: _side(getattr(served, name), f"{place}/{name}") for name in ("left", "right")}
    return {"comparison": served.id, "kind": served.left.kind, "prompt": asked, **sides}


def _asked(prompt: Prompt, place: str) -> list[dict[str, Any]]:
    parts = enumerate(prompt)
    return [_part(block, f"{place}/prompt-{i}") | ({"role": block.role} if block.role else {}) for i, block in parts]


def _part(block: Block, place: str) -> dict[str, Any]:
    return {"text": block.data} if block.kind == "text" else {"media": place}


def _side(entry: Entry, place: str) -> dict[str, Any]:
    return {"text": said(entry)} if entry.kind == "text" else {"media": place}


def ranged(request: Request, kind: str, data: bytes) -> Response:
    """A medium, or the part of it that is asked for, as players do; kept by nobody, and of no date."""
    headers = {"accept-ranges": "bytes", "cache-control": "no-store"}
    found = re.fullmatch(r"bytes=(\d{1,12})-(\d{0,12})", request.headers.get("range", ""))
    if not found:
        return Response(data, 200, headers, kind)
    start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
    if start > end:
        return Response(b"", 416, headers | {"content-range": f"bytes */{len(data)}"}, kind)
    return Response(data[start : end + 1], 206, headers | {"content-range": f"bytes {start}-{end}/{len(data)}"}, kind)


def told(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """The endpoint, with what it refuses, and samples that cannot be read any more, as messages."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refused as refusal:
            return JSONResponse({"detail": str(refusal)}, refusal.status)
        except DataError:  # whose own message names the file, and with it maybe the system
            return JSONResponse({"detail": "this sample cannot be read any more"}, 410)

    return answer
