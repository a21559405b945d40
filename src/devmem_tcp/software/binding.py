"""Bindings of a software NIC: a Buffer's pages given to RX queues, or its bytes offered for sending."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, NamedTuple, Protocol

from devmem_tcp import contract
from devmem_tcp.buffers import Buffer, BufferUse
from devmem_tcp.nicmodel.page_pool import PagePool
from devmem_tcp.software.place import SoftwarePlace
from devmem_tcp.types import TokenHolder, U32Array

_ids = itertools.count(1)


def next_dmabuf_id() -> int:
    """Return the next binding id of this process: from 1, never used twice, not even after a failed bind."""
    return next(_ids)


class PageWaiter(Protocol):
    """A socket that has data and no page to put it in."""

    def pages_freed(self) -> None:
        """Called, from any thread, once pages were given back."""


class Reserved(NamedTuple):
    """The pages of one place."""

    queue: int
    first_page: int
    page_count: int


class PageLock:
    """The lock of a binding's pages.

    A place may be closed by the garbage collector, in the midst of whatever the thread does with the lock in its hands.
    So its pages are only handed in here, which never waits, and who lets go of the lock takes them back.
    """

    def __init__(self, take_back: Callable[[Iterable[Reserved]], list[PageWaiter]]) -> None:
        self._lock = threading.Lock()
        self._take_back = take_back
        self._handed_in: deque[Reserved] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._handed_in:
            self._settle()

    def hand_in(self, reserved: Reserved) -> None:
        """Have pages of a place taken back: now, or when the lock is free."""
        self._handed_in.append(reserved)
        self._settle()

    def _settle(self) -> None:
        while self._handed_in and self._lock.acquire(blocking=False):
            try:
                waiters = self._take_back(self._all_handed_in())
            finally:
                self._lock.release()
            for waiter in waiters:
                waiter.pages_freed()

    def _all_handed_in(self) -> Iterable[Reserved]:
        while self._handed_in:
            yield self._handed_in.popleft()


class SoftwareRxBinding(contract.RxBinding):
    """A Buffer whose pages the sockets of some queues receive into, and whose runs programs reserve.

    Thread-safe. The Buffer stays pinned until the binding is closed and the last page is back.
    """

    def __init__(
        self,
        dmabuf_id: int,
        buffer: Buffer,
        pool: PagePool,
        queues: tuple[int, ...],
        frag_size: int,
        on_close: Callable[[SoftwareRxBinding], None],
        find_holders: Callable[[int], Iterable[TokenHolder]],
        *,
        places: bool,
    ) -> None:
        self._id = dmabuf_id
        self._buffer = buffer
        self._queues = queues
        self._on_close = on_close
        self._find_holders = find_holders
        self._closed = False
        self._places = places
        self._placed: dict[int, tuple[int, int]] = dict.fromkeys(queues, (0, 0))  # places, and pages in them
        self._lock = PageLock(self._take_back)
        self._pool = pool
        self._waiters: list[PageWaiter] = []
        self.page_size: Final = pool.page_size
        self.frag_size: Final = max(self.page_size, frag_size - frag_size % self.page_size)
        self._pin: int | None = buffer.pin(f"RX binding {dmabuf_id} (queues {list(queues)})", BufferUse.RX)
        try:
            self._view: memoryview | None = buffer.view()
        except BaseException:
            buffer.unpin(self._pin)
            raise
        self._windows: dict[tuple[int, int], memoryview] = {}

    @property
    def dmabuf_id(self) -> int:
        return self._id

    @property
    def queues(self) -> tuple[int, ...]:
        return self._queues

    @property
    def buffer(self) -> Buffer:
        return self._buffer

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def drained(self) -> bool:
        return self._pool.inflight == 0

    @property
    def pool(self) -> PagePool:
        """The page pool, for its counters; taking and giving back go through the binding, which locks."""
        return self._pool

    def holders(self) -> tuple[TokenHolder, ...]:
        return tuple(sorted(self._find_holders(self._id), key=lambda holder: -holder.oldest_age_s))

    def reserve(self, queue: int, size_bytes: int) -> SoftwarePlace | None:
        self._check_reservation(queue, size_bytes)
        if not self._places:
            return None
        page_count = -(-size_bytes // self.page_size)
        with self._lock:
            if self._view is None:  # closed by another thread since, and nothing in use
                return None
            first_page = self._pool.reserve(queue, page_count)
            if first_page is None:
                return None
            self._count_places(queue, 1, page_count)
            offset = first_page * self.page_size
            memory = self._view[offset : offset + size_bytes]
        reserved = Reserved(queue, first_page, page_count)
        return SoftwarePlace(self, offset, memory, partial(self._lock.hand_in, reserved))

    def placed(self, queue: int) -> tuple[int, int]:
        """Return how many places of a queue there are, and how many bytes their pages have."""
        places, pages = self._placed[queue]
        return places, pages * self.page_size

    def _take_back(self, all_reserved: Iterable[Reserved]) -> list[PageWaiter]:
        for queue, first_page, page_count in all_reserved:
            self._pool.unreserve(first_page, page_count)
            self._count_places(queue, -1, -page_count)
        return self._after_return()

    def _count_places(self, queue: int, more_places: int, more_pages: int) -> None:
        places, pages = self._placed[queue]
        self._placed[queue] = (places + more_places, pages + more_pages)

    def window(self, offset: int, size: int) -> memoryview:
        """Return bytes of the Buffer, from a cache: slicing anew for each read costs more than it seems."""
        window = self._windows.get((offset, size))
        if window is None:
            if self._view is None:
                raise RuntimeError("window of a binding that has been drained")
            if len(self._windows) >= _MAX_WINDOWS:
                self._windows.clear()
            window = self._windows[offset, size] = self._view[offset : offset + size]
        return window

    def take(self, queue: int, pages: int, max_runs: int) -> list[tuple[int, int]]:
        """Take free pages for a queue: see ``PagePool.alloc``."""
        with self._lock:
            return self._pool.alloc(queue, pages, max_runs=max_runs)

    def share(self, page: int) -> None:
        with self._lock:
            self._pool.share(page)

    def give_back(self, first: int, count: int) -> None:
        """Give back one run of pages and wake who waits for some."""
        with self._lock:
            self._pool.free_run(first, count)
            waiters = self._after_return()
        for waiter in waiters:
            waiter.pages_freed()

    def give_back_many(self, firsts: U32Array, counts: U32Array) -> None:
        """Give back many runs, columns of shape (n,), and wake who waits for some."""
        with self._lock:
            self._pool.free_runs(firsts, counts)
            waiters = self._after_return()
        for waiter in waiters:
            waiter.pages_freed()

    def _after_return(self) -> list[PageWaiter]:
        if self._closed and self._pool.inflight == 0:
            self._let_go()
        if not self._waiters:
            return _NOBODY
        waiters, self._waiters = self._waiters, []
        return waiters

    def wait_for_pages(self, waiter: PageWaiter, queue: int) -> bool:
        """Have ``waiter`` told of the next returned pages; False if there are some already, or the binding closed."""
        with self._lock:
            if self._closed or self._pool.queue_free(queue):
                return False
            if waiter not in self._waiters:
                self._waiters.append(waiter)
            return True

    def forget_waiter(self, waiter: PageWaiter) -> None:
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiters, self._waiters = self._waiters, []
            if self._pool.inflight == 0:
                self._let_go()
        self._on_close(self)
        for waiter in waiters:
            waiter.pages_freed()

    def _let_go(self) -> None:
        """Unpin the Buffer: nothing of this binding is left in it."""
        self._windows.clear()
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._pin is not None:
            self._buffer.unpin(self._pin)
            self._pin = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "bound"
        return f"<RxBinding {self._id} {state}, queues {list(self._queues)}, {self._buffer.size_bytes} bytes>"


class SoftwareTxBinding(contract.TxBinding):
    """A Buffer that sockets may send from."""

    def __init__(self, dmabuf_id: int, buffer: Buffer, on_close: Callable[[SoftwareTxBinding], None]) -> None:
        self._id = dmabuf_id
        self._buffer = buffer
        self._on_close = on_close
        self._pin: int | None = buffer.pin(f"TX binding {dmabuf_id}", BufferUse.TX)
        try:
            self._view = buffer.view()
        except BaseException:
            buffer.unpin(self._pin)
            raise
        self._windows: dict[tuple[int, int], memoryview] = {}

    @property
    def dmabuf_id(self) -> int:
        return self._id

    @property
    def buffer(self) -> Buffer:
        return self._buffer

    @property
    def closed(self) -> bool:
        return self._pin is None

    def window(self, offset: int, size: int) -> memoryview:
        """Return bytes of the Buffer to send, from a cache: programs send from the same places again and again."""
        window = self._windows.get((offset, size))
        if window is None:
            if len(self._windows) >= _MAX_WINDOWS:
                self._windows.clear()
            window = self._windows[offset, size] = self._view[offset : offset + size]
        return window

    def close(self) -> None:
        if self._pin is not None:
            self._windows.clear()
            self._view.release()
            self._buffer.unpin(self._pin)
            self._pin = None
            self._on_close(self)

    def __repr__(self) -> str:
        return f"<TxBinding {self._id} {'closed' if self.closed else 'bound'}, {self._buffer.size_bytes} bytes>"


_MAX_WINDOWS: Final = 4096
_NOBODY: Final[list[PageWaiter]] = []
