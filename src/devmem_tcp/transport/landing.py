"""Where the bytes of one message come to lie: in one place, in frags, or in memory of the caller's.

A landing takes bytes from lanes in any order of pieces, and knows which part of the message each frag is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Final, Protocol

import numpy as np

from devmem_tcp.buffers import Buffer, CpuAccess
from devmem_tcp.contract import DevmemSocket, Place
from devmem_tcp.endpoints import worth_waking
from devmem_tcp.gather import gather
from devmem_tcp.transport.inbox import Share, host_memory
from devmem_tcp.types import PAGE_SIZE, FragBatch, FragKind, U8Array

_MAX_READ: Final = 1 << 20  # bytes, of frags that come in one call
_INLINE_KINDS: Final = (FragKind.LINEAR.value, FragKind.HOST.value)


class Waiter(Protocol):
    """Waits for something to happen."""

    @property
    def looks(self) -> int:
        """How often to look once more before ``wait_briefly``."""

    def wait_briefly(self) -> bool:
        """Wait for a moment at most; False: nothing has happened."""


class PathBytes:
    """Which path the bytes of one message took: ``dmabuf`` to device memory, ``linear`` and ``host`` to the host's.

    ``copied`` of them were copied by the CPU since, to make them contiguous or to free pages.
    """

    __slots__ = ("copied", "dmabuf", "host", "linear")

    def __init__(self) -> None:
        self.dmabuf = self.linear = self.host = self.copied = 0

    @property
    def received(self) -> int:
        """Bytes that have come, by all paths."""
        return self.dmabuf + self.linear + self.host

    def count(self, batch: FragBatch) -> None:
        """Count what a batch holds."""
        if not len(batch.inline):
            self.dmabuf += batch.nbytes
            return
        for kind, size in zip(batch.kinds.tolist(), batch.sizes.tolist(), strict=True):
            if kind == FragKind.DMABUF:
                self.dmabuf += size
            elif kind == FragKind.LINEAR:
                self.linear += size
            else:
                self.host += size

    def __repr__(self) -> str:
        return f"<PathBytes dmabuf={self.dmabuf} linear={self.linear} host={self.host} copied={self.copied}>"


class Landing(ABC):
    """Where one message lands. ``path`` says how its bytes came."""

    __slots__ = ("counted", "nbytes", "path")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.path = PathBytes()
        self.counted = True  #: as one of the messages that the receiver holds

    @abstractmethod
    def receive(self, sock: DevmemSocket, offset: int, size: int) -> int:
        """Receive up to ``size`` bytes, which are the message's from ``offset`` on; 0: the lane has ended.

        Raises:
            BlockingIOError: nothing is there.
            NotZeroCopy: ordinary data on a strict socket.
        """

    @abstractmethod
    def contiguous(self) -> memoryview | None:
        """Return the message where it lies, if that is in one run: format B, shape (nbytes,)."""

    @abstractmethod
    def pieces(self) -> Iterator[memoryview]:
        """Yield the message where it lies, run by run, in order."""

    def copy_to(self, target: memoryview) -> None:
        """Copy the message to ``target``, format B, shape (nbytes,)."""
        at = 0
        for piece in self.pieces():
            target[at : at + len(piece)] = piece
            at += len(piece)
        self.path.copied += at

    def _copy_out(self, batch: FragBatch, buffer: Buffer | None, target: memoryview, offset: int) -> None:
        """Copy a batch to where it belongs in the message's contiguous memory."""
        self.path.copied += batch.nbytes
        copy_batch(batch, buffer, np.frombuffer(target, np.uint8)[offset : offset + batch.nbytes])

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Idempotent."""


class PlacedLanding(Landing):
    """In one place of the bound Buffer, set apart beforehand: one of ``Share.take``, the landing's from here on."""

    __slots__ = ("_place", "_share", "landed")

    def __init__(self, nbytes: int, place: Place, share: Share) -> None:
        super().__init__(nbytes)
        self.landed = 0  #: bytes that ``receive_whole`` has brought
        self._place: Place | None = place
        self._share = share

    def receive(self, sock: DevmemSocket, offset: int, size: int) -> int:
        assert self._place is not None
        if sock.lands_in is self._place.binding:
            taken = sock.recv_placed(self._place, offset, size)
            self.path.dmabuf += taken
            return taken
        with sock.recv_frags(min(size, _MAX_READ)) as batch:  # for once it lands elsewhere
            self.path.count(batch)
            self._copy_out(batch, self._share.buffer, self._place.view(), offset)
            return batch.nbytes

    def receive_whole(self, sock: DevmemSocket, waiter: Waiter | None) -> bool:
        """Receive the message from its start on, as far as it comes before something else does: ``landed`` bytes.

        Args:
            waiter: waits for a moment; None: take what is here.

        Returns: whether all of it is here; if not, call again.

        Raises:
            LocalProtocolError: the rest cannot land here.
            EOFError, ConnectionError: the connection has ended.
        """
        assert self._place is not None
        looks, waited = 0, False
        while left := self.nbytes - self.landed:
            try:
                came = sock.recv_placed(self._place, self.landed, left)
            except BlockingIOError:
                if waiter is not None and looks < waiter.looks and not waited:
                    looks += 1
                    continue
                sock.set_low_water(worth_waking(left))
                if waiter is None or waited or not waiter.wait_briefly():
                    return False
                waited = True
                continue
            if not came:
                raise EOFError
            self.landed += came
            self.path.dmabuf += came
            looks, waited = 0, False
        return True

    def contiguous(self) -> memoryview:
        return memoryview(b"") if self._place is None else self._place.view()

    def pieces(self) -> Iterator[memoryview]:
        yield self.contiguous()

    def close(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            self._share.put(place)


class FragLanding(Landing):
    """In frags of the bound Buffer, as they came; moved to host memory if its share of that is used up meanwhile."""

    __slots__ = ("_batches", "_buffer", "_moved", "_pages", "_share")

    def __init__(self, nbytes: int, share: Share) -> None:
        super().__init__(nbytes)
        self._share = share
        self._buffer = share.buffer
        self._batches: list[tuple[int, FragBatch]] = []  # and where in the message each begins
        self._pages = 0
        self._moved: memoryview | None = None

    def receive(self, sock: DevmemSocket, offset: int, size: int) -> int:
        batch = sock.recv_frags(min(size, _MAX_READ))
        taken = batch.nbytes
        self.path.count(batch)
        if self._moved is None:
            pages = _pages_of(batch)
            self._batches.append((offset, batch))
            self._pages += pages
            if not self._share.hold_pages(pages):
                self._move()
        else:
            self._copy(offset, batch)
        return taken

    def _move(self) -> None:
        self._moved = host_memory(self.nbytes)
        batches, self._batches = self._batches, []
        self._let_go()
        for offset, batch in batches:
            self._copy(offset, batch)

    def _copy(self, offset: int, batch: FragBatch) -> None:
        assert self._moved is not None
        self._copy_out(batch, self._buffer, self._moved, offset)
        batch.release()

    def _let_go(self) -> None:
        pages, self._pages = self._pages, 0
        self._share.hold_pages(-pages)

    def contiguous(self) -> memoryview | None:
        if self._moved is not None:
            return self._moved
        runs = list(self.pieces())
        return runs[0] if len(runs) == 1 else memoryview(b"") if not runs else None

    def pieces(self) -> Iterator[memoryview]:
        if self._moved is not None:
            yield self._moved
            return
        view = self._buffer.view()
        start = end = 0  # of the run in the Buffer that is being put together
        for offset, size, inline in self._frags():
            if inline is not None:
                if end > start:
                    yield view[start:end]
                start = end = 0
                yield inline
            elif offset == end and end > start:
                end += size
            else:
                if end > start:
                    yield view[start:end]
                start, end = offset, offset + size
        if end > start:
            yield view[start:end]

    def _frags(self) -> Iterator[tuple[int, int, memoryview | None]]:
        """Yield offset and size of each frag in order, or the bytes of one that is in host memory."""
        for _, batch in sorted(self._batches, key=_first):
            for offset, size, _, _, kind in batch.frags.tolist():
                inline = batch.inline[offset : offset + size] if kind in _INLINE_KINDS else None
                yield offset, size, inline

    def copy_to(self, target: memoryview) -> None:
        if self._moved is not None or not self._batches:
            super().copy_to(target)
            return
        batches = [batch for _, batch in sorted(self._batches, key=_first)]
        gather(batches, self._buffer, np.frombuffer(target, np.uint8))
        self.path.copied += self.nbytes

    def close(self) -> None:
        batches, self._batches = self._batches, []
        self._moved = None
        self._let_go()
        for _, batch in batches:
            batch.release()


class IntoLanding(Landing):
    """In memory of the caller's: each read is copied there, and its pages go back at once.

    Args:
        target: writable, format B, shape (nbytes,).
    """

    __slots__ = ("_buffer", "_target")

    def __init__(self, nbytes: int, buffer: Buffer | None, target: memoryview) -> None:
        super().__init__(nbytes)
        self._buffer = buffer
        self._target = target

    def receive(self, sock: DevmemSocket, offset: int, size: int) -> int:
        with sock.recv_frags(min(size, _MAX_READ)) as batch:
            self.path.count(batch)
            self._copy_out(batch, self._buffer, self._target, offset)
            return batch.nbytes

    def contiguous(self) -> memoryview | None:
        return self._target

    def pieces(self) -> Iterator[memoryview]:
        yield self._target

    def close(self) -> None:
        """Nothing is held but the caller's own."""


def copy_batch(batch: FragBatch, buffer: Buffer | None, window: U8Array) -> None:
    if not batch.nbytes:
        return
    if buffer is None:  # a NIC without binding: everything is in host memory
        window[:] = np.frombuffer(batch.inline, np.uint8)
    elif len(batch) == 1 and not len(batch.inline):
        offset = int(batch.offsets[0])
        with buffer.cpu_access(CpuAccess.READ) as view:
            window[:] = np.frombuffer(view, np.uint8, batch.nbytes, offset)
    else:
        gather(batch, buffer, window)


def _pages_of(batch: FragBatch) -> int:
    """Return how many pages a batch may keep in flight: of each frag, those that it touches."""
    offsets, sizes = batch.offsets, batch.sizes
    device = batch.kinds == FragKind.DMABUF
    touched = (offsets + sizes + (PAGE_SIZE - 1)) // PAGE_SIZE - offsets // PAGE_SIZE
    return int(touched[device].sum())


def _first(item: tuple[int, Any]) -> int:
    return item[0]
