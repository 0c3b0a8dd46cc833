"""T22, S11, S12: nothing secret in what a run writes or prints, and nobody outside this machine is spoken to."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmpo import cli, masking, network
from mmpo import recipe as recipes
from mmpo.judging import Blocks, JudgeResult
from mmpo.runlog import RunLog
from tests import tiny_run
from tests.reliability.counters import counter

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "GITHUB_TOKEN",
    "DB_PASSWORD",
    "COMET_API_KEY",
    "GOOGLE_CREDENTIALS",
    "SLACK_TOKEN",
)
CANARIES = {name: f"canary{i:02d}x{name.lower()[:6]}9Zq" for i, name in enumerate(ENVIRONMENT)}
CANARIES |= {"HF_TOKEN": "hf_canary00AbCdEfGh123456", "OPENAI_API_KEY": "sk-proj-canary03-AbCd1234"}
SETTINGS = {
    "judge.options.api_key": "canary10apikey",
    "judge.options.hf_token": "canary11token",
    "judge.options.password": "canary12pass",
    "judge.options.deep": "{client_secret: canary13deep, list: [{access_token: canary14list}]}",
    "judge.options.note": "hf_canary15AbCdEfGh123456",
    "judge.options.where": "[sk-canary16AbCdEf, ghp_canary17AbCdEf12]",
    "judge.options.echo": CANARIES["HF_TOKEN"],
    "judge.options.secrets": "{a: canary18secret}",
    "judge.options.credentials": "[canary19credential]",
    "judge.options.letters": "[hf_canaryAbCdEfGhIjKlMnOpQr, sk-proj-canaryEFGHijklMNOPqrst]",
    "judge.options.lower": "glpat-canaryghijklmnopqrst",
}
COUNT = 23


def told(path: str | None = None, device: str = "cpu", **options: Any) -> Any:
    """`tiny_run.brightness`, which wants to be paid."""
    inner = tiny_run.brightness()

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        assert options["api_key"].startswith("canary10") and options["deep"]["list"][0]["access_token"] == "canary14list"
        if options.get("fail"):
            raise RuntimeError(f"the server refused {options['api_key']} and {os.environ['DB_PASSWORD']}")
        return inner(prompts, answers)

    return judge


HOOK = """
import json, socket, sys
seen = []
def hook(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        seen.append(str(args[0]))
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        seen.append(str(args[1][0]))
sys.addaudithook(hook)
from mmpo.cli import main
code = main(sys.argv[2:])
looked_up = len(seen)
socket.getaddrinfo("localhost", 80)  # the hook hears it
from huggingface_hub import constants
told = {"code": code, "seen": seen, "count": looked_up, "offline": constants.HF_HUB_OFFLINE}
told["telemetry_off"] = constants.HF_HUB_DISABLE_TELEMETRY
open(sys.argv[1], "w").write(json.dumps(told))
"""
LOOPBACK = {"127.0.0.1", "::1", "localhost", "None", "0.0.0.0", "::"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A whole `mmpo train` in a process of its own, with canaries everywhere, under a socket hook: folder, output, sockets."""
    root = tmp_path_factory.mktemp("canaries")
    tiny_run.make_world(root)
    more = ["train.steps=2", "eval.every=2", "judge.name=tests.reliability.test_secrets:told", "track=[tensorboard]"]
    words = tiny_run.settings(root, root / "out", *more, *(f"{k}={v}" for k, v in SETTINGS.items()))
    environment = {k: v for k, v in os.environ.items() if k not in network.OFFLINE} | CANARIES | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOOK, str(root / "sockets.json"), "train", "--modality", "diffusion"]
    command += ["--plugin", "tests.reliability.test_secrets", *(w for word in words for w in ("--set", word))]
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "out", done.stdout + done.stderr, json.loads((root / "sockets.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, and those inside archives; names count as content."""
    found = {}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        found[str(path)] = data + str(path).encode()
        if data[:2] == b"\x1f\x8b":
            found[f"{path}!"] = gzip.decompress(data)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found |= {f"{path}!{name}": archive.read(name) for name in archive.namelist()}
    return found


@pytest.mark.slow
def test_no_canary_in_any_artefact_or_output(ran: Any) -> None:
    start = time.monotonic()
    folder, output, told = ran
    assert told["code"] == 0 and (folder / "summary.json").exists(), output[-3000:]
    files = contents(folder)
    assert any("tfevents" in name for name in files) and any(name.endswith("report.html") for name in files)
    found = [(name, at) for name, data in [*files.items(), ("output", output.encode())] if (at := data.find(b"canary")) >= 0]
    where = [n for n, d in files.items() if b"***" in d]
    assert found == [] and any(n.endswith("recipe.yaml") for n in where) and any("tfevents" in n for n in where)
    counter("T22", f"canaries in {len(files)} files and the output", COUNT, "0 found", time.monotonic() - start)


@pytest.mark.slow
def test_a_run_speaks_to_nobody(ran: Any) -> None:
    _, output, told = ran
    assert told["code"] == 0, output[-3000:]
    assert set(told["seen"]) <= LOOPBACK and told["seen"][told["count"] :] == ["localhost"]
    assert told["offline"] is True and told["telemetry_off"] is True
    counter("S12", "look-ups of a whole training", told["count"], "0 outside this machine", 0.0)


@pytest.mark.slow
def test_a_masked_run_resumes(ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The folder's recipe is masked, the one on the command line is not; they are the same recipe all the same."""
    from mmpo import drift

    folder, _, _ = ran
    given = tiny_run.settings(folder.parent, folder, *(f"{k}={v}" for k, v in SETTINGS.items()))
    given += ["train.steps=2", "eval.every=2", "judge.name=tests.reliability.test_secrets:told", "track=[tensorboard]"]
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    drift.claim_recipe(folder, recipes.load(None, given, "diffusion"))
    assert "canary" not in (folder / "recipe.yaml").read_text()


def test_errors_are_masked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """What a recipe or the environment keeps secret does not come out of a message that somebody else wrote."""
    monkeypatch.setattr(masking, "_LEARNT", set())
    monkeypatch.setenv("DB_PASSWORD", CANARIES["DB_PASSWORD"])
    monkeypatch.delenv("MMPO_DEBUG", raising=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("judge: {options: {api_key: canary10apikey, wait: 3}}\n")

    def fail(resolved: Any) -> int:
        raise RuntimeError(f"refused {resolved.recipe.judge.options['api_key']}, {os.environ['DB_PASSWORD']}, hf_canary9AbCd12")

    monkeypatch.setattr("mmpo.launch.run", fail)
    assert cli.main(["train", str(recipe)]) == 1
    assert capsys.readouterr().err == "mmpo: RuntimeError: refused ***, ***, ***\n"
    for text in ("train: {lr: hf_canary5canary5}", "hf_canary5canary5: 1", "train: {steps: [sk-canary5canary5]}"):
        recipe.write_text(text + "\n")
        assert cli.main(["config", "validate", str(recipe), "--set", "sk-canary6canary6"]) == 2
        assert "canary" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("api_key", "abc", "***"),
        ("HF_TOKEN", "abc", "***"),
        ("max_tokens", 64, 64),
        ("keep", 2, 2),
        ("password", 1234, "***"),
        ("path", "/data/hf_datasets/x", "/data/hf_datasets/x"),
        ("path", "runs/task-evaluation-2024", "runs/task-evaluation-2024"),
        ("x", "a hf_AbCdEfGh1234 b", "a *** b"),
        ("x", "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "***"),
        ("x", "a sk-proj-abcdEFGHijklMNOPqrst b", "a *** b"),
        ("x", "glpat-abcdefghijklmnopqrst", "***"),
        ("x", "AKIAABCDEFGHIJKLMNOP", "***"),
        ("x", "hf_hub_download of sk-learn-something-else", "hf_hub_download of sk-learn-something-else"),
        ("path", "/data/hf_datasets_of_preference_pairs/x", "/data/hf_datasets_of_preference_pairs/x"),
        ("x", {"a": [{"secret": "s"}]}, {"a": [{"secret": "***"}]}),
        ("key", None, None),
        ("token", True, True),
    ],
)
def test_masking(name: str, value: Any, shown: Any) -> None:
    """Secrets and nothing else: a path that was masked in a run's recipe could not be opened again."""
    assert masking.masked(name, value) == shown


def test_logs_are_masked_and_stay_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret of digits must not be looked for in numbers."""
    monkeypatch.setenv("PIN_PASSWORD", "12345678")
    log = RunLog(tmp_path / "log.jsonl")
    log.append({"loss": 0.12345678, "source": "db://u:12345678@host", "deep": {"x": ["hf_AbCdEfGh1234"]}})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "loss": 0.12345678,
        "source": "db://u:***@host",
        "deep": {"x": ["***"]},
    }


def test_downloads_are_a_recipes_own_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed by default; opened by allow_download of the model or the judge, and never against the environment."""
    for name in (*network.OFFLINE, *network.NO_TELEMETRY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(network, "_CLOSED", set())
    plain = recipes.load(None, [], "diffusion").recipe
    for wish in ("model.allow_download=true", "judge.options.allow_download=true"):
        network.close()
        network.open_for(plain)
        assert all(os.environ[n] == "1" for n in (*network.OFFLINE, *network.NO_TELEMETRY))
        network.open_for(recipes.load(None, [wish], "diffusion").recipe)
        assert not any(n in os.environ for n in network.OFFLINE) and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    network.close()
    network.open_for(recipes.load(None, ["model.allow_download=true"], "diffusion").recipe)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
