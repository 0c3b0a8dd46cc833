"""T5: damaged, hostile and oversized media through the one door. Whatever the bytes, this process survives and is told why."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from mmpo import decoding, media
from mmpo.errors import DataError
from mmpo.pair import Block
from tests import clips
from tests.reliability.counters import FULL, counter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel does not limit address space")

MUTANTS = {"image": 4000, "audio": 3000, "video": 3000} if FULL else {"image": 240, "audio": 180, "video": 180}
LIMITS = replace(media.LIMITS, wall=2.0, cpu=2, memory=2**30, output=2**28)
WAIT = LIMITS.wall + 1.0  # what an answer may take; over it is a hang
SIDE = 48


def pictures() -> dict[str, bytes]:
    ramp = np.add.outer(np.arange(SIDE) * 3, np.arange(SIDE) * 2).astype(np.uint8)
    picture = Image.fromarray(np.stack([ramp, ramp.T, np.roll(ramp, 9, 0)], -1))
    options: dict[str, dict[str, Any]] = {
        "PNG": {},
        "JPEG": {"quality": 90},
        "WEBP": {},
        "LOSSLESS": {"lossless": True},
        "GIF": {},
        "BMP": {},
    }
    saved = {}
    for name, more in options.items():
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP" if name == "LOSSLESS" else name, **more)
        saved[name] = buffer.getvalue()
    return saved


def in_a_fork(work: Callable[[], dict[str, int]], seconds: float, memory: int) -> tuple[int, dict[str, int]]:
    """Exit code and answer of `work`, done in a copy of this process with `memory` bytes more than it has, and so much time."""
    near, far = socket.socketpair()
    if not (pid := os.fork()):
        try:
            near.close()
            mine = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mine + memory, mine + memory))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            far.sendall(json.dumps(work()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    far.close()
    with near:
        answer = b"".join(iter(lambda: near.recv(65536), b""))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(answer or b"{}")


def digest_refuses(mutant: bytes, original: bytes, folder: Path) -> bool:
    (folder / "mutant").write_bytes(mutant)
    try:
        media.read(folder, "mutant", sha256=hashlib.sha256(original).hexdigest())
    except DataError:
        return True
    return False


def image_outcomes(folder: Path, start: int, stop: int) -> dict[str, int]:
    """How the door takes these mutants. Images are decoded in the calling process: each has an alarm of its own."""
    counts: Counter[str] = Counter()
    originals = list(pictures().values())
    wanted = [media.pixels(data) for data in originals]
    for number in range(start, stop):
        which = number % len(originals)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        try:
            mutant = clips.damaged(originals[which], (5, 0, number))
            same = np.array_equal(media.pixels(mutant), wanted[which])
            counts["same" if same else "changed"] += 1
            assert same or digest_refuses(mutant, originals[which], folder)
        except DataError:
            counts["refused"] += 1
        except Exception as error:
            counts[f"escaped: {type(error).__name__}"] += 1
    return dict(counts)


def report(kind: str, counts: Counter[str], seconds: float) -> None:
    size = MUTANTS[kind]
    told = ", ".join(f"{counts[name]} {name}" for name in ("same", "refused", "changed"))
    counter("T5", f"{kind} mutants", size, f"0 crashes, 0 hangs, {told} (a digest refuses the changed)", seconds)
    assert sum(counts[name] for name in ("same", "refused", "changed")) == size, counts
    assert counts["refused"] > size // 10


@pytest.mark.slow
def test_damaged_images(tmp_path: Path) -> None:
    start, counts = time.monotonic(), Counter[str]()
    for first in range(0, MUTANTS["image"], 120):
        last = min(first + 120, MUTANTS["image"])
        code, answer = in_a_fork(partial(image_outcomes, tmp_path, first, last), WAIT, 2**30)
        assert code == 0, f"exit code {code} somewhere in mutants {first} to {last}"
        counts.update(answer)
    report("image", counts, time.monotonic() - start)


def opened(kind: str, data: bytes) -> np.ndarray:
    return media.open_audio(data, LIMITS).samples if kind == "audio" else media.open_video(data, limits=LIMITS).frames


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["audio", "video"])
def test_damaged_clips(kind: str, tmp_path: Path) -> None:
    if kind == "audio":
        originals = [clips.sound(format, 0.25) for format in clips.SOUNDS]
    else:
        originals = [clips.video(container, frames=12) for container in clips.VIDEOS]
    wanted, start, counts = [opened(kind, data) for data in originals], time.monotonic(), Counter[str]()
    for number in range(MUTANTS[kind]):
        which, began = number % len(originals), time.monotonic()
        mutant = clips.damaged(originals[which], (5, 1 + (kind == "video"), number))
        try:
            same = np.array_equal(opened(kind, mutant), wanted[which])
            counts["same" if same else "changed"] += 1
            assert same or digest_refuses(mutant, originals[which], tmp_path)
        except DataError:
            counts["refused"] += 1
        assert time.monotonic() - began < 2 * WAIT, f"mutant {number} hung"  # two decoders may each take their time
    report(kind, counts, time.monotonic() - start)


# Probes that lead a decoder to another file. That file is a good video, so that being led there shows as success.


def boxed(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + name + body


def with_outside_data(data: bytes, target: Path) -> bytes:
    """An MP4 whose data reference names another file instead of itself: same length, so that no offset moves."""
    url = b"file://" + str(target).encode() + b"\0"
    inside, outside = boxed(b"url ", b"\0\0\0\1"), boxed(b"url ", b"\0\0\0\0", url)
    at, more = data.index(inside), len(outside) - len(inside)
    out = bytearray(data[:at] + outside + data[at + len(inside) :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):  # the boxes around it have grown
        place = out.index(name) - 4
        out[place : place + 4] = struct.pack(">I", struct.unpack(">I", out[place : place + 4])[0] + more)
    return bytes(out)


def with_subtitles(data: bytes, playlist: bytes) -> bytes:
    """An AVI of which a subtitle stream carries a playlist, as in the HLS attacks on servers that transcode."""
    inner = b"GAB2\0" + struct.pack("<HI", 2, 2) + b"a\0" + struct.pack("<HI", 4, len(playlist)) + playlist
    chunk = b"01tx" + struct.pack("<I", len(inner)) + inner + b"\0" * (len(inner) % 2)
    at = data.index(b"movi") + 4
    out = bytearray(data[:at] + chunk + data[at:])
    out[4:8] = struct.pack("<I", len(out) - 8)
    return bytes(out)


def probes(secret: Path, port: int) -> dict[str, bytes]:
    head = clips.video()[:32]
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    remote = playlist.replace(str(secret).encode(), f"http://127.0.0.1:{port}/x.mp4".encode())
    concat = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    dash = (
        f'<?xml version="1.0"?><MPD><Period><AdaptationSet mimeType="video/mp4"><Representation id="0">'
        f"<BaseURL>file://{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    ).encode()
    return {
        "hls": playlist,
        "hls file:": playlist.replace(b"\n/", b"\nfile:///"),
        "hls http": remote,
        "hls bom": b"\xef\xbb\xbf" + playlist,
        "hls subfile": playlist.replace(b"\n/", b"\nsubfile,,start,0,end,99,,:/"),
        "hls concat": playlist.replace(b"\n/", b"\nconcat:/"),
        "concat": concat,
        "dash": dash,
        "sdp": f"v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n".encode(),
        "hls behind a head": head + playlist,
        "concat behind a head": head + concat,
        "hls behind a riff": b"RIFF\0\1\0\0AVI " + playlist,
        "hls behind matroska": b"\x1aE\xdf\xa3" + playlist,
        "path": str(secret).encode(),
        "image pattern": b"%d.png",
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{secret}"/></svg>'.encode(),
        "data reference": with_outside_data(clips.video(), secret),
        "avi subtitles": with_subtitles(clips.video("avi"), playlist),
    }


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.mp4"
    path.write_bytes(clips.video("mp4", frames=7))
    return path


def test_the_probes_work_where_nothing_stops_them(secret: Path) -> None:
    for format, data in (("hls", probes(secret, 9)["hls"]), ("concat", probes(secret, 9)["concat"])):
        options = {"safe": "0", "protocol_whitelist": "file,crypto,data", "allowed_extensions": "ALL", "extension_picky": "0"}
        with av.open(io.BytesIO(data), "r", format=format, options=options) as file:
            assert len(list(file.decode(video=0))) == 7


def test_no_file_leads_to_another(secret: Path) -> None:
    """Through the door; and past it, straight into both decoders, with the format that would follow the playlist."""
    start, led = time.monotonic(), []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        attacks = probes(secret, listener.getsockname()[1])
        for name, data in attacks.items():
            (secret.parent / "probe.mp4").write_bytes(data)
            ways: list[Callable[[], np.ndarray]] = [
                partial(lambda d: media.open_video(Block("video", d, "probe.mp4"), limits=LIMITS).frames, data),
                partial(lambda p: media.open_video(p, limits=LIMITS).frames, secret.with_name("probe.mp4")),
                partial(lambda d: media.open_audio(d, LIMITS).samples, data),
                partial(media.pixels, data),
                partial(lambda d: decoding.decode("decord", d, LIMITS)[1], data),
            ]
            for format in ("hls", "concat", "dash", "sdp", "mov"):
                ways.append(partial(lambda f, d: decoding.decode("av", d, LIMITS, None, f)[1], format, data))
            for way in ways:
                try:
                    frames = way()
                except DataError:
                    continue
                if len(frames) != 24:  # its own 24 frames are harmless, the 7 of the secret are not
                    led.append(name)
        with pytest.raises(TimeoutError):
            listener.accept()
    counter("T5", "probes for another file", len(attacks), f"{len(led)} led there", time.monotonic() - start)
    assert led == []


def png(width: int, height: int, *chunks: tuple[bytes, bytes], body: bytes = b"\0" * 1000) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [header, *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gif(width: int, height: int, frames: int = 1, frame_side: int = 1) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, frame_side, frame_side, 0) + b"\x02\x02\x44\x01\0"
    return head + frame * frames + b";"


def webp(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def bombs() -> dict[str, bytes]:
    """Small files that ask for much. In each comment what a careless reader would do."""
    zeros = zlib.compress(b"\0" * 2**28, 9)
    jpeg = bytearray(pictures()["JPEG"])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    lossless = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", 16_383 | 16_383 << 14) + b"\0" * 5
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (2**24 - 1).to_bytes(3, "little") + (127).to_bytes(3, "little")
    bmp = bytearray(pictures()["BMP"])
    bmp[18:26] = struct.pack("<ii", 2**30, 2**30)
    lines = b"\0" * ((6000 * 3 + 1) * 6000)
    return {
        "png of a gigapixel": png(2**15, 2**15),  # allocate 3 GB
        "png of 36 megapixels, whole": png(6000, 6000, body=lines),  # allocate 108 MB
        "png with a long stream": png(8, 8, body=b"\0" * 2**28),  # inflate 256 MB
        "png with a text of 256 MB": png(8, 8, (b"zTXt", b"a\0\0" + zeros)),
        "png with 100 texts of 256 MB": png(8, 8, *[(b"zTXt", b"a\0\0" + zeros)] * 100),
        "png with a profile of 256 MB": png(8, 8, (b"iCCP", b"a\0\0" + zeros)),
        "png of a million frames": png(8, 8, (b"acTL", struct.pack(">II", 10**6, 0))),
        "gif of 4 gigapixels": gif(65_535, 65_535),
        "gif with a frame beyond its screen": gif(1, 1, 1, 65_535),
        "gif of four million frames": gif(8, 8, 4_000_000),  # count them: minutes
        "webp of 268 megapixels": webp(lossless),
        "webp with a canvas of 2 gigapixels": webp(extended + lossless),
        "jpeg of 4 gigapixels": bytes(jpeg),
        "bmp of an exapixel": bytes(bmp),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs() -> None:
    """Each within 200 MB and a few seconds. A small picture with a bomb beside its pixels may be decoded, the rest not."""
    start, made, harmless = time.monotonic(), bombs(), {"png with a long stream"}

    def cost(data: bytes) -> dict[str, int]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            decoded = media.pixels(data).size
        except DataError:
            decoded = 0
        return {"decoded": decoded, "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}

    for name, data in made.items():
        code, answer = in_a_fork(partial(cost, data), 5.0, 400 * 2**20)
        assert code == 0, f"{name}: exit code {code}"
        assert answer["decoded"] in ((8 * 8 * 3, 0) if name in harmless else (0,)), name
        assert answer["kilobytes"] < 200_000, name
    counter("T5", "image bombs", len(made), "0 crashes, 0 hangs, each within 200 MB", time.monotonic() - start)


def test_another_library_cannot_loosen_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's switches are global, and training scripts set them."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    for name, data in pictures().items():
        with pytest.raises(DataError):
            media.pixels(data[: len(data) // 2])
        assert media.pixels(data).shape == (SIDE, SIDE, 3), name
    with pytest.raises(DataError, match="pixels, expected at most"):
        media.pixels(png(2**15, 2**15))


def test_nothing_but_pixels_leaves_the_door() -> None:
    assert media.open_image(png(8, 8, (b"tEXt", b"Comment\0swordfish"), body=b"\0" * 200)).info == {}
    exif = Image.Exif()
    exif[0x010E] = "swordfish"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif, icc_profile=b"profile", comment=b"swordfish")
    picture = media.open_image(buffer.getvalue())
    assert picture.info == {} and not picture.getexif()
