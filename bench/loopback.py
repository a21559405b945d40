"""What both ends of a measured pair share: congestion control, a span of wall and CPU time, lines of JSON.

Standard library alone, so that a plain end does not carry the weight of the package in its figures.
"""

from __future__ import annotations

import json
import mmap
import resource
import socket
import time
from pathlib import Path
from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30
HOST: Final = "127.0.0.1"
SYSTEM: Final = "-"
"""The word for: leave the congestion control as the system has it."""

_FOR_LOOPBACK: Final = ("cubic", "reno")


def allowed_congestion() -> str:
    """Return the first of cubic and reno that this process may set on a socket, or SYSTEM if neither.

    Under bbr, which paces by a timer, loopback runs at half its speed or less.
    """
    with socket.socket() as probe:
        for name in _FOR_LOOPBACK:
            try:
                set_congestion(probe, name)
            except OSError:
                continue
            return name
    return SYSTEM


def system_congestion() -> str:
    """Return the congestion control that the system gives to new sockets."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="ascii").strip()


def set_congestion(sock: socket.socket, name: str) -> None:
    """Set TCP_CONGESTION on a socket, unless ``name`` is SYSTEM. Raises OSError if it is unknown or not allowed."""
    if name != SYSTEM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def prefaulted(size_bytes: int) -> memoryview:
    """Return private anonymous memory with every page present: the kind that the C program uses."""
    memory = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    for at in range(0, size_bytes, mmap.PAGESIZE):
        memory[at] = 0x5A
    return memory


def windows(memory: memoryview, step_bytes: int) -> list[memoryview]:
    """Cut memory into views of ``step_bytes``, once: slicing at every call would cost more than the call saves."""
    return [memory[at : at + step_bytes] for at in range(0, len(memory), step_bytes)]


class Span:
    """Wall and CPU time (user and system, all threads of this process) since it was made."""

    def __init__(self) -> None:
        self._cpu_s = _cpu_s()
        self._wall_s = time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Return what has gone by, in seconds: ``wall_s`` and ``cpu_s``."""
        wall_s = time.perf_counter() - self._wall_s
        return {"wall_s": wall_s, "cpu_s": _cpu_s() - self._cpu_s}


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def say(**fields: object) -> None:
    """Print one line of JSON for the driver and flush it."""
    print(json.dumps(fields), flush=True)
