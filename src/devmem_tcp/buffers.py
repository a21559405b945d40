"""The contract of device memory: what an Allocator and its Buffers must do, and who may hold a Buffer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from enum import Enum, IntFlag
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from devmem_tcp.closing import Closing
from devmem_tcp.errors import BusyError, ClosedError
from devmem_tcp.types import PAGE_SIZE


class CpuAccess(IntFlag):
    """DMA_BUF_IOCTL_SYNC directions."""

    READ = 1
    WRITE = 2
    READ_WRITE = 3


class BufferUse(Enum):
    """What a binding does with a Buffer. At most one binding receives into a Buffer; any number send from it."""

    RX = "rx"
    TX = "tx"


class Buffer(Closing):
    """Device memory: ``size_bytes`` that a NIC can fill and send from. Made by an Allocator.

    Lifetime: bindings hold it, and so do the frags of an RX binding until their tokens are back. ``close()`` before
    that raises BusyError and changes nothing: two flows would be handed the same pages (kernel: rebinding a dma-buf
    whose old frags are out corrupts silently).
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes: Final = size_bytes
        self._pins: dict[int, tuple[str, BufferUse]] = {}
        self._next_pin = 1

    @property
    @abstractmethod
    def kind(self) -> str:
        """What memory this is, for people: ``host memfd``, ``udmabuf``, ``dma-heap system`` …"""

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    @property
    @abstractmethod
    def dmabuf_fd(self) -> int | None:
        """The dma-buf's fd, for bind-rx and bind-tx; None for memory that is not a dma-buf (software backend only)."""

    @abstractmethod
    def view(self) -> memoryview:
        """Return all bytes as a writable memoryview of format B, shape (size_bytes,).

        Raises:
            ClosedError: the buffer is closed.
            KernelError: the memory cannot be mapped for the CPU.
        """

    @abstractmethod
    def cpu_access(self, mode: CpuAccess = CpuAccess.READ_WRITE) -> AbstractContextManager[memoryview]:
        """Bracket CPU access, so that CPU and device see each other's writes; yields ``view()``.

        Kernel: ioctl DMA_BUF_IOCTL_SYNC START and END on the dma-buf; nothing for plain host memory.
        """

    @abstractmethod
    def array(self, dtype: npt.DTypeLike = np.uint8, *, offset: int = 0, count: int = -1) -> npt.NDArray[Any]:
        """Return a writable NumPy view, shape (count,), of ``dtype`` from byte ``offset`` on; -1: to the end.

        Raises:
            ValueError: the range does not fit the buffer or ``dtype``.
        """

    @abstractmethod
    def __dlpack__(self, **options: Any) -> Any: ...

    @abstractmethod
    def __dlpack_device__(self) -> tuple[int, int]: ...

    def pin(self, holder: str, use: BufferUse) -> int:
        """Note a holder (for bindings) and return its pin, to give to ``unpin``.

        Raises:
            ClosedError: the buffer is closed.
            BusyError: ``use`` is RX, and another binding receives into this buffer or has frags out.
        """
        if self.closed:
            raise ClosedError(f"{self.kind} buffer is closed", hint="allocate() a new one")
        if use is BufferUse.RX:
            for other, their_use in self._pins.values():
                if their_use is BufferUse.RX:
                    raise BusyError(
                        f"buffer is still received into by {other}: bound again, its pages would be handed out twice",
                        hint="return that binding's tokens (or close its sockets) and close its places first, or "
                        "allocate() another buffer",
                    )
        number = self._next_pin
        self._next_pin += 1
        self._pins[number] = (holder, use)
        return number

    def unpin(self, number: int) -> None:
        """Forget a holder. Unknown pins are ignored."""
        if self._pins.pop(number, None) is not None and not self._pins:
            self._unused()

    def _unused(self) -> None:
        """The last holder has let go."""

    @abstractmethod
    def retire(self) -> None:
        """Close now, or once the last holder has let go. Never refused: views stay valid, and keep their memory."""

    @property
    def holders(self) -> tuple[str, ...]:
        """Who holds this buffer now, for people."""
        return tuple(holder for holder, _ in self._pins.values())

    def check_unused(self) -> None:
        """Raise BusyError if anybody holds this buffer: the first line of every ``close()``."""
        if self._pins:
            raise BusyError(
                f"buffer is in use by {', '.join(self.holders)}",
                hint="first close the binding and its places, and release its batches (or close its sockets); `with` "
                "does it in order",
            )


class Allocator(ABC):
    """Makes Buffers of one kind of device memory."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> Buffer:
        """Allocate ``size_bytes``, a positive multiple of 4096.

        Raises:
            ValueError: size is zero, negative or not page-aligned.
            OutOfDeviceMemory: more than there is, or than the exporter's limit.
            KernelError: a device node is missing or not permitted; the hint says which.
        """


def check_buffer_size(size_bytes: int) -> None:
    """Raise ValueError unless ``size_bytes`` is a positive multiple of the page size; names the next good size."""
    if size_bytes <= 0:
        raise ValueError(f"buffer size must be positive, got {size_bytes} bytes; the smallest is {PAGE_SIZE}")
    if size_bytes % PAGE_SIZE:
        good = -(-size_bytes // PAGE_SIZE) * PAGE_SIZE
        raise ValueError(f"buffer size {size_bytes} is not a multiple of {PAGE_SIZE} bytes; use {good}")
