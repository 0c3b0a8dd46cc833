"""The command line: its frozen surface, its exit codes, its speed, and that it imports nothing heavy."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import typer

from mmpo import cli, find
from mmpo.errors import DataError, MissingExtra, RecipeError, RunFailed

SERVED = {"--host", "--port", "--auth-file", "--open"}
SURFACE = {
    "train": {"words", "--modality", "--set", "--plugin", "--rounds", "--allow-drift"},
    "data validate": {"path", "--format", "--root", "--modality"},
    "data convert": {"path", "--to", "--out", "--from", "--root", "--ties", "--aspect", "--on-bad"},
    "data audit": {"path", "--format", "--against", "--model", "--model-pairs", "--ties", "--aspect", "--limit", "--json"},
    "sample": {"run", "--prompt", "--out", "--seed"},
    "eval": {"run", "--plugin", "--data", "--format", "--limit", "--on-bad", "--out"},
    "export": {"run", "--out", "--merge"},
    "assets add": {"name", "--wheel"},
    "assets gguf": {"file", "--out"},
    "make-base": {
        "modality",
        "--out",
        "--steps",
        "--select",
        "--scraped-steps",
        "--vae-steps",
        "--pictures",
        "--prompts",
        "--candidates",
        "--seed",
    },
    "demo compare": {"run", "--model", "--samples"} | SERVED,
    "demo vote": {"source", "--out"} | SERVED,
    "demo label": {"folder", "--out"} | SERVED,
    "demo export": {"folder", "--to", "--out", "--ties", "--source"},
    "demo password": {"name"},
    "list": {"room"},
    "doctor": {"--json"},
    "pairs": {
        "builder",
        "options",
        "--data",
        "--out",
        "--format",
        "--root",
        "--generator",
        "--set",
        "--judge",
        "--judge-set",
        "--image-embedder",
        "--text-embedder",
        "--device",
        "--seed",
        "--limit",
        "--on-bad",
        "--executor",
        "--workers",
        "--preview",
        "--plugin",
    },
    "config schema": {"--modality"},
    "config explain": {"key", "--modality"},
    "config validate": {"words", "--modality", "--set", "--plugin"},
}


def surface(command: Any, name: str = "") -> dict[str, set[str]]:
    if hasattr(command, "commands"):
        return {k: v for n, c in command.commands.items() for k, v in surface(c, f"{name} {n}".strip()).items()}
    return {name: {p.opts[0] if p.opts[0].startswith("-") else p.name for p in command.params if p.name != "help"}}


def test_the_command_line_is_frozen() -> None:
    assert surface(typer.main.get_command(cli.app)) == SURFACE


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for `mmpo.launch`, which imports the whole of training; collects what it was asked to run."""
    seen: list[Any] = []
    launch = types.ModuleType("mmpo.launch")
    launch.run = lambda resolved: len(seen.append(resolved) or [])  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, "mmpo.launch", launch)
    monkeypatch.delenv("MMPO_DEBUG", raising=False)
    return seen


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("modality: diffusion\nobjective: [{loss: dpo, beta: 0.1}]\ntrain: {lr: 1e-4}\n")
    return str(path)


def test_train_accepts_every_spelling_of_a_setting(launched: list[Any], recipe: str) -> None:
    words = [
        "--train.lr",
        "1e-5",
        recipe,
        "--train.batch-size=4",
        "out=runs/x",
        "train.warmup=3",
        "--seed",
        "7",
        "--rounds",
        "2",
    ]
    assert cli.main(["train", *words, "--set", "train.warmup=5", "--allow-drift", "train.steps"]) == 0
    (resolved,) = launched
    found = resolved.recipe
    assert (found.train.lr, found.train.batch_size, found.out, found.seed) == (1e-5, 4, "runs/x", 7)
    assert (found.train.rounds, found.train.warmup) == (2, 5)  # --set comes last
    assert resolved.allow_drift == ("train.steps",)


@pytest.mark.parametrize(
    ("words", "recipe_name", "settings"),
    [
        ([], None, []),
        (["a.yaml"], "a.yaml", []),
        (["a=1", "b.yaml", "--c", "-1e-3"], "b.yaml", ["a=1", "c=-1e-3"]),
        (["--x.y-z=a=b"], None, ["x.y_z=a=b"]),
        (["dir=x/r.yaml"], None, ["dir=x/r.yaml"]),
        (["./dir=x/r.yaml"], "./dir=x/r.yaml", []),
    ],
)
def test_split_words(words: list[str], recipe_name: str | None, settings: list[str]) -> None:
    assert cli.split_words(words) == (recipe_name, settings)


@pytest.mark.parametrize("words", [["a", "b"], ["a", "--train.lr"]])
def test_split_words_refuses(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="command line"):
        cli.split_words(words)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("no"), 1), (OSError("disk"), 1), (RecipeError("no"), 2), (ValueError("no"), 2), (DataError("row 3"), 3),
        (MissingExtra("wandb", "track"), 4), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_exit_codes_without_a_traceback(
    error: BaseException, code: int, launched: list[Any], recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(resolved: Any) -> int:
        raise error

    monkeypatch.setattr(sys.modules["mmpo.launch"], "run", fail)
    assert cli.main(["train", recipe]) == code
    said = capsys.readouterr().err
    assert len(said.splitlines()) == (code != 130 or said != "") and "Traceback" not in said
    monkeypatch.setenv("MMPO_DEBUG", "1")
    if code != 130:
        with pytest.raises(type(error)):
            cli.main(["train", recipe])


def test_a_failed_run_keeps_its_code(launched: list[Any], recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mmpo.launch"], "run", lambda resolved: 1)
    assert cli.main(["train", recipe]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "nothing to load"),
        (["train", "--modality", "difusion"], "did you mean 'diffusion'"),
        (["nonsense"], "nonsense"),
        (["list"], "ROOM"),
        (["list", "loses"], "did you mean 'losses'"),
        (["list", "nope"], "datasets.embedders, configs)"),
        (["list", "datasets"], "no room 'datasets'"),
        (["config", "explain", "model.max_length"], "; it is a setting of --modality text or vlm"),
        (["config", "explain", "model.nothing"], "no setting 'model.nothing'"),
        (["config", "explain", "objective.nothing"], "no setting 'objective.nothing'"),
        (["train", "text", "--modality", "diffusion"], "recipe text is of modality text (got --modality diffusion"),
        (["config", "explain", "train.lrr"], "did you mean 'lr'"),
        (["make-base", "video", "--out", "x"], "no base to make for 'video'"),
        (["sample", "runs/x", "--out", "x"], "--prompt"),
    ],
)
def test_usage_errors_exit_with_2(words: list[str], said: str, capsys: Any) -> None:
    assert cli.main(words) == 2
    assert said.lower() in capsys.readouterr().err.lower()


def test_all_errors_of_a_recipe_and_its_losses_come_at_once(recipe: str, launched: list[Any], capsys: Any) -> None:
    Path(recipe).write_text("objective: [{loss: dpo, betta: 1}]\ntrain: {lrr: 1, steps: x}\n")
    assert cli.main(["train", recipe, "sed=3"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and not launched
    assert f"{recipe}:1:25 objective.0.betta: unknown key (got 'betta'" in "\n".join(said)


def test_a_mistyped_key_ends_the_process_with_2_and_its_place(recipe: str) -> None:
    Path(recipe).write_text("modality: diffusion\ntrain:\n  lerning_rate: 1\n  step: 3\n")
    done = subprocess.run([sys.executable, "-m", "mmpo", "train", recipe, "--data.pth", "x"], capture_output=True, text=True)
    lines = sorted(done.stderr.splitlines())
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 3
    assert lines[0].startswith(f"{recipe}:3:3 train.lerning_rate: unknown key (got 'lerning_rate', expected one of steps, ")
    assert lines[1].startswith(f"{recipe}:4:3 train.step: unknown key") and lines[1].endswith("; did you mean 'steps'?")
    assert lines[2].startswith("command line data.pth: unknown key") and "'path'" in lines[2]


def test_validate_prints_where_each_value_came_from(recipe: str, capsys: Any) -> None:
    assert cli.main(["config", "validate", recipe, "seed=3"]) == 0
    said = capsys.readouterr().out
    assert "lr: 0.0001  # recipe.yaml:3" in said and "seed: 3  # command line" in said and "eps: 1.0e-08  # default" in said


def test_settings_that_nothing_reads_are_notes_beside_the_recipe(capsys: Any) -> None:
    assert cli.main(["config", "validate", "text", "draw.t_max=0.5"]) == 0
    told = capsys.readouterr()
    assert told.err == "note: command line draw.t_max: not read; it goes with modalities that draw timesteps and noise\n"
    assert "note" not in told.out and "t_max: 0.5  # command line" in told.out


def test_a_name_that_cannot_be_written_to_is_a_mistake_of_usage(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    for to, endings in (("trl", ".jsonl, .jsonl.gz, .parquet or .json"), ("swift", ".jsonl, .jsonl.gz or .json")):
        assert cli.main(["data", "convert", str(tmp_path / "a.jsonl"), "--to", to, "--out", str(tmp_path / "b.txt")]) == 2
        assert f"b.txt: expected a name that ends in {endings}" in capsys.readouterr().err


def test_parameters_of_losses_are_explained_without_torch(capsys: Any) -> None:
    assert cli.main(["config", "explain", "objective.beta"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("objective.beta: a parameter of losses: ") and re.search(r"default 0.1 of .*\bdpo\b", said)
    assert cli.main(["config", "explain", "objective.0.beta_dpo"]) == 0
    assert "objective.beta_dpo: another way to give beta, which is beta_dpo / 1000, to " in capsys.readouterr().out


def test_explain_and_schema(capsys: Any) -> None:
    assert cli.main(["config", "explain", "train.lr"]) == 0
    assert capsys.readouterr().out == "train.lr: number > 0; default 0.0001\n    peak learning rate\n"
    assert (
        cli.main(["config", "explain"]) == cli.main(["config", "explain", "model.lora"]) == cli.main(["config", "schema"]) == 0
    )
    said = capsys.readouterr().out
    assert "model.lora.rank: integer >= 1; default 8" in said and '"additionalProperties": false' in said


def test_plugins_are_allowed_by_the_command_line_only(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(find, "PLUGINS", set())
    Path(recipe).write_text("objective: [{loss: 'mmpo.losses.ipo:ipo'}]\n")
    assert cli.main(["config", "validate", recipe]) == 2
    assert "--plugin mmpo.losses.ipo" in capsys.readouterr().err
    assert cli.main(["config", "validate", recipe, "--plugin", "mmpo.losses.ipo"]) == 0


def test_bad_rows_exit_with_3(tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert cli.main(["data", "validate", str(rows)]) == cli.main(["data", "validate", str(rows), "--modality", "text"]) == 0
    assert cli.main(["data", "validate", str(rows), "--modality", "diffusion"]) == 3
    assert "rows.jsonl:line 1 field 'chosen': expected image (modality diffusion), found text" in capsys.readouterr().out


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, mmpo.cli, mmpo.recipe, mmpo.find, mmpo.schema, mmpo.modalities.diffusion_config\n"
        "assert mmpo.cli.main(['list', 'losses']) == mmpo.cli.main(['config', 'explain', 'model']) == 0\n"
        "assert mmpo.cli.main(['config', 'explain', 'objective.beta']) == 0\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_is_fast() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmpo", "--help"], check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


def test_an_interrupt_that_a_library_turns_into_another_error_is_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setattr(cli, "app", broken)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes away from background jobs
    try:
        assert cli.main([]) == cli.INTERRUPTED and "interrupted" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
