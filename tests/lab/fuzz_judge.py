"""How the lab's fuzzers judge: what a case is run against, and guest memory that knows who may touch which byte.

What must hold for each input: no exception, little time; for each access to guest memory: it is refused if and only if
a byte of it is not the guest's to give, and otherwise reaches exactly those bytes; after each case: the subject still
works after a reset, nothing outside of what was mapped has changed, and no fd is left.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from choices import Choices, blocks
from devmem_tcp.lab.dma import DmaError, DmaSpace
from vfio_client import PAGE, open_fds

SLOW_S: Final = 1.0  # of processor time, far above what any single input needs


class Subject(Protocol):
    """What is fuzzed, with what is thrown at it."""

    def step(self) -> None:
        """Throw one input and judge what came of it."""

    def finish(self) -> None:
        """Reset, check that all works and that nothing has changed that must not."""

    def count(self, tally: Counter[str]) -> None:
        """Add what has happened."""

    def close(self) -> None:
        """Let everything go."""


def run_case(make: Callable[[Choices], Subject], case: bytes, tally: Counter[str]) -> None:
    """Run one case against a fresh subject.

    Args:
        make: makes the subject, which reads its inputs off the choices that it is given.
        case: what the choices are read off, block by block: the first for making the subject, one for each input.
        tally: gets the number of ``inputs``, and what the subject counts.

    Raises:
        AssertionError: the judgement; or whatever escaped from the subject. A note says at which input.
    """
    first, *others = blocks(case) or [b""]
    choices = Choices()
    choices.refill(first)
    before = open_fds()
    subject = make(choices)
    number = 0
    try:
        for block in others:
            number += 1
            choices.refill(block)
            started_s = time.process_time()
            subject.step()
            assert time.process_time() - started_s < SLOW_S, "an input took too long"
        subject.finish()
    except BaseException as error:
        error.add_note(f"at input {number} of {len(others)} of a case")
        raise
    finally:
        tally["cases"] += 1
        tally["inputs"] += number
        subject.count(tally)
        subject.close()
    assert open_fds() == before, "an fd is left, or gone"


class Range(NamedTuple):
    """A map that was accepted: addresses ``start`` to ``end``, which is not part of it, and where that is in a file."""

    start: int
    end: int
    offset: int | None  # None: mapped without a file
    writable: bool


class JudgedSpace(DmaSpace):
    """A DMA space beside a plain list of what is mapped, by which it judges each map and each access.

    Args:
        file: the guest's memory, whole pages; no other file may get mapped.
    """

    def __init__(self, file: int) -> None:
        super().__init__()
        status = os.fstat(file)
        self.inode: Final = status.st_ino
        self.size_bytes: Final = status.st_size
        self.whole: Final = mmap.mmap(file, status.st_size)  # the file, whatever is mapped for DMA
        self.ranges: list[Range] = []
        self.accesses = 0
        self.refusals = 0  #: of accesses

    def map(self, address: int, size: int, fd: int, offset: int, *, writable: bool) -> None:
        super().map(address, size, fd, offset, writable=writable)
        end = address + size
        assert address % PAGE == size % PAGE == 0 < size
        assert end <= 1 << 64
        assert not any(address < other.end and other.start < end for other in self.ranges), "maps overlap"
        if fd >= 0:
            assert os.fstat(fd).st_ino == self.inode
            assert offset % PAGE == 0 <= offset <= offset + size <= self.size_bytes
        self.ranges.append(Range(address, end, offset if fd >= 0 else None, writable))

    def unmap(self, address: int, size: int) -> None:
        super().unmap(address, size)
        end = address + size
        gone = [one for one in self.ranges if address < one.end and one.start < end]
        assert gone
        assert all(address <= one.start < one.end <= end for one in gone), "a map was cut"
        self.ranges = [one for one in self.ranges if one not in gone]

    def unmap_all(self) -> None:
        super().unmap_all()
        self.ranges.clear()

    def close(self) -> None:
        super().close()
        self.whole.close()

    def places(self, address: int, size: int, *, writing: bool) -> list[slice] | None:
        """Return which bytes of the file an access is to reach, in order; None if it must be refused."""
        found = []
        end = address + size
        if size < 0:
            return None
        while address < end:
            one = next((one for one in self.ranges if one.start <= address < one.end), None)
            if one is None or one.offset is None or (writing and not one.writable):
                return None
            length = min(end, one.end) - address
            start = one.offset + address - one.start
            found.append(slice(start, start + length))
            address += length
        return found

    def read(self, address: int, size: int) -> memoryview:
        places = self._judge(address, size, writing=False)
        try:
            data = super().read(address, size)
        except DmaError:
            self._refused(places)
            raise
        assert places is not None, f"{size} bytes were read at {address:#x}, where not all of them may be"
        assert data.readonly
        assert data == b"".join([self.whole[place] for place in places]), "other bytes were read"
        return data

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        wanted = bytes(data)  # before: it may be a view of what is written
        places = self._judge(address, len(wanted), writing=True)
        try:
            super().write(address, data)
        except DmaError:
            self._refused(places)
            raise
        assert places is not None, f"{len(wanted)} bytes were written at {address:#x}, where not all of them may be"
        assert b"".join([self.whole[place] for place in places]) == wanted, "other bytes were written"

    def view(self, address: int, size: int) -> memoryview:
        places = self._judge(address, size, writing=True)
        try:
            view = super().view(address, size)
        except DmaError:
            self._refused(places if places and len(places) == 1 else None)  # it never spans maps
            raise
        assert places is not None
        assert view.nbytes == size
        assert view == self.whole[places[0]]
        return view

    def _judge(self, address: int, size: int, *, writing: bool) -> list[slice] | None:
        self.accesses += 1
        return self.places(address, size, writing=writing)

    def _refused(self, places: list[slice] | None) -> None:
        self.refusals += 1
        assert places is None, "an access was refused that is the guest's to give"
