"""Decodes video and audio in another process, so that no file can crash, hang or fill this one.

Decoders are large programs in C, and what they are given comes from strangers. `mmpo.decode_child` forks for each file
under limits that the kernel holds; what comes back is checked like everything else from outside. The process that
forks is started at the first file, is small (it imports no torch), and ends with this one.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpo.errors import DataError, RunFailed

START_SECONDS = 60.0  # for importing the decoders, from a cold disk
GRACE_SECONDS = 5.0  # the kernel ends a fork at its limit; when even that does not happen, everything is ended
MAX_HEADER = 4 * 2**20


@dataclass(frozen=True)
class Limits:
    """What one file may take. Over a limit it is refused with the number found, never cut."""

    size: int = 128 * 2**20  # bytes of the file
    duration: float = 600.0  # seconds of playing time
    frames: int = 4096  # frames returned
    pixels: int = 4096 * 2304  # of one frame
    output: int = 2**30  # bytes returned
    memory: int = 3 * 2**30  # bytes of address space of the decoding process
    cpu: int = 60  # its seconds of processor time
    wall: float = 60.0  # and of time


class Undecodable(DataError):
    """A decoder could make nothing of the bytes; another decoder may."""


class EndedFromOutside(DataError):
    """The decoding process, or its fork, was killed by something that is not a limit of the file's."""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    control: socket.socket


_server: Server | None = None
_lock = threading.Lock()


def decode(
    decoder: str, data: bytes, limits: Limits, frames: int | None = None, container: str | None = None
) -> tuple[dict[str, Any], NDArray[Any]]:
    """What `decoder` (decord, av, soundfile) makes of a file: rate (and, of video, timestamps), and the array; of `repack`,
    the container of a clean copy, and its bytes.

    frames: how many, evenly spread; None: all. container: FFmpeg's name of the format, for av and repack. Raises Undecodable
    when the decoder gives up, DataError when the file is over a limit or the decoder crashed or hung on it, or was killed
    twice: after the first time a new process decodes the file again.
    """
    fields = dataclasses.asdict(limits)
    request = fields | {"frames_limit": fields["frames"], "frames": frames, "container": container}
    request |= {"decoder": decoder, "size": len(data)}
    with _lock:
        try:
            header, array, code = _once(request, data, limits)
        except EndedFromOutside:  # by the system, short of memory, or by a person: the file is not to blame, so once more
            header, array, code = _once(request, data, limits)
    if code:
        raise DataError(f"{decoder} {_fate(code, limits)}")
    if "refused" in header:
        raise DataError(str(header["refused"]))
    if "error" in header:
        raise Undecodable(f"{decoder}: {header['error']}")
    return header, array


def _once(request: dict[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], NDArray[Any], int]:
    """One exchange. Raises EndedFromOutside for a death that no limit explains: nothing here sends SIGKILL to a fork."""
    server = _running()
    try:
        header, array, code = _exchange(server, request, data, limits)
    except BaseException:  # also when interrupted: an answer half read must not be taken for the next one
        stop()
        raise
    if code == -signal.SIGKILL:
        raise EndedFromOutside(
            f"{request['decoder']} was killed twice on this file: by the system, short of memory, or for its processor time"
        )
    return header, array, code


def _running() -> Server:
    """The process that forks, started when there is none."""
    global _server
    if _server is not None and _server.process.poll() is None:
        return _server
    stop()
    if not hasattr(os, "fork"):
        raise RunFailed("video and audio are decoded in a forked process, which Windows does not have; use WSL or Linux")
    near, far = socket.socketpair()
    script = str(Path(__file__).with_name("decode_child.py"))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with threads does not fork well
    with far:
        process = subprocess.Popen(
            [sys.executable, "-P", script, str(far.fileno())],
            pass_fds=[far.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches the run, which ends it
            env=os.environ | threads,
        )
    _server = Server(process, near)
    near.settimeout(START_SECONDS)
    try:
        ready = near.recv(16)
    except OSError:
        ready = b""
    if ready != b"ready":
        stop()
        raise RunFailed(f"the decoding process did not start within {START_SECONDS:g} s: {sys.executable} -P {script}")
    return _server


def stop() -> None:
    """End the process that forks, and its fork."""
    global _server
    server, _server = _server, None
    if server is None:
        return
    server.control.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


def _forget() -> None:
    """A forked copy of this process starts its own; the one it was copied with belongs to its parent."""
    global _server, _lock
    _server, _lock = None, threading.Lock()


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _exchange(server: Server, request: dict[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], NDArray[Any], int]:
    """Send a file to a fresh fork; its header, its array, and its exit code (negative: the signal that ended it)."""
    deadline = time.monotonic() + limits.wall + GRACE_SECONDS
    near, far = socket.socketpair()
    header: dict[str, Any] = {}
    array = np.empty(0, np.uint8)
    try:
        with near:
            with far:
                socket.send_fds(server.control, [json.dumps(request).encode()], [far.fileno()])
            near.settimeout(limits.wall + GRACE_SECONDS)
            try:
                near.sendall(data)
                header, array = _answer(near, deadline, limits)
            except (ConnectionError, EOFError):
                header = {"error": "ended without an answer"}  # why, its exit code tells
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(f"{request['decoder']} gave an answer that makes no sense ({error})") from None
        server.control.settimeout(max(deadline - time.monotonic(), 0.1))
        return header, array, struct.unpack("<i", server.control.recv(4))[0]
    except TimeoutError:
        raise DataError(f"{request['decoder']} gave no answer in {limits.wall + GRACE_SECONDS:g} s and was ended") from None
    except (OSError, struct.error) as error:
        raise EndedFromOutside(f"the decoding process was killed twice on this file ({error})") from error


def _answer(link: socket.socket, deadline: float, limits: Limits) -> tuple[dict[str, Any], NDArray[Any]]:
    """Read header and array. What is said about the array is believed only as far as the limits go."""
    prefix = bytearray(4)
    _receive(link, memoryview(prefix), deadline)
    (length,) = struct.unpack("<I", prefix)
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes, expected at most {MAX_HEADER}")
    written = bytearray(length)
    _receive(link, memoryview(written), deadline)
    header = json.loads(written)
    if not isinstance(header, dict):
        raise ValueError(f"a header that is a {type(header).__name__}")
    if "shape" not in header:
        return header, np.empty(0, np.uint8)
    shape, dtype = header["shape"], np.dtype({"uint8": np.uint8, "float32": np.float32}[header["dtype"]])
    if math.prod(shape) * dtype.itemsize > limits.output or min(shape) < 1:
        raise ValueError(f"an array of shape {shape}, expected at most {limits.output} bytes")
    array = np.empty(shape, dtype)
    _receive(link, array.data.cast("B"), deadline)
    return header, array


def _receive(link: socket.socket, view: memoryview, deadline: float) -> None:
    while view:
        link.settimeout(max(deadline - time.monotonic(), 0.001))
        count = link.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]


def _fate(code: int, limits: Limits) -> str:
    """In words, how a fork ended that did not end well."""
    if code == -signal.SIGALRM:
        return f"took longer than {limits.wall:g} s"
    if code == -signal.SIGXCPU:
        return f"took more than {limits.cpu} s of processor time"
    if code < 0:
        return f"crashed with {signal.Signals(-code).name} (its memory is limited to {limits.memory} bytes)"
    return f"ended with exit code {code} (its memory is limited to {limits.memory} bytes)"
