"""The limit: the same sockets as plain Python, but every loop in C (c_loops.c), one call a part.

Python makes the connections and takes the time; ctypes calls once, and nothing of Python runs until all is done.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from peers.control import Control, Part
from peers.plain import accepted, connected
from peers.works import Kind

SOURCE: Final = Path(__file__).with_suffix(".c")
LIBRARY: Final = SOURCE.parents[1] / "build" / "c_loops.so"


class CLoops:
    most_connections = 512

    def available(self) -> str:
        compiler = shutil.which("cc")
        if compiler is None:
            return "no C compiler: apt install gcc libc6-dev"
        if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
            LIBRARY.parent.mkdir(exist_ok=True)
            unfinished = LIBRARY.with_suffix(f".{os.getpid()}")  # two comparisons may begin at once
            options = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
            command = [compiler, *options, "-o", str(unfinished), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{shlex.join(command)}: {done.stderr.strip()}: apt install gcc libc6-dev"
            unfinished.replace(LIBRARY)
        return ""

    def serve(self, control: Control) -> None:
        loops = ctypes.CDLL(str(LIBRARY))
        size = ctypes.c_size_t(control.work.size_bytes)
        with accepted(control) as socks:
            fds, memories = _fds(socks), [_address(memory) for memory in control.landing]
            for part in control.parts():
                messages = ctypes.c_long(part.messages)
                with part:
                    if control.work.kind is Kind.CONNECTIONS:
                        landing = (ctypes.c_void_p * len(memories))(*(memory.value for memory in memories))
                        _call(loops.receive_many, fds, landing, size, messages, len(socks))
                    elif control.work.kind is Kind.ROUND_TRIP:
                        _call(loops.echo_messages, fds[0], memories[0], size, messages)
                    else:
                        _call(loops.receive_messages, fds[0], memories[0], size, messages)
                part.check(part.landing)

    def drive(self, control: Control) -> None:
        loops = ctypes.CDLL(str(LIBRARY))
        size, message = ctypes.c_size_t(control.work.size_bytes), _address(control.message)
        with connected(control) as socks:
            fds = _fds(socks)
            for part in control.parts():
                messages = ctypes.c_long(part.messages)
                if control.work.kind is Kind.ROUND_TRIP:
                    _round_trips(loops, fds[0], part)
                    continue
                with part:
                    if control.work.kind is Kind.CONNECTIONS:
                        _call(loops.send_many, fds, message, size, messages, len(socks))
                    else:
                        _call(loops.send_messages, fds[0], message, size, messages)


def _round_trips(loops: ctypes.CDLL, fd: int, part: Part) -> None:
    laps = (ctypes.c_double * part.messages)()
    size, messages = ctypes.c_size_t(len(part.message)), ctypes.c_long(part.messages)
    with part:
        _call(loops.round_trips, fd, _address(part.message), _address(part.landing[0]), size, messages, laps)
        part.laps.extend(laps)  # the same clock as time.perf_counter's
    part.check(part.landing)


def _fds(socks: Sequence[socket.socket]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(socks))(*(sock.fileno() for sock in socks))


def _address(memory: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))


def _call(function: Callable[..., int], *arguments: object) -> None:
    """Call one of the loops. Raises OSError with the errno that it returned."""
    error = function(*arguments)
    if error:
        raise OSError(error, os.strerror(error))
