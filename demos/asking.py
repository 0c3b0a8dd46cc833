"""What a visitor of `mmpo demo compare` asks of the models: a prompt, pictures of their own, an end; and what comes back.

A visitor has one comparison at a time, as its answers are written into their cards. Others' wait in the worker's line.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmpo.demos import brought, cards
from mmpo.demos.brought import Brought
from mmpo.demos.systems import Source
from mmpo.demos.worker import Worker
from mmpo.errors import DataError

SEEDS, LARGEST_SEED, TEXT = 4, 2**31 - 1, 4000
OWN = "My own words"
WAITING = 16  # requests that are told that they wait; the models answer one
LOADING, READING = "Loading the models.", "Reading the held-out prompts."

Updates = dict[Any, Any]  # by component
Grid = Sequence[Sequence[cards.Card]]  # a line for each seed, in it a card for each system


class Asking:
    """The part of a source's page whose answers its worker gives."""

    def __init__(self, source: Source, brought: Brought, worker: Worker) -> None:
        self.source, self.brought, self.worker = source, brought, worker
        self._comparing: set[str] = set()  # visitors whose comparison has not ended
        self._beginning = threading.Lock()

    def wire(self, blocks: Any, parts: Mapping[str, Any], status: Any, rows: Sequence[Any], grid: Grid) -> None:
        """What happens on the page when somebody does something."""
        import gradio as gr

        worker = self.worker
        timer = gr.Timer(1.0)
        shown = [status, parts["held"], timer]
        timer.tick(self._looked(parts["held"], status, timer), [status], shown, show_progress="hidden")
        chosen = [parts["words"], parts["pictures"], parts["names"], *([parts["without"]] if self.source.pictures else [])]
        parts["held"].input(self._picked, [parts["held"]], chosen, show_progress="hidden", trigger_mode="always_last")
        if self.source.pictures:
            self._wire_uploads(parts, status)
        given = [parts[name] for name in ("words", "held", "seed", "count", "steps", "names")]
        outputs = [status, parts["run"], parts["stop"], *rows, *cards.components(grid)]
        run, free = self._run(parts, status, rows, grid), self._free(parts["run"], parts["stop"])
        for trigger in (parts["run"].click, parts["words"].submit):
            ran = trigger(run, given, outputs, show_progress="hidden", concurrency_limit=WAITING, concurrency_id="compare")
            # Not in the last update of the run itself: until Gradio has closed a run it drops a click.
            ran.then(free, None, [parts["run"], parts["stop"]], show_progress="hidden", queue=False)

        @cards.with_request
        def stop(request: Any) -> None:
            worker.cancel(str(request.session_hash))

        parts["stop"].click(stop, None, None, show_progress="hidden", queue=False)
        blocks.unload(stop)  # whoever closes the page waits no more

    def _wire_uploads(self, parts: Mapping[str, Any], status: Any) -> None:
        """Pictures that are brought are shown, take the place of a held-out prompt's, and can be left out again."""
        import gradio as gr

        file, names, held, without = (parts[name] for name in ("file", "names", "held", "without"))

        @cards.with_request
        def take(paths: list[str] | None, known: list[str], request: Any) -> Updates:
            given = [str(path) for path in paths or ()]
            try:
                found = self.brought.take(str(request.session_hash), given, known)
            except DataError as error:
                return {file: None, status: str(error)}
            left = len(known) + len(given) - len(found)
            said = f"At most {brought.MOST} pictures; the first of them are taken." if left else gr.skip()
            shown = {parts["pictures"]: cards.pictures(found), without: gr.update(visible=bool(found))}
            return shown | {file: None, names: found, held: -1, status: said}

        def drop() -> Updates:
            return {parts["pictures"]: cards.pictures([]), without: gr.update(visible=False), names: []}

        file.upload(take, [file, names], [file, names, parts["pictures"], held, without, status], show_progress="minimal")
        without.click(drop, None, [names, parts["pictures"], without], show_progress="hidden")

    def _looked(self, held: Any, status: Any, timer: Any) -> Any:
        """Asked every second until the models and the held-out prompts are there."""
        import gradio as gr

        worker = self.worker

        def look(said: str) -> Updates:
            state = worker.state
            waiting = said in ("", LOADING, READING)  # nothing has been asked meanwhile, whose answer is told there
            if state.name == "failed":
                return {status: state.message, timer: gr.Timer(active=False)}
            if state.prompts is None:
                told = LOADING if state.name == "starting" else READING
                return {status: told} if waiting and said != told else {status: gr.skip()}
            choices = [(OWN, -1), *((label_of(i, p["words"]), i) for i, p in enumerate(state.prompts))]
            ready = {status: state.message or "Ready."} if waiting else {}
            return ready | {held: gr.Dropdown(choices), timer: gr.Timer(active=False)}

        return look

    def _held(self, number: Any) -> dict[str, Any] | None:
        prompts = self.worker.state.prompts or ()
        return prompts[number] if isinstance(number, int) and 0 <= number < len(prompts) else None

    def _picked(self, number: Any) -> tuple[Any, ...]:
        """The words and the pictures of a held-out prompt; a visitor's own go."""
        import gradio as gr

        prompt = self._held(number) or {"words": gr.skip(), "pictures": []}
        left_out = [gr.update(visible=False)] if self.source.pictures else []
        return prompt["words"], cards.pictures(prompt["pictures"]), [], *left_out

    def _run(self, parts: Mapping[str, Any], status: Any, rows: Sequence[Any], grid: Grid) -> Any:
        import gradio as gr

        worker, run, stop = self.worker, parts["run"], parts["stop"]

        @cards.with_request
        def compare(
            words: Any, held: Any, seed: Any, count: Any, steps: Any, names: list[str], request: Any
        ) -> Iterator[Updates]:
            asked, owner = str(words or "").strip(), str(request.session_hash)
            if not self._begun(owner):
                # Not in the status line, where the comparison writes.
                gr.Warning("Your comparison still runs. Stop it before you ask for another one.")
                return
            try:
                if asked and len(asked) <= TEXT:
                    yield from answered(asked, held, seed, count, steps, names, owner)
                else:
                    yield {status: f"Write a prompt of 1 to {TEXT:,} characters, or choose a held-out one."}
            finally:
                self._comparing.discard(owner)

        def answered(
            asked: str, held: Any, seed: Any, count: Any, steps: Any, names: list[str], owner: str
        ) -> Iterator[Updates]:
            first, most = clamped(seed, 0, LARGEST_SEED), self.source.steps[0] if self.source.steps else 1
            seeds = [(first + i) % (LARGEST_SEED + 1) for i in range(clamped(count, 1, SEEDS))]
            begin: Updates = {row: gr.update(visible=i < len(seeds)) for i, row in enumerate(rows)}
            for card in itertools.chain.from_iterable(grid):
                begin |= card.empty()
            yield begin | {status: "Asked.", run: gr.update(interactive=False), stop: gr.update(interactive=True)}
            number = held if self._held(held) else None
            options: dict[str, Any] = {"held": number, "steps": clamped(steps, 1, most), "owner": owner, "pictures": names}
            cells = [[cards.Cell(card, seed) for card in line] for line, seed in zip(grid, seeds, strict=False)]
            yield from cards.paced(worker.sample(asked, seeds, **options), cells, status)

        return compare

    def _begun(self, owner: str) -> bool:
        """Note that a visitor's comparison begins; False when one of theirs still runs, whose cards it would write into."""
        with self._beginning:
            runs = owner in self._comparing
            self._comparing.add(owner)
            return not runs

    def _free(self, run: Any, stop: Any) -> Any:
        """The buttons as they are once a visitor's comparison has ended, or was never begun."""
        import gradio as gr

        @cards.with_request
        def free(request: Any) -> Updates:
            runs = str(request.session_hash) in self._comparing
            return {run: gr.update(interactive=not runs), stop: gr.update(interactive=runs)}

        return free


def clamped(value: Any, least: int, most: int) -> int:
    """A number of the client's as a whole one within its limits; what is none counts as the least."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) and value == value else least
    return int(min(max(number, least), most))


def label_of(number: int, words: str) -> str:
    """A prompt in one line of a list, where no two are the same: Gradio takes a choice by its label."""
    line = " ".join(words.split())
    return f"{number + 1}. {line if len(line) <= 100 else line[:99] + chr(0x2026)}"
