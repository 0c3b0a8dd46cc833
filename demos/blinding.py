"""An answer as a voter's browser gets it: its content and nothing beside it that could tell which system made it.

Pictures become PNG and sounds 16-bit WAV, from their pixels and samples, whatever file they were in. Of video
the streams are put into a new container, which has no names, tags, tools and times. Files have no names here.
"""

from __future__ import annotations

import struct

import numpy as np

from mmpo import media
from mmpo.errors import DataError
from mmpo.pair import Block


def blinded(block: Block) -> tuple[str, bytes]:
    """Media type and bytes of a picture, sound or video. Raises DataError where it cannot be decoded."""
    if block.kind == "image":
        return "image/png", media.encode(media.pixels(block))
    if block.kind == "audio":
        return "audio/wav", wav(media.open_audio(block))
    if block.kind != "video":
        raise DataError(f"expected a picture, a sound or a video, found {block.kind}")
    container, data = media.repacked(block)
    return f"video/{container}", data


def wav(sound: media.Audio) -> bytes:
    """A RIFF file of 16-bit samples, without any chunk but its format and its data."""
    samples = (np.clip(sound.samples.T, -1, 1) * 32767).round().astype("<i2").tobytes()
    channels = len(sound.samples)
    form = struct.pack("<HHIIHH", 1, channels, sound.rate, 2 * channels * sound.rate, 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body
