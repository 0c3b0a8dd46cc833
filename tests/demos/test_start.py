"""`mmpo demo ...` as a command: how soon it answers, what it prints, what it refuses, and that it imports no torch."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmpo import cli, cli_demo
from mmpo.demos import accounts
from mmpo.errors import RecipeError
from tests.demos.pools import picture_folder

ROOT = Path(__file__).resolve().parents[2]
PORT = re.compile(r"(http://127\.0\.0\.1:\d+/)")


def test_password_prints_a_line_that_opens_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"a long password\n")
    os.close(writing)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    assert cli.main(["demo", "password", "tim"]) == 0
    line = capsys.readouterr().out
    (file := tmp_path / "accounts").touch(0o600)
    file.write_text(line)
    assert "a long password" not in line and accounts.read(file).check("tim", "a long password")


def test_without_a_run_the_command_says_how_to_make_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("compare", "vote"):
        assert cli.main(["demo", command]) == cli.USAGE
        assert "mmpo train --modality diffusion" in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for words in (["compare", str(tmp_path)], ["vote", str(tmp_path)], ["label", str(tmp_path)]):
        assert cli.main(["demo", *words]) == cli.MISSING
        assert "pip install" in (told := capsys.readouterr().err) and "mmpo[demo]" in told


def test_the_newest_finished_run_is_taken(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "old", "unfinished"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").touch()
        if name != "unfinished":
            (tmp_path / name / "summary.json").write_text("{}")
            os.utime(tmp_path / name / "summary.json", (1000 - age, 1000 - age))
    assert cli_demo.newest_run(tmp_path) == tmp_path / "newest"
    with pytest.raises(RecipeError, match="no finished run"):
        cli_demo.newest_run(tmp_path / "old")


def test_votes_that_cannot_be_kept_anywhere_name_the_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    source = picture_folder(tmp_path / "samples", 2)
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "votes"
    for words in (["vote", str(source)], ["label", str(source / "base")]):
        assert cli.main(["demo", *words, "--out", str(out)]) == cli.USAGE
        told = capsys.readouterr().err
        assert f"{out}: votes cannot be kept there (" in told and "choose another folder with --out" in told


@pytest.mark.parametrize("why", ["no accounts", "bad accounts", "a port in use"])
def test_a_start_that_is_refused_leaves_nothing_behind(
    why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No votes.db, after which the folder would be refused elsewhere, no cache, no models that were started."""
    pytest.importorskip("gradio")
    from mmpo.demos import compare, site

    monkeypatch.setattr(compare, "compare_site", lambda source: pytest.fail("models are started"))
    samples = picture_folder(tmp_path / "samples", 2)
    (people := tmp_path / "accounts").touch(0o600)
    before = sorted(tmp_path.rglob("*"))
    with site.listening("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        options = {
            "no accounts": ["--host", "0.0.0.0"],
            "bad accounts": ["--auth-file", str(people)],
            "a port in use": ["--port", port],
        }[why]
        for words in (["vote", str(samples)], ["label", str(samples)], ["compare", "--samples", str(samples)]):
            assert cli.main(["demo", *words, *options]) == cli.USAGE
            told = {"no accounts": "--auth-file", "bad accounts": "holds no account", "a port in use": port}[why]
            assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_sigterm_removes_what_is_temporary() -> None:
    code = (
        "import os, signal\nfrom mmpo.demos import site\nwith site.ended_by_sigterm(), site.empty_directory():\n"
        "    print(os.getcwd(), flush=True)\n    os.kill(os.getpid(), signal.SIGTERM)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    folder = Path(ended.stdout.strip())
    assert ended.returncode == -signal.SIGTERM and folder.name.startswith("mmpo-demo-") and not folder.exists()


def test_a_page_that_cannot_be_made_closes_what_it_had(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from mmpo.demos import site

    def broken() -> None:
        raise ValueError("no page")

    closed: list[bool] = []
    (tmp_path / "media").mkdir()
    with pytest.raises(ValueError, match="no page"):
        site.build(site.Site("t", broken, tmp_path / "media", close=lambda: closed.append(True)))  # type: ignore[arg-type]
    assert closed == [True] and list(tmp_path.iterdir()) == [tmp_path / "media"]


@contextmanager
def started(*words: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of `mmpo demo ...`, and the address that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "mmpo", "demo", *words]
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], 120)[0], "it printed nothing"
        first = process.stdout.readline()
        found = PORT.search(first)
        assert found, first + process.stdout.read()
        yield process, found[1]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def import_of_gradio() -> float:
    """Seconds of work of a bare import, here and now: on a machine that shares its cores, all work takes longer."""
    child = subprocess.Popen([sys.executable, "-c", "import gradio"])
    used = os.wait4(child.pid, 0)[2]
    child.returncode = 0
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_compare_answers_within_five_seconds(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """Of work: what a test machine does beside it is not the command's."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("gradio")
    run = finished_run("text")
    before, start = set(run.iterdir()), time.monotonic()
    with started("compare", str(run), cwd=tmp_path) as (process, address):
        status = 0
        while status != 200 and time.monotonic() - start < 120:
            try:
                status = httpx.get(address, timeout=10).status_code
            except httpx.TransportError:
                time.sleep(0.05)
        spent = (Path("/proc") / str(process.pid) / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        seconds = (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")
        print(f"answered after {time.monotonic() - start:.1f} s, of which the processor worked {seconds:.1f} s")
        assert status == 200 and seconds < max(5.0, 2 * import_of_gradio()), f"{seconds:.1f} s"
        libraries = (Path("/proc") / str(process.pid) / "maps").read_text(encoding="utf-8", errors="replace")
        assert "libtorch" not in libraries, "models belong in a process of their own"
    assert process.returncode == cli.INTERRUPTED
    assert set(run.iterdir()) == before, "nothing is left in the run"
