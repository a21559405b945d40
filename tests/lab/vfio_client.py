"""A vfio-user client for tests, as QEMU is one, and a small PCI function with a DMA engine for it to talk to."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self

from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab.dma import DmaSpace
from devmem_tcp.lab.vfio_protocol import Command, IrqSet
from devmem_tcp.lab.vfio_user import VfioUserServer

PAGE: Final = 4096
REGISTERS: Final = 0  # BARs of DmaFunction
ENGINE: Final = 2
ENGINE_READ: Final = 0x100
ASSIGN: Final = IrqSet.DATA_EVENTFD | IrqSet.TRIGGER
DISABLE: Final = IrqSet.DATA_NONE | IrqSet.TRIGGER
_ENGINE: Final = struct.Struct("<QII")  # address, size, byte to fill with or ENGINE_READ
_BAR0_MASK: Final = struct.pack("<I", ~(PAGE - 1) & 0xFFFFFFFF)


class DmaFunction:
    """A PCI function: BAR 0 keeps what is written to it; a write to BAR 2 makes it fill or read guest memory."""

    def __init__(self, dma: DmaSpace) -> None:
        self.dma = dma
        self.config = bytearray(range(256))
        self.config[0x10:0x14] = bytes(4)
        self.bars: Mapping[int, int] = {REGISTERS: PAGE, ENGINE: 64}
        self.msix_vectors = 4
        self.registers = bytearray(PAGE)
        self.calls: list[tuple[object, ...]] = []
        self.irqs: dict[int, int] = {}
        self.resets = 0

    def read_bar(self, bar: int, offset: int, size: int) -> bytes:
        assert 0 <= offset < offset + size <= self.bars[bar]
        return bytes(self.registers[offset : offset + size]) if bar == REGISTERS else bytes(size)

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        assert 0 <= offset < offset + len(data) <= self.bars[bar]
        if bar == REGISTERS:
            self.registers[offset : offset + len(data)] = data
        elif len(data) == _ENGINE.size:
            self.transfer(*_ENGINE.unpack(data))

    def transfer(self, address: int, size: int, value: int) -> None:
        if value == ENGINE_READ:
            data = self.dma.read(address, min(size, PAGE))
            self.registers[: len(data)] = data
        else:
            self.dma.write(address, bytes([value & 0xFF]) * min(size, 4 * PAGE))

    def write_config(self, offset: int, data: bytes) -> None:
        assert 0 <= offset < offset + len(data) <= len(self.config)
        for at, byte in enumerate(data, offset):
            mask = _BAR0_MASK[at - 0x10] if 0x10 <= at < 0x14 else 0
            self.config[at] = self.config[at] & ~mask | byte & mask

    def set_irq(self, vector: int, eventfd: int | None) -> None:
        assert 0 <= vector < self.msix_vectors
        if eventfd is None:
            self.irqs.pop(vector, None)
        else:
            self.irqs[vector] = eventfd

    def reset(self) -> None:
        self.registers[:] = bytes(PAGE)
        self.resets += 1


class Reply(NamedTuple):
    """A reply: ``errno`` is 0 unless it is an error reply."""

    id: int
    command: int
    errno: int
    payload: bytes


def pump(server: VfioUserServer, rounds: int = 1000) -> None:
    """Call ``ready()`` while the server has something to do; fail if it still has after so many rounds."""
    for _ in range(rounds):
        if not select.select([server], [], [], 0)[0]:
            return
        server.ready()
    raise AssertionError(f"the server is still ready after {rounds} rounds: it spins")


def message(command: int, payload: bytes = b"", *, flags: int = 0, message_id: int = 7) -> bytes:
    """Build a request."""
    return wire.HEADER.pack(message_id, command, wire.HEADER.size + len(payload), flags, 0) + payload


def version(capabilities: bytes = b'{"capabilities":{"max_msg_fds":16}}\0', major: int = 0, minor: int = 0) -> bytes:
    return message(Command.VERSION, wire.VERSION.pack(major, minor) + capabilities)


def dma_map(address: int, size: int, *, offset: int = 0, flags: int = 3) -> bytes:
    return message(Command.DMA_MAP, wire.DMA_MAP.pack(wire.DMA_MAP.size, flags, offset, address, size))


def dma_unmap(address: int, size: int, *, flags: int = 0) -> bytes:
    return message(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, flags, address, size))


def set_irqs(flags: int, start: int, count: int, data: bytes = b"", *, kind: int = wire.MSIX_IRQ) -> bytes:
    head = wire.IRQ_SET.pack(wire.IRQ_SET.size + len(data), flags, kind, start, count)
    return message(Command.DEVICE_SET_IRQS, head + data)


def region_read(region: int, offset: int, count: int) -> bytes:
    return message(Command.REGION_READ, wire.REGION_ACCESS.pack(offset, region, count))


def region_write(region: int, offset: int, data: bytes, *, flags: int = 0) -> bytes:
    return message(Command.REGION_WRITE, wire.REGION_ACCESS.pack(offset, region, len(data)) + data, flags=flags)


def engine(address: int, size: int, value: int, *, flags: int = 0) -> bytes:
    """A register write that makes DmaFunction fill guest memory with ``value``, or read it (ENGINE_READ)."""
    return region_write(ENGINE, 0, _ENGINE.pack(address, size, value), flags=flags)


class Client:
    """One connection to a server in this thread: what is sent is handled before ``send`` returns."""

    def __init__(self, server: VfioUserServer, path: str, *, negotiate: bool = True) -> None:
        self._server = server
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.socket.setblocking(False)
        self._received = b""
        if negotiate:
            assert self.call(version()).errno == 0

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes in one piece with fds, and let the server handle them. A closed connection is no error here."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        view = memoryview(data)
        try:
            while view:
                view = view[self.socket.sendmsg([view], rights) :]
                rights = []
                pump(self._server)
        except (BrokenPipeError, ConnectionResetError):
            pass
        pump(self._server)

    def replies(self) -> list[Reply]:
        """Return the replies that have come, and check that each is well formed."""
        while data := self._receive():
            self._received += data
            pump(self._server)  # a large reply is sent in pieces
        found = []
        while len(self._received) >= wire.HEADER.size:
            message_id, command, size, flags, code = wire.HEADER.unpack_from(self._received)
            assert size >= wire.HEADER.size
            if len(self._received) < size:
                break
            assert (flags, bool(code)) in ((wire.REPLY, False), (wire.REPLY | wire.ERROR, True))
            assert not code or size == wire.HEADER.size
            found.append(Reply(message_id, command, code, self._received[wire.HEADER.size : size]))
            self._received = self._received[size:]
        return found

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(1 << 21)
        except (BlockingIOError, ConnectionResetError):
            return b""

    def call(self, data: bytes, fds: Sequence[int] = ()) -> Reply:
        """Send one request and return its reply."""
        self.send(data, fds)
        (reply,) = self.replies()
        assert (reply.id, reply.command) == struct.unpack_from("<HH", data)
        return reply

    @property
    def closed_by_server(self) -> bool:
        try:
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()
        pump(self._server)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_fds() -> int:
    """Count the open fds of this process."""
    return len(os.listdir("/proc/self/fd"))


@dataclass
class Served:
    """A server with its function, and the path that clients connect to."""

    path: str
    dma: DmaSpace
    function: DmaFunction
    server: VfioUserServer

    def connect(self, *, negotiate: bool = True) -> Client:
        return Client(self.server, self.path, negotiate=negotiate)


def refused(served: Served, client: Client, data: bytes, code: int, fds: tuple[int, ...] = ()) -> None:
    """Check that a request is refused with ``code`` and counted, that no fd stays, and that the connection does."""
    before, errors = open_fds(), served.server.counters.errors
    reply = client.call(data, fds)
    assert (errno.errorcode[reply.errno], reply.payload) == (errno.errorcode[code], b"")
    assert served.server.counters.errors == errors + 1
    assert open_fds() == before
    assert client.call(message(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0))).errno == 0
