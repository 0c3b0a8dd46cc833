"""The door for video and audio: what comes out, what is refused, and decoders that crash, hang and swallow memory."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpo import decode_child, decoding, media
from mmpo.errors import DataError
from mmpo.pair import Block
from tests import clips

LIMITS = media.LIMITS
QUICK = replace(LIMITS, wall=2.0, memory=2**29)


@pytest.mark.parametrize("container", clips.VIDEOS)
def test_a_video_comes_out_as_it_went_in(container: str) -> None:
    video = media.open_video(clips.video(container))
    assert video.frames.shape == (24, 48, 64, 3) and video.frames.dtype == np.uint8
    assert video.rate == 12 and video.decoder == "decord"
    assert np.allclose(video.timestamps, np.arange(24) / 12, atol=1e-3)
    for index in (0, 11, 23):
        square, rest = video.frames[index, 20, index + 10], video.frames[index, 40, 10]
        assert np.abs(square - np.array([200.0, 50, 100])).max() < 16 and rest.max() < 16


@pytest.mark.parametrize("wanted", [1, 5, 24])
@pytest.mark.parametrize("decoder", ["decord", "av"])
def test_frames_are_spread_evenly(decoder: str, wanted: int) -> None:
    data = clips.video()
    every = decoding.decode(decoder, data, LIMITS, None, "mov")
    some = decoding.decode(decoder, data, LIMITS, wanted, "mov")
    indices = [int((i + 0.5) * 24 / wanted) for i in range(wanted)]
    assert np.array_equal(some[1], every[1][indices])
    assert some[0]["timestamps"] == [every[0]["timestamps"][i] for i in indices]


@pytest.mark.parametrize("container", clips.VIDEOS)
def test_both_decoders_see_the_same(container: str) -> None:
    data = clips.video(container)
    name = media._video_container(data)
    (one, decord), (two, av) = (decoding.decode(decoder, data, LIMITS, None, name) for decoder in ("decord", "av"))
    assert one["rate"] == two["rate"] and np.allclose(one["timestamps"], two["timestamps"], atol=1e-3)
    assert np.abs(decord.astype(int) - av).max() <= 3


def test_what_decord_cannot_pyav_decodes() -> None:
    video = media.open_video(clips.video("mp4", "libsvtav1"))
    assert video.decoder == "av" and video.frames.shape == (24, 48, 64, 3)


@pytest.mark.parametrize("size", [(64, 48), (64, 64), (50, 34)])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_video_comes_out_upright(degrees: int, size: tuple[int, int]) -> None:
    width, height = size
    plain = clips.video(width=width, height=height)
    expected = np.rot90(media.open_video(plain, 1).frames[0], -degrees // 90).astype(int)
    found = media.open_video(clips.turned(plain, degrees), 1).frames[0]
    assert np.abs(expected - found).max() <= 3
    again = decoding.decode("av", clips.turned(plain, degrees), LIMITS, 1, "mov")[1][0]
    assert np.abs(expected - again).max() <= 3


@pytest.mark.parametrize("format", clips.SOUNDS)
def test_a_sound_comes_out_as_it_went_in(format: str) -> None:
    audio = media.open_audio(clips.sound(format))
    assert audio.samples.shape == (2, 8000) and audio.samples.dtype == np.float32 and audio.rate == 16_000
    if format in ("WAV", "FLAC"):
        noise = np.random.default_rng(0).normal(0, 0.1, (8000, 2)).T
        assert np.abs(audio.samples - noise).max() < 1e-4


def test_blocks_and_paths_are_opened_and_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clips.video())
    assert np.array_equal(media.open_video(tmp_path / "a.mp4").frames, media.open_video(clips.video()).frames)
    data = media.read(tmp_path, "a.mp4")
    assert media.open_video(Block("video", data, "a.mp4"), 2).frames.shape == (2, 48, 64, 3)
    with pytest.raises(DataError, match="video 'b.mp4': cannot be decoded"):
        media.open_video(Block("video", data[:1000], "b.mp4"))
    with pytest.raises(DataError, match=r"\(decord: DECORDError: Check failed"):  # without decord's clock and folders
        media.open_video(b"RIFF\0\0\0\0AVI " + b"x" * 100)
    with pytest.raises(DataError, match="audio 'c.wav': expected WAV"):
        media.open_audio(Block("audio", data, "c.wav"))
    with pytest.raises(DataError, match="No such file"):
        media.open_audio(tmp_path / "missing.wav")
    with pytest.raises(DataError, match="found ndarray"):
        media.open_video(Block("video", np.zeros((1, 2, 2, 3), np.uint8)))


def test_a_digest_tells_what_a_decoder_does_not(tmp_path: Path) -> None:
    data = clips.video()
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "a.mp4").write_bytes(data)
    assert media.read(tmp_path, "a.mp4", sha256=digest) == data
    (tmp_path / "a.mp4").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match="a.mp4.*sha256"):
        media.read(tmp_path, "a.mp4", sha256=digest)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"size": 1000}, "expected at most 1000"),
        ({"duration": 1.0}, r"1\.\d s, expected at most 1"),
        ({"frames": 10}, "frames or more, expected at most 10|24 frames or more"),
        ({"pixels": 3000}, "64x48 pixels"),
        ({"output": 50_000}, "once decoded"),
    ],
)
@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_videos_over_a_limit_are_refused(codec: str, limits: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        media.open_video(clips.video("mp4", codec), limits=replace(LIMITS, **limits))


@pytest.mark.parametrize(
    ("limits", "words"), [({"size": 1000}, "at most 1000"), ({"duration": 0.4}, "0.5 s"), ({"output": 1000}, "once decoded")]
)
def test_sounds_over_a_limit_are_refused(limits: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        media.open_audio(clips.sound(), replace(LIMITS, **limits))


def test_more_frames_than_there_are_and_none_at_all_are_refused() -> None:
    with pytest.raises(DataError, match="24 frames, expected at least the 25"):
        media.open_video(clips.video(), 25)
    with pytest.raises(ValueError, match="at least 1"):
        media.open_video(clips.video(), 0)


def test_empty_and_cut_sounds_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        media.open_audio(clips.sound("WAV", seconds=0))
    with pytest.raises(DataError, match="lost sync|declares"):
        media.open_audio(clips.sound("FLAC")[:9000])
    broken = bytearray(clips.sound("WAV"))
    broken[20:22], broken[34:36] = struct.pack("<H", 3), struct.pack("<H", 32)  # the noise, read as floats
    broken[28:34] = struct.pack("<IH", 16_000 * 8, 8)
    broken[44:52] = struct.pack("<2f", np.nan, np.inf)
    with pytest.raises(DataError, match="not finite"):
        media.open_audio(bytes(broken))


SPY = """
class SoundFile:
    def __init__(self, file):
        exec(file.read()[4:].decode(), {})
"""


@pytest.fixture
def obedient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A soundfile that does what the file tells it, as a decoder with a hole would."""
    (tmp_path / "soundfile.py").write_text(SPY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    decoding.stop()
    yield
    decoding.stop()


def played(code: str, limits: decoding.Limits = QUICK) -> str:
    """What the door says of a file that has the decoder run `code`."""
    with pytest.raises(DataError) as caught:
        media.open_audio(Block("audio", b"fLaC" + code.encode(), "evil.flac"), limits)
    return str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "crashed with SIGABRT"),
        ("import os; os.kill(os.getpid(), 11)", "crashed with SIGSEGV"),
        ("import os; os._exit(7)", "exit code 7"),
        ("import os; os._exit(0)", "ended without an answer"),
        ("import time; time.sleep(100)", "took longer than 2 s"),
        ("import signal\nsignal.pthread_sigmask(0, [14, 24])\nwhile True: pass", "gave no answer|processor time"),
        ("bytearray(2**40)", "bytes of memory"),
        ("x = []\nwhile True: x.append(bytearray(2**24))", "bytes of memory"),
        ("raise RecursionError('deep')", "RecursionError: deep"),
        ("raise SystemExit", "exit code 1"),
        ("import os; os.kill(os.getppid(), 9); os._exit(0)", "killed twice"),
        ("import os; os.kill(os.getpid(), 9)", "killed twice"),
    ],
)
@pytest.mark.slow
def test_a_decoder_can_only_hurt_itself(obedient: None, monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    monkeypatch.setattr(decoding, "GRACE_SECONDS", 1.0)
    message = played(code)
    assert re.search(words, message) and "evil.flac" in message
    assert "RuntimeError: still there" in played("raise RuntimeError('still there')")


def test_processor_time_is_limited_too(obedient: None) -> None:
    assert "more than 1 s of processor time" in played("while True: pass", replace(LIMITS, cpu=1, wall=30.0))


def test_a_decoder_can_open_nothing(obedient: None, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("swordfish")
    for code in (
        f"raise ValueError(open({str(tmp_path / 'secret')!r}).read())",
        f"raise ValueError(open({str(tmp_path / 'written')!r}, 'w').write('x'))",
        "import socket; raise ValueError(socket.socket().fileno())",
        "import os; raise ValueError(os.pipe())",
        "import os; raise ValueError(os.listdir('/'))",
    ):
        message = played(code)
        assert "Too many open files" in message and "swordfish" not in message
    assert not (tmp_path / "written").exists()


HEADERS = [
    b'{"shape": [1000000000000], "dtype": "uint8"}',
    b'{"shape": [-4], "dtype": "uint8"}',
    b'{"shape": [], "dtype": "uint8"}',
    b'{"shape": 3, "dtype": "uint8"}',
    b'{"shape": ["a"], "dtype": "uint8"}',
    b'{"shape": [1.5], "dtype": "uint8"}',
    b'{"shape": [1], "dtype": "object"}',
    b'{"shape": [2]}',
    b"[]",
    b"3",
    b"{{{{{",
    b"[" * 200_000,
    b"\xff\xfe",
]


@pytest.mark.parametrize(
    "answer", [struct.pack("<I", 2**31), *(struct.pack("<I", len(h)) + h for h in HEADERS)], ids=lambda a: repr(a[:30])
)
def test_an_answer_is_not_believed(answer: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        threading.Thread(target=far.sendall, args=(answer + b"\0" * 4096,)).start()
        with pytest.raises((ValueError, TypeError, KeyError, RecursionError)):
            decoding._answer(near, time.monotonic() + 5, LIMITS)


def test_a_fork_and_threads_get_their_own(tmp_path: Path) -> None:
    data = clips.sound()
    want = media.open_audio(data).samples
    if not (pid := os.fork()):
        same = np.array_equal(media.open_audio(data).samples, want)
        decoding.stop()
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(np.array_equal(media.open_audio(data).samples, want))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_descriptors_do_not_pile_up() -> None:
    data = clips.sound()
    media.open_audio(data)
    before = len(os.listdir("/dev/fd"))
    for _ in range(50):
        media.open_audio(data)
        with pytest.raises(DataError):
            media.open_audio(data[:30])
    assert len(os.listdir("/dev/fd")) == before


def test_confinement_holds_in_a_bare_fork() -> None:
    """Without the decoders around it: nothing can be opened, written or allocated."""
    near, far = socket.socketpair()
    if not (pid := os.fork()):
        decode_child.confine(2**33, 10, 10.0)
        found = {}
        actions: dict[str, Callable[[], object]] = {
            "open": lambda: os.open(os.devnull, os.O_RDONLY),
            "socket": socket.socket,
            "memory": lambda: mmap.mmap(-1, 2**34),
        }
        for name, action in actions.items():
            try:
                action()
                found[name] = "allowed"
            except OSError as error:
                found[name] = type(error).__name__
        far.sendall(json.dumps(found).encode())
        os._exit(0)
    far.close()
    os.waitpid(pid, 0)
    assert json.loads(near.recv(4096)) == {"open": "OSError", "socket": "OSError", "memory": "OSError"}
