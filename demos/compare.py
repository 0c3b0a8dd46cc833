"""`mmpo demo compare`: the same prompt and seed to every model, side by side, and where their likelihoods part.

The page is made of what the server says alone: prompts are text that is never markup, a held-out prompt is a number, samples
are files that the worker wrote under names nobody can guess, and no path or address of a client's is opened.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmpo.demos import brought, cards, heat, history, markup
from mmpo.demos.asking import LARGEST_SEED, OWN, SEEDS, TEXT, Asking, Grid, Updates, label_of
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
SHOWN = re.compile(r"[0-9a-f]{32}\.(png|svg|wav|mp4|webm)")
TYPES = {"png": "image/png", "svg": "image/svg+xml", "wav": "audio/wav", "mp4": "video/mp4", "webm": "video/webm"}


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
                assert self.worker is not None
                Asking(self.source, self.brought, self.worker).wire(blocks, parts, status, rows, grid)
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
            updates |= {parts["words"]: self.words_of(first), parts["pictures"]: cards.pictures(self._pictures_of(first))}
            for index, line in enumerate(grid):
                for card, name in zip(line, self.source.systems, strict=True):
                    found = by_system[name][index : index + 1]
                    updates |= card.filled(*_sample_of(found[0])) if found else card.empty()
            return updates

        return show


def _sample_of(entry: Entry) -> tuple[str, str]:
    """What a card shows of a ready-made sample: its text, or where it is; and its seed in words."""
    told = "" if entry.seed is None else f"Seed {entry.seed}."
    if entry.kind != "text":
        return f"/entry/{entry.id}", told
    try:
        return str(entry.block.data), told
    except DataError:  # gone, or another one by now
        return "", "This sample cannot be read any more."
