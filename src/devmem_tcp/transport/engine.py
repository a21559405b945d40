"""What senders and receivers are driven by: everything that is watched, and everything that is due, in one step.

An engine never waits but in ``step``. A blocking driver calls ``run``, which steps until a verb has done its work; an
asyncio driver watches ``fileno`` and calls ``step(0)``.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

from devmem_tcp.errors import Timeout
from devmem_tcp.sys import calls
from devmem_tcp.transport.poller import READABLE, Poller
from devmem_tcp.transport.waiting import Until, Verb

MOMENT_S: Final = 0.004  #: that a call may wait and see nothing else: deadlines can wait so long
_SOON_S: Final = 50e-6  # to sleep and be woken takes as long, and the waking is work of the one who sends
_LOOKS: Final = 12  # of a reader, that take as long

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
        self.may_block = False  #: whether the driver blocks, for one session alone: then a read may wait for a moment
        self.looks = 0  #: of a reader before it waits: some, if what was waited for the last time came soon
        self._most_looks = _LOOKS if calls.usable_cpus() > 1 else 0  # one CPU has better to do
        self._thread = threading.get_ident()
        self._wake_fd = calls.eventfd_create()
        try:
            self.poller.watch(self._wake_fd, READABLE, self._woken)
        except BaseException:
            Engine.close(self)
            raise

    def fileno(self) -> int:
        """An fd that is readable when ``step`` has something to do, deadlines aside."""
        return self.poller.fileno()

    def wake(self) -> None:
        """Have ``step`` return soon, if it waits or is about to."""
        if not self.closed:
            calls.eventfd_write(self._wake_fd)

    @property
    def drives(self) -> bool:
        """Whether this thread is the one that last drove the engine, or made it."""
        return threading.get_ident() == self._thread

    def _take_the_wheel(self) -> None:
        self._thread = threading.get_ident()

    def _woken(self) -> None:
        calls.eventfd_clear(self._wake_fd)

    @abstractmethod
    def _timed(self) -> Iterable[Timed]:
        """Return everything that has deadlines."""

    @abstractmethod
    def _settle(self) -> None:
        """Do what was left to do by other threads, and by collections."""

    @property
    @abstractmethod
    def alone(self) -> bool:
        """Whether there is one session at most, so that nobody else waits while a call does."""

    def deadline(self) -> float | None:
        """Return when ``step`` has something to do at the latest, by time.monotonic; None: never by time alone."""
        return min((due for timed in self._timed() if (due := timed.deadline()) is not None), default=None)

    def step(self, timeout_s: float | None, slice_s: float | None = None) -> None:
        """Wait for something to happen, at most so many seconds (None: without limit), and act on it.

        Args:
            slice_s: begin nothing more after so many seconds of acting; the next step goes on. None: act on everything.
        """
        self._take_the_wheel()
        self._settle()
        due = self.deadline()
        if due is None:
            self.poller.step(timeout_s, slice_s)
            return
        left = max(0.0, due - time.monotonic())
        self.poller.step(left if timeout_s is None else min(left, timeout_s), slice_s)
        now = time.monotonic()
        if now >= due:
            for timed in list(self._timed()):
                timed.tick(now)

    def wait_briefly(self) -> bool:
        """Wait for a moment until ``step`` has something to do; False: it has not, as far as fds tell."""
        began = time.monotonic()
        found = self.poller.wait(MOMENT_S)
        self.looks = self._most_looks if time.monotonic() - began < _SOON_S else 0
        return found

    def run(self, verb: Verb[Result]) -> Result:
        """Run a verb to its end, waiting where it has to.

        Raises: what the verb does.
        """
        self._take_the_wheel()
        self.may_block = self.alone
        try:
            wanted = next(verb)
            while True:
                try:
                    answer = self._wait(wanted)
                except BaseException as error:
                    wanted = verb.throw(error)
                else:
                    wanted = verb.send(answer)
        except StopIteration as done:
            result: Result = done.value
            return result

    def _wait(self, wanted: Until) -> object:
        """Step until the attempt answers something."""
        while (answer := wanted.attempt()) is None:
            left = wanted.limit.left_s
            if left is not None and left <= 0:
                raise Timeout(f"{wanted.what} {wanted.limit}")
            self.step(left, slice_s=0.0)  # what one handler brought may be all that is waited for
        return answer

    def close(self) -> None:
        """Let go of the fds. Idempotent."""
        if not self.closed:
            self.closed = True
            self.poller.close()
            calls.close_fd(self._wake_fd)
