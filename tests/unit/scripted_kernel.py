"""A model of the kernel's side of devmem TCP, put in at the seam of system calls, and what tests with it need."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import numpy as np
import pytest

from devmem_tcp.buffers import Buffer, BufferUse
from devmem_tcp.errors import ETOOSMALL
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.kernel.binding import KernelRxBinding
from devmem_tcp.sys import calls
from devmem_tcp.sys.messages import ReceivedMessage
from devmem_tcp.types import FRAG_DTYPE, PAGE_SIZE, FragKind, QueueStats
from devmem_tcp.uapi.socket import (
    CONTROL_SPACE_PER_FRAG,
    MAX_DONTNEED_FRAGS,
    MAX_DONTNEED_TOKENS,
    MSG_SOCK_DEVMEM,
    SO_INCOMING_NAPI_ID,
    TOKEN_DTYPE,
    build_control,
)

BINDING = 7
QUEUE = 3
NAPI = 8200
PAGES = 64


class Dmabuf(NamedTuple):
    """Payload in device memory."""

    offset: int
    size: int
    dmabuf_id: int = BINDING


class Linear(NamedTuple):
    """Payload of a devmem packet in the header buffer."""

    data: bytes


Segment: TypeAlias = Dmabuf | Linear | bytes | OSError


class ScriptedKernel:
    """The devmem side of one TCP socket, as net/ipv4/tcp.c and net/core/sock.c behave: its calls, its byte layouts.

    ``queue`` is what arrived: pieces in device memory or header buffers, ordinary bytes, errors to come out once.
    """

    def __init__(self) -> None:
        self.queue: deque[Segment] = deque()
        self.ended = False
        self.live: set[int] = set()
        self.dontneeds: list[list[tuple[int, int]]] = []
        self.flags: list[int] = []
        self.unread = False

    def receive_message(self, sock: calls.Socket, message: ReceivedMessage, flags: int) -> int:
        calls._enter("recvmsg")
        self.flags.append(flags)
        if flags & calls.MSG_ERRQUEUE:
            raise BlockingIOError(errno.EAGAIN, "EAGAIN")
        assert flags & MSG_SOCK_DEVMEM
        room, space = message._iov.length, message.control_length
        if not self.queue:
            message.control_length = 0
            if self.ended:
                return 0
            raise BlockingIOError(errno.EAGAIN, "EAGAIN")
        if isinstance(self.queue[0], OSError):
            raise self.queue.popleft()  # type: ignore[misc]
        if flags & calls.MSG_TRUNC:
            return self._drop(room)
        if isinstance(self.queue[0], bytes):
            return self._ordinary(message, room)
        return self._devmem(message, room, space)

    def _drop(self, room: int) -> int:
        dropped = 0
        while self.queue and dropped < room:
            dropped += len(self._cut(room - dropped))
        return dropped

    def _cut(self, room: int) -> bytes:
        """Take at most ``room`` bytes off the first segment; bytes of device memory come as zeros."""
        first = self.queue.popleft()
        assert not isinstance(first, OSError)
        if isinstance(first, Dmabuf):
            if first.size > room:
                self.queue.appendleft(first._replace(offset=first.offset + room, size=first.size - room))
            return bytes(min(first.size, room))
        data = first.data if isinstance(first, Linear) else first
        if len(data) > room:
            self.queue.appendleft(Linear(data[room:]) if isinstance(first, Linear) else data[room:])
        return data[:room]

    def _ordinary(self, message: ReceivedMessage, room: int) -> int:
        taken = 0
        while self.queue and isinstance(self.queue[0], bytes) and taken < room:
            data = self._cut(room - taken)
            message.data[taken : taken + len(data)] = data
            taken += len(data)
        message.control_length = 0
        return taken

    def _devmem(self, message: ReceivedMessage, room: int, space: int) -> int:
        rows: list[tuple[int, int, int, int, int]] = []
        taken = inline = 0
        while self.queue and isinstance(self.queue[0], (Dmabuf, Linear)) and taken < room:
            if space < CONTROL_SPACE_PER_FRAG * (len(rows) + 1):
                if not rows:
                    raise OSError(ETOOSMALL, "ETOOSMALL")
                break
            first = self.queue[0]
            data = self._cut(room - taken)
            if isinstance(first, Linear):
                message.data[inline : inline + len(data)] = data
                inline += len(data)
                rows.append((0, len(data), 0, 0, FragKind.LINEAR))
            else:
                token = next(number for number in range(1, len(self.live) + 2) if number not in self.live)
                self.live.add(token)
                rows.append((first.offset, len(data), token, first.dmabuf_id, FragKind.DMABUF))
            taken += len(data)
        control = build_control(np.array(rows, FRAG_DTYPE))
        message.control[: len(control)] = control
        message.control_length = len(control)
        return taken

    def return_tokens(self, sock: calls.Socket, tokens: bytes) -> int:
        calls._enter("setsockopt")
        if not tokens or len(tokens) % 8 or len(tokens) > 8 * MAX_DONTNEED_TOKENS:
            raise OSError(errno.EINVAL, "EINVAL")
        ranges = np.frombuffer(tokens, TOKEN_DTYPE).tolist()
        self.dontneeds.append(ranges)
        freed = looked_at = 0
        for start, count in ranges:
            for token in range(start, start + count):
                looked_at += 1
                if looked_at > MAX_DONTNEED_FRAGS:
                    return freed
                freed += token in self.live
                self.live.discard(token)
        return freed

    def getsockopt_bytes(self, sock: calls.Socket, level: int, option: int, size: int) -> bytes:
        calls._enter("getsockopt")
        if option == calls.SO_MEMINFO:
            return bytes([self.unread]).ljust(size, b"\0")
        if option == SO_INCOMING_NAPI_ID:
            return NAPI.to_bytes(size, "little")
        return b"cubic".ljust(size, b"\0")


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection; the first is the block's to close."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), 10) as far,
        listener.accept()[0] as near,
    ):
        yield near, far


def install(monkeypatch: pytest.MonkeyPatch, kernel: ScriptedKernel) -> None:
    """Put a scripted kernel in the place of the system's."""
    for name in ("receive_message", "return_tokens", "getsockopt_bytes"):
        monkeypatch.setattr(calls, name, getattr(kernel, name))


def queue_stats(queue: int) -> QueueStats:
    return QueueStats(queue, BINDING, rx_bytes=0, rx_alloc_fail=5, pages_total=PAGES, pages_inflight=PAGES)


def make_registry() -> Registry:
    return Registry({NAPI: QUEUE, 0: -1}.__getitem__, queue_stats)


class Attached:
    """Stands for queues that a dma-buf is attached to."""

    def __init__(self, dmabuf_id: int) -> None:
        self.dmabuf_id = dmabuf_id
        self.closed = False

    def close(self) -> None:
        self.closed = True


def make_binding(registry: Registry, buffer: Buffer, dmabuf_id: int = BINDING) -> KernelRxBinding:
    pin = buffer.pin("a test", BufferUse.RX)
    return KernelRxBinding(buffer, pin, (QUEUE,), Attached(dmabuf_id), registry)


def pages(count: int, *, size: int = PAGE_SIZE) -> list[Segment]:
    return [Dmabuf(index * PAGE_SIZE, size) for index in range(count)]
