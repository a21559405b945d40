"""Dma-bufs made of ordinary memory by /dev/udmabuf: what a NIC without a GPU beside it is bound to."""

from __future__ import annotations

import contextlib
import errno
from typing import Final

from devmem_tcp.buffers import Allocator, check_buffer_size
from devmem_tcp.errors import OutOfDeviceMemory
from devmem_tcp.memory.dmabuf import DmabufBuffer, open_node
from devmem_tcp.memory.refusals import check_available, refusals
from devmem_tcp.sys import calls
from devmem_tcp.uapi.dmabuf import UDMABUF_CREATE, pack_udmabuf_create

_NODE: Final = "/dev/udmabuf"
_SIZE_LIMIT: Final = "/sys/module/udmabuf/parameters/size_limit_mb"
_DEFAULT_SIZE_LIMIT_MB: Final = 64  # drivers/dma-buf/udmabuf.c, size_limit_mb
_MIB: Final = 1 << 20


class Udmabuf(Allocator):
    """Allocate dma-bufs of ordinary memory.

    Kernel: memfd_create(2), sealed with F_SEAL_SHRINK, then ioctl UDMABUF_CREATE on /dev/udmabuf
    (drivers/dma-buf/udmabuf.c, udmabuf_create). The dma-buf holds the pages, the memory file is closed at once.

    Limits: module parameter ``size_limit_mb``: 64 MiB a buffer by default in Linux 7.2, next to none in 7.3.
    """

    def allocate(self, size_bytes: int) -> DmabufBuffer:
        """Allocate ``size_bytes`` of zeroed memory, a positive multiple of 4096, as a dma-buf.

        Raises:
            ValueError: size is zero, negative or not page-aligned.
            OutOfDeviceMemory: more than ``size_limit_mb`` or more than there is.
            KernelError: /dev/udmabuf is missing or not permitted, or the kernel refused; the hint says what to do.
        """
        check_buffer_size(size_bytes)
        with contextlib.ExitStack() as fds:
            node = open_node(
                _NODE,
                wanted=size_bytes,
                missing="sudo modprobe udmabuf; if there is no such module: a kernel with CONFIG_UDMABUF=y",
                udev_match='KERNEL=="udmabuf"',
            )
            fds.callback(calls.close_fd, node)
            _check_size_limit(size_bytes)
            check_available(size_bytes)
            memfd = _sealed_memfd(size_bytes)
            fds.callback(calls.close_fd, memfd)
            argument = bytearray(pack_udmabuf_create(memfd, 0, size_bytes))
            hints = {errno.EINVAL: f"larger than {_SIZE_LIMIT} allows ({_DEFAULT_SIZE_LIMIT_MB} MiB by default)?"}
            with refusals("ioctl(UDMABUF_CREATE)", wanted=size_bytes, hints=hints):
                dmabuf_fd = calls.ioctl(node, UDMABUF_CREATE, argument)
        return DmabufBuffer(size_bytes, "udmabuf", dmabuf_fd)

    def __repr__(self) -> str:
        return "Udmabuf()"


def _sealed_memfd(size_bytes: int) -> int:
    with refusals("memfd_create", wanted=size_bytes):
        memfd = calls.memfd_create("devmem-tcp udmabuf")
    try:
        with refusals("ftruncate(memfd)", wanted=size_bytes):
            calls.truncate(memfd, size_bytes)
        with refusals("fcntl(F_ADD_SEALS, F_SEAL_SHRINK)", wanted=size_bytes):
            calls.add_seals(memfd, calls.SEAL_SHRINK)
    except BaseException:
        calls.close_fd(memfd)
        raise
    return memfd


def _check_size_limit(size_bytes: int) -> None:
    """Raise OutOfDeviceMemory over the module's limit, which the kernel itself reports as a bare EINVAL."""
    try:
        limit_mb = int(calls.read_text(_SIZE_LIMIT))
    except (OSError, ValueError):
        return  # sysfs is hidden here (a container, say): the kernel decides
    if size_bytes > limit_mb * _MIB:
        raise OutOfDeviceMemory(
            f"{size_bytes} bytes wanted, udmabuf allows {limit_mb * _MIB} a buffer ({_SIZE_LIMIT} is {limit_mb})",
            wanted=size_bytes,
            free=limit_mb * _MIB,
            hint=f"echo {-(-size_bytes // _MIB)} | sudo tee {_SIZE_LIMIT}",
        )
