"""What recvmsg and sendmsg are given, laid out as the kernel reads it and reused from call to call.

Python's own ``socket.recvmsg`` makes an object of every control message and a new buffer every time, and its
``sendmsg`` takes no offset for an address.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np

from devmem_tcp.types import FragArray, U8Array, U64Array
from devmem_tcp.uapi.socket import (
    CMSG_HEADER_SIZE,
    CMSGHDR,
    MAX_IOVECS,
    SCM_DEVMEM_DMABUF,
    SOL_SOCKET,
    ControlColumns,
    align_control,
)

_ID_BYTES: Final = 4  # what follows SCM_DEVMEM_DMABUF's header in a sendmsg: u32 dmabuf_id; net/core/sock.c


class _IoVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MsgHdr(ctypes.Structure):
    """struct msghdr, as the C library and 64-bit Linux lay it out."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class ReceivedMessage:
    """One recvmsg: room for data and for control messages, which grows and is then kept.

    After the call ``control_length`` bytes of ``control`` are valid, and of ``data`` as many as the call says.
    """

    __slots__ = ("_columns", "_header", "_iov", "address", "control", "data")

    def __init__(self) -> None:
        self.data = memoryview(b"")
        self.control = memoryview(b"")
        self._columns = ControlColumns(b"")
        self._iov = _IoVec()
        self._header = _MsgHdr(iov=ctypes.addressof(self._iov), iov_length=1)
        self.address: Final = ctypes.addressof(self._header)

    def prepare(self, data_size: int, control_size: int) -> None:
        """Offer ``data_size`` bytes for data and ``control_size`` for control messages to the next call."""
        if data_size > len(self.data):
            data = np.empty(data_size, np.uint8)  # what nobody writes to is never there: a large one costs nothing
            self.data, self._iov.base = data.data, data.ctypes.data
        if control_size > len(self.control):
            control = np.empty(control_size, np.uint8)
            self.control, self._header.control = control.data, control.ctypes.data
            self._columns = ControlColumns(self.control)
        self._iov.length = data_size
        self._header.control_length = control_size

    @property
    def control_length(self) -> int:
        """Bytes of control messages: offered, and after a successful call, used."""
        return int(self._header.control_length)

    @control_length.setter
    def control_length(self, length: int) -> None:
        self._header.control_length = length

    def frags(self) -> FragArray:
        """Return what the control messages tell of: a copy, shape (n,), dtype FRAG_DTYPE; see ``parse_control``."""
        return self._columns.parse(self.control_length)


class OffsetsMessage:
    """One sendmsg from a dma-buf: pieces given by their offsets, and the id of the binding they are offsets into."""

    __slots__ = ("_control", "_header", "_iovecs", "address")

    def __init__(self) -> None:
        size = CMSG_HEADER_SIZE + _ID_BYTES
        self._control: U8Array = np.zeros(align_control(size), np.uint8)
        self._control[:CMSG_HEADER_SIZE] = np.frombuffer(CMSGHDR.pack(size, SOL_SOCKET, SCM_DEVMEM_DMABUF), np.uint8)
        self._iovecs: U64Array = np.zeros(
            (MAX_IOVECS + 1, 2), np.uint64
        )  # one over the limit, for the kernel to refuse
        self._header = _MsgHdr(
            iov=self._iovecs.ctypes.data, control=self._control.ctypes.data, control_length=len(self._control)
        )
        self.address: Final = ctypes.addressof(self._header)

    def prepare(self, dmabuf_id: int, offsets: U64Array, sizes: U64Array) -> None:
        """Name the pieces of the next call: offsets and sizes in bytes, shapes (n,), n at most 1024."""
        count = len(offsets)
        self._iovecs[:count, 0] = offsets
        self._iovecs[:count, 1] = sizes
        self._header.iov_length = count
        self._control[CMSG_HEADER_SIZE : CMSG_HEADER_SIZE + _ID_BYTES].view(np.uint32)[0] = dmabuf_id

    @property
    def dmabuf_id(self) -> int:
        return int(self._control[CMSG_HEADER_SIZE : CMSG_HEADER_SIZE + _ID_BYTES].view(np.uint32)[0])

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(offset, size) of each piece; for tests."""
        return [(offset, size) for offset, size in self._iovecs[: self._header.iov_length].tolist()]
