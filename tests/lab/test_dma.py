"""The DMA space: what is mapped can be reached, nothing else can, and maps come and go as QEMU makes them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.lab.dma import MAX_MAPS, DmaError, DmaSpace

PAGE = 4096
PAGES = 8
CONTENT = bytes(range(1, PAGES + 1))  # of each page: its number, counted from 1


@pytest.fixture
def memory() -> Iterator[int]:
    fd = make_memory()
    yield fd
    os.close(fd)


@pytest.fixture
def dma() -> Iterator[DmaSpace]:
    space = DmaSpace()
    yield space
    space.close()


def make_memory() -> int:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"".join(bytes([page]) * PAGE for page in CONTENT))
    return fd


def peek(dma: DmaSpace, address: int, size: int) -> bytes:
    return bytes(dma.read(address, size))


def refusal(error: pytest.ExceptionInfo[DmaError]) -> int:
    return error.value.errno


def test_reads_and_writes_reach_the_file_at_the_mapped_offset(dma: DmaSpace, memory: int) -> None:
    dma.map(0x10000, 2 * PAGE, memory, 3 * PAGE, writable=True)
    assert peek(dma, 0x10000, 2 * PAGE) == b"\x04" * PAGE + b"\x05" * PAGE
    dma.write(0x10000 + PAGE - 2, b"abcd")
    assert os.pread(memory, 6, 4 * PAGE - 3) == b"\x04abcd\x05"
    view = dma.view(0x10000 + PAGE, 3)
    view[:] = b"xyz"
    assert peek(dma, 0x10000 + PAGE, 4) == b"xyz\x05"


def test_a_read_is_read_only_and_sees_later_changes(dma: DmaSpace, memory: int) -> None:
    dma.map(0, PAGE, memory, 0, writable=True)
    seen = dma.read(8, 4)
    assert seen.readonly
    assert (seen.format, seen.itemsize) == ("B", 1)
    dma.write(8, b"wxyz")
    assert bytes(seen) == b"wxyz"


@pytest.mark.parametrize(
    ("address", "size"),
    [(0xFFFF, 1), (0xFFFF, 2), (0x12000, 1), (0x11FFF, 2), (0, 1), (1 << 64, 1), (0x10000, -1), (0x10000, 1 << 64)],
)
def test_nothing_outside_a_map_can_be_reached(dma: DmaSpace, memory: int, address: int, size: int) -> None:
    dma.map(0x10000, 2 * PAGE, memory, 3 * PAGE, writable=True)
    dma.read(0x10000, 1)  # the map is the one that is tried first
    with pytest.raises(DmaError) as error:
        dma.read(address, size)
    assert refusal(error) == errno.EFAULT
    with pytest.raises(DmaError):
        dma.view(address, size)
    if 0 < size <= PAGE:
        with pytest.raises(DmaError):
            dma.write(address, bytes(size))
    assert os.pread(memory, PAGES * PAGE, 0) == b"".join(bytes([page]) * PAGE for page in CONTENT)


def test_no_bytes_can_be_read_and_written_anywhere(dma: DmaSpace) -> None:
    assert peek(dma, 0x5000, 0) == b""
    dma.write(0x5000, b"")


def test_ranges_over_adjacent_maps_are_one(dma: DmaSpace, memory: int) -> None:
    dma.map(0, PAGE, memory, 4 * PAGE, writable=True)
    dma.map(PAGE, PAGE, memory, 1 * PAGE, writable=True)
    assert peek(dma, PAGE - 1, 2) == b"\x05\x02"
    dma.write(PAGE - 2, b"abcd")
    assert os.pread(memory, 2, 5 * PAGE - 2) == b"ab"
    assert os.pread(memory, 2, 1 * PAGE) == b"cd"
    with pytest.raises(DmaError, match="2 maps"):
        dma.view(PAGE - 1, 2)


def test_a_write_that_fails_at_its_end_writes_nothing(dma: DmaSpace, memory: int) -> None:
    dma.map(0, PAGE, memory, 0, writable=True)
    dma.map(PAGE, PAGE, memory, PAGE, writable=False)
    for size in (2, PAGE + 2):  # into the read-only map, and on into nothing
        with pytest.raises(DmaError):
            dma.write(PAGE - 1, b"x" * size)
    assert peek(dma, PAGE - 1, 2) == b"\x01\x02"


def test_a_read_only_map_can_be_read(dma: DmaSpace, memory: int) -> None:
    dma.map(0, PAGE, memory, 0, writable=False)
    assert peek(dma, 0, 1) == b"\x01"
    for attempt in (lambda: dma.write(0, b"x"), lambda: dma.view(0, 1)):
        with pytest.raises(DmaError, match="read-only"):
            attempt()


def test_a_map_without_file_is_known_but_out_of_reach(dma: DmaSpace, memory: int) -> None:
    dma.map(PAGE, PAGE, -1, 0, writable=True)
    with pytest.raises(DmaError, match="gave no file") as error:
        dma.read(PAGE, 1)
    assert refusal(error) == errno.EFAULT
    with pytest.raises(DmaError) as overlap:
        dma.map(PAGE, PAGE, memory, 0, writable=True)
    assert refusal(overlap) == errno.EEXIST
    dma.unmap(PAGE, PAGE)
    dma.map(PAGE, PAGE, memory, 0, writable=True)
    assert peek(dma, PAGE, 1) == b"\x01"


@pytest.mark.parametrize(
    ("address", "size", "offset"),
    [
        (1, PAGE, 0),
        (0, PAGE - 1, 0),
        (0, PAGE, 512),
        (0, 0, 0),
        (0, -PAGE, 0),
        (-PAGE, PAGE, 0),
        (0, PAGE, -PAGE),
        ((1 << 64) - PAGE, 2 * PAGE, 0),
        (0, PAGE, PAGES * PAGE),
        (0, 2 * PAGE, (PAGES - 1) * PAGE),
        (0, 1 << 63, 0),
        (0, PAGE, (1 << 64) - PAGE),
    ],
)
def test_maps_that_are_no_pages_of_the_file_are_refused(
    dma: DmaSpace, memory: int, address: int, size: int, offset: int
) -> None:
    with pytest.raises(DmaError) as error:
        dma.map(address, size, memory, offset, writable=True)
    assert refusal(error) == errno.EINVAL
    with pytest.raises(DmaError):
        dma.read(0, 1)


def test_the_last_page_of_the_address_space_can_be_mapped(dma: DmaSpace, memory: int) -> None:
    dma.map((1 << 64) - PAGE, PAGE, memory, (PAGES - 1) * PAGE, writable=True)
    assert peek(dma, (1 << 64) - 1, 1) == bytes([PAGES])
    with pytest.raises(DmaError):
        dma.read((1 << 64) - 1, 2)


@pytest.mark.parametrize(("address", "pages"), [(2, 1), (4, 1), (1, 2), (4, 9), (0, 9), (2, 3), (3, 1)])
def test_overlapping_maps_are_refused(dma: DmaSpace, memory: int, address: int, pages: int) -> None:
    dma.map(2 * PAGE, 3 * PAGE, memory, 0, writable=True)
    with pytest.raises(DmaError) as error:
        dma.map(address * PAGE, pages * PAGE, -1, 0, writable=True)
    assert refusal(error) == errno.EEXIST
    dma.map(PAGE, PAGE, memory, 0, writable=True)  # both neighbours are free
    dma.map(5 * PAGE, PAGE, memory, 0, writable=True)


@pytest.mark.parametrize(("address", "pages"), [(2, 1), (3, 1), (3, 9), (0, 3), (1, 2), (4, 2)])
def test_an_unmap_never_cuts_a_map(dma: DmaSpace, memory: int, address: int, pages: int) -> None:
    dma.map(2 * PAGE, 3 * PAGE, memory, 0, writable=True)
    dma.map(6 * PAGE, PAGE, memory, 0, writable=True)
    with pytest.raises(DmaError) as error:
        dma.unmap(address * PAGE, pages * PAGE)
    assert refusal(error) == errno.EINVAL
    assert peek(dma, 2 * PAGE, 1) == b"\x01"


def test_an_unmap_takes_every_map_it_covers(dma: DmaSpace, memory: int) -> None:
    for page in (1, 2, 5, 7):
        dma.map(page * PAGE, PAGE, memory, 0, writable=True)
    dma.unmap(0, 6 * PAGE)
    for page in (1, 2, 5):
        with pytest.raises(DmaError):
            dma.read(page * PAGE, 1)
    assert peek(dma, 7 * PAGE, 1) == b"\x01"
    for size in (6 * PAGE, 0):
        with pytest.raises(DmaError) as error:
            dma.unmap(0, size)
        assert refusal(error) == errno.ENOENT


def test_firmware_splits_the_memory_below_one_mebibyte(dma: DmaSpace) -> None:
    """QEMU's q35 unmaps low memory as one and maps it again in pieces around 0xc0000, some without file."""
    fd = os.memfd_create("low", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 << 20)
    dma.map(0, 2 << 20, fd, 0, writable=True)
    dma.write(0xC0000, b"rom")
    dma.unmap(0, 2 << 20)
    dma.map(0, 0xC0000, fd, 0, writable=True)
    dma.map(0xC0000, 0x20000, fd, 0xC0000, writable=False)
    dma.map(0xE0000, 0x20000, -1, 0, writable=False)
    dma.map(0x100000, 0x100000, fd, 0x100000, writable=True)
    os.close(fd)
    assert peek(dma, 0xBFFFE, 5) == b"\0\0rom"
    with pytest.raises(DmaError):
        dma.write(0xBFFFF, b"no")
    with pytest.raises(DmaError):
        dma.read(0xDFFFF, 2)
    dma.write(0x100000, b"up")


def test_a_view_outlives_its_map_without_harm(dma: DmaSpace, memory: int) -> None:
    dma.map(0, PAGE, memory, 0, writable=True)
    before = dma.generation
    view = dma.view(0, 4)
    dma.unmap_all()
    assert dma.generation > before
    view[:] = b"late"
    with pytest.raises(DmaError):
        dma.read(0, 1)
    assert os.pread(memory, 4, 0) == b"late"


def test_only_regular_files_are_mapped(dma: DmaSpace, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    zero = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    for fd in (reader, writer, zero, directory):
        with pytest.raises(DmaError) as error:
            dma.map(0, PAGE, fd, 0, writable=True)
        assert refusal(error) == errno.EINVAL
        os.close(fd)
    with pytest.raises(DmaError) as closed:
        dma.map(0, PAGE, reader, 0, writable=True)
    assert refusal(closed) == errno.EBADF


def test_a_file_that_is_open_for_reading_can_only_be_read(dma: DmaSpace, memory: int) -> None:
    fd = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
    with pytest.raises(DmaError) as error:
        dma.map(0, PAGE, fd, 0, writable=True)
    assert refusal(error) == errno.EACCES
    dma.map(0, PAGE, fd, 0, writable=False)
    os.close(fd)
    assert peek(dma, 0, 1) == b"\x01"


def test_a_mapped_memfd_cannot_shrink(dma: DmaSpace, memory: int) -> None:
    """A page that is mapped but no longer in its file would end the process at the first touch."""
    dma.map(0, PAGE, memory, 7 * PAGE, writable=True)
    with pytest.raises(PermissionError):
        os.ftruncate(memory, PAGE)


def test_there_is_a_limit_to_maps(dma: DmaSpace) -> None:
    for number in range(MAX_MAPS):
        dma.map(number * PAGE, PAGE, -1, 0, writable=True)
    with pytest.raises(DmaError) as error:
        dma.map(MAX_MAPS * PAGE, PAGE, -1, 0, writable=True)
    assert refusal(error) == errno.ENOSPC
    dma.unmap(0, PAGE)
    dma.map(MAX_MAPS * PAGE, PAGE, -1, 0, writable=True)


class Map(NamedTuple):
    """Pages to map, from page ``page`` on; ``kind`` is rw, ro or none (no file)."""

    page: int
    pages: int
    offset: int
    kind: str


class Unmap(NamedTuple):
    """Pages to unmap."""

    page: int
    pages: int


class Entry(NamedTuple):
    """What a page of the address space is: page ``offset`` of the file, by map number ``map``."""

    map: int
    offset: int
    kind: str


pages = st.integers(0, 15)
maps = st.builds(Map, pages, st.integers(1, 5), st.integers(0, PAGES - 1), st.sampled_from(["rw", "ro", "none"]))
changes_made = st.lists(st.one_of(maps, st.builds(Unmap, pages, st.integers(1, 9))), max_size=12)
accesses_made = st.lists(st.tuples(st.integers(0, 16 * PAGE), st.integers(0, 3 * PAGE)), min_size=1, max_size=6)


@given(changes=changes_made, accesses=accesses_made)
def test_the_space_is_what_a_page_table_says(changes: list[Map | Unmap], accesses: list[tuple[int, int]]) -> None:
    """Compare with the plainest model there is: a table of pages, and a copy of the file."""
    fd = make_memory()
    dma = DmaSpace()
    table: dict[int, Entry] = {}
    file = bytearray(os.pread(fd, PAGES * PAGE, 0))
    try:
        for number, change in enumerate(changes):
            if isinstance(change, Map):
                check_map(dma, table, number, change, fd)
            else:
                check_unmap(dma, table, change)
        for at, size in accesses:
            check_access(dma, table, file, at, size)
        assert os.pread(fd, PAGES * PAGE, 0) == file
    finally:
        dma.close()
        os.close(fd)


def check_map(dma: DmaSpace, table: dict[int, Entry], number: int, change: Map, fd: int) -> None:
    """Map in both, or see it refused where the table says so."""
    page, count, offset, kind = change
    wanted = range(page, page + count)
    expected = (kind == "none" or offset + count <= PAGES) and not any(one in table for one in wanted)
    try:
        dma.map(page * PAGE, count * PAGE, -1 if kind == "none" else fd, offset * PAGE, writable=kind == "rw")
    except DmaError:
        assert not expected
    else:
        assert expected
        table.update({one: Entry(number, offset + one - page, kind) for one in wanted})


def check_unmap(dma: DmaSpace, table: dict[int, Entry], change: Unmap) -> None:
    """Unmap in both, or see it refused where the table says so."""
    wanted = range(change.page, change.page + change.pages)
    inside = {table[one].map for one in wanted if one in table}
    outside = {table[one].map for one in table if one not in wanted}
    expected = bool(inside) and not inside & outside
    try:
        dma.unmap(change.page * PAGE, change.pages * PAGE)
    except DmaError:
        assert not expected
    else:
        assert expected
        for one in wanted:
            table.pop(one, None)


def check_access(dma: DmaSpace, table: dict[int, Entry], file: bytearray, at: int, size: int) -> None:
    """Read, then write, one range; both must do, or refuse, what the table says."""
    touched = range(at // PAGE, (at + size - 1) // PAGE + 1) if size else range(0)
    kinds = {table[page].kind if page in table else "none" for page in touched}
    places = [table[a // PAGE].offset * PAGE + a % PAGE for a in range(at, at + size)] if "none" not in kinds else []
    try:
        seen = peek(dma, at, size)
    except DmaError:
        assert "none" in kinds
    else:
        assert "none" not in kinds
        assert seen == bytes(file[place] for place in places)
    data = bytes((at + n) % 251 for n in range(size))
    try:
        dma.write(at, data)
    except DmaError:
        assert kinds - {"rw"}
    else:
        assert kinds <= {"rw"}
        for place, byte in zip(places, data, strict=True):
            file[place] = byte
