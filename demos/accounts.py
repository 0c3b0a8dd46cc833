"""Who may come in: a file of names with scrypt digests, and the sessions of those who gave the right password.

One line a person, `name:scrypt$n$r$p$salt$digest`, as `mmpo demo password NAME` prints it. No password is ever stored or
logged, and an unknown name takes as long to refuse as a wrong password.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from mmpo.errors import RecipeError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
COST = (2**14, 8, 1)  # n, r, p of RFC 7914: 16 MiB and a few hundredths of a second a guess
SHORTEST, LONGEST = 8, 256  # characters of a password
SESSION = 12 * 3600.0  # seconds
SESSIONS = 1000  # at once; the oldest ends first
_LINE = re.compile(r"(?P<name>[^:]+):scrypt\$(?P<n>\d+)\$(?P<r>\d+)\$(?P<p>\d+)\$(?P<salt>[^$]+)\$(?P<digest>[^$]+)")


@dataclass(frozen=True)
class Digest:
    cost: tuple[int, int, int]
    salt: bytes
    digest: bytes


@dataclass(frozen=True)
class Accounts:
    digests: dict[str, Digest]

    def check(self, name: str, password: str) -> bool:
        """Whether this is the password of this name. Takes the time of one scrypt, whoever asks; compared in constant time."""
        known = self.digests.get(name)
        kept = known or _NOBODY
        same = hmac.compare_digest(_scrypt(password[:LONGEST], kept.salt, kept.cost), kept.digest)
        return same and known is not None


@dataclass
class Sessions:
    """Tokens of those who are in, in memory only: after a restart people give their password again."""

    names: OrderedDict[str, tuple[str, float]] = field(default_factory=OrderedDict)

    def start(self, name: str) -> str:
        token = secrets.token_urlsafe(32)
        self.names[token] = (name, time.monotonic() + SESSION)
        while len(self.names) > SESSIONS:
            self.names.popitem(last=False)
        return token

    def name(self, token: str | None) -> str | None:
        name, end = self.names.get(token or "", ("", 0.0))
        return name if time.monotonic() < end else None


def line(name: str, password: str) -> str:
    """The line of the file for this name and password. Raises RecipeError for a name or a password that cannot be used."""
    if not NAME.fullmatch(name):
        raise RecipeError(f"name {name!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    if not SHORTEST <= len(password) <= LONGEST:
        raise RecipeError(f"password of {len(password)} characters: expected {SHORTEST} to {LONGEST}")
    salt = secrets.token_bytes(16)
    parts = (*COST, _text(salt), _text(_scrypt(password, salt, COST)))
    return f"{name}:scrypt$" + "$".join(map(str, parts))


def read(path: Path) -> Accounts:
    """The accounts of a file; blank lines and lines from # are left out. Raises RecipeError naming the file and the line."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; `mmpo demo password NAME >> {path}` adds a line to it")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RecipeError(f"{path}: others on this machine can read or change it; `chmod 600 {path}` closes it")
    digests = {}
    for number, row in enumerate(_decoded(path).splitlines(), 1):
        if not row.strip() or row.startswith("#"):
            continue
        name, digest = _parse(row.strip(), f"{path}:{number}")
        if name in digests:
            raise RecipeError(f"{path}:{number}: {name} has a line already")
        digests[name] = digest
    if not digests:
        raise RecipeError(f"{path}: holds no account; `mmpo demo password NAME >> {path}` adds one")
    return Accounts(digests)


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: no text; expected lines that `mmpo demo password NAME` printed") from error


def _parse(row: str, where: str) -> tuple[str, Digest]:
    found = _LINE.fullmatch(row)
    try:
        if not found or not NAME.fullmatch(found["name"]):
            raise ValueError
        cost = int(found["n"]), int(found["r"]), int(found["p"])
        salt, digest = (base64.b64decode(found[part], validate=True) for part in ("salt", "digest"))
        if not _usable(*cost) or len(digest) != 32:
            raise ValueError
    except ValueError as error:
        raise RecipeError(f"{where}: expected a line that `mmpo demo password NAME` printed") from error
    return found["name"], Digest(cost, salt, digest)


def _usable(n: int, r: int, p: int) -> bool:
    """Whether scrypt takes this cost (RFC 7914, section 2: n is a power of 2, and below 2 to the 16 r), in bearable time."""
    bearable = COST[0] <= n <= 2**17 and 1 <= r <= 16 and 1 <= p <= 4  # looked at first: of a huge r there is no power
    return bearable and n & (n - 1) == 0 and n < 2 ** (16 * r)


def _scrypt(password: str, salt: bytes, cost: tuple[int, int, int]) -> bytes:
    n, r, p = cost
    return hashlib.scrypt(password.encode(errors="replace"), salt=salt, n=n, r=r, p=p, maxmem=256 * n * r, dklen=32)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


_NOBODY = Digest(COST, bytes(16), bytes(32))
