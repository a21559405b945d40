"""A Buffer over a dma-buf, whoever exported it: mapping, and the ioctls that bracket CPU access."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from typing import Final

from devmem_tcp.buffers import CpuAccess
from devmem_tcp.memory.mapped import MappedBuffer
from devmem_tcp.memory.refusals import refusals
from devmem_tcp.sys import calls
from devmem_tcp.uapi.dmabuf import DMA_BUF_IOCTL_SYNC, DMA_BUF_SYNC_END, DMA_BUF_SYNC_START, pack_dma_buf_sync

_NOT_MAPPABLE: Final = "this exporter gives no CPU access; the buffer can still be bound to a NIC"


class DmabufBuffer(MappedBuffer):
    """A dma-buf. Made by ``Udmabuf`` and ``DmaHeap``; owns ``fd``, and maps it for the CPU at the first view.

    Kernel: mmap(2) of the dma-buf with MAP_SHARED (Documentation/driver-api/dma-buf.rst, CPU Access to DMA Buffer
    Objects).
    """

    def __init__(self, size_bytes: int, kind: str, fd: int) -> None:
        self._mapping_once = threading.Lock()
        super().__init__(size_bytes, kind, mapping=None, fd=fd)

    @property
    def dmabuf_fd(self) -> int:
        """The dma-buf's fd, valid until ``close()``.

        Raises:
            ClosedError: the buffer is closed; its number may be another file's by now.
        """
        self._check_open()
        assert self._fd is not None
        return self._fd

    @contextlib.contextmanager
    def cpu_access(self, mode: CpuAccess = CpuAccess.READ_WRITE) -> Iterator[memoryview]:
        """Bracket CPU access, so that CPU and device see each other's writes; yields ``view()``, which ends with it.

        Kernel: ioctl DMA_BUF_IOCTL_SYNC with START and ``mode``, then END and ``mode``, also when the block raises.

        Raises:
            KernelError: the exporter refused.
        """
        with super().cpu_access(mode) as view:
            self._sync(DMA_BUF_SYNC_START | mode)
            try:
                yield view
            finally:
                self._sync(DMA_BUF_SYNC_END | mode)

    def _sync(self, flags: int) -> None:
        argument = pack_dma_buf_sync(flags)
        with refusals("ioctl(DMA_BUF_IOCTL_SYNC)", wanted=self.size_bytes):
            while True:
                try:
                    calls.ioctl(self.dmabuf_fd, DMA_BUF_IOCTL_SYNC, argument)
                    return
                except (InterruptedError, BlockingIOError):
                    # EINTR or EAGAIN: must be restarted. dma-buf.rst, CPU Access to DMA Buffer Objects.
                    continue

    def _memory(self) -> calls.MemoryMap:
        fd = self.dmabuf_fd
        with self._mapping_once:
            if self._mapping is None:
                hints = dict.fromkeys((errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENODEV), _NOT_MAPPABLE)
                with refusals(f"mmap({self.kind})", wanted=self.size_bytes, hints=hints):
                    self._mapping = calls.map_memory(fd, self.size_bytes, calls.MAP_SHARED)
        return super()._memory()


def open_node(path: str, *, wanted: int, missing: str, udev_match: str) -> int:
    """Open the device node of an exporter for an allocation of ``wanted`` bytes; the caller closes it.

    Args:
        missing: what to do when there is no such node.
        udev_match: how a udev rule names it.

    Raises:
        KernelError: it cannot be opened; the hint says how to mend that.
    """
    denied = (
        f"run as root, or join the node's group (`ls -l {path}`), or let yours in by a udev rule: "
        f'{udev_match}, GROUP="video", MODE="0660"'
    )
    hints = {
        errno.ENOENT: missing,
        errno.ENODEV: missing,
        errno.ENXIO: missing,
        errno.EACCES: denied,
        errno.EPERM: f"{denied}; in a container the node must also be allowed: --device {path}",
    }
    with refusals(f"open {path}", wanted=wanted, hints=hints):
        return calls.open_device(path)
