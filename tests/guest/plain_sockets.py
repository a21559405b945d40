"""Linux without the backend: bindings and connections made by single system calls, for tests in a guest of the lab."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import pytest

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.kernel import netdev
from devmem_tcp.sys import calls
from devmem_tcp.sys.messages import OffsetsMessage, ReceivedMessage
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import FragArray
from devmem_tcp.uapi import netdev as abi
from devmem_tcp.uapi.errqueue import (
    IP_RECVERR,
    IPV6_RECVERR,
    SO_EE_ORIGIN_ZEROCOPY,
    SOCK_EXTENDED_ERR,
    SOL_IP,
    SOL_IPV6,
)
from devmem_tcp.uapi.socket import MSG_SOCK_DEVMEM, MSG_ZEROCOPY, pack_tokens, parse_control
from far_end import NEAR, NETIF, FarEnd

QUEUE: Final = 1
PORT: Final = 5201  # steered to QUEUE by who uses this
PATIENCE_S: Final = 30.0
MANY_FRAGS: Final = (1 << 16) // 40  # 64 KiB of control messages
UNTOUCHED: Final = b"\xee"  # what the iovec holds before a recvmsg
FIONREAD: Final = 0x541B  # asm-generic/ioctls.h


class Line(NamedTuple):
    """One connection: our end and the far one, both plain sockets."""

    near: socket.socket
    far: socket.socket


class Received(NamedTuple):
    """What one recvmsg gave: its answer, its control messages, the flags it left, and the bytes of the iovec."""

    taken: int
    frags: FragArray
    flags: int
    data: memoryview


def ifindex() -> int:
    return socket.if_nametoindex(NETIF)


def fd_of(buffer: Buffer) -> int:
    assert buffer.dmabuf_fd is not None
    return buffer.dmabuf_fd


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout


def content(size: int) -> bytes:
    words: np.ndarray = np.random.SFC64(1).random_raw(-(-size // 8))
    return words.tobytes()[:size]


@contextlib.contextmanager
def bound(buffer: Buffer, *queues: int) -> Iterator[int]:
    """Bind a dma-buf to queues (QUEUE, if none is given) while the block runs; gives the binding's id."""
    with GenericNetlink(abi.FAMILY) as netlink:
        yield netdev.bind_rx(netlink, ifindex(), fd_of(buffer), queues or [QUEUE])


@contextlib.contextmanager
def tx_bound(buffer: Buffer) -> Iterator[int]:
    with GenericNetlink(abi.FAMILY) as netlink:
        yield netdev.bind_tx(netlink, ifindex(), fd_of(buffer))


@contextlib.contextmanager
def line(far: FarEnd, *, port: int = PORT, host: str = NEAR[0]) -> Iterator[Line]:
    """Connect the far end to ``port`` here; any port but PORT is not steered."""
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        theirs = far.connect(listener.getsockname()[:2], PATIENCE_S)
        ours, _ = listener.accept()
    with ours, theirs:
        ours.settimeout(None)
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Line(ours, theirs)


def unread(sock: socket.socket) -> int:
    """Return how many bytes are queued. Kernel: ioctl FIONREAD, net/ipv4/tcp.c, tcp_ioctl."""
    return int(struct.unpack("i", fcntl.ioctl(sock, FIONREAD, bytes(4)))[0])


def deliver(on: Line, data: bytes) -> None:
    """Send from the far end, and see that all of it is queued here."""
    wanted = unread(on.near) + len(data)
    on.far.sendall(data)
    until(lambda: unread(on.near) == wanted)


def until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not so():
        assert time.monotonic() < deadline, "it never came to that"


def receive(sock: socket.socket, size: int, *, flags: int = 0, max_frags: int = MANY_FRAGS) -> Received:
    message = ReceivedMessage()
    message.prepare(size, 40 * max_frags)
    if size:
        message.data[:] = UNTOUCHED * len(message.data)
    taken = calls.receive_message(sock, message, flags | MSG_SOCK_DEVMEM)
    frags = parse_control(message.control, message.control_length)
    return Received(taken, frags, message._header.flags, message.data)


def give_back(sock: socket.socket, *batches: FragArray) -> int:
    """Return the tokens of frags; answers how many were freed."""
    tokens = [int(token) for frags in batches for token in frags["token"] if token]
    parts = [tokens[at : at + 128] for at in range(0, len(tokens), 128)]
    return sum(calls.return_tokens(sock, pack_tokens(part, [1] * len(part)).tobytes()) for part in parts)


def bytes_of(buffer: Buffer, frags: FragArray) -> bytes:
    with buffer.cpu_access(CpuAccess.READ) as memory:
        return b"".join(bytes(memory[one["offset"] : one["offset"] + one["size"]]) for one in frags)


def send(sock: socket.socket, message: OffsetsMessage, *, flags: int = MSG_ZEROCOPY) -> int:
    return calls.send_offsets(sock, message, flags | calls.MSG_NOSIGNAL | calls.MSG_DONTWAIT)


def pieces(dmabuf_id: int, offsets: Sequence[int], sizes: Sequence[int]) -> OffsetsMessage:
    message = OffsetsMessage()
    message.prepare(dmabuf_id, np.array(offsets, np.uint64), np.array(sizes, np.uint64))
    return message


def refuse(sock: socket.socket, message: OffsetsMessage, number: int, *, flags: int = MSG_ZEROCOPY) -> None:
    with pytest.raises(OSError, match=r"\w") as caught:
        send(sock, message, flags=flags)
    assert caught.value.errno == number


def completion(sock: socket.socket) -> tuple[int, int]:
    """Wait for a completion, and look at every field of it."""
    assert calls.wait(calls.poller(sock.fileno(), 0), PATIENCE_S), "POLLERR never came"
    _, control, _, _ = sock.recvmsg(0, 256, calls.MSG_ERRQUEUE)
    ((level, kind, data),) = control
    assert (level, kind) == ((SOL_IPV6, IPV6_RECVERR) if sock.family == socket.AF_INET6 else (SOL_IP, IP_RECVERR))
    number, origin, _, code, _, low, high = SOCK_EXTENDED_ERR.unpack_from(data)
    assert (number, origin, code) == (0, SO_EE_ORIGIN_ZEROCOPY, 0)
    return low, high
