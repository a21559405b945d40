"""A kernel of Python on the other side of a netlink socket, which answers as a test tells it to."""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from devmem_tcp.sys import calls
from devmem_tcp.sys.netlink import RECEIVE_BYTES
from devmem_tcp.uapi import netlink as nl
from devmem_tcp.uapi.netlink import Message

FAMILIES = ("fake", "netdev")
FAMILY_ID = 29
FAMILY_VERSION = 3
PORT = 4711

Datagram = bytes | OSError | tuple[bytes, int, int]  # bytes, else with msg_flags and the sender's port
Answer = Callable[[Message], Sequence[Datagram]]


class FakeKernel:
    """The kernel's side of one netlink socket, as far as ``calls`` uses it: answers each request as it is told to."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.options: list[tuple[int, int, int]] = []
        self.requests: list[Message] = []
        self.queue: deque[Datagram] = deque()
        self.before_send: Callable[[], object] = lambda: None
        self.closed = False

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.options.append((level, option, value))

    def bind(self, address: tuple[int, int]) -> None:
        assert address == (0, 0)

    def getsockname(self) -> tuple[int, int]:
        return PORT, 0

    def send(self, data: bytes, flags: int) -> int:
        self.before_send()
        (request,) = nl.parse_messages(data)
        if request.kind == nl.GENL_ID_CTRL:
            self.queue += self._family(request)
        else:
            self.requests.append(request)
            self.queue += self.answer(request)
        return len(data)

    def _family(self, request: Message) -> Sequence[Datagram]:
        command, wanted = nl.parse_generic(request.payload)
        assert command == nl.CTRL_CMD_GETFAMILY
        if wanted.string(nl.CTRL_ATTR_FAMILY_NAME) not in FAMILIES:
            return [ack(request, -errno.ENOENT)]
        found = nl.attr_u16(nl.CTRL_ATTR_FAMILY_ID, FAMILY_ID) + nl.attr_u32(nl.CTRL_ATTR_VERSION, FAMILY_VERSION)
        return [entry(request, found), ack(request)]

    def recvmsg(self, size: int, control: int, flags: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        assert size == RECEIVE_BYTES
        assert flags == socket.MSG_DONTWAIT
        if not self.queue:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        datagram = self.queue.popleft()
        if isinstance(datagram, OSError):
            raise datagram
        data, msg_flags, sender = (datagram, 0, 0) if isinstance(datagram, bytes) else datagram
        return data, [], msg_flags, (sender, 0)

    def fileno(self) -> int:
        return -1 if self.closed else 99

    def close(self) -> None:
        self.closed = True


def entry(request: Message, *attrs: bytes, flags: int = 0, sequence: int | None = None, port: int = PORT) -> bytes:
    """Make one message of an answer."""
    number = request.sequence if sequence is None else sequence
    return nl.message(FAMILY_ID, flags, number, nl.generic(1, 1, *attrs), port=port)


def ack(request: Message, status: int = 0, *attrs: bytes) -> bytes:
    """Make the ack of a request: its header alone is echoed."""
    echo = nl.NLMSGHDR.pack(16 + len(request.payload), request.kind, request.flags, request.sequence, 0)
    flags = nl.NLM_F_CAPPED | (nl.NLM_F_ACK_TLVS if attrs else 0)
    payload = struct.pack("<i", status) + echo + b"".join(attrs)
    return nl.message(nl.NLMSG_ERROR, flags, request.sequence, payload, port=PORT)


def done(request: Message, status: int = 0, *attrs: bytes, flags: int = 0) -> bytes:
    """Make the end of a dump."""
    flags |= nl.NLM_F_MULTI | (nl.NLM_F_ACK_TLVS if attrs else 0)
    return nl.message(nl.NLMSG_DONE, flags, request.sequence, struct.pack("<i", status) + b"".join(attrs), port=PORT)


def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    """Give a kernel that netlink sockets of the test are open to, and that acknowledges all: make it a fixture."""
    made = FakeKernel(lambda request: [ack(request)])
    monkeypatch.setattr(calls, "open_netlink", lambda protocol: made)
    yield made
    assert made.closed
