"""What each vfio-user request does to a PCI function and to its guest's memory. Knows no socket and no stream."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab.dma import MAX_MAPS, DmaSpace
from devmem_tcp.lab.vfio_protocol import Command, IrqSet, Refused

_PAYLOAD_BYTES: Final[dict[int, tuple[int, int]]] = {  # the shortest and the longest payload of each request
    Command.VERSION: (wire.VERSION.size, wire.MAX_VERSION),
    Command.DMA_MAP: (wire.DMA_MAP.size, wire.DMA_MAP.size),
    Command.DMA_UNMAP: (wire.DMA_UNMAP.size, wire.DMA_UNMAP.size),
    Command.DEVICE_GET_INFO: (wire.DEVICE_INFO.size, wire.DEVICE_INFO.size),
    Command.DEVICE_GET_REGION_INFO: (wire.REGION_INFO.size, wire.REGION_INFO.size),
    Command.DEVICE_GET_REGION_IO_FDS: (wire.REGION_IO_FDS.size, wire.REGION_IO_FDS.size),
    Command.DEVICE_GET_IRQ_INFO: (wire.IRQ_INFO.size, wire.IRQ_INFO.size),
    Command.DEVICE_SET_IRQS: (wire.IRQ_SET.size, wire.MAX_MESSAGE),
    Command.REGION_READ: (wire.REGION_ACCESS.size, wire.REGION_ACCESS.size),
    Command.REGION_WRITE: (wire.REGION_ACCESS.size, wire.MAX_MESSAGE),
    Command.DEVICE_RESET: (0, 0),
}


class PciFunction(Protocol):
    """What the server presents: a PCI function with memory BARs and, as its only interrupts, MSI-X.

    Offsets and sizes are checked before any call: within the BAR, or within configuration space. A DmaError that a
    method raises is the guest's mistake, any other exception a fault of the function; the client gets an error reply.
    """

    @property
    def config(self) -> bytearray:
        """Configuration space, 256 bytes. The server reads it; writes go through ``write_config``."""

    @property
    def bars(self) -> Mapping[int, int]:
        """The BARs by index 0 to 5, with their sizes in bytes."""

    @property
    def msix_vectors(self) -> int:
        """How many MSI-X vectors there are."""

    def read_bar(self, bar: int, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes, 1 or more."""

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        """Take a write of 1 byte or more."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Change the writable bits of configuration space, so that all ones written to a BAR read back as its size."""

    def set_irq(self, vector: int, eventfd: int | None) -> None:
        """Fire ``vector`` from now on by this eventfd, or not at all. It never blocks: EAGAIN means it is full.

        Lifetime: the fd is the server's, and is closed when this has been called for the vector again.
        """

    def reset(self) -> None:
        """Forget everything but what the function was made with; interrupts stay as they are."""


class RequestHandler:
    """Answers the requests of one client after the other, on one PCI function.

    Lifetime: owns the eventfds of the interrupts; neither the function nor the DMA space.
    """

    def __init__(self, function: PciFunction, dma: DmaSpace) -> None:
        self._function = function
        self._dma = dma
        self._eventfds: dict[int, int] = {}  # by MSI-X vector
        self.negotiated = False  #: the client has sent VERSION
        self._methods: Final[dict[int, Callable[[bytes], bytes]]] = {
            Command.VERSION: self._version,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
        }
        self._methods_with_fds: Final[dict[int, Callable[[bytes, list[int]], bytes]]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DEVICE_SET_IRQS: self._set_irqs,
        }

    def answer(self, command: int, payload: bytes, fds: list[int]) -> bytes:
        """Do one request and return the payload of its reply.

        Args:
            fds: those that came with it. Those that are kept are taken out of the list; the rest is the caller's.

        Raises:
            Refused: the request had no effect; ``errno`` is for the reply.
            DmaError: the same, or the function raised it half-way.
            Exception: whatever else the function raised.
        """
        if not self.negotiated and command != Command.VERSION:
            raise Refused(f"command {command} before VERSION")
        if command not in _PAYLOAD_BYTES:
            raise Refused(f"unknown command {command}", errno=errno.EOPNOTSUPP)
        shortest, longest = _PAYLOAD_BYTES[command]
        if not shortest <= len(payload) <= longest:
            raise Refused(f"{Command(command).name} with {len(payload)} bytes of payload, not {shortest} to {longest}")
        if method := self._methods.get(command):
            if fds:
                raise Refused(f"{len(fds)} fds with {Command(command).name}, which takes none")
            return method(payload)
        return self._methods_with_fds[command](payload, fds)

    def disconnect(self) -> None:
        """Reset the function, take its interrupts back and unmap all memory: the client is gone.

        The specification would keep the function's state. But a NIC that goes on would write into the memory of the
        next guest before that guest's driver has seen it, so this is a power cut.
        """
        self.negotiated = False
        with contextlib.ExitStack() as steps:  # from the last one; each is done, whatever another one raised
            steps.callback(self._dma.unmap_all)
            for vector in tuple(self._eventfds):
                steps.callback(self._assign, vector, None)
            steps.callback(self._function.reset)

    # --- session and memory --------------------------------------------------------------------------------------

    def _version(self, payload: bytes) -> bytes:
        if self.negotiated:
            raise Refused("a second VERSION")
        wire.check_version(payload)
        self.negotiated = True
        return wire.build_version(MAX_MAPS)

    def _dma_map(self, payload: bytes, fds: list[int]) -> bytes:
        argsz, flags, offset, address, size = wire.DMA_MAP.unpack(payload)
        _check_argsz(argsz, wire.DMA_MAP.size)
        if flags & ~wire.MAP_WRITABLE != wire.MAP_READABLE:
            raise Refused(f"DMA_MAP with flags {flags:#x}; a map is readable, and may be writable")
        if len(fds) > 1:
            raise Refused(f"DMA_MAP with {len(fds)} fds; a map is of one file")
        self._dma.map(address, size, fds[0] if fds else -1, offset, writable=bool(flags & wire.MAP_WRITABLE))
        return b""

    def _dma_unmap(self, payload: bytes) -> bytes:
        argsz, flags, address, size = wire.DMA_UNMAP.unpack(payload)
        _check_argsz(argsz, wire.DMA_UNMAP.size)
        if flags == wire.UNMAP_ALL:
            self._dma.unmap_all()
        elif flags == 0:
            self._dma.unmap(address, size)
        else:
            raise Refused(f"DMA_UNMAP with flags {flags:#x}")
        return payload

    # --- what there is ---------------------------------------------------------------------------------------------

    def _get_info(self, payload: bytes) -> bytes:
        _check_argsz(wire.DEVICE_INFO.unpack(payload)[0], wire.DEVICE_INFO.size)
        flags = wire.DEVICE_RESETS | wire.DEVICE_IS_PCI
        return wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, flags, wire.REGIONS, wire.IRQ_KINDS)

    def _get_region_info(self, payload: bytes) -> bytes:
        argsz, _, region, *_ = wire.REGION_INFO.unpack(payload)
        _check_argsz(argsz, wire.REGION_INFO.size)
        size = self._region_bytes(region)
        flags = wire.REGION_READ_WRITE if size else 0
        return wire.REGION_INFO.pack(wire.REGION_INFO.size, flags, region, 0, size, 0)

    def _get_region_io_fds(self, payload: bytes) -> bytes:
        argsz, flags, region, _ = wire.REGION_IO_FDS.unpack(payload)
        _check_argsz(argsz, wire.REGION_IO_FDS.size)
        if flags:
            raise Refused(f"DEVICE_GET_REGION_IO_FDS with flags {flags:#x}")
        self._region_bytes(region)
        return wire.REGION_IO_FDS.pack(wire.REGION_IO_FDS.size, 0, region, 0)

    def _get_irq_info(self, payload: bytes) -> bytes:
        argsz, _, kind, _ = wire.IRQ_INFO.unpack(payload)
        _check_argsz(argsz, wire.IRQ_INFO.size)
        count = self._irq_count(kind)
        # No NORESIZE: vectors may be set one by one, which is what QEMU then does.
        return wire.IRQ_INFO.pack(wire.IRQ_INFO.size, wire.IRQ_EVENTFD if count else 0, kind, count)

    def _region_bytes(self, region: int) -> int:
        if region >= wire.REGIONS:
            raise Refused(f"region {region}; there are {wire.REGIONS}")
        return wire.CONFIG_BYTES if region == wire.CONFIG_REGION else self._function.bars.get(region, 0)

    def _irq_count(self, kind: int) -> int:
        if kind >= wire.IRQ_KINDS:
            raise Refused(f"interrupts of kind {kind}; there are {wire.IRQ_KINDS}")
        return self._function.msix_vectors if kind == wire.MSIX_IRQ else 0

    # --- registers -------------------------------------------------------------------------------------------------

    def _region_read(self, payload: bytes) -> bytes:
        offset, region, count = wire.REGION_ACCESS.unpack(payload)
        self._check_access(region, offset, count)
        if region == wire.CONFIG_REGION:
            data = bytes(self._function.config[offset : offset + count])
        else:
            data = self._function.read_bar(region, offset, count)
        if len(data) != count:
            raise RuntimeError(f"the PCI function gave {len(data)} bytes of region {region} for {count}")
        return payload + data

    def _region_write(self, payload: bytes) -> bytes:
        head, data = payload[: wire.REGION_ACCESS.size], payload[wire.REGION_ACCESS.size :]
        offset, region, count = wire.REGION_ACCESS.unpack(head)
        if len(data) != count:
            raise Refused(f"REGION_WRITE of {count} bytes that brings {len(data)}")
        self._check_access(region, offset, count)
        if region == wire.CONFIG_REGION:
            self._function.write_config(offset, data)
        else:
            self._function.write_bar(region, offset, data)
        return head

    def _check_access(self, region: int, offset: int, count: int) -> None:
        size = self._region_bytes(region)
        if not 0 < count <= wire.MAX_TRANSFER or offset + count > size:
            raise Refused(f"access to {count} bytes at {offset:#x} of region {region}, which has {size:#x}")

    def _reset(self, payload: bytes) -> bytes:
        self._function.reset()
        return payload

    # --- interrupts ------------------------------------------------------------------------------------------------

    def _set_irqs(self, payload: bytes, fds: list[int]) -> bytes:
        head, bools = payload[: wire.IRQ_SET.size], payload[wire.IRQ_SET.size :]
        argsz, flags, kind, start, count = wire.IRQ_SET.unpack(head)
        _check_argsz(argsz, wire.IRQ_SET.size)
        if start + count > self._irq_count(kind):
            raise Refused(
                f"interrupts {start} to {start + count - 1} of kind {kind}, which has {self._irq_count(kind)}"
            )
        if len(bools) != (count if flags & IrqSet.DATA_BOOL else 0):
            raise Refused(f"DEVICE_SET_IRQS of {count} interrupts, flags {flags:#x}, with {len(bools)} bytes of data")
        if fds and not flags & IrqSet.DATA_EVENTFD:
            raise Refused(f"{len(fds)} fds with DEVICE_SET_IRQS, flags {flags:#x}, which takes none")
        vectors = range(start, start + count)
        if flags == IrqSet.DATA_EVENTFD | IrqSet.TRIGGER and count:
            self._assign_all(vectors, fds)
        elif flags == IrqSet.DATA_NONE | IrqSet.TRIGGER and count:
            self._fire(vectors)
        elif flags == IrqSet.DATA_NONE | IrqSet.TRIGGER and start == 0:
            self._assign_all(range(self._irq_count(kind)), [])
        elif flags == IrqSet.DATA_BOOL | IrqSet.TRIGGER and count:
            self._fire([vector for vector, wanted in zip(vectors, bools, strict=True) if wanted])
        else:  # masking too: MSI-X vectors are masked in their table, which is the client's
            raise Refused(f"DEVICE_SET_IRQS of {count} interrupts with flags {flags:#x}", errno=errno.EOPNOTSUPP)
        return b""

    def _assign_all(self, vectors: range, fds: list[int]) -> None:
        """Give each vector its eventfd, or with no fds take all of theirs away."""
        if fds and len(fds) != len(vectors):
            raise Refused(f"{len(fds)} eventfds for {len(vectors)} interrupts")
        for fd in fds:
            _check_eventfd(fd)
        for vector in vectors:
            self._assign(vector, fds.pop(0) if fds else None)

    def _assign(self, vector: int, eventfd: int | None) -> None:
        before = self._eventfds.pop(vector, None)
        if eventfd is not None:
            self._eventfds[vector] = eventfd
        try:
            self._function.set_irq(vector, eventfd)
        finally:
            if before is not None:
                os.close(before)

    def _fire(self, vectors: range | list[int]) -> None:
        """Fire interrupts because the client said so; those without an eventfd are none."""
        for vector in vectors:
            if vector in self._eventfds:
                with contextlib.suppress(BlockingIOError):  # full: it has fired 2^64 - 2 times unseen
                    os.eventfd_write(self._eventfds[vector], 1)


def _check_argsz(argsz: int, needed: int) -> None:
    if argsz < needed:
        raise Refused(f"argsz is {argsz}, less than the {needed} bytes of the structure")


def _check_eventfd(fd: int) -> None:
    """Make sure that firing an interrupt can do nothing but count: not block, not write into some other file."""
    target = os.readlink(f"/proc/self/fd/{fd}")
    if target != "anon_inode:[eventfd]":
        raise Refused(f"an interrupt's fd is {target}, not an eventfd")
    os.set_blocking(fd, False)
