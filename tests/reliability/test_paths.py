"""S4: 200 names and files that try to lead a dataset out of its root, or to something that is no file. None is read."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpo import media
from mmpo.datasets.load import load
from tests.reliability.counters import FULL, counter

INSIDE = media.encode(np.full((4, 4, 3), 90, np.uint8))
SECRET = media.encode(np.full((4, 4, 3), 7, np.uint8))
RACES = 4000 if FULL else 400  # reads while a folder is being swapped for a link


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root with a picture in each of three folders, beside a secret, with links and special files of every sort."""
    folder = tmp_path / "root"
    (folder / "sub" / "deep").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "sub/deep/c.png"):
        (folder / name).write_bytes(INSIDE)
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    for path in (tmp_path / "secret.png", outside / "b.png", outside / "deep" / "c.png"):
        path.write_bytes(SECRET)
    (tmp_path / "root-twin").mkdir()
    (tmp_path / "root-twin" / "a.png").write_bytes(SECRET)
    for name, target in LINKS.items():
        (folder / name).symlink_to(target.format(top=tmp_path))
    os.mkfifo(folder / "pipe.png")
    with open(folder / "large.png", "wb") as file:
        file.truncate(media.MAX_BYTES + 1)  # sparse: takes no disk
    (folder / "locked").mkdir()
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket has at most 107 bytes
    server.bind("socket.png")
    os.chdir(here)
    yield folder
    server.close()


LINKS = {
    "out.png": "../secret.png", "absolute.png": "{top}/secret.png", "outside": "../outside", "top": "{top}", "slash": "/",
    "chain1": "chain2", "chain2": "out.png", "chain3": "chain4/b.png", "chain4": "outside", "loop": "loop", "loop1": "loop2",
    "loop2": "loop1", "dangling": "nowhere", "twin": "../root-twin", "zero": "/dev/zero", "null": "/dev/null",
    "random": "/dev/urandom", "environ": "/proc/self/environ", "self": "/proc/self/root", "fd": "/dev/fd/0", "up": "..",
    "back": "sub/../../secret.png", "memory": "/proc/self/mem", "topipe": "pipe.png", "tosocket": "socket.png", "tosub": "sub",
}  # fmt: skip

HOSTS = ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "169.254.169.254", "[::ffff:127.0.0.1]", "user:pw@host"]
NAMES: dict[str, list[str]] = {
    "forbidden path": [
        "", " ", "\t", "..", "../", "./..", "../.", "sub/..", "sub/../a.png", "a.png/..", "../root/a.png", "../root-twin/a.png",
        *("../" * depth + "secret.png" for depth in range(1, 9)), *("sub/" + "../" * d + "secret.png" for d in range(2, 9)),
        *("../" * depth + "etc/passwd" for depth in range(1, 9)), "sub/./../../secret.png", "sub//..//..//secret.png",
        "outside/../a.png", "up/../../secret.png", "/", "/etc/passwd", "//etc/passwd", "///etc/passwd", "/dev/zero",
        "/proc/self/environ", "/./etc/passwd", "//host/share/a.png", "/root/../etc/passwd", "C:/secret.png", "c:secret.png",
        "z:\\secret.png", "..\\secret.png", "sub\\..\\..\\secret.png", "sub\\b.png", "\\secret.png", "\\\\host\\share\\a.png",
        "\\\\?\\C:\\secret.png", "\\\\.\\pipe\\x", "\0", "\0a.png", "a.png\0", "a.png\0.txt", "a\0.png", "sub\0/b.png",
        "sub/\0b.png", "../secret.png\0a.png",
    ],
    "URL": [
        *(f"{scheme}://{host}/a.png" for scheme in ("http", "https", "HTTP") for host in HOSTS), "http:/127.0.0.1/a.png",
        " http://host/a.png", "http:a.png", "https:\\\\host\\a.png", "ftp://host/a.png", "file:///etc/passwd",
        "file:/etc/passwd",
        "file:a.png", "FILE:///etc/passwd", "file://localhost/etc/passwd", "file:..\\secret.png", "\tfile:///etc/passwd",
        "data:image/png;base64,AAAA", "data:,x", "s3://bucket/a.png", "gs://bucket/a.png", "hf://datasets/x/a.png",
        "zip://a.png::http://host/b.zip", "concat:/etc/passwd|a.png", "pipe:0", "pipe:", "javascript:alert(1)", "blob:x",
        "sub/http://host/a.png", "gopher://127.0.0.1:25/x", "jar:file:///x!/a.png", "ssh://host/a.png", "smb://host/a.png",
        "unix:///var/run/x.sock", "dict://127.0.0.1:11211/x", "ldap://127.0.0.1/x",
    ],
    "path leaves the root": [
        "out.png", "absolute.png", "outside/b.png", "outside/deep/c.png", "outside", "top/secret.png", "top/root-twin/a.png",
        "slash/etc/passwd", "slash/dev/zero", "slash", "chain1", "chain2", "chain3", "chain4/b.png", "twin/a.png", "zero",
        "null", "random", "environ", "self/etc/passwd", "up/secret.png", "up", "back", "./out.png", "memory",
    ],
    "not a regular file": [".", "./", "sub", "sub/", "sub/deep", "pipe.png", "socket.png", "topipe", "tosocket", "tosub",
                           "tosub/deep", "locked", "up/root"],
    "missing file": [
        "none.png", "sub/none.png", "none/a.png", "dangling", "a.png/b.png", "a.png ", "A.PNG", "%2e%2e/secret.png",
        "..%2fsecret.png", ".../secret.png", "..;/secret.png", "\uff0e\uff0e/secret.png", "~/secret.png", "$HOME/a.png",
        "a.png\n", "sub/b.png?x", "a.png#x", "..\u2215secret.png", "a.png;ls", "$(ls)", "`ls`", "a.png|cat",
        "*.png", "x/" * 3000, "sub/\udcff",
    ],
    "unreadable file": ["loop", "loop1", "loop2/a.png", "x" * 300, "a.png" * 1000, "\ud800.png", "sub/\udcff\ud800"],
    "file too large": ["large.png", "./large.png"],
}  # fmt: skip
ATTACKS = [(name, reason) for reason, names in NAMES.items() for name in names]


def attack(root: Path, name: str) -> str:
    """The reason for which a name is refused, or what was read."""
    try:
        return f"read {len(media.read(root, name))} bytes"
    except media.ForbiddenPath as error:
        return error.reason


def test_names_and_links_inside_the_root_are_read(root: Path) -> None:
    for name in ("a.png", "./a.png", "sub/b.png", "sub//deep/./c.png", "tosub/b.png", "tosub/deep/c.png", "up/root/a.png"):
        assert media.read(root, name) == INSIDE
    assert media.read(root / "up" / "root", "a.png") == INSIDE  # the root itself may be reached through links


def test_s4_attacks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, links and special files; and each of them again as a row of a file, refused with its reason and its line."""

    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket, "getaddrinfo", none)
    monkeypatch.setattr(socket.socket, "connect", none)
    start = time.monotonic()
    found = {name: attack(root, name) for name, _ in ATTACKS}
    assert {n: (found[n], reason) for n, reason in ATTACKS if found[n] != reason} == {}
    rows = [{"caption": "c", "file_path": name, "label": 1} for name, _ in ATTACKS]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"file_path": "a.png"}])))
    pairs, ledger = load(root / "rows.jsonl", on_bad="quarantine")
    reasons = ["missing image" if not name else reason for name, reason in ATTACKS]
    assert len(pairs) == 1 and ledger.refused == Counter(reasons)
    told = [json.loads(line) for line in ledger.quarantined]
    assert [(t["where"], t["reason"]) for t in told] == [(f"rows.jsonl:line {i}", r) for i, r in enumerate(reasons, 1)]
    swaps = [swapped(root, name, swap, monkeypatch) for name in SWAPPED for swap in SWAPS]
    assert not [s for s in swaps if s.startswith("read")], swaps
    size = len(found) + len(swaps)
    assert size >= 200
    counter("S4", "path attacks, each also as a row, some swapped after the check", size, "0 read", time.monotonic() - start)


# ---- what changes between the check and the opening


def _link(path: Path, top: Path) -> None:
    path.symlink_to(top / "outside" / "deep" if path.suffix == "" else top / "secret.png")


SWAPS: dict[str, Callable[[Path, Path], None]] = {
    "a link out": _link,
    "a link to a device": lambda path, top: path.symlink_to("/dev/zero"),
    "a link within": lambda path, top: path.symlink_to(top / "root" / "a.png"),
    "a pipe": lambda path, top: os.mkfifo(path),
    "a folder": lambda path, top: path.mkdir(),
    "nothing": lambda path, top: None,
}
SWAPPED = ["a.png", "sub/b.png", "sub/deep/c.png", "sub/deep", "sub"]  # of the last two, a folder on the way is swapped


def swapped(root: Path, name: str, swap: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read a file while what it is, or a folder on its way, is swapped after `resolve` has found everything in order."""
    kept, original = root.parent / "kept", media.resolve

    def resolve(*arguments: Any) -> Path:
        path = original(*arguments)
        (root / name).rename(kept)
        SWAPS[swap](root / name, root.parent)
        return path

    monkeypatch.setattr(media, "resolve", resolve)
    target = {"sub/deep": "sub/deep/c.png", "sub": "sub/b.png"}.get(name, name)
    try:
        return attack(root, target)
    finally:
        monkeypatch.setattr(media, "resolve", original)
        path = root / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        kept.rename(path)


@pytest.mark.parametrize("swap", ["a link out", "a link within", "a pipe", "a folder", "nothing"])
def test_a_file_that_is_swapped_after_it_was_found_regular(root: Path, swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last moment: between the look at the file and its opening."""
    original = media._check_regular
    done: list[Path] = []

    def check(status: os.stat_result, name: str) -> None:
        original(status, name)
        if not done:
            done.append((root / "sub" / "b.png").rename(root / "kept"))
            SWAPS[swap](root / "sub" / "b.png", root.parent)

    monkeypatch.setattr(media, "_check_regular", check)
    assert attack(root, "sub/b.png") in ("unreadable file", "not a regular file") and done


def test_a_file_that_grows_after_it_was_measured_is_read_up_to_the_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = original(descriptor)
        with open(root / "sub" / "b.png", "ab") as file:
            file.write(bytes(5000))
        return found

    monkeypatch.setattr(media.os, "fstat", fstat)
    assert len(media.read(root, "sub/b.png", limit=1000)) <= 1000


def test_devices_are_never_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open some devices already does something: pipes, sockets and devices are told before."""
    opened: list[Any] = []
    original = os.open

    def watched(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(media.os, "open", watched)
    monkeypatch.setattr(media.os, "supports_dir_fd", {watched})
    try:
        os.mknod(root / "device.png", 0o600 | 0o020000, os.makedev(1, 5))  # a copy of /dev/zero
        special = ["pipe.png", "socket.png", "device.png"]
    except PermissionError:
        special = ["pipe.png", "socket.png"]
    for name in special:
        assert attack(root, name) == "not a regular file"
    assert not [p for p in opened if str(p).endswith(".png")] and opened


def test_a_folder_that_is_swapped_for_a_link_all_the_time_gives_nothing_away(root: Path) -> None:
    """A thread swaps sub/ for a link to a folder outside and back; every read is the file inside, or an error."""
    start, stop, outcomes = time.monotonic(), threading.Event(), Counter[str]()

    def swap() -> None:
        while not stop.is_set():
            (root / "sub").rename(root / "away")
            (root / "sub").symlink_to("../outside")
            (root / "sub").unlink()
            (root / "away").rename(root / "sub")
            stop.wait(random.random() * 2e-3)  # from no time at all to enough for a read on a busy machine

    def both() -> bool:
        return outcomes["the file inside"] > 0 and len(outcomes) > 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        while outcomes.total() < RACES or not (both() or time.monotonic() > start + 60):
            try:
                data = media.read(root, "sub/b.png")
                outcomes["the file inside" if data == INSIDE else "THE SECRET"] += 1
            except media.ForbiddenPath as error:
                outcomes[error.reason] += 1
    finally:
        stop.set()
        thread.join()
    assert "THE SECRET" not in outcomes and both()
    counter("S4", "reads against a thread that swaps a folder", RACES, "0 read outside", time.monotonic() - start)
