"""Small videos and sounds for tests, written by PyAV and soundfile, and ways to damage a file."""

from __future__ import annotations

import io
import os
import struct
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder introduces itself at length

VIDEOS = {"mp4": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}  # container: codec
SOUNDS = {"WAV": "PCM_16", "FLAC": "PCM_16", "OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}  # format: subtype


def video(container: str = "mp4", codec: str | None = None, frames: int = 24, width: int = 64, height: int = 48) -> bytes:
    """A bright square that walks to the right by a pixel a frame, at 12 frames per second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream: Any = file.add_stream(codec or VIDEOS[container], rate=12)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[10:30, index : index + 20] = (200, 50, 100)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return buffer.getvalue()


def turned(data: bytes, degrees: int) -> bytes:
    """An MP4 file with the orientation of a telephone held sideways: the matrix of its track header."""
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of times, layer, volume before the matrix
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (v * 0x10000 for v in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000) + data[at + 36 :]


def sound(format: str = "WAV", seconds: float = 0.5, rate: int = 16_000, channels: int = 2) -> bytes:
    """Noise."""
    samples = np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate), channels))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=SOUNDS[format])
    return buffer.getvalue()


def damaged(data: bytes, seed: tuple[int, ...]) -> bytes:
    """A mutant: cut short, bytes flipped (anywhere or in the header), a hole of zeros, a part moved, or garbage put in."""
    rng = np.random.default_rng(seed)
    kind, out = rng.integers(6), np.frombuffer(data, np.uint8).copy()
    start, length = int(rng.integers(len(out))), int(rng.integers(1, 200))
    if kind == 0:
        return data[:start]
    if kind in (1, 2):
        where = rng.integers(0, len(out) if kind == 1 else 64, int(rng.integers(1, 17)))
        out[where] ^= rng.integers(1, 256, len(where)).astype(np.uint8)
    elif kind == 3:
        out[start : start + length] = 0
    elif kind == 4:
        part: NDArray[np.uint8] = out[start : start + length].copy()
        out = np.insert(np.delete(out, slice(start, start + length)), int(rng.integers(len(out) - len(part) + 1)), part)
    else:
        out = np.insert(out, start, rng.integers(0, 256, length).astype(np.uint8))
    return out.tobytes()
