"""An answer as a voter's browser gets it: its content and nothing beside it that could tell which system made it.

Pictures become PNG and sounds 16-bit WAV, from their pixels and samples, whatever file they were in. Video keeps its streams;
the times and tags of its container, which name titles and tools, are blanked in place. Files have no names here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from mmpo import media
from mmpo.errors import DataError
from mmpo.pair import Block

TIMED = {b"mvhd", b"tkhd", b"mdhd"}  # boxes of MP4 that start with when it was made and changed
NESTED = {b"moov", b"trak", b"mdia"}  # boxes that hold those
TAGS = {b"udta", b"meta", b"uuid"}  # titles, tools, places
SEGMENT, INFO, EBML_TAGS = 0x18538067, 0x1549A966, 0x1254C367  # elements of WebM
TOLD = {0x7BA9, 0x4D80, 0x5741, 0x4461}  # of INFO: title, muxing and writing application, date
VOID = 0xEC  # an element to be passed over


def blinded(block: Block) -> tuple[str, bytes]:
    """Media type and bytes of a picture, sound or video. Raises DataError where it cannot be decoded."""
    if block.kind == "image":
        return "image/png", media.encode(media.pixels(block))
    if block.kind == "audio":
        return "audio/wav", wav(media.open_audio(block))
    if block.kind != "video" or not isinstance(block.data, bytes):
        raise DataError(f"expected a picture, a sound or a video, found {block.kind}")
    is_mp4 = block.data[4:8] == b"ftyp"
    return ("video/mp4", untagged(block.data)) if is_mp4 else ("video/webm", untagged_webm(block.data))


def wav(sound: media.Audio) -> bytes:
    """A RIFF file of 16-bit samples, without any chunk but its format and its data."""
    samples = (np.clip(sound.samples.T, -1, 1) * 32767).round().astype("<i2").tobytes()
    channels = len(sound.samples)
    form = struct.pack("<HHIIHH", 1, channels, sound.rate, 2 * channels * sound.rate, 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def untagged(data: bytes) -> bytes:
    """An MP4 of the same length with its tags turned into empty space and its times into 0."""
    out = bytearray(data)
    for kind, at, start, end in _boxes(data, 0, len(data)):
        if kind in TAGS:
            out[at + 4 : at + 8] = b"free"
            out[start:end] = bytes(end - start)
        elif kind in TIMED:
            stamps = 16 if data[start : start + 1] == b"\1" else 8  # two times, of 8 or 4 bytes, behind version and flags
            out[start + 4 : min(start + 4 + stamps, end)] = bytes(min(stamps, max(end - start - 4, 0)))
    return bytes(out)


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Kind of each box, where it starts, and where its content starts and ends; stops at what is no box."""
    while at + 8 <= end:
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        head = 16 if size == 1 else 8
        size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size or end - at
        if size < head or at + size > end:
            return
        yield kind, at, at + head, at + size
        if kind in NESTED:
            yield from _boxes(data, at + head, at + size)
        at += size


def untagged_webm(data: bytes) -> bytes:
    """A WebM of the same length without tags, its title, tools and date overwritten with zeros."""
    out = bytearray(data)
    for kind, at, start, end in _elements(data, 0, len(data)):
        if kind in TOLD:
            out[start:end] = bytes(end - start)
        elif kind == EBML_TAGS and end - at >= 9:
            out[at:end] = bytes([VOID, 1]) + (end - at - 9).to_bytes(7, "big") + bytes(end - at - 9)
    return bytes(out)


def _elements(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Kind of each element that tells something, where it starts, and where its content starts and ends."""
    while at < end:
        kind, next_ = _number(data, at, keep=True)
        size, start = _number(data, next_, keep=False)
        if not 0 < next_ - at <= 4 or start == next_:
            return
        unknown = size == (1 << 7 * (start - next_)) - 1  # of a segment that was streamed: it goes on to the end
        stop = end if unknown else start + size
        if stop > end:
            return
        if kind in (SEGMENT, INFO):
            yield from _elements(data, start, stop)
        elif kind in TOLD or kind == EBML_TAGS:
            yield kind, at, start, stop
        at = stop


def _number(data: bytes, at: int, keep: bool) -> tuple[int, int]:
    """A number whose first byte tells its length, and its end (`at` where there is none). keep: with that mark, as in ids."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    if not first or at + length > len(data):
        return 0, at
    value = int.from_bytes(data[at : at + length], "big")
    return value if keep else value & ((1 << 7 * length) - 1), at + length
