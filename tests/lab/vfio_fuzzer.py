"""The vfio-user server under a hostile client: arbitrary bytes, mutated requests, wrong fds.

An input is one write of the client: one message, whole, mutated, cut in two or followed by others, with the fds that
come with it; or the end of its connection. What must hold after each: no exception, no endless readiness, replies that
are well formed, guest memory exactly as a list of the accepted maps says; when the client has gone, no fd is left, no
map and no interrupt, and the next client finds a server that works.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Final

from choices import Choices
from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab.vfio_protocol import Command, IrqSet
from devmem_tcp.lab.vfio_user import VfioUserServer
from fuzz_judge import JudgedSpace, run_case
from vfio_client import (
    ENGINE_READ,
    PAGE,
    REGISTERS,
    Client,
    DmaFunction,
    dma_map,
    dma_unmap,
    engine,
    message,
    open_fds,
    region_read,
    region_write,
    set_irqs,
    version,
)

FILE_PAGES: Final = 8
CANARY: Final = b"".join(bytes([0xC0 + page]) * PAGE for page in range(FILE_PAGES))
ADDRESS_PAGES: Final = 12  # small, so that maps meet
INTERESTING: Final = (0, 1, 2, 4, 15, 16, 17, 24, 255, 256, 4095, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
INTERESTING_64: Final = (*INTERESTING, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1)
COMMANDS: Final = (*Command, 11, 12, 14, 15, 16)


class JudgedFunction(DmaFunction):
    """Does DMA as the client says, and the same to a copy of the guest's file."""

    def __init__(self, dma: JudgedSpace) -> None:
        super().__init__(dma)
        self.judged = dma
        self.file = bytearray(CANARY)

    def transfer(self, address: int, size: int, value: int) -> None:
        size = min(size, PAGE if value == ENGINE_READ else 4 * PAGE)
        super().transfer(address, size, value)
        if value == ENGINE_READ:
            return
        for place in self.judged.places(address, size, writing=True) or ():
            self.file[place] = bytes([value & 0xFF]) * (place.stop - place.start)


class Arena:
    """A server, a client that can be replaced, a guest's file, and the judgement after each input."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.directory.name, "nic.sock")
        self.memory = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(self.memory, CANARY)
        self.read_only = os.open(f"/proc/self/fd/{self.memory}", os.O_RDONLY | os.O_CLOEXEC)
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.pipe = os.pipe()
        self.fds: Final = (self.memory, self.read_only, self.eventfd, *self.pipe)
        self.dma = JudgedSpace(self.memory)
        self.function = JudgedFunction(self.dma)
        self.server = VfioUserServer(self.path, self.function, self.dma)
        self.fds_idle = open_fds()
        self.client = self.connect()

    def connect(self) -> Client:
        """Connect as a guest with some memory: 4 pages to write, 2 to read, 1 out of reach."""
        client = Client(self.server, self.path)
        client.call(dma_map(0, 4 * PAGE, offset=2 * PAGE), [self.memory])
        client.call(dma_map(5 * PAGE, 2 * PAGE, offset=PAGE, flags=wire.MAP_READABLE), [self.memory])
        client.call(dma_map(8 * PAGE, PAGE))
        return client

    def feed(self, pieces: Sequence[bytes], fds: Sequence[int] = ()) -> None:
        """Send one input, the fds with its first piece, and judge what came of it."""
        for piece in pieces:
            self.client.send(piece, fds)
            fds = ()
        self.client.replies()
        # A failed judgement in the function is an AssertionError there, so a fault of the function.
        assert self.server.counters.function_faults == 0
        unharmed = os.pread(self.memory, len(CANARY) + 1, 0) == self.function.file  # apart: a diff would take minutes
        assert unharmed, "a byte of the guest's file is not what was written to it"
        if self.client.closed_by_server or not ends_a_message(b"".join(pieces)):
            self.reconnect()

    def reconnect(self) -> None:
        """Replace the client. The old one may have left a message half sent; nothing of it may stay."""
        self.client.close()
        assert open_fds() == self.fds_idle
        assert not self.dma.ranges
        assert not self.function.irqs
        self.client = self.connect()

    def check(self) -> None:
        """Check that a new client is served: memory, registers and a reset."""
        self.reconnect()
        self.feed([engine(PAGE - 2, 4, 0x5A), engine(PAGE - 4, 8, ENGINE_READ)])
        reply = self.client.call(region_read(REGISTERS, 0, 8))
        assert reply.payload[-8:] == self.function.file[3 * PAGE - 4 : 3 * PAGE + 4]
        assert reply.payload[-6:-2] == b"\x5a" * 4
        assert self.client.call(message(Command.DEVICE_RESET)).errno == 0
        assert self.client.call(region_read(REGISTERS, 0, 8)).payload[-8:] == bytes(8)

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.dma.close()
        for fd in self.fds:
            os.close(fd)
        self.directory.cleanup()


def ends_a_message(data: bytes) -> bool:
    """Say whether the server is left waiting for a new message, not for the rest of one."""
    while len(data) >= wire.HEADER.size:
        size = wire.HEADER.unpack_from(data)[2]
        if not wire.HEADER.size <= size <= len(data):
            return False
        data = data[size:]
    return not data


class HostileClient:
    """A vfio-user client that does what its choices say. Throws inputs at an Arena."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.arena = Arena()

    def step(self) -> None:
        """Throw one input."""
        if self.choices.once_in(64):
            self.arena.reconnect()  # or one huge map without file would keep the addresses for the rest of the case
        else:
            self.arena.feed(*self.make_input())

    def finish(self) -> None:
        self.arena.check()

    def count(self, tally: Counter[str]) -> None:
        counters = self.arena.server.counters
        tally["messages"] += counters.messages
        tally["messages refused"] += counters.errors
        tally["connections broken"] += counters.broken
        tally["memory accesses"] += self.arena.dma.accesses
        tally["memory accesses refused"] += self.arena.dma.refusals

    def close(self) -> None:
        self.arena.close()

    # --- inputs ---

    def make_input(self) -> tuple[list[bytes], list[int]]:
        """Return the pieces of one input and its fds."""
        choices, fds = self.choices, self.arena.fds
        kind = choices.integer(0, 15)
        if kind == 15:
            return [choices.data(choices.integer(1, 100))], []
        data, wanted = self.valid_message()
        for _ in range(choices.one_of((0, 0, 0, 1, 1, 2))):
            data = self.mutate(data)
        if kind == 14:
            data += b"".join(self.valid_message()[0] for _ in range(choices.integer(0, 3)))
        count = choices.one_of((0, 1, 2, 16, 17)) if choices.once_in(8) else wanted
        given_fds = [choices.one_of(fds) if choices.once_in(4) else fds[0] for _ in range(count)]
        if data[2:4] == b"\x08\0" and not choices.once_in(4):
            given_fds = [self.arena.eventfd] * count
        cut = choices.integer(1, len(data) - 1) if kind == 13 else len(data)
        return [piece for piece in (data[:cut], data[cut:]) if piece], given_fds

    def valid_message(self) -> tuple[bytes, int]:
        """Return a request that makes sense by itself, and how many fds should come with it."""
        choices = self.choices
        kind = choices.integer(0, 11)
        if kind <= 3:
            address = choices.integer(0, ADDRESS_PAGES - 1) * PAGE + choices.one_of((0, 0, 1, 4000, 4095))
            size = choices.one_of((8, 0, 1, 2, 96, 97, 4096, 9000))
            return engine(address, size, ENGINE_READ if choices.once_in(2) else choices.integer(0, 255)), 0
        if kind <= 6:
            place, size = choices.integer(0, ADDRESS_PAGES - 1) * PAGE, choices.integer(1, 3) * PAGE
            if kind == 6:
                return dma_unmap(place, size, flags=wire.UNMAP_ALL if choices.once_in(16) else 0), 0
            offset = choices.integer(0, FILE_PAGES - 1) * PAGE
            return dma_map(place, size, offset=offset, flags=choices.one_of((3, 3, 1))), choices.one_of((1, 1, 1, 0))
        if kind == 7:
            flags = choices.one_of((0x24, 0x24, 0x21, 0x22, 1, 2, 4, 8, 16, 32))
            count = choices.integer(0, 4)
            data = bytes(byte & 1 for byte in choices.data(count)) if flags & IrqSet.DATA_BOOL else b""
            return set_irqs(flags, choices.integer(0, 4), count, data), choices.one_of((count, 0))
        if kind <= 9:
            region, end = choices.one_of(((REGISTERS, PAGE), (wire.CONFIG_REGION, wire.CONFIG_BYTES), (2, 64), (9, 0)))
            offset = max(end - choices.integer(0, 5), 0) if choices.once_in(2) else choices.one_of((0, 16, 96))
            size = choices.one_of((4, 1, 2, 5, 64, 256))
            if kind == 8:
                return region_read(region, offset, size), 0
            return region_write(region, offset, choices.data(size)), 0
        command = choices.one_of(COMMANDS)
        if command == Command.VERSION:
            return version(), 0
        return message(command, bytes([choices.integer(0, 63)]) + bytes(15)), 0

    def mutate(self, data: bytes) -> bytes:
        """Change a request in one place: a byte, a field, or its length, with or without its header knowing."""
        choices = self.choices
        changed = bytearray(data)
        kind = choices.integer(0, 5)
        if kind == 0:
            changed[choices.integer(0, len(changed) - 1)] = choices.integer(0, 255)
        elif kind == 1 and len(changed) > wire.HEADER.size:
            at = choices.integer(wire.HEADER.size, len(changed) - 1) & ~3
            changed[at : at + 4] = choices.one_of(INTERESTING).to_bytes(4, "little")
        elif kind == 2 and len(changed) > wire.HEADER.size:
            at = choices.integer(wire.HEADER.size, len(changed) - 1) & ~7
            changed[at : at + 8] = choices.one_of(INTERESTING_64).to_bytes(8, "little")
        elif kind == 3:
            changed[8:12] = choices.one_of((wire.NO_REPLY, wire.NO_REPLY, wire.ERROR, 1, 2)).to_bytes(4, "little")
        elif kind == 4:
            changed += choices.data(choices.integer(1, 39))
        else:
            del changed[choices.integer(wire.HEADER.size, len(changed)) :]
        if not choices.once_in(8):
            changed[4:8] = len(changed).to_bytes(4, "little")
        return bytes(changed)


def run(case: bytes, tally: Counter[str]) -> None:
    """Run one case; see ``run_case``."""
    run_case(HostileClient, case, tally)
