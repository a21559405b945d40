"""Rings in guest memory: reading what the driver wrote, and writing completions so that it never sees half of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple

from devmem_tcp.lab.dma import DmaSpace

_WORD: Final = Struct("<H")


class Ring(NamedTuple):
    """Where a ring is: its guest-physical address, how many entries (a power of two), how many bytes each has."""

    address: int
    entries: int
    entry_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.entries * self.entry_bytes

    def read(self, dma: DmaSpace, head: int, tail: int) -> Iterator[memoryview]:
        """Yield entries ``head`` up to, not including, ``tail``: in one piece, or in two around the ring's end.

        Raises:
            DmaError: the ring is not in mapped memory.
        """
        if tail <= head:
            yield self._read(dma, head, self.entries)
            head = 0
        if tail > head:
            yield self._read(dma, head, tail)

    def _read(self, dma: DmaSpace, first: int, end: int) -> memoryview:
        return dma.read(self.address + first * self.entry_bytes, (end - first) * self.entry_bytes)


class CompletionFormat(NamedTuple):
    """What entries of a completion ring look like: little-endian, with a generation bit in a 16-bit field."""

    layout: Struct
    generation: int  # the bit
    field: int  # which field of ``layout`` holds it
    offset: int  # of that field, in bytes


class CompletionRing:
    """A ring that the device writes. Each entry has a generation bit, flipped with every lap, 1 in the first.

    The driver takes an entry, and may take all that follow, as soon as it sees the bit flipped (gve_rx_poll_dqo,
    gve_clean_tx_done_dqo). So entries are written with the first one's bit still old, and that is flipped last.
    """

    __slots__ = ("_dma", "_format", "_head", "_lap", "_ring")

    def __init__(self, dma: DmaSpace, ring: Ring, format: CompletionFormat) -> None:
        self._dma = dma
        self._ring = ring
        self._format = format
        self._lap = format.generation  # the bit as the present lap writes it
        self._head = 0

    def write(self, entries: Sequence[list[int]]) -> None:
        """Append entries, lists of the layout's fields with generation bits 0. Each lap gets its own bit.

        Raises:
            DmaError: the ring is not in mapped memory; some entries may have been written.
        """
        while entries:
            room = self._ring.entries - self._head
            self._publish(entries[:room])
            entries = entries[room:]

    def _publish(self, entries: Sequence[list[int]]) -> None:
        """Write entries that lie next to each other, and move on."""
        layout, generation, field, offset = self._format
        address = self._ring.address + self._head * layout.size
        for entry in entries:
            entry[field] |= self._lap
        flipped = entries[0][field]
        entries[0][field] ^= generation
        self._dma.write(address, b"".join([layout.pack(*entry) for entry in entries]))
        self._dma.write(address + offset, _WORD.pack(flipped))
        self._head += len(entries)
        if self._head == self._ring.entries:
            self._head = 0
            self._lap ^= generation
