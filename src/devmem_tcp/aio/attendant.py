"""Driving an engine by an event loop: no thread, no executor, nothing that waits but the loop.

The loop watches the engine's one fd and its next deadline, and steps it when either is due, whether a coroutine waits
or not. Coroutines run the verbs of ``devmem_tcp.transport``; where a verb cannot go on, the coroutine waits in line.

Rules: what a coroutine waits for is only looked at by others; it takes it itself once it runs again, so that cancelling
it at any moment loses nothing. After whatever may have changed something, a step or a verb, everybody is looked at.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final, TypeVar

from devmem_tcp.errors import ClosedError, Timeout
from devmem_tcp.transport.engine import Engine
from devmem_tcp.transport.waiting import Line, Until, Verb

_SLICE_S: Final = 0.002  # of work without letting the loop do something else

Result = TypeVar("Result")


class _Waiter:
    """A coroutine that waits for something."""

    __slots__ = ("error", "line", "wanted", "woken")

    def __init__(self, wanted: Until, line: Line) -> None:
        self.wanted: Final = wanted
        self.line: Final = line
        self.woken: asyncio.Future[None] | None = None  # while it waits
        self.error: Exception | None = None  # what the engine failed with meanwhile

    def wake(self) -> None:
        if self.woken is not None and not self.woken.done():
            self.woken.set_result(None)

    def look(self) -> None:
        """Wake it if it can go on, or is to be told why it cannot."""
        try:
            found = self.wanted.attempt() is not None
        except Exception:  # the coroutine meets it, too
            found = True
        if found:
            self.wake()


class Attendant:
    """Drives one engine by the event loop that runs now, until ``close``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._first: dict[_Waiter, None] = {}  # those at the head of their lines
        self._error: Exception | None = None  # of a step, for whoever comes next
        self._watching = False
        self._attending: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0  # by time.monotonic
        self._last_turn = time.monotonic()  # when the loop last had its way
        self._watch()
        self._set_timer()

    async def run(self, verb: Verb[Result]) -> Result:
        """Run a verb to its end.

        Raises:
            asyncio.CancelledError: the task was cancelled; the verb undid what it had begun.
            RuntimeError: this is another event loop than the one it was opened in.
            Exception: what the verb raises, or the engine, if that failed.
        """
        self.check_loop()
        if time.monotonic() - self._last_turn > _SLICE_S:
            await asyncio.sleep(0)
            self._last_turn = time.monotonic()
        self._go_on()
        try:
            wanted = next(verb)
            while True:
                try:
                    answer = await self._wait(wanted)
                except BaseException as error:
                    wanted = verb.throw(error)
                else:
                    wanted = verb.send(answer)
        except StopIteration as done:
            result: Result = done.value
            return result
        finally:
            self._attend_soon()

    @property
    def may_act(self) -> bool:
        """Whether a coroutine may do something at once that waits for nothing: else it is to ``run`` it.

        Raises:
            RuntimeError: as ``run``.
        """
        self.check_loop()
        return self._watching and self._error is None and time.monotonic() - self._last_turn <= _SLICE_S

    def run_now(self, verb: Verb[Result]) -> Result:
        """Run a verb that does not wait; where it would, its time is up."""
        try:
            wanted = next(verb)
            verb.throw(Timeout(f"{wanted.what} {wanted.limit}"))
        except StopIteration as done:
            result: Result = done.value
            return result
        finally:
            self._attend_soon()
        raise AssertionError("a verb waits on after its time was up")

    async def _wait(self, wanted: Until) -> object:
        """Wait in line until the attempt answers something."""
        line = deque() if wanted.line is None else wanted.line
        waiter = _Waiter(wanted, line)
        line.append(waiter)
        try:
            if line[0] is waiter:
                self._first[waiter] = None
                self._step()
            self._attend_soon()
            while True:
                if waiter.error is not None:
                    raise waiter.error
                if line[0] is waiter and (answer := wanted.attempt()) is not None:
                    return answer
                if self._engine.closed:
                    raise ClosedError("this end of the session was closed")
                left = wanted.limit.left_s
                if left is not None and left <= 0:
                    raise Timeout(f"{wanted.what} {wanted.limit}")
                await self._sleep(waiter, left)
        finally:
            self._first.pop(waiter, None)
            line.remove(waiter)
            if line:
                self._first[line[0]] = None

    async def _sleep(self, waiter: _Waiter, left_s: float | None) -> None:
        """Let the loop run until the waiter is woken, or for so many seconds."""
        waiter.woken = self._loop.create_future()
        timer = None if left_s is None else self._loop.call_later(left_s, waiter.wake)
        try:
            await waiter.woken
        finally:
            waiter.woken = None
            self._last_turn = time.monotonic()
            if timer is not None:
                timer.cancel()

    def check_loop(self) -> None:
        """Raise RuntimeError if this is another event loop than the one it was opened in."""
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this was opened in another event loop, and can be used in that one alone")

    # --- what the loop does ---

    def _watch(self) -> None:
        self._watching = True
        self._loop.add_reader(self._engine.fileno(), self._turn)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            if not self._loop.is_closed():
                self._loop.remove_reader(self._engine.fileno())
        self._set_timer()

    def _turn(self) -> None:
        """Step, since the loop says that something is due."""
        self._last_turn = time.monotonic()
        self._step()
        self._attend()

    def _time_is_up(self) -> None:
        self._timer = None
        self._turn()

    def _step(self) -> None:
        try:
            self._engine.step(0, _SLICE_S)
        except Exception as error:
            self._fail(error)

    def _attend_soon(self) -> None:
        """Have ``_attend`` called by the loop, once for all that is done before."""
        if self._loop.is_closed():
            return  # a coroutine that waited is collected
        if not self._first:
            self._set_timer()
        elif self._attending is None:
            self._attending = self._loop.call_soon(self._attend)

    def _attend(self) -> None:
        """Wake whoever can go on, and see to it that the next deadline is met."""
        if self._attending is not None:
            self._attending.cancel()
            self._attending = None
        for waiter in self._first:
            waiter.look()
        self._set_timer()

    def _set_timer(self) -> None:
        due = self._engine.deadline() if self._watching else None
        if self._timer is not None:
            if due is not None and self._timer_at <= due:
                return  # early enough: it looks again
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer_at = due
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._time_is_up)

    # --- errors and the end ---

    def _fail(self, error: Exception) -> None:
        """Tell whoever waits, or else the next one, and step no more before that one comes."""
        waiting = self._everybody()
        for waiter in waiting:
            waiter.error = error
            waiter.wake()
        if not waiting:
            self._error = error
        self._unwatch()

    def _go_on(self) -> None:
        """Say what a step failed with while nobody waited; and watch again, if one failed."""
        if not self._watching and not self._engine.closed:
            self._watch()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _everybody(self) -> list[_Waiter]:
        return [waiter for first in self._first for waiter in first.line]

    @property
    def orphaned(self) -> bool:
        """Whether its event loop was closed, so that nothing can be waited for any more."""
        return self._loop.is_closed()

    def close(self) -> None:
        """Close the engine, at once, and tell whoever waits. Idempotent."""
        self._unwatch()
        try:
            self._engine.close()
        finally:
            if not self._loop.is_closed():
                for waiter in self._everybody():
                    waiter.wake()
