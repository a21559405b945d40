"""In a guest: place a buffer on a NUMA node of its own, and find out where in the node's memory each byte lies.

A guest of ``devmem-tcp lab run --second-memory SIZE FILE`` keeps its node 1 in FILE, a byte of the file for each byte
of the node, in the order of their physical addresses. So what the NIC writes there by DMA can be read outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from devmem_tcp.errors import DevmemError, KernelError
from devmem_tcp.memory.dmabuf import DmabufBuffer
from devmem_tcp.sys import calls
from devmem_tcp.uapi.dmabuf import UDMABUF_CREATE, pack_udmabuf_create

PAGE_BYTES: Final = 4096

_SYS_SET_MEMPOLICY: Final = 238  # x86-64
_MPOL_DEFAULT: Final = 0  # include/uapi/linux/mempolicy.h
_MPOL_BIND: Final = 2
_MAX_NODES: Final = 64  # of one word of a node mask
_PRESENT: Final = 1 << 63  # Documentation/admin-guide/mm/pagemap.rst
_FRAME: Final = (1 << 55) - 1
_ZONES: Final = Path("/proc/zoneinfo")
_ZONE: Final = re.compile(r"^Node (?P<node>\d+), zone.*?(?=^Node |\Z)", re.MULTILINE | re.DOTALL)
_ZONE_START: Final = re.compile(r"^ +start_pfn: +(?P<frame>\d+)$", re.MULTILINE)  # of a zone that has memory

_libc = ctypes.CDLL(None, use_errno=True)


class PlacedBuffer(NamedTuple):
    """A buffer, and where its pages are."""

    buffer: DmabufBuffer
    physical: npt.NDArray[np.uint64]
    """The physical address of each page, as the guest sees it."""


def allocate_on(node: int, size_bytes: int) -> PlacedBuffer:
    """Allocate a udmabuf whose pages all lie on a NUMA node.

    Kernel: the pages of a memfd are touched while set_mempolicy(2) binds this thread to the node, pinned by
    UDMABUF_CREATE (drivers/dma-buf/udmabuf.c, udmabuf_create), and only then looked up, as they cannot move any more.

    Args:
        size_bytes: a multiple of 4096.

    Raises:
        KernelError: there is no such node, it is full, or /dev/udmabuf refuses.
        DevmemError: the addresses are hidden (that takes CAP_SYS_ADMIN).
    """
    if size_bytes <= 0 or size_bytes % PAGE_BYTES:
        raise ValueError(f"a buffer is a multiple of {PAGE_BYTES} bytes, not {size_bytes}")
    with contextlib.ExitStack() as held:
        memfd = os.memfd_create("devmem-tcp placed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        held.callback(os.close, memfd)
        os.ftruncate(memfd, size_bytes)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        mapping = held.enter_context(mmap.mmap(memfd, size_bytes))
        with bound_to(node):
            for offset in range(0, size_bytes, PAGE_BYTES):
                mapping[offset] = 0
        exporter = os.open("/dev/udmabuf", os.O_RDWR | os.O_CLOEXEC)
        held.callback(os.close, exporter)
        try:
            dmabuf_fd = calls.ioctl(exporter, UDMABUF_CREATE, bytearray(pack_udmabuf_create(memfd, 0, size_bytes)))
        except OSError as error:
            raise KernelError(error.errno or 0, "ioctl(UDMABUF_CREATE)") from error
        buffer = DmabufBuffer(size_bytes, "udmabuf", dmabuf_fd)
        try:
            return PlacedBuffer(buffer, physical_addresses(mapping))
        except BaseException:
            buffer.close()
            raise


@contextlib.contextmanager
def bound_to(node: int) -> Iterator[None]:
    """Take this thread's new pages from one NUMA node alone, until the block ends. Kernel: set_mempolicy(2).

    Raises:
        KernelError: there is no such node.
    """
    if not 0 <= node < _MAX_NODES - 1:
        raise ValueError(f"a node is 0 to {_MAX_NODES - 2}, not {node}")
    _set_mempolicy(_MPOL_BIND, 1 << node)
    try:
        yield
    finally:
        _set_mempolicy(_MPOL_DEFAULT, 0)


def physical_addresses(mapping: mmap.mmap) -> npt.NDArray[np.uint64]:
    """Return the physical address of each page of a mapping, whose pages have been touched.

    Kernel: /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst); it shows frames to CAP_SYS_ADMIN only.

    Raises:
        DevmemError: a page is not present, or its frame is not shown.
    """
    anchor = ctypes.c_char.from_buffer(mapping)
    first_page = ctypes.addressof(anchor) // PAGE_BYTES
    del anchor  # it would keep the mapping from being closed
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        found = os.pread(pagemap.fileno(), len(mapping) // PAGE_BYTES * 8, first_page * 8)
    entries = np.frombuffer(found, np.uint64)
    frames = entries & np.uint64(_FRAME)
    if len(entries) * PAGE_BYTES != len(mapping) or not (entries & np.uint64(_PRESENT)).all() or not frames.all():
        raise DevmemError("the kernel does not say where the pages are", hint="it tells root only")
    return frames * np.uint64(PAGE_BYTES)


def node_start(node: int, zones: str | None = None) -> int:
    """Return the physical address of a NUMA node's first byte.

    Args:
        zones: what /proc/zoneinfo says; None: read it.

    Raises:
        DevmemError: there is no such node, or it has no memory.
    """
    text = _ZONES.read_text(encoding="ascii") if zones is None else zones
    starts = [
        int(start["frame"])
        for zone in _ZONE.finditer(text)
        if int(zone["node"]) == node and (start := _ZONE_START.search(zone[0]))
    ]
    if not starts:
        raise DevmemError(f"no NUMA node {node} with memory", hint="devmem-tcp lab run --second-memory makes node 1")
    return min(starts) * PAGE_BYTES


def _set_mempolicy(mode: int, nodes: int) -> None:
    mask = ctypes.c_ulong(nodes)
    if _libc.syscall(_SYS_SET_MEMPOLICY, mode, ctypes.byref(mask) if nodes else None, ctypes.c_ulong(_MAX_NODES)):
        raise KernelError(ctypes.get_errno(), "set_mempolicy")
