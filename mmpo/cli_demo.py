"""`mmpo demo ...`: pages in the browser, where people look at what a run changed, and vote on it.

Gradio is imported when a page is served, torch never: models run in a process of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmpo.errors import RecipeError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pages to compare, vote and label in the browser.")

Host = Annotated[str, typer.Option(help="address to listen on; any but this machine's own needs --auth-file")]
Port = Annotated[int | None, typer.Option(help="default: 7860, or the next one that is free", min=0, max=65535)]
AuthFile = Annotated[Path | None, typer.Option(help="file of accounts, from `mmpo demo password`")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="open the page in the browser")]
Out = Annotated[Path | None, typer.Option(help="folder of the votes and exports; default: votes/ in the run or folder")]


@app.command()
def compare(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="default: the newest finished run under runs/")] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODALITY:PATH[:ADAPTER]", help="a model, instead of a run")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="ready-made samples, instead of a run: one folder a system")] = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    auth_file: AuthFile = None,
    open_page: Open = False,
) -> None:
    """See what models make of the same prompt and seed side by side, and where they differ."""
    from mmpo.demos import site

    site.require_gradio()
    from mmpo.demos import compare as page

    source = page.open_source(run or (None if model or samples else newest_run()), model or (), samples)
    if source.pool is not None:
        tell_rest(source.pool)
    site.serve(lambda: page.compare_site(source), host=host, port=port, auth_file=auth_file, show=open_page)


@app.command()
def vote(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="a run, a folder with one folder a system, or a file of candidates; default: the newest finished run",
        ),
    ] = None,
    out: Out = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    auth_file: AuthFile = None,
    open_page: Open = False,
) -> None:
    """Say which of two is better without knowing whose it is; the votes become pairs to train on."""
    from mmpo.demos import pool, site

    site.require_gradio()
    from mmpo.demos.vote import vote_site

    where = source or newest_run()
    opened = pool.open_pool(where, "vote")
    tell_rest(opened)
    votes = folder_for(out or pool.default_folder(where))
    site.serve(lambda: vote_site(opened, votes, "vote"), host=host, port=port, auth_file=auth_file, show=open_page)


@app.command()
def label(
    folder: Annotated[Path, typer.Argument(help="folder of generations: text, pictures, video or audio")],
    out: Out = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    auth_file: AuthFile = None,
    open_page: Open = False,
) -> None:
    """Rank the generations in a folder: of all pairs, the one is asked whose answer tells most."""
    from mmpo.demos import pool, site

    site.require_gradio()
    from mmpo.demos.vote import vote_site

    opened = pool.open_pool(folder, "label")
    tell_rest(opened)
    votes = folder_for(out or pool.default_folder(folder))
    site.serve(lambda: vote_site(opened, votes, "label"), host=host, port=port, auth_file=auth_file, show=open_page)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="of the votes: --out of `vote` and `label`, by default votes/ in a run")],
    to: Annotated[str, typer.Option(help="format: mmpo, trl or pick_a_pic")] = "mmpo",
    out: Annotated[Path | None, typer.Option(help="what to write; default: in the folder")] = None,
    ties: Annotated[Literal["drop", "soft"], typer.Option(help="drop, or soft to keep them with label 0.5")] = "drop",
    source: Annotated[Path | None, typer.Option(help="what was voted on, if it was moved since")] = None,
) -> None:
    """Write votes as pairs that `mmpo train` reads, and account for every vote."""
    from mmpo.demos import ballot_pairs

    written = ballot_pairs.export(folder, to, out, ties, source)
    print(ballot_pairs.told(str(out or folder / ballot_pairs.NAMES[to]), to, ties, *written))


@app.command()
def password(name: Annotated[str, typer.Argument(help="of the account: letters, digits, dots, dashes, underscores")]) -> None:
    """Print a line for --auth-file. The password is asked for, or read from standard input, and kept nowhere."""
    from mmpo.demos import accounts

    if sys.stdin.isatty():
        given = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        given = sys.stdin.readline().rstrip("\n")
    print(accounts.line(name, given))


def newest_run(root: Path = Path("runs")) -> Path:
    """The run that finished last. Raises RecipeError where there is none."""
    finished = [found.parent for found in root.glob("*/summary.json") if (found.parent / "recipe.yaml").is_file()]
    if not finished:
        raise RecipeError(
            f"no finished run under {root}/: name one, or make one in two minutes: mmpo train --modality diffusion"
        )
    return max(finished, key=lambda run: (run / "summary.json").stat().st_mtime)


def tell_rest(pool: Any) -> None:
    """Print what of a source is not shown, and why: to the terminal alone, as it may name systems."""
    if pool.ledger.skipped or pool.ledger.refused or pool.ledger.notes:
        print(pool.ledger)


def folder_for(votes: Path) -> Path:
    """The folder of the votes. Raises RecipeError where a file has its name."""
    if votes.exists() and not votes.is_dir():
        raise RecipeError(f"--out {votes}: a file has that name, and votes need a folder")
    return votes
