"""Ioctls that make dma-bufs and bracket CPU access to them: linux/udmabuf.h, dma-heap.h and dma-buf.h, as data.

Numbers are those of include/uapi/asm-generic/ioctl.h, so of x86 and arm64 (alpha, mips, powerpc and sparc differ).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

IOC_WRITE: Final = 1  # user space writes, the kernel reads
IOC_READ: Final = 2

_NUMBER_BITS: Final = 8
_KIND_BITS: Final = 8
_SIZE_BITS: Final = 14
_DIRECTION_BITS: Final = 2


def ioc(direction: int, kind: str, number: int, size: int) -> int:
    """Make an ioctl request number; the kernel's _IOC.

    Args:
        direction: 0, or IOC_WRITE and IOC_READ together or alone.
        kind: the driver's letter.
        number: which ioctl of the driver, 8 bits.
        size: bytes of the argument, 14 bits.

    Raises:
        ValueError: something does not fit its bits.
    """
    request = 0
    shift = 0
    for name, value, bits in (
        ("number", number, _NUMBER_BITS),
        ("kind", ord(kind), _KIND_BITS),
        ("size", size, _SIZE_BITS),
        ("direction", direction, _DIRECTION_BITS),
    ):
        if value >> bits:  # negative numbers too
            raise ValueError(f"ioctl {name} {value} does not fit {bits} bits")
        request |= value << shift
        shift += bits
    return request


def iow(kind: str, number: int, size: int) -> int:
    """Make the request number of an ioctl whose argument the kernel reads; the kernel's _IOW."""
    return ioc(IOC_WRITE, kind, number, size)


def iowr(kind: str, number: int, size: int) -> int:
    """Make the request number of an ioctl whose argument the kernel reads and writes back; the kernel's _IOWR."""
    return ioc(IOC_READ | IOC_WRITE, kind, number, size)


UDMABUF_CREATE_STRUCT: Final = struct.Struct("<IIQQ")
"""struct udmabuf_create, 24 bytes: memfd, flags, offset, size."""

UDMABUF_CREATE_LIST_HEAD: Final = struct.Struct("<II")
"""struct udmabuf_create_list without its items, 8 bytes: flags, count."""

UDMABUF_CREATE_ITEM: Final = struct.Struct("<I4xQQ")
"""struct udmabuf_create_item, 24 bytes: memfd, padding, offset, size."""

DMA_HEAP_ALLOCATION_DATA: Final = struct.Struct("<QIIQ")
"""struct dma_heap_allocation_data, 24 bytes: len, fd (the kernel's answer), fd_flags, heap_flags."""

DMA_BUF_SYNC: Final = struct.Struct("<Q")
"""struct dma_buf_sync, 8 bytes: flags."""

UDMABUF_CREATE: Final = iow("u", 0x42, UDMABUF_CREATE_STRUCT.size)
UDMABUF_CREATE_LIST: Final = iow("u", 0x43, UDMABUF_CREATE_LIST_HEAD.size)
UDMABUF_FLAGS_CLOEXEC: Final = 1

DMA_HEAP_IOCTL_ALLOC: Final = iowr("H", 0x0, DMA_HEAP_ALLOCATION_DATA.size)
O_RDWR: Final = 0o2  # for fd_flags; include/uapi/asm-generic/fcntl.h
O_CLOEXEC: Final = 0o2000000

DMA_BUF_IOCTL_SYNC: Final = iow("b", 0, DMA_BUF_SYNC.size)
DMA_BUF_SYNC_READ: Final = 1
DMA_BUF_SYNC_WRITE: Final = 2
DMA_BUF_SYNC_RW: Final = DMA_BUF_SYNC_READ | DMA_BUF_SYNC_WRITE
DMA_BUF_SYNC_START: Final = 0
DMA_BUF_SYNC_END: Final = 4


def pack_udmabuf_create(memfd: int, offset: int, size: int, *, flags: int = UDMABUF_FLAGS_CLOEXEC) -> bytes:
    """Pack the argument of UDMABUF_CREATE, which answers with the dma-buf's fd.

    Kernel: drivers/dma-buf/udmabuf.c, udmabuf_create: the memfd must carry F_SEAL_SHRINK and not F_SEAL_WRITE.

    Args:
        memfd: fd of the memory file.
        offset, size: which part of it, in bytes, multiples of the page size.

    Raises:
        ValueError: a number does not fit its field.
    """
    return _pack("udmabuf_create", UDMABUF_CREATE_STRUCT, memfd, flags, offset, size)


def pack_udmabuf_create_list(items: Sequence[tuple[int, int, int]], *, flags: int = UDMABUF_FLAGS_CLOEXEC) -> bytes:
    """Pack the argument of UDMABUF_CREATE_LIST: one dma-buf of several parts of memory files, in order.

    Kernel: drivers/dma-buf/udmabuf.c, udmabuf_ioctl_create_list: at most 1024 items, unless the module
    parameter list_limit says otherwise.

    Args:
        items: (memfd, offset, size) of each part, as in ``pack_udmabuf_create``.

    Raises:
        ValueError: a number does not fit its field.
    """
    head = _pack("udmabuf_create_list", UDMABUF_CREATE_LIST_HEAD, flags, len(items))
    return head + b"".join(_pack("udmabuf_create_item", UDMABUF_CREATE_ITEM, *item) for item in items)


def pack_dma_heap_allocation_data(size: int, *, fd_flags: int = O_RDWR | O_CLOEXEC, heap_flags: int = 0) -> bytes:
    """Pack the argument of DMA_HEAP_IOCTL_ALLOC; the kernel writes its answer into it (``unpack_dma_heap_fd``).

    Kernel: drivers/dma-buf/dma-heap.c, dma_heap_ioctl_allocate.

    Args:
        size: bytes wanted; the kernel rounds up to pages.
        fd_flags: O_RDWR, O_CLOEXEC of the dma-buf's fd.
        heap_flags: 0; the kernel defines none.

    Raises:
        ValueError: a number does not fit its field.
    """
    return _pack("dma_heap_allocation_data", DMA_HEAP_ALLOCATION_DATA, size, 0, fd_flags, heap_flags)


def unpack_dma_heap_fd(argument: bytes | bytearray) -> int:
    """Return the dma-buf's fd from the argument of DMA_HEAP_IOCTL_ALLOC as the kernel left it.

    Raises:
        ValueError: ``argument`` is not of the struct's 24 bytes.
    """
    if len(argument) != DMA_HEAP_ALLOCATION_DATA.size:
        raise ValueError(f"dma_heap_allocation_data has {DMA_HEAP_ALLOCATION_DATA.size} bytes, not {len(argument)}")
    fd: int = DMA_HEAP_ALLOCATION_DATA.unpack(argument)[1]
    return fd


def pack_dma_buf_sync(flags: int) -> bytes:
    """Pack the argument of DMA_BUF_IOCTL_SYNC: one of START and END, with READ, WRITE or both.

    Kernel: drivers/dma-buf/dma-buf.c, dma_buf_ioctl.

    Raises:
        ValueError: ``flags`` does not fit 64 bits.
    """
    return _pack("dma_buf_sync", DMA_BUF_SYNC, flags)


def _pack(name: str, layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise ValueError(f"struct {name} of {values}: {error}") from None
