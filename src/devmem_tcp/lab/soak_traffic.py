"""The load of a soak: TCP, UDP and ping between two network namespaces, every byte of it checked.

All sockets of both namespaces belong to one process: a socket stays in the namespace in which it was made. Each
direction of each protocol is a flow, with a thread that sends and a thread that receives.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

LIMIT_S: Final = 30.0  # of any one wait: a connection backs off, and emulation is slow
TCP_PORT: Final = 5300
UDP_PORT: Final = 5301
_PIECE_BYTES: Final = 1 << 16
_PERIOD_BYTES: Final = 1_000_003  # a prime: no packet size ever falls into step with the pattern
_STEP_BYTES: Final = 100_003  # from one flow's start in the pattern to the next one's
_DATAGRAM_BYTES: Final = (64, 512, 1200, 1472, 4000, 8000)  # the last two are fragmented at an MTU of 1500
_DATAGRAM_PAUSE_S: Final = 0.004
_LOOK_S: Final = 0.02
_SEQUENCE: Final = struct.Struct("!Q")
_CLONE_NEWNET: Final = 0x40000000
_TCP_RTO_MAX_MS: Final = 44  # include/uapi/linux/tcp.h, since 6.15
_RTO_MAX_MS: Final = 1000
_PINGS: Final = 10
_PING_COUNTS: Final = re.compile(r"(\d+) packets transmitted, (\d+) received")
_NO_ROUTE: Final = re.compile("unreachable|Cannot assign requested address")
_UNROUTED: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL})
"""What a datagram may be refused with while an interface is down or gone."""

_libc = ctypes.CDLL(None, use_errno=True)
_block = random.Random(TCP_PORT).randbytes(_PERIOD_BYTES)
_PATTERN: Final = _block + _block[:_PIECE_BYTES]


class SoakFailed(Exception):
    """A byte is wrong, a flow stands still, a command failed, or the kernel complained."""


def pattern(start: int, size: int) -> bytes:
    """Return ``size`` bytes, at most 64 KiB, of the endless pattern from ``start`` on."""
    start %= _PERIOD_BYTES
    return _PATTERN[start : start + size]


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Keep this thread in a network namespace while the block runs; "" is where it is. Kernel: setns(2).

    Sockets made and processes started there stay there.

    Raises:
        OSError: no such namespace.
    """
    if not namespace:
        yield
        return
    with open("/proc/thread-self/ns/net", "rb") as here, open(f"/run/netns/{namespace}", "rb") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(here.fileno())


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One end of the load: its namespace and addresses."""

    namespace: str
    ipv4: str
    ipv6: str

    def address(self, family: int) -> str:
        return self.ipv6 if family == socket.AF_INET6 else self.ipv4

    def make_socket(self, family: int, kind: int) -> socket.socket:
        """Make a socket in the namespace."""
        with inside(self.namespace):
            made = socket.socket(family, kind)
        made.settimeout(LIMIT_S)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own on that port
        return made


@dataclass
class Flow:
    """One direction of one protocol, over all of its connections: ``start`` is where in the pattern it begins."""

    name: str
    start: int
    sent: int = 0  #: bytes
    received: int = 0  #: bytes, all of them right


class Worker:
    """Something done in threads, from ``start`` on, until it is enough or fails."""

    def __init__(self, name: str, *jobs: Callable[[], None]) -> None:
        self.name: Final = name
        self._jobs: Final = jobs
        self._enough: Final = threading.Event()
        self._threads: Final[list[threading.Thread]] = []
        self._failure: Exception | None = None

    def start(self) -> None:
        """Give each job a thread."""
        for job in self._jobs:
            thread = threading.Thread(target=self._run, args=(job,), name=self.name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def check(self) -> None:
        """Say what went wrong, if anything did; raises SoakFailed."""
        if self._failure is not None:
            raise SoakFailed(f"{self.name}: {self._failure}") from self._failure

    def finish(self) -> None:
        """Say that it is enough, and wait for the end.

        Raises:
            SoakFailed: something went wrong, or it does not end.
        """
        self._enough.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            self.check()
            if thread.is_alive():
                raise SoakFailed(f"{self.name} does not end")

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # the thread that checks tells of it
            self._failure = self._failure or error


class Stream(Worker):
    """A flow's part on one TCP connection; at its end all that was sent has arrived."""

    def __init__(self, flow: Flow, sender: socket.socket, receiver: socket.socket) -> None:
        super().__init__(flow.name, self._send, self._receive)
        self._flow: Final = flow
        self._sender: Final = sender
        self._receiver: Final = receiver
        self._sent = self._received = 0

    def finish(self) -> None:
        """Send no more, and wait until all has arrived.

        Raises:
            SoakFailed: it has not, or something went wrong before.
        """
        super().finish()
        if self._sent != self._received:
            raise SoakFailed(f"{self._flow.name}: {self._sent} bytes sent, {self._received} received")

    def _send(self) -> None:
        while not self._enough.is_set():
            taken = self._sender.send(pattern(self._flow.start + self._sent, _PIECE_BYTES))
            self._sent += taken
            self._flow.sent += taken
        self._sender.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while data := self._receiver.recv(_PIECE_BYTES):
            if data != pattern(self._flow.start + self._received, len(data)):
                raise SoakFailed(f"a wrong byte between {self._received} and {self._received + len(data)}")
            self._received += len(data)
            self._flow.received += len(data)


class Datagrams(Worker):
    """A UDP flow from one place to another: some get lost, none arrives twice or changed."""

    def __init__(self, flow: Flow, family: int, here: Place, there: Place) -> None:
        super().__init__(flow.name, self._send, self._receive)
        self._flow: Final = flow
        self._target: Final = (there.address(family), UDP_PORT)
        self._sender: Final = here.make_socket(family, socket.SOCK_DGRAM)
        self._receiver: Final = there.make_socket(family, socket.SOCK_DGRAM)
        self._receiver.bind(("", UDP_PORT))
        self._receiver.settimeout(_LOOK_S)
        self._next = 0
        self._seen: Final[set[int]] = set()

    def finish(self) -> None:
        """End the flow and close its sockets; raises SoakFailed."""
        super().finish()
        self._sender.close()
        self._receiver.close()

    def _datagram(self, sequence: int) -> bytes:
        size = _DATAGRAM_BYTES[sequence % len(_DATAGRAM_BYTES)] - _SEQUENCE.size
        return _SEQUENCE.pack(sequence) + pattern(self._flow.start + sequence * _PIECE_BYTES, size)

    def _send(self) -> None:
        while not self._enough.wait(_DATAGRAM_PAUSE_S):
            datagram, self._next = self._datagram(self._next), self._next + 1
            try:
                self._sender.sendto(datagram, self._target)
                self._flow.sent += len(datagram)
            except OSError as error:
                if error.errno not in _UNROUTED:
                    raise

    def _receive(self) -> None:
        while not self._enough.is_set():
            with contextlib.suppress(TimeoutError):
                self._check(self._receiver.recv(_PIECE_BYTES))

    def _check(self, datagram: bytes) -> None:
        sequence = int.from_bytes(datagram[: _SEQUENCE.size], "big")
        if sequence >= self._next or datagram != self._datagram(sequence):
            raise SoakFailed(f"a wrong datagram of {len(datagram)} bytes, number {sequence} of {self._next}")
        if sequence in self._seen:
            raise SoakFailed(f"datagram {sequence} arrived twice")
        self._seen.add(sequence)
        self._flow.received += len(datagram)


class Pings(Worker):
    """ping(8), a few packets a process, again and again."""

    def __init__(self, name: str, target: str) -> None:
        super().__init__(name, self._ping)
        self.sent = 0
        self.received = 0
        self.processes = 0
        self._target: Final = target

    def _ping(self) -> None:
        command = ["ping", "-n", "-q", "-c", str(_PINGS), "-i", "0.02", "-W", "1", self._target]
        while not self._enough.is_set():
            self.count(subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False))

    def count(self, ended: subprocess.CompletedProcess[str]) -> None:
        """Take what a ping said at its end; raises SoakFailed if it was not the network that kept it from pinging."""
        self.processes += 1
        if counts := _PING_COUNTS.search(ended.stdout):
            self.sent += int(counts[1])
            self.received += int(counts[2])
        elif not _NO_ROUTE.search(ended.stderr):
            raise SoakFailed(f"ping: {ended.stderr.strip()}")


class Load:
    """TCP both ways on one connection of each IP version, UDP both ways, and ping, from ``start`` to ``finish``."""

    def __init__(self, near: Place, far: Place) -> None:
        self._near: Final = near
        self._far: Final = far
        self.flows: Final[list[Flow]] = []
        self.pings: Final[list[Pings]] = []
        self.connections = 0
        self._streams: list[Stream] = []
        self._held = contextlib.ExitStack()
        self._datagrams: Final[list[Datagrams]] = []
        self._tcp_flows: Final[dict[int, tuple[Flow, Flow]]] = {}

    def start(self) -> None:
        """Connect, and let everything flow.

        Raises:
            OSError: no connection.
        """
        for family, version in ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6")):
            self._tcp_flows[family] = self._flow(f"TCP {version} out"), self._flow(f"TCP {version} in")
            for name, here, there in (("out", self._near, self._far), ("in", self._far, self._near)):
                flow = self._flow(f"UDP {version} {name}")
                self._datagrams.append(Datagrams(flow, family, here, there))
            self.pings.append(Pings(f"ping {version}", self._far.address(family)))
        for worker in (*self._datagrams, *self.pings):
            worker.start()
        self.connect()

    def connect(self) -> None:
        """Make the TCP connections, new ones if there were some: those carried all that was sent, to the last byte.

        Raises:
            SoakFailed: they did not.
            OSError: no connection.
        """
        self._finish_streams()
        for family, (out, back) in self._tcp_flows.items():
            near, far = self._connection(family)
            for flow, sender, receiver in ((out, near, far), (back, far, near)):
                self._streams.append(Stream(flow, sender, receiver))
                self._streams[-1].start()
            self.connections += 1

    def wait_until_moving(self, after: str) -> None:
        """Wait until every flow has received something since now.

        Raises:
            SoakFailed: one does not, or anything is wrong; says after what.
        """
        before = {flow.name: flow.received for flow in self.flows}
        deadline = time.monotonic() + LIMIT_S
        self._check(after)
        while still := [flow.name for flow in self.flows if flow.received == before[flow.name]]:
            self._check(after)
            if time.monotonic() > deadline:
                raise SoakFailed(f"after {after}: no byte in {LIMIT_S:.0f} s: {', '.join(still)}")
            time.sleep(_LOOK_S)

    def finish(self) -> None:
        """End everything, with all that TCP has sent arrived.

        Raises:
            SoakFailed: it has not, no ping was ever answered, or something else went wrong.
        """
        for worker in (*self._datagrams, *self.pings):
            worker.finish()
        self._finish_streams()
        if silent := [one.name for one in self.pings if not one.received]:
            raise SoakFailed(f"no answer at all: {', '.join(silent)}")

    def _check(self, after: str) -> None:
        for worker in (*self._streams, *self._datagrams, *self.pings):
            try:
                worker.check()
            except SoakFailed as failure:
                raise SoakFailed(f"after {after}: {failure}") from failure

    def _flow(self, name: str) -> Flow:
        self.flows.append(Flow(name, len(self.flows) * _STEP_BYTES))
        return self.flows[-1]

    def _connection(self, family: int) -> tuple[socket.socket, socket.socket]:
        with contextlib.closing(self._far.make_socket(family, socket.SOCK_STREAM)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", TCP_PORT))
            listener.listen()
            near = self._held.enter_context(self._near.make_socket(family, socket.SOCK_STREAM))
            near.connect((self._far.address(family), TCP_PORT))
            far = self._held.enter_context(listener.accept()[0])
            far.settimeout(LIMIT_S)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, _RTO_MAX_MS)
        return near, far

    def _finish_streams(self) -> None:
        for stream in self._streams:
            stream.finish()
        self._streams.clear()
        self._held.close()
