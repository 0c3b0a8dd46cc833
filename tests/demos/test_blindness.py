"""Before the vote nothing tells which system made an answer: sides are balanced, and no byte that is sent names a system."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image, PngImagePlugin
from scipy.stats import binomtest, chisquare

from mmpo import media
from mmpo.demos.ballots import Ballots
from mmpo.demos.blinding import blinded
from mmpo.demos.pool import default_folder, open_pool
from mmpo.demos.vote import vote_site
from mmpo.errors import DataError
from mmpo.pair import Block
from tests import clips
from tests.demos.pools import picture, text_pool

NAMES = ("Zebrafinch-v7", "Quokka_final")  # systems that occur nowhere by chance


def test_sides_are_balanced_over_2000_served_items(tmp_path: Path) -> None:
    """By system, by the side that was served before, and by the order in the source; two-sided, at 1 in 10,000."""
    pool = text_pool(100)
    ballots = Ballots(tmp_path, pool)
    ballots._db.execute("PRAGMA synchronous = OFF")
    sides, items = [], []
    for voter in range(20):
        for number in range(100):
            served = ballots.serve(str(voter))
            assert served is not None
            sides.append(served.left.system == "base")
            items.append(int(served.left.item))
            ballots.vote(str(voter), served.id, "left", f"nonce-{number:04d}")
    assert len(sides) == 2000
    assert binomtest(sum(sides), 2000).pvalue > 1e-4
    same = sum(a == b for a, b in zip(sides, sides[1:], strict=False))
    assert binomtest(same, 1999).pvalue > 1e-4
    for item in range(0, 100, 20):  # of one item the sides differ between voters
        assert 0 < sum(side for side, i in zip(sides, items, strict=True) if i == item) < 20
    first = np.bincount([items[100 * voter] % 4 for voter in range(20)], minlength=4)
    assert chisquare(first).pvalue > 1e-4  # and no item comes first for everybody
    ids = {row[0] for row in ballots._db.execute("SELECT id FROM comparisons")}
    assert len(ids) == 2000 and all(len(id) >= 22 for id in ids)


# What is sent


def tagged_png(seed: int, name: str) -> bytes:
    info, out = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Software", name)
    Image.fromarray(picture(seed)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def tagged_jpeg(seed: int, name: str) -> bytes:
    picture_, out = Image.fromarray(picture(seed)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0131] = name  # Software
    picture_.save(out, "JPEG", exif=exif, comment=name)
    return out.getvalue()


def tagged_sound(seed: int, name: str, format: str = "WAV") -> bytes:
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 8000, 1, clips.SOUNDS[format], format=format) as file:
        file.title = file.software = file.comment = name
        file.write(np.random.default_rng(seed).normal(0, 0.1, 800))
    return out.getvalue()


CODECS = {"mp4": "libx264", "webm": "libvpx-vp9"}


def tagged_video(seed: int, name: str, container: str = "mp4", codec: str = "", sound: str = "") -> bytes:
    """Named in the container, in a chapter and in each stream."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        file.metadata.update(title=name, comment=name)
        file.set_chapters([{"id": 1, "start": 0, "end": 1, "time_base": Fraction(1, 4), "metadata": {"title": name}}])
        stream: Any = file.add_stream(codec or CODECS[container], rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        tracks = [stream, *([file.add_stream(sound, rate=48_000)] if sound else [])]
        for track in tracks:
            track.metadata.update(title=name, handler_name=name, encoder=name, language="que")
        for index in range(4):
            pixels = np.full((32, 32, 3), 20 * index + seed, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for track in tracks[1:]:
            quiet: Any = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.float32), format="flt", layout="mono")
            quiet.rate, quiet.pts = 48_000, 0
            made = av.AudioResampler(track.format.name, "mono", 48_000, track.codec_context.frame_size or None).resample(quiet)
            file.mux([packet for frame in made for packet in track.encode(frame)])
        for track in tracks:
            file.mux(track.encode())
    return out.getvalue()


KINDS: dict[str, Callable[[int, str], bytes]] = {
    "png": tagged_png, "jpg": tagged_jpeg, "wav": tagged_sound, "mp4": tagged_video,
    "webm": lambda seed, name: tagged_video(seed, name, "webm"),
    "txt": lambda seed, name: f"It is {seed}.".encode(),
}  # fmt: skip


def tagged_folder(root: Path, items: int = 3) -> Path:
    """Samples that name their systems in every way a file can: folder, metadata, time. Pictures differ in format, too."""
    for k, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for i in range(items):
            for suffix in ("wav", "mp4", "webm", "txt"):
                (root / name / f"{suffix}{i}.{suffix}").write_bytes(KINDS[suffix](10 * i + k, name))
            suffix = ("png", "jpg")[k]
            (root / name / f"picture{i}.{suffix}").write_bytes(KINDS[suffix](10 * i + k, name))
    return root


def bytes_of(answer: httpx.Response) -> bytes:
    """All that an answer tells: its address, its headers and its body."""
    headers = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
    return f"{answer.request.method} {answer.url}\n{headers}\n\n".encode() + answer.content


@pytest.mark.slow
def test_nothing_that_is_sent_names_a_system(tmp_path: Path, served: Callable[..., str]) -> None:
    """The page, what it loads, and every answer and medium of every comparison, as bytes; then, after the end, the names."""
    source = tagged_folder(tmp_path / "samples")
    files = [path.read_bytes() for path in source.rglob("*.*")]
    assert sum(name.encode() in data for data in files for name in NAMES) == 24  # all but the texts: they could tell
    pool = open_pool(source)
    address = served(vote_site(pool, default_folder(source)))
    sent, seen = [], []
    with httpx.Client(base_url=address) as client:
        sent += [client.get("/"), client.get("/config")]
        sent += [client.get(path) for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', sent[0].text)]
        while (told := client.get("/vote").json())["comparison"]:
            seen.append(told)
            sent.append(client.get("/vote"))
            sides = [client.get(told[side]["media"]) for side in ("left", "right") if "media" in told[side]]
            alike(*sides) if sides else None
            sent += sides
            vote = {"comparison": told["comparison"], "choice": "left", "nonce": f"nonce-{len(seen):04d}"}
            sent.append(client.post("/vote", json=vote))
            assert sent[-1].json()["stored"] is True
        early = httpx.get(f"{address}vote/results")
        assert early.status_code == 403
        results = client.get("/vote/results")
    assert len(seen) == 15 and all(answer.status_code == 200 for answer in sent)
    found = [name for answer in sent for name in NAMES if name.lower().encode() in bytes_of(answer).lower()]
    assert found == [], "named before the vote"
    ids = [entry.id for entry in pool.entries] + [str(entry.digest) for entry in pool.entries]
    everything = b"".join(map(bytes_of, sent))
    assert not any(id.encode() in everything for id in ids)
    assert str(tmp_path).encode() not in everything
    assert all(name in results.text for name in NAMES)


def alike(left: httpx.Response, right: httpx.Response) -> None:
    """Two media of a comparison have the same headers, but for their length, and no date but the answer's own."""
    differ = {name for name in left.headers if left.headers[name] != right.headers.get(name)} - {"content-length", "date"}
    assert not differ and left.headers.keys() == right.headers.keys()
    assert not {"last-modified", "etag", "content-disposition"} & set(left.headers)


@pytest.mark.parametrize("suffix", ["png", "jpg", "wav", "mp4", "webm"])
def test_a_blinded_sample_keeps_its_content_and_nothing_else(suffix: str) -> None:
    kinds = {"png": "image", "jpg": "image", "wav": "audio", "mp4": "video", "webm": "video"}
    data = KINDS[suffix](3, NAMES[0])
    assert NAMES[0].encode() in data
    kind, sent = blinded(Block(kinds[suffix], data))  # type: ignore[arg-type]
    assert NAMES[0].encode() not in sent
    assert kind == {"jpg": "image/png"}.get(suffix, f"{kinds[suffix]}/{suffix}")
    if kinds[suffix] == "image":
        assert (media.pixels(sent) == media.pixels(data)).all()
        assert Image.open(io.BytesIO(sent)).info == {}
    elif kinds[suffix] == "audio":
        before, after = media.open_audio(data), media.open_audio(sent)
        assert before.rate == after.rate and np.abs(before.samples - after.samples).max() < 1e-4
        assert len(sent) == 44 + 2 * before.samples.size
    else:
        assert (media.open_video(sent).frames == media.open_video(data).frames).all()
        with av.open(io.BytesIO(sent)) as file:
            brand = {"major_brand", "minor_version", "compatible_brands"}
            assert set(file.metadata) <= brand or dict(file.metadata) == {"encoder": "Lavf"}  # who packs, for all the same


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_sound_of_any_format_is_sent_without_its_tags(format: str) -> None:
    data = tagged_sound(1, NAMES[0], format)
    kind, sent = blinded(Block("audio", data))
    assert NAMES[0].encode() in data and NAMES[0].encode() not in sent and kind == "audio/wav"
    assert len(sent) == 44 + 2 * media.open_audio(data).samples.size


@pytest.mark.parametrize(
    ("container", "codec", "sound", "kind"),
    [
        ("mp4", "libx264", "aac", "mp4"), ("mp4", "libx265", "", "mp4"), ("mp4", "mpeg4", "", "mp4"),
        ("mov", "libx264", "aac", "mp4"), ("mp4", "libsvtav1", "", "mp4"), ("webm", "libvpx", "libopus", "webm"),
        ("webm", "libvpx-vp9", "", "webm"), ("webm", "libsvtav1", "", "webm"), ("matroska", "libx264", "aac", "mp4"),
        ("matroska", "libvpx-vp9", "aac", "mp4"), ("matroska", "libvpx-vp9", "libopus", "webm"),
    ],
)  # fmt: skip
def test_videos_keep_their_streams_and_no_names(container: str, codec: str, sound: str, kind: str) -> None:
    data = tagged_video(3, NAMES[0], container, codec, sound)
    assert NAMES[0].encode() in data
    media_type, sent = blinded(Block("video", data))
    assert media_type == f"video/{kind}" and blinded(Block("video", data))[1] == sent
    assert NAMES[0].encode() not in sent and b"que" not in sent
    told = codec in ("libx265", "mpeg4") or sound == "aac"  # what these encoders say of themselves inside of the stream
    assert not re.search(rb"x264|Lavf\d", sent) and (told or not re.search(rb"x265|Lavc\d", sent))
    before, after = media.open_video(data), media.open_video(sent)
    assert (before.frames == after.frames).all() and np.abs(before.timestamps - after.timestamps).max() < 2e-3
    old: Any
    new: Any
    with av.open(io.BytesIO(data)) as old, av.open(io.BytesIO(sent)) as new:
        assert len(new.streams) == 1 + bool(sound) and new.chapters() == []
        streams = [file.streams.get(video=0, audio=0) if sound else file.streams.get(video=0) for file in (old, new)]
        assert [s.codec_context.codec.canonical_name for s in streams[0]] == [
            s.codec_context.codec.canonical_name for s in streams[1]
        ]
        heard = [[bytes(p) for p in file.demux(file.streams.audio) if p.size] for file in (old, new) if sound]
        assert not sound or (heard[0] == heard[1] and heard[0])


def test_an_upright_telephone_video_stays_upright() -> None:
    data = clips.turned(clips.video("mp4", frames=2), 90)
    before, after = media.open_video(data).frames, media.open_video(blinded(Block("video", data))[1]).frames
    assert before.shape == (2, 64, 48, 3) and (before == after).all()


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_damaged_videos_are_repacked_or_refused(container: str) -> None:
    data, ends = clips.video(container, frames=3), set()
    for seed in range(40):
        try:
            ends.add(blinded(Block("video", clips.damaged(data, (seed, 1))))[0])
        except DataError as error:
            assert str(error).startswith("video")
            ends.add("refused")
    assert ends == {f"video/{container}", "refused"}


def test_json_of_a_comparison_has_the_same_shape_for_both_sides(tmp_path: Path) -> None:
    from mmpo.demos.vote_routes import shown

    ballots = Ballots(tmp_path, text_pool(3))
    told = shown(ballots.serve("ann"))
    assert told["left"].keys() == told["right"].keys() == {"text"}
    assert "base" not in json.dumps(told) and "aligned" not in json.dumps(told)
