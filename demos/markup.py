"""The little markup that the pages have: media of our own, numbers, and other people's words as nothing but words."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {"sanitize_html": True, "latex_delimiters": []}  # of every gr.Markdown
MEDIA = {
    "image": '<img class="shown" src="{place}" alt="{label}">',
    "video": '<video class="shown" src="{place}" title="{label}" controls preload="auto" playsinline loop></video>',
    "audio": '<audio class="shown" src="{place}" title="{label}" controls preload="auto" loop></audio>',
}


def plain(words: str) -> str:
    """Words that Markdown and HTML show as they are: whatever is no letter, digit or blank becomes a reference to itself."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in " ".join(words.split()))


def medium(kind: str, place: str, label: str) -> str:
    """A picture, video or sound. place: a path that the server made. label: what it is, for who does not see it."""
    return MEDIA[kind].format(place=place, label=plain(label))


def figure(place: str, title: str, caption: str) -> str:
    """A drawing with its title and what to look for in it."""
    shown = MEDIA["image"].format(place=place, label=plain(title))
    return f"<figure><h2>{plain(title)}</h2>{shown}<figcaption>{plain(caption)}</figcaption></figure>"


def signed(value: float) -> str:
    """A number with its sign and three digits that say something."""
    written = f"{value:+.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:+.2g}"
    return written.replace("-", "\N{MINUS SIGN}")
