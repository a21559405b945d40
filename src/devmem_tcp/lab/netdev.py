"""The two netdev requests that a trial makes, spelt out: bind-rx and bind-tx over generic netlink.

Kept apart from any backend on purpose: the lab judges backends, so it does not ask the kernel through one.
Source: Documentation/netlink/specs/netdev.yaml; numbers as in docs/kernel-contract.md.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Final, Self

from devmem_tcp.errors import KernelError

_NETLINK_GENERIC: Final = 16
_GENL_ID_CTRL: Final = 16
_CTRL_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_ID: Final = 1
_CTRL_ATTR_FAMILY_NAME: Final = 2
_BIND_RX: Final = 13
_BIND_TX: Final = 15
_IFINDEX, _QUEUES, _FD, _ID = 1, 2, 3, 4
_QUEUE_ID, _QUEUE_TYPE = 1, 3
_RX: Final = 0
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
_NLMSG_ERROR: Final = 2
_REQUEST_ACK: Final = 0x1 | 0x4
_HEADER: Final = struct.Struct("<IHHII")  # struct nlmsghdr
_GENERIC: Final = struct.Struct("<BBH")  # struct genlmsghdr
_ATTRIBUTE: Final = struct.Struct("<HH")  # struct nlattr
_REPLY_BYTES: Final = 65536


class NetdevSocket:
    """A generic netlink socket to the netdev family. What it binds lives as long as it is open."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
        self._sequence = 0
        try:
            self._sock.bind((0, 0))
            found = self._ask(_GENL_ID_CTRL, _CTRL_GETFAMILY, "getfamily", _text(_CTRL_ATTR_FAMILY_NAME, "netdev"))
            (self._family,) = struct.unpack_from("<H", found[_CTRL_ATTR_FAMILY_ID])
        except BaseException:
            self._sock.close()
            raise

    def bind_rx(self, nic: str, dmabuf_fd: int, queues: Sequence[int]) -> int:
        """Bind a dma-buf to RX queues; returns its id. Needs CAP_NET_ADMIN.

        Raises:
            KernelError: refused; has errno and extack.
        """
        wanted = b"".join(
            _attribute(_QUEUES | _NESTED, _number(_QUEUE_ID, queue) + _number(_QUEUE_TYPE, _RX)) for queue in queues
        )
        return self._bind(_BIND_RX, "bind-rx", nic, dmabuf_fd, wanted)

    def bind_tx(self, nic: str, dmabuf_fd: int) -> int:
        """Let sockets send from a dma-buf; returns its id.

        Raises:
            KernelError: refused; has errno and extack.
        """
        return self._bind(_BIND_TX, "bind-tx", nic, dmabuf_fd, b"")

    def _bind(self, command: int, name: str, nic: str, dmabuf_fd: int, more: bytes) -> int:
        body = _number(_IFINDEX, socket.if_nametoindex(nic)) + _number(_FD, dmabuf_fd) + more
        (dmabuf_id,) = struct.unpack("<I", self._ask(self._family, command, name, body)[_ID])
        return int(dmabuf_id)

    def _ask(self, family: int, command: int, name: str, body: bytes) -> dict[int, bytes]:
        """Send one request and return the attributes of its answer, once the kernel has acknowledged it."""
        self._sequence += 1
        payload = _GENERIC.pack(command, 1, 0) + body
        size = _HEADER.size + len(payload)
        self._sock.send(_HEADER.pack(size, family, _REQUEST_ACK, self._sequence, 0) + payload)
        answer: dict[int, bytes] = {}
        while True:
            data = self._sock.recv(_REPLY_BYTES)
            at = 0
            while at < len(data):
                size, kind, _, _, _ = _HEADER.unpack_from(data, at)
                message = data[at + _HEADER.size : at + size]
                if kind == _NLMSG_ERROR:
                    (status,) = struct.unpack_from("<i", message)
                    if status:
                        raise KernelError(-status, name)
                    return answer
                answer.update(_attributes(message[_GENERIC.size :]))
                at += _aligned(size)

    def close(self) -> None:
        """Unbind all that was bound. Idempotent."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _aligned(size: int) -> int:
    return (size + 3) & ~3


def _attribute(kind: int, data: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(size, kind) + data.ljust(_aligned(len(data)), b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("<I", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if size < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + size]
        at += _aligned(size)
    return found
