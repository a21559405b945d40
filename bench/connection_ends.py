"""The two ends of many connections at once, each a process of its own; run by connections.py.

    python connection_ends.py recv CONNECTIONS BYTES_EACH BUFFER_BYTES CC speed|bytes
    python connection_ends.py send PORT CONNECTIONS BYTES_EACH CC

The receiver accepts all connections first, then sends one byte on each: the sender's signal to begin. ``speed`` only
counts what it receives; ``bytes`` looks at every byte and at every allocation. In both, each connection keeps its
last batch until its next one, as a program does that works on what it got, and stays open until all have ended.
"""

from __future__ import annotations

import contextlib
import random
import resource
import select
import socket
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Final

from devmem_tcp.buffers import CpuAccess
from devmem_tcp.contract import DevmemSocket, Listener
from devmem_tcp.types import FragBatch
from loopback import HOST, MIB, Span, say, set_congestion
from software_ends import QUEUE, opened

READ: Final = 64 << 10
SEED: Final = 5201
STRIDE: Final = 16  # port times stride is another place in the pattern for every port


def raise_file_limit() -> None:
    """Allow as many fds as the hard limit does: one connection is one fd, or a few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Pattern:
    """What each connection carries: 1 MiB of random bytes over and over, begun at a place given by the sender's port.

    So every connection's bytes differ from every other's at every offset, and a frag delivered to the wrong
    connection, or twice, or out of order, is seen.
    """

    def __init__(self) -> None:
        self._twice = memoryview(random.Random(SEED).randbytes(MIB) * 2)

    def at(self, port: int, position: int, size: int) -> memoryview:
        """Return ``size`` bytes, at most 1 MiB, from ``position`` of the connection whose sender has this port."""
        start = (port * STRIDE + position) % MIB
        return self._twice[start : start + size]


def resident_bytes() -> int:
    """Return how much of this process lies in memory: anonymous pages alone, so that no Buffer on a memfd is in it."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


class Receiver:
    """Reads every connection as its fd becomes ready."""

    def __init__(self, memory: memoryview, pattern: Pattern | None) -> None:
        self._memory = memory
        self._pattern = pattern
        self._poll = select.epoll()
        self._open: dict[int, DevmemSocket] = {}
        self._held: dict[int, FragBatch] = {}
        self._received: dict[int, int] = {}
        self.wrong_bytes = 0

    @property
    def received(self) -> int:
        return sum(self._received.values())

    def add(self, sock: DevmemSocket) -> None:
        sock.settimeout(0)
        fd = sock.fileno()
        self._open[fd] = sock
        self._received[fd] = 0
        self._poll.register(fd, select.EPOLLIN)

    def run(self) -> None:
        """Read until every connection has ended."""
        ended = 0
        while ended < len(self._open):
            for fd, _ in self._poll.poll():
                with contextlib.suppress(BlockingIOError):
                    ended += self._read(fd)
        self._poll.close()

    def _read(self, fd: int) -> bool:
        """Read one batch; returns whether this was the connection's end. Its last batch stays with it."""
        sock = self._open[fd]
        batch = sock.recv_frags(max_bytes=READ)
        if not batch:
            self._poll.unregister(fd)
            return True
        if self._pattern is not None:
            self._check(fd, sock, batch, self._pattern)
        self._received[fd] += batch.nbytes
        if fd in self._held:
            self._held[fd].release()
        self._held[fd] = batch
        return False

    def _check(self, fd: int, sock: DevmemSocket, batch: FragBatch, pattern: Pattern) -> None:
        position, port = self._received[fd], sock.remote_address[1]
        for offset, size in zip(batch.offsets.tolist(), batch.sizes.tolist(), strict=True):
            expected = pattern.at(port, position, size)
            if self._memory[offset : offset + size] != expected:
                self.wrong_bytes += size
            position += size


def receive(connections: str, bytes_each: str, buffer_bytes: str, congestion: str, look: str) -> None:
    """Take all connections on one binding and measure memory, speed and, when asked, the bytes themselves."""
    count = int(connections)
    with (
        opened(congestion, int(buffer_bytes)) as (nic, buffer),
        nic.set_header_split("on"),
        nic.set_rss(equal=QUEUE),
        nic.listen((HOST, 0), backlog=count) as listener,
        nic.add_ntuple(dst_port=listener.address[1], queue=QUEUE),
        nic.bind_rx(buffer, queues=[QUEUE]),
        buffer.cpu_access(CpuAccess.READ) as memory,
        contextlib.ExitStack() as sockets,
    ):
        receiver = Receiver(memory, Pattern() if look == "bytes" else None)
        if look == "bytes":
            tracemalloc.start()
        resident = resident_bytes()
        say(port=listener.address[1])
        accepted = [sockets.enter_context(_accepted(listener, receiver)) for _ in range(count)]
        span = Span()
        for sock in accepted:
            sock.send(b"!")
        receiver.run()
        figures = span.figures()
        stats = [sock.stats for sock in accepted]
        say(
            bytes=receiver.received,
            expected_bytes=count * int(bytes_each),
            wrong_bytes=receiver.wrong_bytes,
            resident_bytes_each=(resident_bytes() - resident) / count,
            traced_bytes_each=tracemalloc.get_traced_memory()[1] / count,
            tokens_held=sum(one.tokens_out for one in stats),
            dmabuf_bytes=sum(one.dmabuf_bytes for one in stats),
            linear_bytes=sum(one.linear_bytes for one in stats),
            host_bytes=sum(one.host_bytes for one in stats),
            backend=nic.capabilities.backend,
            **figures,
        )


def _accepted(listener: Listener, receiver: Receiver) -> DevmemSocket:
    sock = listener.accept()
    receiver.add(sock)
    return sock


def transmit(port: str, connections: str, bytes_each: str, congestion: str) -> None:
    """Open all connections; send on each, a piece at a time, once the receiver has said so there."""
    pattern, total = Pattern(), int(bytes_each)
    poll = select.epoll()
    opened_sockets: dict[int, socket.socket] = {}
    sent: dict[int, int] = {}
    for _ in range(int(connections)):
        sock = socket.socket()
        set_congestion(sock, congestion)
        sock.connect((HOST, int(port)))
        sock.setblocking(False)
        opened_sockets[sock.fileno()] = sock
        poll.register(sock.fileno(), select.EPOLLIN)
    ports = {fd: sock.getsockname()[1] for fd, sock in opened_sockets.items()}
    left = len(opened_sockets)
    while left:
        for fd, _ in poll.poll():
            sock = opened_sockets[fd]
            if fd not in sent:
                sock.recv(1)
                sent[fd] = 0
                poll.modify(fd, select.EPOLLOUT)
                continue
            piece = pattern.at(ports[fd], sent[fd], min(READ, total - sent[fd]))
            sent[fd] += sock.send(piece)
            if sent[fd] == total:
                sock.shutdown(socket.SHUT_WR)
                poll.unregister(fd)
                left -= 1
    for sock in opened_sockets.values():
        sock.setblocking(True)
        sock.recv(1)
        sock.close()


MODES: Final[dict[str, Callable[..., None]]] = {"recv": receive, "send": transmit}

if __name__ == "__main__":
    raise_file_limit()
    MODES[sys.argv[1]](*sys.argv[2:])
