"""Which paths of the server are open, and which files below them."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
WHO = "mmpo.visitor"  # who asks, in the scope of a request that was let in
# What a page shows or hands out; never what a browser would run, such as HTML and SVG.
SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".mp4", ".webm", ".wav", ".flac", ".mp3", ".ogg", ".txt", ".jsonl",
    ".parquet", ".zip",
})  # fmt: skip
_FILE = re.compile(r"/gradio_api/file[=/](.*)", re.DOTALL)
_GRADIO = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data|status)|run/\w+|heartbeat/[\w-]+|cancel|reset/?|app_id|startup-events|theme\.css"
    r"|upload_progress|login_check)",
    re.DOTALL,
)  # what a page of Gradio asks for
_CONSTANT = re.compile(r"/(assets|static|svelte)/.*|/theme\.css|/favicon\.ico", re.DOTALL)
_UPLOAD = "/gradio_api/upload"


class Refused(Exception):
    """A request that is not let through. reason: for the log; the message: for the one who asked."""

    def __init__(self, status: int, reason: str, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason
        self.headers = {"retry-after": f"{wait:.0f}"} if wait else {}


def canonical(name: str) -> str:
    """A host's name as it is compared: lower case, without the dot of the root, addresses in their shortest form."""
    name = name.lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


@dataclass(frozen=True)
class Doors:
    """media, cache: folders whose files are served. private: never, wherever they are. own: patterns of a page's own paths."""

    media: Path
    cache: Path
    private: tuple[Path, ...] = ()
    own: tuple[re.Pattern[str], ...] = ()
    uploads: bool = False

    def constant(self, path: str) -> bool:
        """The same for everybody, so that it is not counted and may be kept by a browser."""
        return _CONSTANT.fullmatch(path) is not None

    def check(self, path: str) -> None:
        """Raises Refused unless this path is one that a page needs."""
        if found := _FILE.fullmatch(path):
            return self.check_file(found[1])
        if path == _UPLOAD and not self.uploads:
            raise Refused(403, "an upload", "this page takes no files")
        if not (path == _UPLOAD or _GRADIO.fullmatch(path) or any(pattern.match(path) for pattern in self.own)):
            raise Refused(404, "no such path", "no such path")

    def check_file(self, name: str) -> None:
        """Raises Refused unless this is a medium below `media`, or below the page's own cache."""
        try:
            found = Path(os.path.realpath(name))
            inside = Path(name).is_absolute() and any(found.is_relative_to(folder) for folder in self._served())
            hidden = any(found.is_relative_to(os.path.realpath(folder)) for folder in self.private)
            free = inside and not hidden and found.suffix.lower() in SUFFIXES and found.is_file()
        except (ValueError, OSError):  # a NUL, a loop of links, a name that is too long
            free = False
        if not free:
            raise Refused(403, "a file", "that file is not part of this page")

    def _served(self) -> tuple[str, str]:
        return os.path.realpath(self.media), os.path.realpath(self.cache)
