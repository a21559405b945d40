"""When a socket is ready: the fd that poll, select and asyncio watch, and the wait for free pages.

The fd is an epoll of two others: the TCP socket, taken out while the queue has no page (Linux would have dropped the
data), and an eventfd that stands for what is here already: a rest of a page, or completions. Both are made when first
asked for, so that a blocking program's connection costs one fd.
"""

from __future__ import annotations

import threading
import time
import warnings
from typing import Final

from devmem_tcp.endpoints import tell_holders
from devmem_tcp.errors import StarvationWarning, Timeout
from devmem_tcp.software.binding import SoftwareRxBinding
from devmem_tcp.software.inbound import Starved
from devmem_tcp.sys import calls

REPORT_AFTER_S: Final = 1.0


class Readiness:
    """The fds of one socket besides its own. ``pages_freed`` may be called from any thread, the rest from one."""

    def __init__(self, sock: calls.Socket) -> None:
        self._sock = sock
        self._lock = threading.RLock()  # the garbage collector may close a place in the midst of it: pages_freed
        self._epoll: calls.Epoll | None = None
        self._here_fd = -1  # in the epoll, readable while something is here already
        self._here = False
        self._muted = False  # the TCP socket is out of the epoll
        self._wake_fd = -1  # written when pages were freed, for a blocked reader
        self._waiting_on: SoftwareRxBinding | None = None
        self._shortage: Starved | None = None  # the last one, of a reader that did not wait

    def fileno(self, *, pending: bool) -> int:
        """Return the fd to watch; ``pending``: something is here already."""
        if self._epoll is None:
            here_fd = calls.eventfd_create()
            try:
                epoll = calls.epoll_create()
                try:
                    calls.epoll_set(epoll, self._sock.fileno(), calls.EPOLLIN, known=False)
                    calls.epoll_set(epoll, here_fd, calls.EPOLLIN, known=False)
                except BaseException:
                    epoll.close()
                    raise
            except BaseException:
                calls.close_fd(here_fd)
                raise
            self._epoll, self._here_fd, self._here = epoll, here_fd, False
            if self._shortage is not None:
                self.starved(self._shortage)
        self.update(pending=pending)
        return self._epoll.fileno()

    @property
    def watched(self) -> bool:
        """Whether the fd was ever asked for."""
        return self._epoll is not None

    def update(self, *, pending: bool) -> None:
        """Say whether something is here already."""
        if self._epoll is not None and pending != self._here:
            (calls.eventfd_write if pending else calls.eventfd_clear)(self._here_fd)
            self._here = pending

    def starved(self, shortage: Starved) -> None:
        """Report the TCP socket's data no more until pages are freed, also on an fd that is asked for later."""
        self._shortage = shortage
        if self._epoll is not None:
            self._mute(True)
            if not self._subscribe(shortage.binding, shortage.queue):
                self._mute(False)

    def wants_data(self) -> None:
        """Report the TCP socket's data also while no page is free: the reader has room of its own."""
        if self._shortage is not None:
            self._shortage = None
            self._unsubscribe()
            self._mute(False)

    def wait_freed(self, binding: SoftwareRxBinding, queue: int, timeout_s: float | None) -> bool:
        """Wait until pages of a queue are freed; False when the time ran out."""
        if self._wake_fd < 0:
            self._wake_fd = calls.eventfd_create()
        calls.eventfd_clear(self._wake_fd)
        if not self._subscribe(binding, queue):
            return True
        try:
            return calls.wait(calls.poller(self._wake_fd, calls.POLLIN), timeout_s)
        finally:
            self._unsubscribe()

    def pages_freed(self) -> None:
        with self._lock:
            self._waiting_on = None
            if self._wake_fd >= 0:
                calls.eventfd_write(self._wake_fd)
        self._mute(False)

    def _mute(self, muted: bool) -> None:
        with self._lock:
            if self._epoll is not None and muted != self._muted:
                calls.epoll_set(self._epoll, self._sock.fileno(), 0 if muted else calls.EPOLLIN, known=True)
                self._muted = muted

    def _subscribe(self, binding: SoftwareRxBinding, queue: int) -> bool:
        self._unsubscribe()
        self._waiting_on = binding
        if binding.wait_for_pages(self, queue):
            return True
        self._waiting_on = None
        return False

    def _unsubscribe(self) -> None:
        binding, self._waiting_on = self._waiting_on, None
        if binding is not None:
            binding.forget_waiter(self)

    def close(self) -> None:
        self._unsubscribe()
        with self._lock:
            if self._epoll is not None:
                self._epoll.close()
                self._epoll = None
                calls.close_fd(self._here_fd)
            if self._wake_fd >= 0:
                calls.close_fd(self._wake_fd)
                self._wake_fd = -1


class Starvation:
    """One reader's wait for pages: who holds them is reported once it lasts over a second, and when it times out."""

    def __init__(self, readiness: Readiness, shortage: Starved) -> None:
        self._readiness = readiness
        self._shortage = shortage
        self._report_at: float | None = time.monotonic() + REPORT_AFTER_S

    def mute(self) -> None:
        """Keep the socket's fd from being ready until pages are freed."""
        self._readiness.starved(self._shortage)

    def wait(self, deadline: float | None) -> None:
        """Wait until pages are freed.

        Raises:
            Timeout: ``deadline`` passed; the text says who holds the pages.
        """
        while True:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                self.mute()
                hint = "release() batches sooner, close() places, or bind a larger buffer"
                raise Timeout(self.report(), hint=hint)
            if self._report_at is not None and now >= self._report_at:
                self._report_at = None
                warnings.warn(self.report(), StarvationWarning, stacklevel=5)
            limits = [limit for limit in (deadline, self._report_at) if limit is not None]
            left = max(0.0, min(limits) - now) if limits else None
            if self._readiness.wait_freed(self._shortage.binding, self._shortage.queue, left):
                return

    def report(self) -> str:
        """Say which queue has no page, who holds how many tokens for how long, and what places take."""
        binding, queue = self._shortage.binding, self._shortage.queue
        total = binding.pool.queue_total(queue)
        holders = [holder for holder in binding.holders() if holder.queue == queue]
        held = [text for text in (tell_holders(holders), _tell_places(*binding.placed(queue))) if text]
        return f"no free page on RX queue {queue}: all {total} are held: {'; '.join(held) or 'by unread data'}"


def _tell_places(places: int, size_bytes: int) -> str:
    return f"{places} places ({size_bytes} bytes) that the program reserved" if places else ""
