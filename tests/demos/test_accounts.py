"""Accounts of the pages: digests that hold no password, files read strictly, sessions that end, equal times."""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path

import pytest

from mmpo.demos import accounts
from mmpo.demos.accounts import Accounts
from mmpo.errors import RecipeError

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def people() -> Accounts:
    return Accounts({"tim": accounts._parse(accounts.line("tim", PASSWORD), "here")[1]})


def test_a_session_ends(people: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, now = accounts.Sessions(), time.monotonic()
    token = sessions.start("tim")
    assert sessions.name(token) == "tim" and sessions.name(None) is sessions.name(token[:-1]) is None
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now + accounts.SESSION + 10)
    assert sessions.name(token) is None


def test_an_unknown_name_takes_as_long_as_a_wrong_password(people: Accounts) -> None:
    """Both are one scrypt; without it an unknown name would be known by an answer a thousand times as fast."""
    spent: dict[str, list[float]] = {"tim": [], "nobody": []}
    for name in random.Random(0).sample(["tim", "nobody"] * 5, 10):
        start = time.process_time()
        assert not people.check(name, "wrong")
        spent[name].append(time.process_time() - start)
    known, unknown = (statistics.median(spent[name]) for name in ("tim", "nobody"))
    assert 0.5 < known / unknown < 2


def test_a_file_of_accounts_is_read_strictly(tmp_path: Path) -> None:
    line, path = accounts.line("tim", PASSWORD), tmp_path / "accounts"
    assert PASSWORD not in line and line != accounts.line("tim", PASSWORD), "salted"
    path.write_text(f"# people\n\n{line}\n")
    os.chmod(path, 0o600)
    assert accounts.read(path).check("tim", PASSWORD) and not accounts.read(path).check("tim", PASSWORD + "x")
    bad = [
        "tim:secret",
        line + "x",
        line.replace("16384", "2"),
        line.replace("16384", "20000"),
        line.replace("16384$8", "65536$1"),
        line.replace("16384$8", "16384$99999999999"),
        line.replace("tim", "a b"),
        f"{line}\n{line}",
        "# nobody",
        "a:scrypt$1$1$1$?$?",
    ]
    for text in bad:
        path.write_text(text)
        with pytest.raises(RecipeError, match="accounts"):
            accounts.read(path)
    path.write_bytes(b"# people\n\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"accounts:2: .*mmpo demo password"):
        accounts.read(path)
    os.chmod(path, 0o644)
    with pytest.raises(RecipeError, match="chmod 600"):
        accounts.read(path)
    with pytest.raises(RecipeError, match="no such file"):
        accounts.read(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "password"), [("", PASSWORD), ("a:b", PASSWORD), ("a\nb", PASSWORD), ("tim", "short"), ("tim", "x" * 257)]
)
def test_names_and_passwords_that_cannot_be_used(name: str, password: str) -> None:
    with pytest.raises(RecipeError):
        accounts.line(name, password)
