"""`mmpo demo compare`: the same prompt and seed to every model, side by side, and where their likelihoods part.

The page is made of what the server says alone: prompts are text that is never markup, a held-out prompt is a number, samples
are files that the worker wrote under names nobody can guess, and no path or address of a client's is opened.
"""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmpo.demos import brought, cards, heat, history, markup
from mmpo.demos.blinding import blinded
from mmpo.demos.brought import Brought
from mmpo.demos.pool import Entry
from mmpo.demos.site import Site, private_folder
from mmpo.demos.systems import Source, open_source
from mmpo.demos.vote_routes import ranged
from mmpo.demos.worker import Worker
from mmpo.errors import DataError

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["compare_site", "open_source"]

TITLE = "Compare models"
SCRIPT = Path(__file__).with_name("players.js")
SEEDS, LARGEST_SEED, TEXT = 4, 2**31 - 1, 4000
SHOWN = re.compile(r"[0-9a-f]{32}\.(png|svg|wav|mp4|webm)")
TYPES = {"png": "image/png", "svg": "image/svg+xml", "wav": "audio/wav", "mp4": "video/mp4", "webm": "video/webm"}
OWN = "My own words"
WAITING = 16  # requests that are told that they wait; the models answer one
LOADING, READING = "Loading the models.", "Reading the held-out prompts."

Updates = dict[Any, Any]  # by component
Grid = Sequence[Sequence[cards.Card]]  # a line for each seed, in it a card for each system


def compare_site(source: Source, worker: Worker | None = None) -> Site:
    """The page of a source. Its models are being loaded when this returns; the page says when they are ready.

    worker: what answers, for tests; None: one of its own.
    """
    lock, folder = private_folder(Path(tempfile.gettempdir()))
    files, cache, media = (folder / name for name in ("files", "cache", "media"))
    for made in (files, cache, media):
        made.mkdir()
    if worker is None and source.pool is None:
        worker = Worker(source, files, cache)
        worker.start()
    desk = Desk(source, files if worker is None else worker.files, worker)

    def close() -> None:
        if worker is not None:
            worker.close()
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)

    return Site(
        TITLE, desk.page, media, routes=desk.routes(), scripts=(SCRIPT,), close=close, uploads=source.pictures
    )  # fmt: skip


class Desk:
    """What the page of a source shows, and what it does. files: where samples lie."""

    def __init__(self, source: Source, files: Path, worker: Worker | None) -> None:
        self.source, self.files, self.worker = source, files, worker
        self.brought = Brought(files)
        self._drawn: list[history.Drawn] | None = None
        self._drawing = threading.Lock()
        self._written: dict[str, list[str]] = {}  # files of ready-made prompts' pictures, by item

    # ---- files

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("/shown/{name}", self.sample, methods=["GET"]),
            Route("/entry/{entry}", self.entry, methods=["GET"]),
        )

    def sample(self, request: Request) -> Response:
        """A file of a sample; only names that this server makes are looked up, in one folder."""
        name = request.path_params["name"]
        found = SHOWN.fullmatch(name)
        if not found or not (self.files / name).is_file():
            return JSONResponse({"detail": "there is no such sample"}, 404)
        return ranged(request, TYPES[found[1]], (self.files / name).read_bytes())

    def entry(self, request: Request) -> Response:
        """A ready-made sample, by the id that the server gave it."""
        pool = self.source.pool
        entry = pool.by_id.get(request.path_params["entry"]) if pool else None
        if entry is None or entry.kind == "text":
            return JSONResponse({"detail": "there is no such sample"}, 404)
        try:
            return ranged(request, *blinded(entry.block))
        except DataError:
            return JSONResponse({"detail": "this sample cannot be read any more"}, 410)

    # ---- the page

    def page(self) -> gr.Blocks:
        import gradio as gr

        with gr.Blocks(title=TITLE) as blocks:
            gr.Markdown(f"# {TITLE}\n{markup.plain(self.source.title)}", **markup.PLAIN)
            parts = self._items() if self.source.pool else self._controls()
            status = gr.Textbox(
                "",
                label="Status",
                interactive=False,
                lines=1,
                max_lines=4,
                elem_id="compare-status",
                visible=not self.source.pool,
            )
            rows, grid = self._grid()
            if self.source.kind in heat.LEGEND and self.source.pool is None:
                gr.Markdown(heat.LEGEND[self.source.kind], elem_id="compare-legend", **markup.PLAIN)
            if self.source.run is not None:
                self._history(blocks)
            if self.source.pool:
                outputs = [*rows, *cards.components(grid)]
                outputs += [parts["words"], parts["pictures"]]
                for happens in (parts["item"].change, blocks.load):
                    happens(self._browsed(parts, rows, grid), [parts["item"]], outputs, show_progress="hidden")
            else:
                self._wire(blocks, parts, status, rows, grid)
        return blocks

    def _controls(self) -> dict[str, Any]:
        import gradio as gr

        most, unit = self.source.steps or (1, "steps")
        with gr.Row(elem_id="compare-controls"):
            with gr.Column(scale=3, min_width=280):
                words = gr.Textbox(label="Prompt", lines=2, max_lines=8, max_length=TEXT, elem_id="compare-prompt")
                held = gr.Dropdown([(OWN, -1)], value=-1, label="Held-out prompt", elem_id="compare-held")
                pictures = gr.Markdown("", visible=False, elem_id="compare-pictures", **markup.PLAIN)
                own: dict[str, Any] = self._uploads() if self.source.pictures else {}
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    seed = gr.Number(0, label="First seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120)
                    count = gr.Slider(1, SEEDS, 1, step=1, label="Seeds", min_width=200, elem_id="compare-seeds")
                steps = gr.Slider(1, most, most, step=1, label=f"Most {unit} of a sample", elem_id="compare-steps")
                with gr.Row():
                    run = gr.Button("Compare", variant="primary", elem_id="compare-run")
                    stop = gr.Button("Stop", interactive=False, elem_id="compare-stop")
        return {
            "words": words, "held": held, "pictures": pictures, "seed": seed, "count": count, "steps": steps, "run": run,
            "stop": stop, "names": gr.State([]),
        } | own  # fmt: skip

    def _uploads(self) -> dict[str, Any]:
        """Where visitors bring pictures of their own, and leave them out again."""
        import gradio as gr

        without = gr.Button("Without these pictures", visible=False, size="sm", elem_id="compare-without")
        file = gr.File(
            label="Pictures of your own", file_count="multiple", file_types=list(brought.SUFFIXES), height=130,
            elem_id="compare-upload",
        )  # fmt: skip
        return {"file": file, "without": without}

    def _items(self) -> dict[str, Any]:
        import gradio as gr

        assert self.source.pool is not None
        items = [(label_of(i, self.words_of(entries[0])), i) for i, entries in enumerate(self.source.pool.items.values())]
        return {
            "item": gr.Dropdown(items, value=0, label="Prompt", elem_id="compare-item"),
            "words": gr.Textbox("", label="The whole prompt", interactive=False, lines=1, max_lines=8, elem_id="compare-whole"),
            "pictures": gr.Markdown("", visible=False, elem_id="compare-pictures", **markup.PLAIN),
        }

    def _grid(self) -> tuple[list[Any], Grid]:
        """A row for each seed, and in it a card for each system."""
        import gradio as gr

        rows, grid = [], []
        for index in range(SEEDS):
            with gr.Row(visible=index == 0, elem_classes=["compare-row"]) as row:
                grid.append([cards.Card(name, self.source.kind) for name in self.source.systems])
            rows.append(row)
        return rows, grid

    def _history(self, blocks: gr.Blocks) -> None:
        """What training did, drawn when the page is first looked at."""
        import gradio as gr

        with gr.Accordion("What training did", open=True, elem_id="compare-history"):
            verdict = gr.Textbox("", label="Verdict of the run", interactive=False, lines=1, max_lines=6)
            curves = gr.Markdown("", elem_id="compare-curves", **markup.PLAIN)
        blocks.load(self._told, None, [verdict, curves])

    def _told(self) -> tuple[str, str]:
        assert self.source.run is not None
        with self._drawing:
            if self._drawn is None:
                self._drawn = history.drawn(self.source.run, self.files)
        return history.verdict(self.source.run), "\n".join(markup.figure(d.file, d.title, d.caption) for d in self._drawn)

    # ---- ready-made samples

    def words_of(self, entry: Entry) -> str:
        return " ".join(str(block.data) for block in entry.prompt if block.kind == "text") or entry.item

    def _pictures_of(self, entry: Entry) -> list[str]:
        """Files of a prompt's pictures, written when they are first asked for."""
        if entry.item not in self._written:
            coded = [blinded(block) for block in entry.prompt if block.kind == "image"]
            self._written[entry.item] = [self.brought.keep(data) for _, data in coded]
        return self._written[entry.item]

    def _browsed(self, parts: Mapping[str, Any], rows: Sequence[Any], grid: Grid) -> Any:
        import gradio as gr

        pool = self.source.pool
        assert pool is not None

        def show(item: int | None) -> Updates:
            groups = list(pool.items.values())
            if item is None or not 0 <= item < len(groups):
                return {rows[0]: gr.skip()}
            first = groups[item][0]
            by_system = {name: [e for e in groups[item] if e.system == name] for name in self.source.systems}
            most = min(SEEDS, max(len(found) for found in by_system.values()))
            updates: Updates = {row: gr.update(visible=i < most) for i, row in enumerate(rows)}
            updates |= {parts["words"]: self.words_of(first), parts["pictures"]: _shown(self._pictures_of(first))}
            for index, line in enumerate(grid):
                for card, name in zip(line, self.source.systems, strict=True):
                    found = by_system[name][index : index + 1]
                    updates |= card.filled(*_sample_of(found[0])) if found else card.empty()
            return updates

        return show

    # ---- generation

    def _wire(self, blocks: Any, parts: Mapping[str, Any], status: Any, rows: Sequence[Any], grid: Grid) -> None:
        """What happens on the page when somebody does something."""
        import gradio as gr

        worker = self.worker
        assert worker is not None
        timer = gr.Timer(1.0)
        shown = [status, parts["held"], timer]
        timer.tick(self._looked(parts["held"], status, timer), [status], shown, show_progress="hidden")
        chosen = [parts["words"], parts["pictures"], parts["names"], *([parts["without"]] if self.source.pictures else [])]
        parts["held"].input(self._picked, [parts["held"]], chosen, show_progress="hidden", trigger_mode="always_last")
        if self.source.pictures:
            self._wire_uploads(parts, status)
        given = [parts[name] for name in ("words", "held", "seed", "count", "steps", "names")]
        outputs = [status, parts["run"], parts["stop"], *rows, *cards.components(grid)]
        run = self._run(parts, status, rows, grid)
        ready = partial(_ready, parts["run"], parts["stop"])
        for trigger in (parts["run"].click, parts["words"].submit):
            ran = trigger(run, given, outputs, show_progress="hidden", concurrency_limit=WAITING, concurrency_id="compare")
            # Not in the last update of the run itself: until Gradio has closed a run it drops a click.
            ran.then(ready, None, [parts["run"], parts["stop"]], show_progress="hidden", queue=False)

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
            shown = {parts["pictures"]: _shown(found), without: gr.update(visible=bool(found))}
            return shown | {file: None, names: found, held: -1, status: said}

        def drop() -> Updates:
            return {parts["pictures"]: _shown([]), without: gr.update(visible=False), names: []}

        file.upload(take, [file, names], [file, names, parts["pictures"], held, without, status], show_progress="minimal")
        without.click(drop, None, [names, parts["pictures"], without], show_progress="hidden")

    def _looked(self, held: Any, status: Any, timer: Any) -> Any:
        """Asked every second until the models and the held-out prompts are there."""
        import gradio as gr

        worker = self.worker
        assert worker is not None

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
        assert self.worker is not None
        prompts = self.worker.state.prompts or ()
        return prompts[number] if isinstance(number, int) and 0 <= number < len(prompts) else None

    def _picked(self, number: Any) -> tuple[Any, ...]:
        """The words and the pictures of a held-out prompt; a visitor's own go."""
        import gradio as gr

        prompt = self._held(number)
        words, shown = (gr.skip(), _shown([])) if prompt is None else (prompt["words"], _shown(prompt["pictures"]))
        return words, shown, [], *([gr.update(visible=False)] if self.source.pictures else [])

    def _run(self, parts: Mapping[str, Any], status: Any, rows: Sequence[Any], grid: Grid) -> Any:
        import gradio as gr

        worker, run, stop = self.worker, parts["run"], parts["stop"]
        assert worker is not None

        @cards.with_request
        def compare(
            words: Any, held: Any, seed: Any, count: Any, steps: Any, names: list[str], request: Any
        ) -> Iterator[Updates]:
            asked = str(words or "").strip()
            if not asked or len(asked) > TEXT:
                yield {status: f"Write a prompt of 1 to {TEXT:,} characters, or choose a held-out one."}
                return
            first, most = clamped(seed, 0, LARGEST_SEED), self.source.steps[0] if self.source.steps else 1
            seeds = [(first + i) % (LARGEST_SEED + 1) for i in range(clamped(count, 1, SEEDS))]
            begin: Updates = {row: gr.update(visible=i < len(seeds)) for i, row in enumerate(rows)}
            for card in itertools.chain.from_iterable(grid):
                begin |= card.empty()
            yield begin | {status: "Asked.", run: gr.update(interactive=False), stop: gr.update(interactive=True)}
            number = held if self._held(held) else None
            options: dict[str, Any] = {"held": number, "steps": clamped(steps, 1, most), "owner": str(request.session_hash)}
            options["pictures"] = names
            cells = [[cards.Cell(card, seed) for card in line] for line, seed in zip(grid, seeds, strict=False)]
            yield from cards.paced(worker.sample(asked, seeds, **options), cells, status)

        return compare


def _ready(run: Any, stop: Any) -> Updates:
    """The buttons as they are while nothing runs."""
    import gradio as gr

    return {run: gr.update(interactive=True), stop: gr.update(interactive=False)}


def _shown(names: Sequence[str]) -> Any:
    """A prompt's pictures, by the names of their files."""
    import gradio as gr

    shown = "".join(markup.medium("image", f"/shown/{name}", "Picture of the prompt") for name in names)
    return gr.update(value=shown, visible=bool(shown))


def _sample_of(entry: Entry) -> tuple[str, str]:
    """What a card shows of a ready-made sample: its text, or where it is; and its seed in words."""
    told = "" if entry.seed is None else f"Seed {entry.seed}."
    if entry.kind != "text":
        return f"/entry/{entry.id}", told
    try:
        return str(entry.block.data), told
    except DataError:  # gone, or another one by now
        return "", "This sample cannot be read any more."


def clamped(value: Any, least: int, most: int) -> int:
    """A number of the client's as a whole one within its limits; what is none counts as the least."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) and value == value else least
    return int(min(max(number, least), most))


def label_of(number: int, words: str) -> str:
    """A prompt in one line of a list, where no two are the same: Gradio takes a choice by its label."""
    line = " ".join(words.split())
    return f"{number + 1}. {line if len(line) <= 100 else line[:99] + chr(0x2026)}"
