"""The bound TX Buffer: windows of it, set apart for messages, given back when every send from them is complete."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from typing import Final

from devmem_tcp.buffers import Buffer
from devmem_tcp.contract import TxBinding
from devmem_tcp.types import PAGE_SIZE


class Window:
    """Bytes of the TX Buffer, one holder's. ``hold`` and ``drop`` count who still needs them."""

    __slots__ = ("_holders", "_outbox", "offset", "size_bytes")

    def __init__(self, outbox: Outbox, offset: int, size_bytes: int) -> None:
        self._outbox = outbox
        self._holders = 1
        self.offset = offset
        self.size_bytes = size_bytes

    def hold(self) -> None:
        self._holders += 1

    def drop(self) -> None:
        """Let go; with the last holder the window is free again."""
        self._holders -= 1
        if not self._holders:
            self._outbox.put(self.offset, self.size_bytes)


class Outbox:
    """Hands out windows of one bound Buffer: the first that fits, page by page. Not thread-safe.

    Args:
        on_room: called when a window comes back after ``fits`` said no.
        part: the window of another Outbox of this Buffer that is all of this one; None: the whole Buffer.
    """

    def __init__(
        self, buffer: Buffer, binding: TxBinding, on_room: Callable[[], None], part: Window | None = None
    ) -> None:
        self.buffer: Final = buffer
        self.binding: Final = binding
        self.view: Final = buffer.view()
        whole = (0, buffer.size_bytes) if part is None else (part.offset, part.size_bytes)
        self._size_bytes = whole[1]
        self._free: list[tuple[int, int]] = [whole]  # offset and size, ascending, never adjacent
        self._on_room = on_room
        self._short = False  # somebody waits for room

    def stage_bytes(self, piece_bytes: int) -> int:
        """Return how much of a piece to copy here at a time: so that two fit, the piece whole if that does."""
        while 2 * piece_bytes > self._size_bytes and piece_bytes % (2 * PAGE_SIZE) == 0:
            piece_bytes //= 2
        return piece_bytes

    @property
    def free_bytes(self) -> int:
        return sum(size for _, size in self._free)

    def fits(self, size_bytes: int) -> bool:
        """Whether ``take`` would answer a window now; if not, ``on_room`` says when to ask again."""
        wanted = _whole_pages(size_bytes)
        found = any(size >= wanted for _, size in self._free)
        self._short |= not found
        return found

    def take(self, size_bytes: int) -> Window | None:
        """Return a window of at least ``size_bytes``, which begins at a page; None: there is none now."""
        wanted = _whole_pages(size_bytes)
        for index, (offset, size) in enumerate(self._free):
            if size >= wanted:
                if size == wanted:
                    del self._free[index]
                else:
                    self._free[index] = (offset + wanted, size - wanted)
                return Window(self, offset, wanted)
        return None

    def put(self, offset: int, size: int) -> None:
        """Take a window back, and join it with its free neighbours."""
        insort(self._free, (offset, size))
        index = self._free.index((offset, size))
        if index + 1 < len(self._free) and offset + size == self._free[index + 1][0]:
            size += self._free.pop(index + 1)[1]
            self._free[index] = (offset, size)
        if index and sum(self._free[index - 1]) == offset:
            before = self._free.pop(index)
            self._free[index - 1] = (self._free[index - 1][0], self._free[index - 1][1] + before[1])
        if self._short:
            self._short = False
            self._on_room()

    def close(self) -> None:
        self.view.release()
        self.binding.close()


def _whole_pages(size_bytes: int) -> int:
    """Return the bytes of the pages that a window of so many bytes takes; one page, for none."""
    return max(1, -(-size_bytes // PAGE_SIZE)) * PAGE_SIZE
