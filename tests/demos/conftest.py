"""What the tests of the pages share: a browser, a page that is served, and small finished runs of each modality.

The pages' policy forbids eval, so `page.wait_for_function` fails there; `playwright.sync_api.expect` waits without it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from mmpo.demos.site import Site

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHORT = {
    "text": [
        "data.limit=600", "train.steps=4", "train.batch_size=16", "eval.every=4", "eval.prompts=8", "eval.pairs=16",
        "eval.test_prompts=8",
    ],
    "vlm": ["train.steps=2", "train.batch_size=8", "train.warmup=0", "eval.every=2", "eval.prompts=6", "eval.test_prompts=6"],
    "diffusion": [
        "data.limit=1000", "train.steps=2", "train.batch_size=4", "eval.every=2", "eval.prompts=2", "eval.seeds=1",
        "eval.pairs=8", "eval.draws=1", "eval.test_prompts=10", "eval.test_seeds=2", "model.sample_steps=4",
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window, as the system has it; MMPO_CHROMIUM names another one."""
    found = os.environ.get("MMPO_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of a modality on its embedded world, a few steps long; not to be changed.

    pytest's workers make each of them once between them: training goes on where it was, and here it has ended.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    shared.mkdir(exist_ok=True)

    @cache
    def make(modality: str) -> Path:
        from mmpo import cli

        out = shared / modality
        with FileLock(shared / f"{modality}.lock"):
            assert cli.main(["train", "--modality", modality, *SHORT[modality], f"out={out}"]) == 0
        return out

    return make


@contextlib.contextmanager
def serving(site: Site, **options: Any) -> Iterator[str]:
    """The address of the page, served by a thread of this process. One at a time: Gradio's settings are the process's."""
    import uvicorn

    from mmpo.demos import site as sites

    bound = sites.listening("127.0.0.1", 0)
    app = sites.build(site, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def served() -> Iterator[Callable[..., str]]:
    """served(site, **options of build) -> address; closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda site, **options: stack.enter_context(serving(site, **options))
