"""The process that holds the models: it answers, stops, times out, dies and comes back, and its server notices all of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mmpo.demos import worker
from mmpo.demos.worker import LAST, Event, Worker, fate
from tests.demos.sources import WORDS, cannot, dies, dies_reading, says


@contextmanager
def working(tmp_path: Path, opener: Callable[..., Any] = says, **options: Any) -> Iterator[Worker]:
    worker = Worker(WORDS, tmp_path, tmp_path, opener=opener, **options)
    worker.start()
    try:
        yield worker
    finally:
        worker.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with working(tmp_path_factory.mktemp("worker"), timeout=30.0, grace=1.0) as worker:
        list(worker.sample("warm", [0]))
        yield worker


def asked(worker: Worker, words: str, **options: Any) -> list[Event]:
    events = list(worker.sample(words, [3, 4], **options))
    assert [e.kind in LAST for e in events] == [False] * (len(events) - 1) + [True]
    return events


def said(events: list[Event]) -> list[tuple[int, int, str]]:
    return [(e.system, e.index, e.value["text"]) for e in events if e.kind == "sample"]


def wait_for(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_it_answers_every_system_and_seed(shared: Worker) -> None:
    events = asked(shared, "hello")
    assert said(events) == [(0, 0, "hello 3"), (0, 1, "hello 4"), (1, 0, "hello 3"), (1, 1, "hello 4")]
    assert events[-1].kind == "done"
    assert shared.state.name == "ready" and shared.state.prompts == ({"words": "a held-out prompt", "pictures": []},)


@pytest.mark.slow
def test_the_server_needs_no_torch() -> None:
    """The worker's own side and what it imports, in a fresh interpreter."""
    code = "import sys, mmpo.demos.worker; assert 'torch' not in sys.modules, 'torch'; assert 'gradio' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_what_a_model_refuses_is_told_and_costs_nothing(shared: Worker) -> None:
    pid = shared._process.pid
    last = asked(shared, "fail")[-1]
    assert (last.kind, last.value["message"]) == ("failed", "no such word")
    assert asked(shared, "again")[-1].kind == "done" and shared._process.pid == pid


def test_a_request_is_stopped_and_the_process_stays(shared: Worker) -> None:
    pid = shared._process.pid
    events = []
    for event in shared.sample("long", [0], owner="me"):
        events.append(event)
        if event.kind == "progress" and len(events) == 3:
            assert not shared.cancel("somebody else")
            assert shared.cancel("me")
    assert events[-1].kind == "stopped" and len(events) < 100
    assert asked(shared, "again")[-1].kind == "done" and shared._process.pid == pid
    assert not shared.cancel("me")


def test_whoever_leaves_stops_the_request(shared: Worker) -> None:
    pid, events = shared._process.pid, shared.sample("long", [0])
    assert next(events).kind == "progress"
    events.close()  # type: ignore[attr-defined]
    began = time.monotonic()
    assert asked(shared, "next")[-1].kind == "done"
    assert time.monotonic() - began < 5 and shared._process.pid == pid


def test_whoever_leaves_holds_nobody_up(shared: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio closes in the thread that serves all pages. The next one is served when the process is free, and not before."""
    gate, stop = threading.Event(), shared._stop
    monkeypatch.setattr(shared, "_stop", lambda: (gate.wait(60), stop()))
    pid, events = shared._process.pid, shared.sample("long", [0], owner="gone")
    assert next(events).kind == "progress"
    events.close()  # type: ignore[attr-defined]
    assert not gate.is_set() and [place.owner for place in shared._line] == ["gone"]
    waiting = shared.sample("next", [0])
    for _ in range(2):
        assert next(waiting).value["note"] == "Waiting: one request is answered before yours."
    gate.set()
    assert [event.kind for event in waiting][-1] == "done" and shared._line == [] and shared._process.pid == pid
    assert shared._leaving is not None
    shared._leaving.join(20)
    assert not shared._leaving.is_alive()


@pytest.mark.slow
def test_whoever_leaves_a_request_that_does_not_stop(tmp_path: Path) -> None:
    """The next one is answered by another process."""
    with working(tmp_path, grace=0.5) as worker:
        list(worker.sample("warm", [0]))
        pid, events = worker._process.pid, worker.sample("deaf", [0])
        assert next(events).kind == "progress"
        events.close()  # type: ignore[attr-defined]
        assert asked(worker, "next")[-1].kind == "done" and worker._process.pid != pid


@pytest.mark.slow
def test_a_worker_that_is_closed_leaves_no_thread(tmp_path: Path) -> None:
    """Neither where a request is being ended, nor where whoever asked leaves, or looks, after the end."""
    with working(tmp_path, grace=30.0) as worker:
        list(worker.sample("warm", [0]))
        gone, late = worker.sample("deaf", [0]), worker.sample("late", [0])
        assert next(gone).kind == "progress"
        gone.close()  # type: ignore[attr-defined]
        began, leaving = time.monotonic(), worker._leaving
        assert leaving is not None and leaving.is_alive()
        worker.close()
        assert not leaving.is_alive() and worker._line == [] and time.monotonic() - began < 20
        assert list(late)[-1].kind == "failed"
    with working(tmp_path, grace=30.0) as worker:
        list(worker.sample("warm", [0]))
        there, gone = (worker.sample("deaf", [0]) for _ in range(2))
        assert next(there).kind == "progress" and next(gone).kind == "waiting"
        worker.close()
        assert list(there)[-1].kind == "stopped" and list(gone)[-1].kind == "failed"
        assert worker._leaving is None and worker._line == []


def test_one_request_at_a_time(shared: Worker) -> None:
    """The second waits, and is told so."""
    first = shared.sample("long", [0], owner="first")
    next(first)
    seen: list[Event] = []
    second = threading.Thread(target=lambda: seen.extend(shared.sample("short", [1])))
    second.start()
    wait_for(lambda: bool(seen))
    assert {e.kind for e in seen} == {"waiting"}
    shared.cancel("first")
    list(first)
    second.join(10)
    assert seen[-1].kind == "done"


def test_who_comes_first_is_served_first(shared: Worker) -> None:
    """And each knows how many come before; one who has gone away without a word keeps nobody waiting."""
    first = shared.sample("long", [0], owner="first")
    assert next(first).kind == "progress"
    gone = shared.sample("gone", [0], owner="gone")
    assert "one request is" in next(gone).value["note"]
    shared._line[1].seen -= worker.AWAY
    served: list[str] = []
    notes: dict[str, str] = {}

    def ask(name: str) -> None:
        for event in shared.sample(name, [0], owner=name):
            notes.setdefault(name, event.value.get("note", ""))
            if event.kind == "sample" and event.system == 0:
                served.append(name)

    names = [f"{i:02d}" for i in range(5)]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for i, thread in enumerate(threads):
        thread.start()
        wait_for(lambda i=i: len(shared._line) == i + 3)  # type: ignore[misc]
    wait_for(lambda: len(notes) == 5)
    shared.cancel("first")
    list(first)
    for thread in threads:
        thread.join(20)
    assert served == names
    assert notes["00"] == "Waiting: one request is answered before yours."
    assert notes["04"] == "Waiting: 5 requests are answered before yours."
    gone.close()  # type: ignore[attr-defined]
    assert shared._line == []


def test_a_crash_is_a_message_and_a_new_process(tmp_path: Path) -> None:
    with working(tmp_path) as worker:
        last = asked(worker, "crash")[-1]
        assert last.kind == "failed" and "SIGKILL" in last.value["message"] and "started again" in last.value["message"]
        assert asked(worker, "after")[-1].kind == "done"


@pytest.mark.slow
def test_a_crash_between_requests_is_mended(tmp_path: Path) -> None:
    with working(tmp_path) as worker:
        asked(worker, "one")
        pid = worker._process.pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: worker._process is not None and worker._process.pid != pid)
        assert said(asked(worker, "two"))[0] == (0, 0, "two 3")


@pytest.mark.slow
def test_what_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """Kindly where it listens, by a kill where it does not; both times the next request is answered."""
    with working(tmp_path, timeout=0.5, grace=0.5) as worker:
        list(worker.sample("warm", [0]))
        pid = worker._process.pid
        last = asked(worker, "long")[-1]
        assert last.kind == "failed" and "longer than" in last.value["message"] and worker._process.pid == pid
        began = time.monotonic()
        last = asked(worker, "deaf")[-1]
        assert last.kind == "failed" and "longer than" in last.value["message"] and time.monotonic() - began < 10
        assert worker._process.pid != pid
        assert asked(worker, "next")[-1].kind == "done"


def test_models_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    with working(tmp_path, cannot) as worker:
        last = asked(worker, "hello")[-1]
        assert last.kind == "failed" and "this model is not there" in last.value["message"]
        assert worker.state.name == "failed"


@pytest.mark.slow
def test_a_process_that_dies_while_loading_is_not_started_for_ever(tmp_path: Path) -> None:
    with working(tmp_path, dies) as worker:
        last = asked(worker, "hello")[-1]
        assert last.kind == "failed" and "while it loaded them" in last.value["message"]
        assert worker.state.name == "failed"


@pytest.mark.slow
def test_a_process_that_dies_at_its_prompts_is_not_started_for_ever(tmp_path: Path) -> None:
    with working(tmp_path, dies_reading) as worker:
        wait_for(lambda: worker.state.name == "failed")
        assert "exit code 9 while it read the held-out prompts" in worker.state.message
        assert asked(worker, "hello")[-1].value["message"] == worker.state.message
    assert (tmp_path / "starts").read_text().count("started") == 2


@pytest.mark.slow
def test_requests_that_crash_do_not_end_the_models_for_others(tmp_path: Path) -> None:
    with working(tmp_path) as worker:
        for _ in range(3):
            assert "started again" in asked(worker, "crash")[-1].value["message"]
        assert asked(worker, "after")[-1].kind == "done"


@pytest.mark.slow
def test_a_closed_worker_leaves_no_process(tmp_path: Path) -> None:
    with working(tmp_path) as worker:
        asked(worker, "hello")
        process = worker._process
    assert not process.is_alive()
    assert asked(worker, "hello")[-1].kind == "failed"


@pytest.mark.slow
def test_a_closed_worker_leaves_no_semaphores(tmp_path: Path) -> None:
    """Python complains of those at the end of a server."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom mmpo.demos import worker as workers\n"
        "from tests.demos.sources import WORDS, locks\n"
        "if __name__ == '__main__':\n"
        "    workers.END = 60.0\n"  # a process that is killed leaves them, and on a busy machine none ends in two seconds
        "    worker = workers.Worker(WORDS, Path(sys.argv[1]), Path(sys.argv[1]), grace=60.0, opener=locks)\n"
        "    worker.start()\n    print(list(worker.sample('hello', [0]))[-1].kind)\n    worker.close()\n"
    )
    (script := tmp_path / "server.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ended = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=180)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_a_process_without_its_server_ends(tmp_path: Path) -> None:
    with working(tmp_path) as worker:
        asked(worker, "hello")
        process = worker._process
        worker.state = type(worker.state)("closed")
        assert worker._pipe is not None
        with socket.socket(fileno=os.dup(worker._pipe.fileno())) as link:
            link.shutdown(socket.SHUT_RDWR)  # what the end of the server does, while others still hold the pipe
        wait_for(lambda: not process.is_alive())


def test_who_waits_can_leave_too(shared: Worker) -> None:
    """For a turn: the other's answer goes on, and the next request is answered."""
    first = shared.sample("long", [0], owner="a")
    next(first)
    second = shared.sample("hello", [0], owner="b")
    assert next(second).kind == "waiting" and shared.cancel("b")
    assert [event.kind for event in second][-1] == "stopped"
    assert shared.cancel("a") and [event.kind for event in first][-1] == "stopped"
    assert asked(shared, "again", owner="b")[-1].kind == "done"


@pytest.mark.slow
def test_held_out_prompts_are_known_while_a_process_is_started_again(tmp_path: Path) -> None:
    with working(tmp_path) as worker:
        list(worker.sample("warm", [0]))
        prompts = worker.state.prompts
        worker._process.kill()
        wait_for(lambda: worker.state.name == "starting")
        assert prompts and worker.state.prompts == prompts


@pytest.mark.parametrize(("code", "words"), [(-9, "SIGKILL, most likely"), (-11, "SIGSEGV"), (3, "exit code 3")])
def test_ends_are_named(code: int, words: str) -> None:
    assert words in fate(code)
