"""The command line. It parses, calls one function, and turns exceptions into exit codes; nothing else happens here.

Exit codes: 0 ok, 1 the run failed, 2 usage or configuration, 3 data, 4 a missing optional dependency, 130 interrupted,
143 terminated.
Whatever is heavy is imported inside the command that needs it, so that `mmpo --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.core

from mmpo import cli_assets, cli_demo, find, masking, network
from mmpo.errors import DataError, MissingExtra, RecipeError
from mmpo.interruption import Interrupted

if TYPE_CHECKING:
    from mmpo.recipe import Resolved

ROOMS = (*find.ROOMS, "configs")
OK, FAILED, USAGE, DATA, MISSING, INTERRUPTED = 0, 1, 2, 3, 4, 130

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Preference alignment for generative models of every modality.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check, convert and audit preference data.")
config_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What a recipe may say, and what one says.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(cli_assets.app, name="assets")
app.add_typer(cli_demo.app, name="demo")

UsageError: Any = typer.BadParameter.__base__  # click's own class in old versions of typer, a copy of it in new ones
_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Words = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="a file or a name, then settings")]
ModalityName = Annotated[str | None, typer.Option("--modality", help="what is generated; alone: its default recipe")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a setting that overrides all others")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", metavar="MODULE", help="let the recipe use code of this module")]
DataPath = Annotated[Path, typer.Argument(help="file or folder of rows")]
Format = Annotated[str | None, typer.Option(help="importer; default: recognised from the columns")]
Root = Annotated[Path | None, typer.Option(help="folder that media paths start from; default: the data's own")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")]


@app.command(context_settings=_SETTINGS)
def train(
    words: Words = None,
    modality: ModalityName = None,
    settings: Settings = None,
    plugins: Plugins = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of sample, judge, pair and train")] = None,
    allow_drift: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="a setting that may differ when resuming")
    ] = None,
) -> int:
    """Train: a recipe, or a modality's default. Settings are key=value or --key value, e.g. train.lr=1e-5."""
    from dataclasses import replace

    extra = [] if rounds is None else [f"train.rounds={rounds}"]
    resolved = replace(_load(words, [*extra, *(settings or [])], modality, plugins), allow_drift=tuple(allow_drift or ()))
    network.open_for(resolved.recipe)
    from mmpo.launch import run

    return run(resolved)


@data_app.command("validate")
def data_validate(
    path: DataPath,
    format: Format = None,
    root: Root = None,
    modality: Annotated[str | None, typer.Option(help="what is to be trained on it: rows that are none of its are bad")] = None,
) -> int:
    """Read every row and name each bad one; exit 3 if there are any."""
    from mmpo.datasets.validate import validate

    report = validate(path, format, root, modality)
    print("\n".join(report.lines()))
    return DATA if report.bad else OK


@data_app.command("convert")
def data_convert(
    path: DataPath,
    to: Annotated[str, typer.Option(help="format to write, e.g. trl, swift or pick_a_pic")],
    out: Annotated[Path, typer.Option(help="file to write: .parquet, .jsonl or .json, by the format; for mmpo a folder")],
    source: Annotated[str | None, typer.Option("--from", help="format to read; default: recognised from the columns")] = None,
    root: Root = None,
    ties: Annotated[str, typer.Option(help="tied rows: drop, or soft to keep them with label 0.5")] = "drop",
    aspect: Annotated[str | None, typer.Option(help="of scores by aspect, the one that counts")] = None,
    on_bad: Annotated[str, typer.Option(help="bad rows: refuse, skip and count, or quarantine beside out")] = "refuse",
) -> None:
    """Write a dataset in another format, its pictures inside the file or beside it, and account for every row."""
    from mmpo.datasets.convert import convert

    options: dict[str, Any] = {"format": source, "root": root, "ties": ties, "aspect": aspect, "on_bad": on_bad}
    count, ledger = convert(path, to, out, **options)
    print(f"{out}: {count} rows of format {to}\n{ledger}")


@data_app.command("audit")
def data_audit(
    path: DataPath,
    format: Format = None,
    against: Annotated[Path | None, typer.Option(help="another split, whose prompts should not be in this one")] = None,
    model: Annotated[str | None, typer.Option(help="transformers directory: how likely are these answers under it?")] = None,
    model_pairs: Annotated[int, typer.Option(help="pairs that are scored under the model")] = 200,
    ties: Annotated[str, typer.Option(help="tied rows: drop, or soft to keep them with label 0.5")] = "drop",
    aspect: Annotated[str | None, typer.Option(help="of scores by aspect, the one that counts")] = None,
    limit: Annotated[int | None, typer.Option(help="read only the first so many pairs", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print all numbers as JSON")] = False,
) -> None:
    """Look for what a model could learn from pairs of text instead of what people meant: length, format, copies, leaks."""
    from mmpo.datasets.audit import audit

    options: dict[str, Any] = {"format": format, "ties": ties, "aspect": aspect, "limit": limit}
    found = audit(path, against=against, model=model, model_pairs=model_pairs, **options)
    print(json.dumps(found.as_json(), indent=2, ensure_ascii=False) if as_json else "\n".join(found.lines()))


class PairsCommand(typer.core.TyperCommand):
    """`mmpo pairs NAME --help` ends with what that builder says of itself and its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["words"] = list(args)  # help is printed before the arguments are read
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        super().format_epilog(ctx, formatter)
        if name := next((word for word in ctx.meta.get("words", ()) if word in find.names("datasets.builders")), None):
            from mmpo.datasets.builder_options import described

            words, options = described(name)
            formatter.write(f"\nOptions of {name}, key=value:\n")
            formatter.write_dl([(f"{key}={default}", kind) for key, kind, default in options])
            formatter.write(f"\n{words}\n")


@app.command(cls=PairsCommand)
def pairs(
    builder: Annotated[str, typer.Argument(metavar="NAME", help="a builder; `mmpo list datasets.builders` names them")],
    data: Annotated[Path, typer.Option(help="source: any dataset that mmpo reads")],
    out: Annotated[Path, typer.Option(help="folder to write; the same command goes on with one that was interrupted")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="options of the builder")] = None,
    format: Format = None,
    root: Root = None,
    generator: Annotated[str | None, typer.Option(help="directory of the model that answers")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="of the generator, e.g. dtype=bf16")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="directory of a model, a judge's name, or generator")] = None,
    judge_settings: Annotated[
        list[str] | None, typer.Option("--judge-set", metavar="KEY=VALUE", help="of a judge's directory, as --set")
    ] = None,
    image_embedder: Annotated[str | None, typer.Option(metavar="NAME[=PATH]", help="of mmpo list datasets.embedders")] = None,
    text_embedder: Annotated[str | None, typer.Option(metavar="NAME[=PATH]", help="of mmpo list datasets.embedders")] = None,
    device: Annotated[str, typer.Option(help="where models run")] = "cpu",
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
    limit: Annotated[int | None, typer.Option(help="read only the first so many records", min=1)] = None,
    on_bad: Annotated[str, typer.Option(help="bad rows: skip and count, refuse, or quarantine in out")] = "skip",
    executor: Annotated[str, typer.Option(help="local, or ray for a cluster or several processes")] = "local",
    workers: Annotated[int, typer.Option(help="of ray")] = 2,
    preview: Annotated[Path | None, typer.Option(help="a page to write, with 24 of the pairs")] = None,
    plugins: Plugins = None,
) -> None:
    """Make preference pairs by a builder: options are key=value, e.g. mmpo pairs collage kinds={grid: 1} --data FILE.

    `mmpo pairs NAME --help` lists those of a builder.
    """
    from mmpo.datasets.build import Order, build, lines
    from mmpo.datasets.builder_options import ToolChoice

    find.PLUGINS.update(plugins or ())
    words = {"plugins": plugins, "settings": settings, "judge_settings": judge_settings}
    said = {name: tuple(given or ()) for name, given in words.items()}
    tools = ToolChoice(generator, judge, image_embedder, text_embedder, device, **said)
    given: dict[str, Any] = {"format": format, "root": root, "on_bad": on_bad, "limit": limit, "executor": executor}
    story = build(Order(builder, data, out, tuple(options or ()), tools=tools, seed=seed, workers=workers, **given))
    print("\n".join([*lines(story), f"{out}: {story['pairs']} pairs of format mmpo"]))
    if not story["pairs"]:
        raise DataError(f"{out}: no pair was made of {data}; the counts above say what became of its rows and records")
    if preview is not None:
        from mmpo.datasets.preview import write_preview

        print(f"{preview}: {write_preview(out, preview)} of them to look at")


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[list[str], typer.Option(help="may be given several times")],
    out: Annotated[Path, typer.Option(help="folder for the samples")],
    seed: Annotated[int, typer.Option(help="seed of the first sample")] = 0,
) -> None:
    """Generate from a finished run, the base model beside the aligned one."""
    _as_its_recipe(run)
    from mmpo import export

    export.sample(run, prompt, seed, out)


@app.command("eval")
def evaluate(
    run: RunFolder,
    plugins: Plugins = None,
    data: Annotated[Path | None, typer.Option(help="other pairs: which of them does the run tell apart?")] = None,
    format: Format = None,
    limit: Annotated[int | None, typer.Option(help="of --data, read only the first so many pairs", min=1)] = None,
    on_bad: Annotated[Literal["refuse", "skip"], typer.Option(help="bad rows of --data: refuse, or skip and count")] = "refuse",
    out: Annotated[Path | None, typer.Option(help="of --data, a JSONL file for every pair's likelihoods")] = None,
) -> None:
    """Measure a run again on its held-out prompts, or its implicit rewards on other pairs."""
    find.PLUGINS.update(plugins or ())
    _as_its_recipe(run)
    if data is None:
        from mmpo import export

        return export.evaluate(run)
    from mmpo import implicit

    print(json.dumps(implicit.evaluate(run, data, format, limit, on_bad, out), indent=2, ensure_ascii=False))


@app.command("export")
def export_run(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="folder to write; default: inside the run")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="fold the adapter into the model's own weights")] = False,
) -> None:
    """Write the trained weights in the format the model's own library loads."""
    _as_its_recipe(run)
    from mmpo import export

    export.export(run, out, merge)


@app.command("make-base")
def make_base(
    modality: Annotated[str, typer.Argument(help="diffusion, text, vlm or smollm2")],
    out: Annotated[Path, typer.Option(help="folder for the model and its candidates")],
    steps: Annotated[int | None, typer.Option(help="optimizer steps of the model; of diffusion's on clean pictures")] = None,
    scraped_steps: Annotated[int | None, typer.Option(help="diffusion: and then on pictures with specks")] = None,
    vae_steps: Annotated[int | None, typer.Option(help="diffusion: optimizer steps of the autoencoder")] = None,
    pictures: Annotated[int | None, typer.Option(help="diffusion: pictures the denoiser learns from")] = None,
    prompts: Annotated[int | None, typer.Option(help="prompts that it samples candidates for")] = None,
    select: Annotated[str | None, typer.Option(help="vlm: pairs by attention, as MIA-DPO, or as many at random")] = None,
    candidates: Annotated[int | None, typer.Option(help="candidates of each of them")] = None,
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
) -> None:
    """Make a shipped base again: all but smollm2 are trained from scratch, and their answers are sampled and judged."""
    makers = {"diffusion": "make_shapes", "text": "make_sums", "vlm": "make_collages", "smollm2": "make_sentiment"}
    if modality not in makers:
        raise RecipeError(f"no base to make for '{modality}' (there are: {', '.join(makers)}){find.nearest(modality, makers)}")
    from importlib import import_module

    budget: dict[str, int | str | None] = {"steps": steps, "scraped_steps": scraped_steps, "vae_steps": vae_steps}
    budget |= {"pictures": pictures, "prompts": prompts, "select": select, "candidates": candidates}
    given = {name: value for name, value in budget.items() if value is not None}
    maker = import_module(f"mmpo.datasets.worlds.{makers[modality]}")
    if unknown := sorted(given.keys() - maker.Budget.__dataclass_fields__.keys()):
        raise RecipeError(f"--{unknown[0].replace('_', '-')}: no such setting of the base for '{modality}'")
    maker.make(out, seed=seed, **given)


@app.command("list")
def list_room(room: Annotated[str, typer.Argument(help=f"one of: {', '.join(ROOMS)}")]) -> None:
    """List what a room offers."""
    from mmpo.recipe import configs

    if room not in ROOMS:
        raise RecipeError(f"no room '{room}' (rooms: {', '.join(ROOMS)}){find.nearest(room, ROOMS)}")
    print("\n".join(configs() if room == "configs" else find.names(room)))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="for programs: one JSON object")] = False) -> int:
    """Check this installation and machine, and name the command that mends each problem; exit 1 if something is broken."""
    from mmpo.doctor import BROKEN, examine, table

    checks = examine()
    broken = any(c.state == BROKEN for c in checks)
    found = {"ok": not broken, "checks": [vars(c) for c in checks]}
    print(json.dumps(found, indent=2) if as_json else "\n".join(table(checks)))
    return FAILED if broken else OK


@config_app.command("schema")
def config_schema(modality: Annotated[str, typer.Option(help="whose model section to include")] = "diffusion") -> None:
    """Print the JSON Schema of recipes, for editors."""
    from mmpo.schema import recipe_class

    print(json.dumps(recipe_class(modality).model_json_schema(), indent=2))


@config_app.command("explain")
def config_explain(
    key: Annotated[str, typer.Argument(help="e.g. train.lr, or a section, or nothing for all sections")] = "",
    modality: Annotated[str, typer.Option(help="whose model section to explain")] = "diffusion",
) -> None:
    """Say what a setting means, with its unit, limits and default."""
    from mmpo.explain import explain

    print(explain(key, modality))


@config_app.command("validate", context_settings=_SETTINGS)
def config_validate(
    words: Words = None, modality: ModalityName = None, settings: Settings = None, plugins: Plugins = None
) -> None:
    """Check a recipe, and print it in full with where each value came from; or all that is wrong with it."""
    from mmpo.recipe import dump
    from mmpo.unread import notes

    resolved = _load(words, settings or [], modality, plugins)
    print(dump(resolved), end="")
    for line in notes(resolved):
        print(f"note: {line}", file=sys.stderr)


def _load(
    words: Sequence[str] | None, settings: Sequence[str], modality: str | None, plugins: Sequence[str] | None
) -> Resolved:
    from mmpo import recipe as recipes

    find.PLUGINS.update(plugins or ())
    path, overrides = split_words(words or [])
    return recipes.load(path, [*overrides, *settings], modality, losses=True)


def _as_its_recipe(run: Path) -> None:
    """What a run was allowed to download when it was trained it may download again."""
    from mmpo import recipe as recipes

    if (run / "recipe.yaml").is_file():
        network.open_for(recipes.load(run / "recipe.yaml").recipe)


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if one is named, and the `key=value` settings, from RECIPE, key=value, --key=value and --key value."""
    recipe, settings, rest = None, [], list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals and not rest:
                raise RecipeError(f"command line: {word} has no value (expected {word} VALUE or {word}=VALUE)")
            settings.append(f"{key.replace('-', '_')}={value if equals else rest.pop(0)}")
        elif re.match(r"[A-Za-z_][\w.]*=", word):
            settings.append(word)
        elif recipe is None:
            recipe = word
        else:
            raise RecipeError(f"command line: two recipes (got {recipe!r} and {word!r}, expected one, then key=value)")
    return recipe, settings


def exit_code(error: BaseException) -> int:
    """A ValueError is something the user can put right in what was given; anything else is a run that failed."""
    if isinstance(error, Interrupted):
        return 128 + error.number
    kinds = {
        KeyboardInterrupt: INTERRUPTED,
        typer.Abort: INTERRUPTED,
        DataError: DATA,
        MissingExtra: MISSING,
        ValueError: USAGE,
    }
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), FAILED)


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Ctrl-C as ever, and remembered: raised inside of an import of a library in C, it comes out as some other error."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: sys.argv) and returns its exit code. MMPO_DEBUG=1 lets exceptions through."""
    network.close()
    with _noting_interrupts() as interrupts:
        return _main(arguments, interrupts)


def _main(arguments: Sequence[str] | None, interrupts: list[int]) -> int:
    try:
        return app(args=arguments, prog_name="mmpo", standalone_mode=False) or OK
    except UsageError as error:
        error.show()
        return USAGE
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("MMPO_DEBUG") == "1":
            raise
        code = INTERRUPTED if interrupts and not isinstance(error, Interrupted) else exit_code(error)
        named = code == FAILED and type(error).__module__ != "mmpo.errors"
        silent = code == INTERRUPTED and not isinstance(error, Interrupted)
        message = masking.in_text("interrupted" if silent else f"{type(error).__name__}: {error}" if named else str(error))
        print(f"mmpo: {message}" if len(message.splitlines()) < 2 else message, file=sys.stderr)
        return code
