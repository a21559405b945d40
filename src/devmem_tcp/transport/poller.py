"""Waiting for many connections at once: one epoll, with a handler for each fd, and deadlines beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Final, TypeAlias

from devmem_tcp.sys import calls

READABLE: Final = calls.EPOLLIN
WRITABLE: Final = calls.EPOLLOUT

Handler: TypeAlias = Callable[[], None]


class Poller:
    """An epoll and what to call for each of its fds.

    Its own ``fileno`` is ready when a handler is due, so that an event loop can watch that alone.
    """

    def __init__(self) -> None:
        self._epoll = calls.epoll_create()
        self._something = calls.poller(self._epoll.fileno(), calls.POLLIN)
        self._handlers: dict[int, tuple[int, Handler]] = {}
        self._due: deque[tuple[int, int]] = deque()  # events whose handlers are still to be called

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def behind(self) -> bool:
        """Whether the last step had no time for all handlers."""
        return bool(self._due)

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call ``handler`` whenever ``fd`` is ready for ``events``, from now on; replaces what was watched of it."""
        known = self._handlers.get(fd)
        if known is None or known[0] != events:
            calls.epoll_set(self._epoll, fd, events, known=known is not None)
        self._handlers[fd] = (events, handler)

    def forget(self, fd: int) -> None:
        """Watch an fd no more; to be called before it is closed. Unknown ones are ignored."""
        if self._handlers.pop(fd, None) is not None:
            calls.epoll_forget(self._epoll, fd)
            if self._due:
                self._due = deque(event for event in self._due if event[0] != fd)

    def step(self, timeout_s: float | None, slice_s: float | None = None) -> None:
        """Wait until something is ready, at most so many seconds (None: without limit), and call its handlers.

        Args:
            slice_s: once handlers have taken so many seconds, leave the others to the next step: by turns, so that none
                waits for ever. None: call them all.
        """
        if not self._due:
            self._due.extend(calls.epoll_wait(self._epoll, timeout_s))
        end = None if slice_s is None else time.monotonic() + slice_s
        while self._due:
            if self._call_next() and end is not None and time.monotonic() >= end:
                return

    def wait(self, timeout_s: float) -> bool:
        """Wait until ``step`` has something to do, at most so many seconds, and call nothing; False: it has not."""
        return bool(self._due) or calls.wait(self._something, timeout_s)

    def go_on(self, found: Collection[object]) -> None:
        """Call the handlers that the last step had no time for, until one of them has found something."""
        while self._due and not found:
            self._call_next()

    def _call_next(self) -> bool:
        """Call the next handler that is due; False: one before it may have closed its fd."""
        fd, _ = self._due.popleft()
        known = self._handlers.get(fd)
        if known is not None:
            known[1]()
        return known is not None

    def close(self) -> None:
        self._handlers.clear()
        self._epoll.close()
