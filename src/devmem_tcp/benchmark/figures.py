"""What one end measures of one work, and what is said of the machine it ran on."""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from devmem_tcp import __version__
from devmem_tcp.arrays import DeviceArray
from devmem_tcp.sys import calls
from devmem_tcp.transport.message import Message
from devmem_tcp.types import SocketStats


class EndFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One end of one measured part. Bytes are payload, by path, as ``PathBytes`` and ``SocketStats`` count them."""

    backend: str
    wall_s: float
    cpu_s: float  # user and system time of the process, all threads
    messages: int  # received
    dmabuf_bytes: int
    linear_bytes: int
    host_bytes: int
    copied_bytes: int
    sent_dmabuf_bytes: int
    sent_host_bytes: int
    congestion_controls: list[str]


class Run(msgspec.Struct, frozen=True):
    """One work, done once: ``messages`` on each connection in the measured part, and how long each round trip took."""

    messages: int
    sender: EndFigures
    receiver: EndFigures
    laps_us: list[float]

    @property
    def total(self) -> int:
        """Messages of all connections, one way."""
        return self.receiver.messages

    @property
    def cpu_s(self) -> float:
        """CPU time of both ends."""
        return self.sender.cpu_s + self.receiver.cpu_s


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an end ran."""

    kernel: str
    architecture: str
    cpu: str
    cpus: int  # that this process may use
    memory_bytes: int
    congestion_control: str  # the system's
    python: str
    numpy: str
    devmem_tcp: str


class Meter:
    """What one end spends, receives and sends between ``begin`` and ``end``.

    Args:
        stats: gives the counters of its data connections.
    """

    def __init__(self, backend: str, stats: Callable[[], Sequence[SocketStats]]) -> None:
        self._backend = backend
        self._stats = stats
        self._forget()

    def _forget(self) -> None:
        self._messages = 0
        self._dmabuf_bytes = self._linear_bytes = self._host_bytes = self._copied_bytes = 0

    def take(self, message: Message) -> DeviceArray:
        """Make a message contiguous, as a program would want it, and count by which paths it came."""
        array = message.gather()
        path = message.path
        self._messages += 1
        self._dmabuf_bytes += path.dmabuf
        self._linear_bytes += path.linear
        self._host_bytes += path.host
        self._copied_bytes += path.copied
        return array

    def begin(self) -> None:
        """Begin to count, from nothing."""
        self._forget()
        self._sent_before = _sent(self._stats())
        self._cpu_before = cpu_s()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Count no more; while the connections are still there."""
        self._wall_s = time.perf_counter() - self._began
        self._cpu_s = cpu_s() - self._cpu_before
        stats = self._stats()
        sent = _sent(stats)
        self._sent = sent[0] - self._sent_before[0], sent[1] - self._sent_before[1]
        self._congestion_controls = sorted({one.congestion_control for one in stats})

    @property
    def figures(self) -> EndFigures:
        """What was counted."""
        return EndFigures(
            backend=self._backend,
            wall_s=self._wall_s,
            cpu_s=self._cpu_s,
            messages=self._messages,
            dmabuf_bytes=self._dmabuf_bytes,
            linear_bytes=self._linear_bytes,
            host_bytes=self._host_bytes,
            copied_bytes=self._copied_bytes,
            sent_dmabuf_bytes=self._sent[0],
            sent_host_bytes=self._sent[1],
            congestion_controls=self._congestion_controls,
        )


def _sent(stats: Sequence[SocketStats]) -> tuple[int, int]:
    """Return the bytes that went from device memory, and from the host's."""
    return sum(one.sent_dmabuf_bytes for one in stats), sum(one.sent_host_bytes for one in stats)


def cpu_s() -> float:
    """Return the user and system time that this process has used, in seconds: getrusage(RUSAGE_SELF)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def this_machine() -> Machine:
    """Look at the machine that this runs on."""
    return Machine(
        kernel=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        cpu=_after("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        cpus=calls.usable_cpus(),
        memory_bytes=_memory("MemTotal"),
        congestion_control=_read("/proc/sys/net/ipv4/tcp_congestion_control").strip() or "unknown",
        python=platform.python_version(),
        numpy=np.__version__,
        devmem_tcp=__version__,
    )


def available_memory() -> int:
    """Return how many bytes can be had without swapping; 0: the system does not say."""
    return _memory("MemAvailable")


def boot_id() -> str:
    """Return what tells this running system from all others; empty: the system does not say."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _memory(name: str) -> int:
    words = _after("/proc/meminfo", name).split()
    return int(words[0]) << 10 if words else 0


def _after(path: str, label: str) -> str:
    """Return what follows ``label:`` in the first line that begins with it; empty if there is none."""
    for line in _read(path).splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == label:
            return value.strip()
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
