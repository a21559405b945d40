"""What verbs wait for, said without waiting: a blocking driver and an asyncio driver run the same verbs.

A verb is a generator. It yields an ``Until`` wherever it cannot go on, and is resumed once the attempt answers; whoever
runs it does the waiting: ``Engine.run`` by steps of the engine, ``devmem_tcp.aio`` by an event loop. When the time is
up, or the task is cancelled, the exception is raised in the verb, where it waits: there is one place to undo things.

Rules: an attempt only looks, and may look any number of times. What it found is taken by the verb itself, before its
next ``yield``, so that nothing is lost between the two when a task is cancelled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

Result = TypeVar("Result")

Line: TypeAlias = deque[Any]
"""Those that wait for the same thing, in the order in which they came: the first is served first."""


class Limit(NamedTuple):
    """When to give up: ``end`` by time.monotonic, ``timeout_s`` seconds from the beginning; None: never."""

    end: float | None
    timeout_s: float | None

    @classmethod
    def after(cls, timeout_s: float | None) -> Limit:
        """Return the limit so many seconds from now."""
        return NEVER if timeout_s is None else cls(time.monotonic() + timeout_s, timeout_s)

    @property
    def left_s(self) -> float | None:
        """Seconds left, not positive if there are none; None: any number."""
        return None if self.end is None else self.end - time.monotonic()

    def __str__(self) -> str:
        return "" if self.timeout_s is None else f"in {self.timeout_s:g} s"


NEVER: Final = Limit(None, None)


class Until(NamedTuple):
    """Wait until ``attempt`` answers anything but None, or raises. ``what`` begins the text of a Timeout."""

    attempt: Callable[[], Any]
    limit: Limit
    what: str
    line: Line | None


Verb: TypeAlias = Generator[Until, Any, Result]


def until(attempt: Callable[[], Result | None], limit: Limit, what: str, line: Line | None = None) -> Verb[Result]:
    """Go on with what ``attempt`` answers, once it does and, with a line, everybody before is served.

    Raises:
        Timeout: it did not within the limit.
    """
    if not line and (result := attempt()) is not None:
        return result
    answered: Result = yield Until(attempt, limit, what, line)
    return answered
