"""What senders and receivers are driven by: everything that is watched, and everything that is due, in one step.

An engine never waits but in ``step``. A blocking driver calls ``step`` until what it wants has come; an asyncio driver
watches ``fileno`` and calls ``step(0)``.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

from devmem_tcp.errors import Timeout
from devmem_tcp.sys import calls
from devmem_tcp.transport.poller import READABLE, Poller

Result = TypeVar("Result")


class Timed(Protocol):
    """Something that has deadlines, by time.monotonic."""

    def deadline(self) -> float | None: ...

    def tick(self, now: float) -> None: ...


class Engine(ABC):
    """One thread at a time drives it. ``wake`` may be called from any."""

    def __init__(self) -> None:
        self.poller: Final = Poller()
        self.closed = False
        self._thread = threading.get_ident()
        self._wake_fd = calls.eventfd_create()
        self.poller.watch(self._wake_fd, READABLE, self._woken)

    def fileno(self) -> int:
        """An fd that is readable when ``step`` has something to do, deadlines aside."""
        return self.poller.fileno()

    def wake(self) -> None:
        """Have ``step`` return soon, if it waits or is about to."""
        if not self.closed:
            calls.eventfd_write(self._wake_fd)

    @property
    def drives(self) -> bool:
        """Whether this thread is the one that last called ``step``, or made the engine."""
        return threading.get_ident() == self._thread

    def _woken(self) -> None:
        calls.eventfd_clear(self._wake_fd)

    @abstractmethod
    def _timed(self) -> Iterable[Timed]:
        """Return everything that has deadlines."""

    @abstractmethod
    def _settle(self) -> None:
        """Do what was left to do by other threads, and by collections."""

    def deadline(self) -> float | None:
        """Return when ``step`` has something to do at the latest, by time.monotonic; None: never by time alone."""
        return min((due for timed in self._timed() if (due := timed.deadline()) is not None), default=None)

    def step(self, timeout_s: float | None) -> None:
        """Wait for something to happen, at most so many seconds (None: without limit), and act on it."""
        self._thread = threading.get_ident()
        self._settle()
        due = self.deadline()
        if due is None:
            self.poller.step(timeout_s)
            return
        left = max(0.0, due - time.monotonic())
        self.poller.step(left if timeout_s is None else min(left, timeout_s))
        now = time.monotonic()
        if now >= due:
            for timed in list(self._timed()):
                timed.tick(now)

    def run_until(self, attempt: Callable[[], Result | None], timeout_s: float | None, what: str) -> Result:
        """Step until ``attempt`` answers something.

        Raises:
            Timeout: nothing in ``timeout_s`` seconds; ``what`` says what was waited for. It may be waited for again.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while (result := attempt()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise Timeout(f"{what} in {timeout_s:g} s")
            self.step(left)
        return result

    def close(self) -> None:
        """Let go of the fds. Idempotent."""
        if not self.closed:
            self.closed = True
            self.poller.close()
            calls.close_fd(self._wake_fd)
