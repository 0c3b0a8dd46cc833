"""What a page may do: the content security policy, and the proof that Gradio's inline scripts are the ones it ships.

Gradio's page carries inline scripts with its configuration in them. A hash is given only to a script that equals one of the
installed template, with nothing but JSON where the template has a placeholder; whatever else is inline does not run.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

_INLINE = re.compile(r"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{\{.*?\}\}", re.DOTALL)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}


def content_security(hashes: Sequence[str] = ()) -> str:
    """The policy's header: everything from this server; scripts from files, and the inline ones that have these hashes.

    Styles may be inline, because Gradio positions its components by style attributes.
    """
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return "; ".join(
        [
            "default-src 'self'", f"script-src 'self' {allowed}".strip(), "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:", "media-src 'self' blob:", "font-src 'self' data:", "connect-src 'self'",
            "worker-src 'self' blob:", "object-src 'none'", "base-uri 'self'", "form-action 'self'", "frame-ancestors 'none'",
        ]
    )  # fmt: skip


def trusted(page: str) -> Iterator[str]:
    """Base64 SHA-256 of each inline script of the page that is Gradio's own."""
    for script in _INLINE.findall(page):
        if any(_is(script, shape) for shape in _shapes()):
            yield base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _shapes() -> tuple[re.Pattern[str], ...]:
    gradio = importlib.util.find_spec("gradio")  # its place, without importing it
    assert gradio is not None and gradio.origin is not None
    template = (Path(gradio.origin).parent / "templates" / "frontend" / "index.html").read_text(encoding="utf-8")
    scripts = [_PLACEHOLDER.split(script) for script in _INLINE.findall(template)]
    return tuple(re.compile("(.*)".join(map(re.escape, pieces)), re.DOTALL) for pieces in scripts)


def _is(script: str, shape: re.Pattern[str]) -> bool:
    found = shape.fullmatch(script)
    return found is not None and all(_is_json(value) for value in found.groups())


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True
