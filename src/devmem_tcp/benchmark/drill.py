"""What both ends of a work do, without the waiting: the same for the blocking and the asyncio driver.

The sender goes through ``Drill.steps``: so many messages on every connection, then a mark, an empty message that the
receiver confirms. First a message that is compared byte for byte, then more and more of them, until it is known how
many fill the time; then the part that is measured, between the marks BEGIN and END. The receiver has ``Tally.take``
look at all that comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from devmem_tcp.benchmark.figures import EndFigures, Meter, Run
from devmem_tcp.benchmark.plan import Work
from devmem_tcp.errors import DevmemError
from devmem_tcp.testing.patterns import find_mismatch
from devmem_tcp.transport.message import Message
from devmem_tcp.types import Address, SocketStats, U8Array

PATTERN: Final = 251  # a prime: bytes that have moved by any power of two are seen
NAME: Final = "bench"

WARM_UP: Final = "warm-up"
BEGIN: Final = "begin"
END: Final = "end"

_WARM_UP_SHARE: Final = 0.125  # of the time that the measured part takes
LOOK_EVERY_S: Final = 0.5  # after the other end, while nothing comes

_FEWEST: Final = 1  # messages of the measured part
_FEWEST_OF_MANY: Final = 8  # on each of many connections: the marks, one of each, take time as well
_FEWEST_SMALL: Final = 100  # as long as they are no more than
_FEW_BYTES: Final = 4 << 20
_MOST: Final = 1 << 16


class ListeningTurn(NamedTuple):
    """One work, for the end that listens.

    Attributes:
        verify: compare the first message of each connection with what is sent.
        listen: where senders are to come.
        listen_back: where receivers are, for what is sent back.
        ready: to be told both addresses once somebody can come.
        over: to be told the figures; returns once the other end has them, and until then no session is closed.
        look: raises why the other end is not there any more, if it is not.
        timeout_s: how long to wait for it at any point.
    """

    work: Work
    verify: bool
    listen: Address
    listen_back: Address
    ready: Callable[[Address, Address], None]
    over: Callable[[EndFigures], None]
    look: Callable[[], None]
    timeout_s: float


class MeasuringTurn(NamedTuple):
    """One work, for the end that measures.

    Attributes:
        to: where to send.
        back: where to receive from, if something is sent back.
        seconds: how long the measured part is to take.
        finish: fetches the figures of the other end, which it has as long as all sessions are open.
    """

    work: Work
    to: Address
    back: Address
    seconds: float
    finish: Callable[[], EndFigures]


class Step(NamedTuple):
    """Send so many messages on each connection, then a mark on each, and wait until all marks are confirmed."""

    messages: int
    mark: str


class Drill:
    """The sender's side of one work.

    Args:
        stats: gives the counters of its data connections.
    """

    def __init__(self, turn: MeasuringTurn, backend: str, stats: Callable[[], Sequence[SocketStats]]) -> None:
        self._turn = turn
        self.meter: Final = Meter(backend, stats)
        self._messages = 0  # of the measured part, on each connection

    def steps(self) -> Iterator[Step]:
        """Yield what to do next; what was yielded is done when the next is asked for."""
        work, seconds = self._turn.work, self._turn.seconds
        count, took_s = 1, 0.0
        yield Step(count, WARM_UP)
        while took_s < seconds * _WARM_UP_SHARE and count < _MOST:
            if took_s:
                count *= 4
            began = time.perf_counter()
            yield Step(count, WARM_UP)
            took_s = time.perf_counter() - began
        least = _FEWEST if work.connections == 1 else _FEWEST_OF_MANY
        fewest = max(least, min(_FEWEST_SMALL, _FEW_BYTES // work.landing_bytes))
        self._messages = max(fewest, min(_MOST, round(seconds * count / took_s)))
        yield Step(0, BEGIN)
        self.meter.begin()
        yield Step(self._messages, END)
        self.meter.end()

    def run(self, laps_us: list[float]) -> Run:
        """Return what came of it, at both ends; before any session is closed."""
        return Run(self._messages, self.meter.figures, self._turn.finish(), laps_us)


class Tally:
    """The receiver's side of one work: looks at each message, and knows when all is over.

    Args:
        stats: gives the counters of its data connections.
    """

    def __init__(self, turn: ListeningTurn, backend: str, stats: Callable[[], Sequence[SocketStats]]) -> None:
        self._work = turn.work
        self._verify = turn.verify
        self._meter = Meter(backend, stats)
        self._marks = {WARM_UP: 0, BEGIN: 0, END: 0}

    @property
    def over(self) -> bool:
        """Whether END has come by every connection."""
        return self._marks[END] == self._work.connections

    @property
    def figures(self) -> EndFigures:
        """What was measured, once it is over."""
        return self._meter.figures

    def take(self, message: Message) -> bool:
        """Look at a message, and return whether it was one, not a mark.

        Raises:
            DevmemError: it is not what was sent.
        """
        if not message.nbytes:
            self._take_mark(message.name)
            return False
        array = self._meter.take(message)
        if self._verify and message.message_id == 0:
            check(array.numpy())
        return True

    def _take_mark(self, name: str) -> None:
        self._marks[name] += 1
        if self._marks[name] == self._work.connections:
            if name == BEGIN:
                self._meter.begin()
            elif name == END:
                self._meter.end()


def check(received: U8Array) -> None:
    """Compare a message with what is sent.

    Raises:
        DevmemError: a byte differs; says where, what was expected, what was found.
    """
    wrong = find_mismatch(received, PATTERN)
    if wrong is not None:
        raise DevmemError(f"byte {wrong.offset} of a message is {wrong.found}, and was sent as {wrong.expected}")
