"""The HTTP side of voting, without a server: what is acknowledged, refused, sent in parts, and told only at the end."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")
from starlette.applications import Starlette
from starlette.testclient import TestClient

from mmpo.demos.accounts import Accounts
from mmpo.demos.doors import WHO, Doors
from mmpo.demos.guard import SESSION_COOKIE, VISITOR, Guard
from mmpo.demos.pool import Pool, open_pool
from mmpo.demos.vote_routes import ACCOUNT, Desk
from tests.demos.pools import picture_folder, text_pool

COOKIE = "AbCdEfGhIjKlMnOpQrStUv"  # as long as the id in a visitor's cookie


class Client:
    """Asks the routes of a desk as one visitor or another, as the guard would let them in."""

    def __init__(self, pool: Pool, folder: Path, mode: Any = "vote") -> None:
        self.desk = Desk(pool, folder, mode)
        self._app = Starlette(routes=list(self.desk.routes()))

    def __call__(self, method: str, path: str, who: str = "ann", headers: Any = None, **more: Any) -> httpx.Response:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self._app({**scope, WHO: who} | ({} if who == COOKIE else {ACCOUNT: who}), receive, send)

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                return await client.request(method, path, headers=headers, **more)

        return asyncio.run(ask())

    def vote(self, choice: Any, nonce: Any = "nonce-001", who: str = "ann") -> httpx.Response:
        comparison = self("GET", "/vote", who).json()["comparison"]
        return self("POST", "/vote", who, json={"comparison": comparison, "choice": choice, "nonce": nonce})


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    made = Client(text_pool(3), tmp_path)
    yield made
    made.desk.close()


def test_an_acknowledgement_counts_what_is_stored(client: Client) -> None:
    assert client.vote("left").json() == {"stored": True, "done": 1, "total": 3, "others": 0, "finished": False}
    assert client("POST", "/vote", json={"choice": "undo", "nonce": "nonce-002"}).json()["done"] == 0
    assert client("POST", "/vote", json={"choice": "undo", "nonce": "nonce-003"}).json()["stored"] is False
    assert client("GET", "/vote", "bob").json()["done"] == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"nonsense", b'{"choice": "left"}', b'{"choice": ["left"], "comparison": "x", "nonce": "nonce-001"}',
        b'{"choice": "left", "comparison": {"$ne": 1}, "nonce": "nonce-001"}', b'{"choice": "undo", "nonce": 7}', b"\xff\xfe",
        b"[" * 9999,
    ],
)  # fmt: skip
def test_what_is_no_vote_is_refused(client: Client, body: bytes) -> None:
    answer = client("POST", "/vote", content=body)
    assert answer.status_code == 400 and set(answer.json()) == {"detail"}
    assert client.desk.ballots.standing() == []


def test_another_voters_comparison_is_not_mine(client: Client) -> None:
    comparison = client("GET", "/vote").json()["comparison"]
    vote = {"comparison": comparison, "choice": "left", "nonce": "nonce-001"}
    assert client("POST", "/vote", "eve", json=vote).status_code == 404
    assert client("GET", f"/vote/media/{comparison}/left", "eve").status_code == 404


def test_names_are_told_at_the_end_only(client: Client) -> None:
    client.vote("left")
    assert client("GET", "/vote/results").status_code == 403
    assert client("POST", "/vote", json={"choice": "finish", "nonce": "nonce-009"}).json()["finished"] is True
    told = client("GET", "/vote/results").json()
    assert {row["name"] for row in told["systems"]} == {"base", "aligned"} and len(told["who"]) == told["own"] == 1
    assert told["win_rate"]["of"] == "aligned" and told["win_rate"]["n"] == 1 and told["agreement"] is None
    assert client("GET", "/vote").json()["comparison"] is None
    assert client("GET", "/vote/results", "bob").status_code == 403


def test_votes_on_answers_that_are_gone_end_nothing(tmp_path: Path) -> None:
    """A voter who has voted on all that was there is asked about what came in its place, before systems are named."""
    before = Client(text_pool(6), tmp_path)
    for number in range(6):
        before.vote("left", f"nonce-{number:03d}")
    before.desk.close()
    entries = text_pool(8).entries
    client = Client(Pool(Path("/nowhere"), entries[:4] + entries[-4:]), tmp_path)  # two of six are left, and two are new
    counts = {"done": 2, "total": 4, "others": 4, "finished": False}
    assert client("GET", "/vote").json().items() >= counts.items()
    assert client("GET", "/vote/results").status_code == 403
    for number in range(2):
        assert client.vote("right", f"again-{number:03d}").json()["done"] == 3 + number
    told = client("GET", "/vote/results").json()
    assert (told["votes"], told["others"], told["win_rate"]["n"]) == (8, 4, 4)
    client.desk.close()


def test_the_id_of_a_cookie_is_stored_as_a_digest(client: Client) -> None:
    client.vote("left", who=COOKIE)
    client.vote("right", who="carl")
    stored = [ballot.voter for ballot in client.desk.ballots.standing()]
    assert stored == [f"anonymous-{hashlib.sha256(COOKIE.encode()).hexdigest()[:12]}", "carl"]


@pytest.mark.parametrize("name", ["tim", COOKIE])
def test_an_account_is_stored_by_its_name_however_long(tmp_path: Path, name: str) -> None:
    """Whether it is an account is what the guard says, not what the name looks like."""
    desk, doors = Desk(text_pool(3), tmp_path, "vote"), Doors(tmp_path, tmp_path, own=(re.compile("/vote"),))
    for accounts, cookie in ((Accounts({}), SESSION_COOKIE), (None, VISITOR)):
        site = Guard(Starlette(routes=list(desk.routes())), doors, accounts=accounts)
        browser = TestClient(site, "http://localhost", cookies={cookie: site.sessions.start(name) if accounts else COOKIE})
        comparison = browser.get("/vote").json()["comparison"]
        vote = {"comparison": comparison, "choice": "left", "nonce": "nonce-001"}
        assert browser.post("/vote", json=vote).json()["done"] == 1
    stored = [ballot.voter for ballot in desk.ballots.standing()]
    assert stored == [name, f"anonymous-{hashlib.sha256(COOKIE.encode()).hexdigest()[:12]}"]
    desk.close()


def test_media_come_in_parts_and_without_a_name(tmp_path: Path) -> None:
    client = Client(open_pool(picture_folder(tmp_path)), tmp_path / "votes")
    place = client("GET", "/vote").json()["left"]["media"]
    whole = client("GET", place)
    assert whole.status_code == 200 and whole.headers["content-type"] == "image/png"
    for asked, start, end in (("bytes=0-", 0, None), ("bytes=5-9", 5, 10), ("bytes=90-99999", 90, None)):
        part = client("GET", place, headers={"range": asked})
        assert part.status_code == 206 and part.content == whole.content[start:end]
        last = start + len(part.content) - 1
        assert part.headers["content-range"] == f"bytes {start}-{last}/{len(whole.content)}"
    assert client("GET", place, headers={"range": "bytes=999999-"}).status_code == 416
    for odd in ("bytes=-5", "bytes=a-b", "lines=1-2", "bytes=5-2-1"):
        assert client("GET", place, headers={"range": odd}).content == whole.content
    for path in (place + "x", place.replace("left", "prompt-0"), place.replace("left", "..%2Fright"), "/vote/entry/x"):
        assert client("GET", path).status_code == 404
    client.desk.close()


def test_a_sample_that_changed_says_so_without_its_name(tmp_path: Path) -> None:
    client = Client(open_pool(picture_folder(tmp_path)), tmp_path / "votes")
    for file in tmp_path.glob("*/*.png"):
        file.write_bytes(file.read_bytes() + b"more")
    answer = client("GET", client("GET", "/vote").json()["left"]["media"])
    assert answer.status_code == 410 and answer.json() == {"detail": "this sample cannot be read any more"}
    client.desk.close()


def test_a_text_that_changed_does_not_stop_the_voter(tmp_path: Path) -> None:
    for system in ("base", "aligned"):
        (tmp_path / system).mkdir()
        (tmp_path / system / "0.txt").write_text(system)
    client = Client(open_pool(tmp_path), tmp_path / "votes")
    (tmp_path / "base" / "0.txt").write_text("other")
    told = client("GET", "/vote").json()
    assert sorted(told[side]["text"] for side in ("left", "right")) == ["This answer cannot be read any more.", "aligned"]
    assert client.vote("tie").json()["done"] == 1
    client.desk.close()


def test_a_ranking_shows_its_answers_to_those_who_finished(tmp_path: Path) -> None:
    client = Client(open_pool(picture_folder(tmp_path, 3, ["all"]) / "all", "label"), tmp_path / "votes", "label")
    entry = client.desk.pool.entries[0].id
    client.vote("left")
    assert client("GET", f"/vote/entry/{entry}").status_code == 404
    client("POST", "/vote", json={"choice": "finish", "nonce": "nonce-009"})
    (item,) = client("GET", "/vote/results").json()["items"]
    assert len(item["answers"]) == 2 and client("GET", item["answers"][0]["media"]).headers["content-type"] == "image/png"
    client.desk.close()
