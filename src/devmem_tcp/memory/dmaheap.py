"""Dma-bufs from the kernel's dma-heaps, /dev/dma_heap/*."""

from __future__ import annotations

from typing import Final

from devmem_tcp.buffers import Allocator, check_buffer_size
from devmem_tcp.memory.dmabuf import DmabufBuffer, open_node
from devmem_tcp.memory.refusals import refusals
from devmem_tcp.sys import calls
from devmem_tcp.uapi.dmabuf import DMA_HEAP_IOCTL_ALLOC, pack_dma_heap_allocation_data, unpack_dma_heap_fd


class DmaHeap(Allocator):
    """Allocate dma-bufs from a dma-heap.

    Args:
        name: the heap, a name in /dev/dma_heap: ``system`` for ordinary memory in large pieces, ``default_cma_region``
            (older kernels: ``reserved``, ``linux,cma``) for physically contiguous memory.

    Kernel: ioctl DMA_HEAP_IOCTL_ALLOC on /dev/dma_heap/NAME (drivers/dma-buf/dma-heap.c, dma_heap_ioctl_allocate).
    """

    def __init__(self, name: str = "system") -> None:
        if not name or "/" in name or name in (".", ".."):
            raise ValueError(f"heap name {name!r} is not a name in /dev/dma_heap, for instance 'system'")
        self.name: Final = name

    def allocate(self, size_bytes: int) -> DmabufBuffer:
        """Allocate ``size_bytes`` of zeroed memory, a positive multiple of 4096, as a dma-buf.

        Raises:
            ValueError: size is zero, negative or not page-aligned.
            OutOfDeviceMemory: more than the heap has.
            KernelError: the heap is missing or not permitted, or the kernel refused; the hint says what to do.
        """
        check_buffer_size(size_bytes)
        node = open_node(
            f"/dev/dma_heap/{self.name}",
            wanted=size_bytes,
            missing="`ls /dev/dma_heap` shows the heaps there are; 'system' needs a kernel with CONFIG_DMABUF_HEAPS=y "
            "and CONFIG_DMABUF_HEAPS_SYSTEM=y",
            udev_match=f'SUBSYSTEM=="dma_heap", KERNEL=="{self.name}"',
        )
        try:
            argument = bytearray(pack_dma_heap_allocation_data(size_bytes))
            with refusals(f"ioctl(DMA_HEAP_IOCTL_ALLOC) on {self.name}", wanted=size_bytes):
                calls.ioctl(node, DMA_HEAP_IOCTL_ALLOC, argument)
        finally:
            calls.close_fd(node)
        return DmabufBuffer(size_bytes, f"dma-heap {self.name}", unpack_dma_heap_fd(argument))

    def __repr__(self) -> str:
        return f"DmaHeap({self.name!r})"
