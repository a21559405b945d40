"""The vfio-user server under hostile clients: arbitrary bytes, mutated requests, wrong fds.

What must hold after each input: no exception, no endless readiness, replies that are well formed, guest memory exactly
as a page table of the accepted maps says, and, when the client has gone, no fd left. By hand, a million of them::

    cd tests/lab && python -c "from test_vfio_user_fuzz import fuzz; print(fuzz(1_000_000, seed=1))"
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.lab import vfio_protocol as wire
from devmem_tcp.lab.dma import DmaError, DmaSpace
from devmem_tcp.lab.vfio_protocol import Command, IrqSet
from devmem_tcp.lab.vfio_user import ServerStats, VfioUserServer
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


class Entry(NamedTuple):
    """What a page of the address space must be: a page of the guest's file."""

    offset: int
    writable: bool


class JudgedSpace(DmaSpace):
    """A DMA space beside a page table; each map that is accepted must be whole pages of the file, and free."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self.inode = os.fstat(file).st_ino
        self.table: dict[int, Entry | None] = {}  # None: mapped without a file

    def map(self, address: int, size: int, fd: int, offset: int, *, writable: bool) -> None:
        super().map(address, size, fd, offset, writable=writable)
        assert address % PAGE == size % PAGE == 0 < size
        assert address + size <= 1 << 64
        if fd >= 0:
            assert os.fstat(fd).st_ino == self.inode
            assert offset % PAGE == 0
            assert offset + size <= FILE_PAGES * PAGE
        # A map without file may be huge: its two ends and what is near the others stand for all of it.
        for page in range(address // PAGE, min((address + size) // PAGE, address // PAGE + 2 * ADDRESS_PAGES)):
            assert page not in self.table
            self.table[page] = Entry(offset // PAGE + page - address // PAGE, writable) if fd >= 0 else None

    def unmap(self, address: int, size: int) -> None:
        super().unmap(address, size)
        for page in [page for page in self.table if address <= page * PAGE < address + size]:
            del self.table[page]

    def unmap_all(self) -> None:
        super().unmap_all()
        self.table.clear()


class JudgedFunction(DmaFunction):
    """Does DMA as the client says, and the same to a copy of the file by way of the page table."""

    def __init__(self, dma: JudgedSpace) -> None:
        super().__init__(dma)
        self.judged = dma
        self.file = bytearray(CANARY)

    def transfer(self, address: int, size: int, value: int) -> None:
        size = min(size, PAGE if value == ENGINE_READ else 4 * PAGE)
        pages = range(address // PAGE, (address + size - 1) // PAGE + 1) if size else range(0)
        entries = [self.judged.table.get(page) for page in pages]
        try:
            super().transfer(address, size, value)
        except DmaError:
            assert not all(entry and (entry.writable or value == ENGINE_READ) for entry in entries)
            raise
        for page, entry in zip(pages, entries, strict=True):
            assert entry is not None
            start, end = max(address, page * PAGE), min(address + size, (page + 1) * PAGE)
            place = slice(entry.offset * PAGE + start % PAGE, entry.offset * PAGE + start % PAGE + end - start)
            if value == ENGINE_READ:
                assert self.registers[start - address : end - address] == self.file[place]
            else:
                assert entry.writable
                self.file[place] = bytes([value & 0xFF]) * (end - start)


class Arena:
    """A server, a client that can be replaced, a guest's file, and the judgement after each input."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, "nic.sock")
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
        assert self.server.counters.function_faults == 0
        unharmed = os.pread(self.memory, len(CANARY) + 1, 0) == self.function.file  # apart: a diff would take minutes
        assert unharmed, "a byte of the guest's file is not what was written to it"
        if self.client.closed_by_server or not ends_a_message(b"".join(pieces)):
            self.reconnect()

    def reconnect(self) -> None:
        """Replace the client. The old one may have left a message half sent; nothing of it may stay."""
        self.client.close()
        assert open_fds() == self.fds_idle
        assert not self.dma.table
        assert not self.function.irqs
        self.client = self.connect()

    def close(self) -> None:
        self.reconnect()
        self.client.close()
        self.server.close()
        for fd in self.fds:
            os.close(fd)


@contextmanager
def arena() -> Iterator[Arena]:
    """Yield an Arena. A failed judgement in the function is an AssertionError there, so a fault of the function."""
    log = logging.getLogger("devmem_tcp.lab.vfio_user")
    before = log.level
    log.setLevel(logging.ERROR)  # refusals are what this is about; faults are still shown
    with tempfile.TemporaryDirectory() as directory:
        made = Arena(directory)
        try:
            yield made
        finally:
            made.close()
            log.setLevel(before)


def ends_a_message(data: bytes) -> bool:
    """Say whether the server is left waiting for a new message, not for the rest of one."""
    while len(data) >= wire.HEADER.size:
        size = wire.HEADER.unpack_from(data)[2]
        if not wire.HEADER.size <= size <= len(data):
            return False
        data = data[size:]
    return not data


# --- inputs ----------------------------------------------------------------------------------------------------------


def valid_message(rng: random.Random) -> tuple[bytes, int]:
    """Return a request that makes sense by itself, and how many fds should come with it."""
    page, count = rng.randrange(ADDRESS_PAGES), rng.randrange(1, 4)
    choice = rng.randrange(12)
    if choice <= 1:
        offset, flags = rng.randrange(FILE_PAGES) * PAGE, rng.choice((1, 3, 3))
        return dma_map(page * PAGE, count * PAGE, offset=offset, flags=flags), rng.choice((0, 1, 1, 1))
    if choice == 2:
        return dma_unmap(page * PAGE, count * PAGE, flags=wire.UNMAP_ALL if rng.randrange(16) == 0 else 0), 0
    if choice <= 6:
        address, size = page * PAGE + rng.choice((0, 0, 1, 4000, 4095)), rng.choice((0, 1, 2, 8, 96, 97, 4096, 9000))
        return engine(address, size, rng.choice((rng.randrange(256), ENGINE_READ))), 0
    if choice == 7:
        flags = rng.choice((0x24, 0x24, 0x21, 0x22, 1 << rng.randrange(6)))
        count = rng.randrange(5)
        data = bytes(rng.randrange(2) for _ in range(count)) if flags & IrqSet.DATA_BOOL else b""
        return set_irqs(flags, rng.randrange(5), count, data), rng.choice((0, count))
    if choice == 8:
        return region_read(rng.choice((0, 2, 7, 9)), rng.choice((0, 16, 255, 4095)), rng.choice((1, 4, 64, 256))), 0
    if choice == 9:
        return region_write(rng.choice((0, 7)), rng.choice((0, 16, 252, 4092)), rng.randbytes(4)), 0
    command = rng.choice((*Command, 11, 12, 14, 15, 16))
    return (version() if command == Command.VERSION else message(command, bytes([rng.randrange(64)]) + bytes(15))), 0


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Change a request in one place: a byte, a field, or its length, with or without its header knowing."""
    changed = bytearray(data)
    choice = rng.randrange(6)
    if choice == 0:
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif choice == 1 and len(changed) > wire.HEADER.size:
        at = rng.randrange(wire.HEADER.size, len(changed)) & ~3
        changed[at : at + 4] = rng.choice(INTERESTING).to_bytes(4, "little")
    elif choice == 2 and len(changed) > wire.HEADER.size:
        at = rng.randrange(wire.HEADER.size, len(changed)) & ~7
        changed[at : at + 8] = rng.choice(INTERESTING_64).to_bytes(8, "little")
    elif choice == 3:
        changed[8:12] = rng.choice((wire.NO_REPLY, wire.NO_REPLY, wire.ERROR, 1, 2)).to_bytes(4, "little")
    elif choice == 4:
        changed += rng.randbytes(rng.randrange(1, 40))
    else:
        del changed[rng.randrange(wire.HEADER.size, len(changed) + 1) :]
    if rng.randrange(8):
        changed[4:8] = len(changed).to_bytes(4, "little")
    return bytes(changed)


def make_input(rng: random.Random, fds: Sequence[int]) -> tuple[list[bytes], list[int]]:
    """Return the pieces of one input and its fds."""
    kind = rng.randrange(16)
    if kind == 0:
        return [rng.randbytes(rng.randrange(1, 100))], []
    data, wanted = valid_message(rng)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        data = mutate(rng, data)
    if kind == 1:
        data += b"".join(valid_message(rng)[0] for _ in range(rng.randrange(4)))
    count = wanted if rng.randrange(8) else rng.choice((0, 1, 2, 16, 17))
    given_fds = [rng.choice(fds) if rng.randrange(4) == 0 else fds[0] for _ in range(count)]
    if data[2:4] == b"\x08\0" and rng.randrange(4):
        given_fds = [fds[2]] * count
    cut = rng.randrange(1, len(data)) if kind == 2 else len(data)
    return [piece for piece in (data[:cut], data[cut:]) if piece], given_fds


def fuzz(inputs: int, seed: int) -> tuple[ServerStats, float]:
    """Feed so many inputs, the same for the same seed; return the server's counters and inputs per second."""
    rng = random.Random(seed)
    with arena() as made:
        began = time.perf_counter()
        for number in range(inputs):
            pieces, fds = make_input(rng, made.fds)
            try:
                made.feed(pieces, fds)
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}: {pieces!r} with fds {fds}")
                raise
            if number % 100 == 99:
                made.reconnect()  # or one huge map without file would keep the addresses for the rest of the run
        return made.server.counters, inputs / (time.perf_counter() - began)


# --- tests -----------------------------------------------------------------------------------------------------------


def test_mutated_requests_do_no_harm() -> None:
    counters, _ = fuzz(5000, seed=0)
    assert counters.errors > 500  # it was hostile
    assert counters.broken > 100
    assert counters.messages - counters.errors > 1000  # and yet got far


@given(pieces=st.lists(st.binary(min_size=1, max_size=200), max_size=4), negotiated=st.booleans())
def test_arbitrary_bytes_do_no_harm(pieces: list[bytes], negotiated: bool) -> None:
    with arena() as made:
        if not negotiated:
            made.client.close()
            made.client = Client(made.server, made.path, negotiate=False)
        made.feed(pieces)


commands = st.sampled_from([*Command, 0, 11, 12, 15])
requests = st.builds(message, commands, st.binary(max_size=64), flags=st.sampled_from([0, wire.NO_REPLY, 1, 0x20]))
seeds = st.integers(0, (1 << 32) - 1)


@given(requests=st.lists(requests, min_size=1, max_size=5), fds=st.lists(st.integers(0, 4), max_size=3))
def test_arbitrary_payloads_do_no_harm(requests: list[bytes], fds: list[int]) -> None:
    with arena() as made:
        made.feed(requests, [made.fds[index] for index in fds])


@given(seed=seeds)
def test_short_hostile_sessions_do_no_harm(seed: int) -> None:
    fuzz(20, seed)


def test_the_judgement_notices_a_write_outside_what_was_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space that forgets where a map ends must not pass here."""

    def careless(self: DmaSpace, address: int, data: bytes) -> None:
        os.pwrite(made.memory, data, address % PAGE)

    with arena() as made:
        made.feed([engine(0, 8, 0x55), region_write(REGISTERS, 0, b"ok")])
        monkeypatch.setattr(DmaSpace, "write", careless)
        with pytest.raises(AssertionError):
            made.feed([engine(0, 8, 0xAA)])
        made.function.file[:] = os.pread(made.memory, len(CANARY), 0)  # let it close in peace
