"""`mmpo demo vote` and `mmpo demo label`: two answers side by side, blind, and one key for the better one.

Gradio makes the page and writes the pairs; what is voted on comes from `vote_routes` and is put on the page by vote.js as text
and media, never as markup, so that it survives a restart of the server and waits for nothing that Gradio does.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpo.demos import ballot_pairs
from mmpo.demos.ballots import FILE
from mmpo.demos.pool import Mode, Pool
from mmpo.demos.site import Site
from mmpo.demos.vote_routes import Desk
from mmpo.errors import DataError, RecipeError
from mmpo.lock import RunBusy

if TYPE_CHECKING:
    import gradio as gr

SCRIPT = Path(__file__).with_name("vote.js")
TITLES = {"vote": "Vote blind", "label": "Rank answers"}
HELP = {
    "vote": "Which answer is better? Who made them is told at the end.",
    "label": "Which answer is better? The next two are those whose comparison tells the most.",
}
KEYS = "Keys: **1** or \N{LEFTWARDS ARROW} A, **2** or \N{RIGHTWARDS ARROW} B, **0** tie, **9** both bad, **u** undo."


def vote_site(pool: Pool, folder: Path, mode: Mode = "vote") -> Site:
    """The page to vote on a pool. folder: keeps votes.db and what is exported; it is made where there is none.

    Raises DataError for a database that is something else, RunBusy where another server holds the folder, RecipeError for a
    place where nothing can be written.
    """
    named, folder = str(folder), folder.resolve()
    empty = folder / ".shown"
    try:
        empty.mkdir(parents=True, exist_ok=True)  # the page serves no files: samples come from vote_routes
        desk = Desk(pool, folder, mode)
    except OSError as error:
        why = error.strerror or error
        raise RecipeError(f"{named}: votes cannot be kept there ({why}); choose another folder with --out") from error
    hidden = tuple(folder / f"{FILE}{end}" for end in ("", "-wal", "-shm"))
    return Site(
        TITLES[mode], lambda: page(desk, mode, folder, named), empty, private=hidden, routes=desk.routes(), scripts=(SCRIPT,),
        close=desk.close,
    )  # fmt: skip


def page(desk: Desk, mode: Mode, folder: Path, named: str) -> gr.Blocks:
    """The frame that vote.js fills, the buttons, and the export. named: the folder as people know it."""
    import gradio as gr

    async def write(to: str, ties: str) -> str:
        ballots = await desk.ask(desk.ballots.standing)
        return await asyncio.to_thread(exported, ballots, desk.pool, folder, named, to, ties)

    with gr.Blocks(title=TITLES[mode]) as blocks:
        gr.Markdown(f"# {TITLES[mode]}\n{HELP[mode]} {KEYS}")
        with gr.Column(elem_id="vote-frame"):
            gr.Markdown("Loading the first comparison.", elem_id="vote-loading")
        with gr.Row(elem_id="vote-buttons"):
            gr.Button("A is better (1)", elem_id="vote-left", variant="primary")
            gr.Button("B is better (2)", elem_id="vote-right", variant="primary")
            gr.Button("Tie (0)", elem_id="vote-tie")
            gr.Button("Both bad (9)", elem_id="vote-both_bad")
            gr.Button("Undo (u)", elem_id="vote-undo")
            gr.Button("Finish and show who was who", elem_id="vote-finish")
        with gr.Accordion("Write the votes as training pairs", open=False, elem_id="vote-export"):
            with gr.Row():
                to = gr.Dropdown(list(ballot_pairs.NAMES), value="mmpo", label="Format")
                ties = gr.Radio(["drop", "soft"], value="drop", label="Ties", info="soft: kept, with label 0.5")
            button = gr.Button("Write pairs", elem_id="vote-write")
            said = gr.Textbox(label="Written", lines=3, interactive=False, elem_id="vote-written")
            button.click(write, [to, ties], said, show_progress="minimal")
    return blocks


def exported(ballots: Any, pool: Pool, folder: Path, named: str, to: str, ties: Any) -> str:
    """Write the pairs beside the votes, and say what was written, or why nothing was."""
    if to not in ballot_pairs.NAMES:
        return f"There is no format {to!r}."
    name = ballot_pairs.NAMES[to]
    try:
        return ballot_pairs.told(f"{named}/{name}", to, ties, *ballot_pairs.write(ballots, pool, to, folder / name, ties))
    except RunBusy:
        return f"{named}/{name}: {ballot_pairs.BUSY}"
    except (DataError, RecipeError) as error:
        return str(error)
    except OSError as error:
        return (
            f"{named}/{name}: cannot be written ({error.strerror or error}); `mmpo demo export --out` writes to another place"
        )
