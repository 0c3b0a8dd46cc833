"""One sample on the page of `mmpo demo compare`: how answers of each kind are shown, and what is told beneath them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpo.demos import heat
from mmpo.demos.markup import PLAIN, medium, plain, signed
from mmpo.demos.worker import Event
from mmpo.pair import Kind

NOTE = 300  # characters of what is told beside an answer
OFTEN = 0.15  # seconds between two updates of a page
Updates = dict[Any, Any]  # by component


@dataclass(frozen=True)
class Show:
    """How answers of a kind are shown. make: the component, by the system's name. value: what it takes of a text or a place."""

    make: Callable[[str], Any]
    value: Callable[[str, str], Any]


def _words(name: str) -> Any:
    import gradio as gr

    return gr.HighlightedText(
        [], label=f"Answer of {name}", color_map=heat.COLOURS, show_inline_category=False, show_legend=False,
        interactive=False, elem_classes=["compare-words"],
    )  # fmt: skip


def _medium(name: str) -> Any:
    import gradio as gr

    return gr.Markdown("", elem_classes=["compare-medium"], **PLAIN)


def _showing(kind: Kind) -> Show:
    return Show(_medium, lambda place, label: medium(kind, place, label))


SHOWN: dict[Kind, Show] = {
    "text": Show(_words, lambda words, label: [(words, None)]),
    "image": _showing("image"),
    "video": _showing("video"),
    "audio": _showing("audio"),
}


class Card:
    """The place of a sample: its system's name, the sample, and what was measured of it."""

    def __init__(self, name: str, kind: Kind) -> None:
        import gradio as gr

        self.name, self.kind, self.show = name, kind, SHOWN[kind]
        with gr.Column(min_width=220, elem_classes=["compare-card", f"compare-{kind}"]):
            gr.Markdown(f"## {plain(name)}", **PLAIN)
            self.shown = self.show.make(name)
            self.told = gr.Markdown("", elem_classes=["compare-told"], **PLAIN)

    def empty(self) -> Updates:
        return {self.shown: [] if self.kind == "text" else "", self.told: ""}

    def filled(self, sample: str, told: str = "") -> Updates:
        """sample: the text, or the place of the medium. told: markup of our own."""
        return {self.shown: self.show.value(sample, f"Answer of {self.name}"), self.told: told}


@dataclass
class Cell:
    """What is known of the sample of a card while a request is answered."""

    card: Card
    seed: int
    words: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def heard(self, event: Event) -> Updates:
        """What an event changes on the page."""
        if event.kind in ("partial", "sample"):
            self.words = str(event.value.get("text", ""))
            shown = self.words if "text" in event.value else f"/shown/{event.value['file']}"
            value = self.card.show.value(shown, f"Answer of {self.card.name}, seed {self.seed}")
            return {self.card.shown: value, self.card.told: self.told()}
        self.facts |= event.value
        updates: Updates = {self.card.told: self.told()}
        if event.value.get("tokens"):
            updates[self.card.shown] = heat.spans(self.words, [tuple(token) for token in event.value["tokens"]])  # type: ignore[misc]
        return updates

    def told(self) -> str:
        """Seed, reward and log-ratio in words and numbers, then the maps."""
        facts, parts = self.facts, [f"Seed {self.seed}."]
        if facts.get("score") is not None and math.isfinite(facts["score"]):
            right = {True: ", right", False: ", wrong", None: ""}[facts.get("correct")]
            parts.append(f"Reward **{facts['score']:.3g}**{right}.")
        if "total" in facts:
            parts.append(f"Log-ratio **{signed(facts['total'])}** nats{self._end()}.")
        if facts.get("full"):
            parts.append(f"Full colour: {facts['full']:.2g} nats of a region.")
        if facts.get("map"):
            label = f"Where the likelihood of this answer of {self.card.name} has moved"
            parts.append(medium("image", f"/shown/{facts['map']}", label))
        if facts.get("strip"):
            bars = ", ".join("no draw" if value is None else signed(value) for value in facts["bars"])
            parts.append(
                medium("image", f"/shown/{facts['strip']}", f"Log-ratio from nearly clean to nearly noise: {bars} nats")
            )
        return " ".join(parts)

    def _end(self) -> str:
        """Of tokens that spell nothing, the one that ends the answer."""
        silent = [value for start, _, value in self.facts.get("tokens") or () if start < 0]
        return f", of which the end of the answer {signed(sum(silent))}" if silent else ""


def components(grid: Sequence[Sequence[Card]]) -> list[Any]:
    return [part for card in itertools.chain.from_iterable(grid) for part in (card.shown, card.told)]


def pictures(names: Sequence[str]) -> Any:
    """What a place of pictures becomes for these, by the names of their files."""
    import gradio as gr

    shown = "".join(medium("image", f"/shown/{name}", "Picture of the prompt") for name in names)
    return gr.update(value=shown, visible=bool(shown))


def paced(events: Iterable[Event], cells: Sequence[Sequence[Cell]], status: Any) -> Iterator[Updates]:
    """The updates of a page from what becomes known, several in one where they come fast. cells: by seed, then by system."""
    pending: Updates = {}
    notes: list[str] = []
    began, last = time.monotonic(), 0.0
    for event in events:
        if event.kind == "note":
            told = str(event.value["text"])
            notes.append(told if len(told) <= NOTE else told[: NOTE - 1] + "\N{HORIZONTAL ELLIPSIS}")
        elif event.kind in ("partial", "sample", "judged", "explained"):
            pending |= cells[event.index][event.system].heard(event)
        else:
            pending[status] = said(event, time.monotonic() - began, notes)
        if pending and time.monotonic() - last > OFTEN:
            yield pending
            pending, last = {}, time.monotonic()
    if pending:
        yield pending


def said(event: Event, seconds: float, notes: Sequence[str]) -> str:
    """The status line."""
    words = {"done": f"Done in {seconds:.1f} s.", "stopped": "Stopped."}.get(event.kind)
    words = words or str(event.value.get("message") or event.value.get("note") or event.kind)
    return "\n".join([words, *dict.fromkeys(notes)]) if event.kind == "done" else words


def with_request(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as Gradio knows it for one that wants to see the request: by the type of its last argument."""
    import gradio as gr

    function.__annotations__["request"] = gr.Request
    return function
