"""The process in which video and audio of strangers are decoded: a script that `mmpo.decoding` starts.

It imports the decoders once and forks for each file. A fork may open nothing any more, no file and no socket, because its
limit of descriptors is 0: a playlist inside a video leads nowhere. It may take so much memory, processor time and time,
answers with a line of JSON and an array, and ends; a crash is its own. Nothing else of mmpo is imported here.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

STAMP = re.compile(r"\[[\d:]{8}\] \S+: ")  # time and source line before each message of decord
Request = dict[str, Any]  # decoder, size, frames, and the fields of mmpo.decoding.Limits
Decoded = tuple[dict[str, Any], NDArray[Any]]


class Refused(ValueError):
    """The file is over a limit or not what it says; another decoder would find the same."""


def confine(memory: int, cpu: int, wall: float) -> None:
    """Take from this process, for good, what a decoder does not need.

    memory: bytes of address space, on Linux (elsewhere the kernel does not hold to it). cpu, wall: seconds, after which the
    kernel ends the process. No descriptor can be opened, no file written, no core dumped.
    """
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.setitimer(signal.ITIMER_REAL, wall)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def by_decord(decord: ModuleType, data: bytearray, request: Request) -> Decoded:
    """Video frames by decord. A frame that it had to make up for a damaged one is an error."""
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
    times = np.asarray(reader.get_frame_timestamp(list(range(len(reader)))), np.float64)[:, 0]
    rate = float(reader.get_avg_fps())
    check_times(times, rate, request)
    chosen = picked(len(times), request)
    shape = reader[int(chosen[0])].shape
    if shape[2] != 3:  # decord mistakes the padding of some turned videos for a fourth channel
        raise RuntimeError(f"frames of shape {shape}")
    check_frames(len(chosen), shape, request)
    return {"timestamps": times[chosen].tolist(), "rate": rate}, reader.get_batch(chosen).asnumpy()


def by_av(av: ModuleType, data: bytearray, request: Request) -> Decoded:
    """Video frames by PyAV. Damage that FFmpeg would conceal is an error. Decodes twice when only some frames are asked for."""
    every = request["frames"] is None
    times, frames, rate = decoded(av, data, request, lambda _: every)
    check_times(times, rate, request)
    chosen = picked(len(times), request)
    if not every:
        frames = decoded(av, data, request, set(chosen.tolist()).__contains__)[1]
    return {"timestamps": times[chosen].tolist(), "rate": rate}, np.stack(frames)


def decoded(
    av: ModuleType, data: bytearray, request: Request, keep: Callable[[int], bool]
) -> tuple[NDArray[np.float64], list[NDArray[np.uint8]], float]:
    """Times of all frames, in seconds; the frames whose index `keep` accepts; the average rate."""
    times: list[float] = []
    kept: list[NDArray[np.uint8]] = []
    options = {"err_detect": "explode", "protocol_whitelist": ""}
    with av.open(io.BytesIO(data), format=request["container"], options=options) as file:
        stream = file.streams.video[0]
        stream.thread_type = "NONE"
        rate = float(stream.average_rate or 0)
        for index, frame in enumerate(file.decode(stream)):
            times.append(index / rate if frame.time is None else frame.time)
            if keep(index):
                check_frames(len(kept) + 1, (frame.height, frame.width), request)
                turns = int(frame.rotation) // 90  # as the telephone was held; decord turns by itself
                kept.append(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    return np.array(times), kept, rate


def picked(count: int, request: Request) -> NDArray[np.int64]:
    """Indices of the frames to return: all, or the given number of them, each in the middle of its share of the video."""
    wanted = request["frames"]
    if wanted is not None and wanted > count:
        raise Refused(f"{count} frames, expected at least the {wanted} asked for")
    return np.arange(count) if wanted is None else ((np.arange(wanted) + 0.5) * count / wanted).astype(np.int64)


def check_times(times: NDArray[np.float64], rate: float, request: Request) -> None:
    """Raises Refused when there is no frame, the video is too long, or its times make no sense."""
    if not len(times):
        raise Refused("no frames")
    if not (math.isfinite(rate) and 0 < rate <= 1000):
        raise Refused(f"{rate} frames per second, expected more than 0 and at most 1000")
    if not (np.isfinite(times).all() and (np.diff(times) >= 0).all()):
        raise Refused("times of frames that do not ascend")
    if (seconds := times[-1] - times[0]) > request["duration"]:
        raise Refused(f"{seconds:.1f} s, expected at most {request['duration']:g}")


def check_frames(count: int, shape: Sequence[int], request: Request) -> None:
    """Raises Refused when so many frames of this shape (H, W, ...) are too many or too large."""
    height, width = shape[:2]
    if height * width > request["pixels"]:
        raise Refused(f"frames of {width}x{height} pixels, expected at most {request['pixels']}")
    if count > request["frames_limit"]:
        raise Refused(f"{count} frames or more, expected at most {request['frames_limit']}; ask for fewer with frames=")
    if (size := count * height * width * 3) > request["output"]:
        raise Refused(f"{size} bytes once decoded, expected at most {request['output']}; ask for fewer with frames=")


def by_soundfile(soundfile: ModuleType, data: bytearray, request: Request) -> Decoded:
    """Samples (channels, time) in float32 by soundfile. Fewer samples than the header declares are an error."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate, declared, channels = file.samplerate, file.frames, file.channels
        if not 1_000 <= rate <= 400_000:
            raise Refused(f"{rate} samples per second, expected 1000 to 400000")
        if declared / rate > request["duration"]:
            raise Refused(f"{declared / rate:.1f} s, expected at most {request['duration']:g}")
        if declared * channels * 4 > request["output"]:
            raise Refused(f"{declared * channels * 4} bytes once decoded, expected at most {request['output']}")
        samples = file.read(dtype="float32", always_2d=True)
    if not len(samples):
        raise Refused("no samples")
    if len(samples) != declared:
        raise Refused(f"{len(samples)} samples, but its header declares {declared}: cut short or damaged")
    if not np.isfinite(samples).all():
        raise Refused("samples that are not finite")
    return {"rate": rate}, samples.T


def repacked(av: ModuleType, data: bytearray, request: Request) -> Decoded:
    """The first video and audio stream in a new container, MP4 or WebM, as bytes; nothing is decoded.

    Packets, times and the turn of the picture are kept. Names, tags, chapters, attachments and other streams stay behind, and
    of H.264 the messages (SEI) in which encoders name themselves.
    """
    out, most = io.BytesIO(), 2 * len(data) + 2**16  # tables that name the same bytes again and again would fill the memory
    with av.open(io.BytesIO(data), format=request["container"], options={"protocol_whitelist": ""}) as file:
        taken = [file.streams.video[0], *file.streams.audio[:1]]
        webm = request["container"] == "matroska" and all(codec_of(s) in WEBM for s in taken)
        to = "webm" if webm else "mp4"
        with av.open(out, "w", format=to, options={"fflags": "+bitexact"}) as made:
            copies = {stream.index: copy_of(av, stream, made) for stream in taken}
            made.metadata.clear()
            for packet in file.demux(taken):
                stream, silenced = copies[packet.stream.index]
                for part in silenced.filter(packet) if packet.size else ():  # an empty one would end the filter
                    part.stream = stream
                    made.mux(part)
                if out.tell() > most:
                    raise Refused(f"more than {most} bytes once repacked")
    return {"container": to}, np.frombuffer(out.getvalue(), np.uint8)


def copy_of(av: ModuleType, stream: Any, made: Any) -> tuple[Any, Any]:
    """A stream like this one, without its tags, and the filter that its packets pass."""
    copy = made.add_stream_from_template(stream, opaque=True)
    copy.metadata.clear()
    return copy, av.bitstream.BitStreamFilterContext(SILENCED.get(codec_of(stream), "null"), stream, copy)


def codec_of(stream: Any) -> str:
    """FFmpeg's name of what a stream is coded in, whatever library decodes it."""
    return str(stream.codec_context.codec.canonical_name)


WEBM = {"vp8", "vp9", "av1", "vorbis", "opus"}  # what it may hold and browsers play
SILENCED = {"h264": "filter_units=remove_types=6"}  # NAL units that a decoder does not need
DECODERS = {"decord": by_decord, "av": by_av, "soundfile": by_soundfile, "repack": repacked}
MODULES = {"decord": "decord", "av": "av", "soundfile": "soundfile", "repack": "av"}
LATER = {
    "av": [
        "av.bitstream",
        *(f"av.{kind}.{part}" for kind in ("audio", "video", "subtitles") for part in ("codeccontext", "stream")),
    ]
}


def answer(request: Request, modules: dict[str, ModuleType | str], link: int) -> None:
    """Decode or repack what comes through the descriptor `link`; send the length of a header, the header, and the array."""
    try:
        data = received(link, request["size"])
        module = modules[MODULES[request["decoder"]]]
        if isinstance(module, str):
            raise RuntimeError(module)
        header, array = DECODERS[request["decoder"]](module, data, request)
        array = np.ascontiguousarray(array)
        header |= {"shape": array.shape, "dtype": str(array.dtype)}
        body = array.data.cast("B")
    except Refused as error:
        header, body = {"refused": str(error)}, memoryview(b"")
    except MemoryError:
        header, body = {"refused": f"needs more than {request['memory']} bytes of memory"}, memoryview(b"")
    except Exception as error:  # damaged bytes make decoders raise anything: UnicodeDecodeError, IndexError, EOFError, ...
        line = STAMP.sub("", (str(error).splitlines() or [""])[0])
        header, body = {"error": f"{type(error).__name__}: {line[:300]}"}, memoryview(b"")
    written = json.dumps(header).encode()
    send(link, memoryview(struct.pack("<I", len(written)) + written))
    send(link, body)


def received(link: int, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.readv(link, [view])
        if not count:
            raise EOFError("the file did not arrive whole")
        view = view[count:]
    return data


def send(link: int, view: memoryview) -> None:
    while view:
        view = view[os.write(link, view) :]


def work(request: Request, modules: dict[str, ModuleType | str], link: int, silence: int) -> NoReturn:
    """The life of a fork. It never returns: the interpreter it was copied with is not its own to tidy up."""
    code = 1
    try:
        os.dup2(silence, 2)  # FFmpeg's complaints about a damaged file are not a run's own lines
        confine(request["memory"], request["cpu"], request["wall"])
        answer(request, modules, link)
        code = 0
    finally:
        os._exit(code)


def imported(name: str) -> ModuleType | str:
    """The module, or why it is not there. What it would import at its first use is imported too: a fork can open no file."""
    try:
        for later in LATER.get(name, ()):
            importlib.import_module(later)
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its shared library does not load
        return f"{name} cannot be imported ({error})"


def serve(control: socket.socket) -> None:
    """Fork once for each request; each comes with the descriptor to talk through, and is answered with an exit code."""
    modules = {name: imported(name) for name in set(MODULES.values())}
    silence = os.open(os.devnull, os.O_WRONLY)
    control.sendall(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
        if not message:
            return
        pid = os.fork()
        if not pid:
            control.close()
            work(json.loads(message), modules, descriptors[0], silence)
        os.close(descriptors[0])
        control.sendall(struct.pack("<i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
