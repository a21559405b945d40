"""One message on its way out: where its bytes are, how much of it has gone, and what the receiver said of it."""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from devmem_tcp.contract import DevmemSocket
from devmem_tcp.transport.outbox import Outbox, Window

_NUMBERS: Final = 1 << 32


class Source(Protocol):
    """Where the bytes of a message are, in the TX Buffer."""

    @property
    def staged(self) -> bool:
        """Whether it holds room that will be free once more of its bytes have gone."""

    def locate(self, offset: int, size: int) -> tuple[Window, int, int] | None:
        """Return a window, an offset into the Buffer, and how many of ``size`` bytes are there; None: no room now."""

    def gone(self, offset: int, size: int) -> None:
        """Note that these bytes were given to a lane."""

    def close(self) -> None:
        """Let go of what is held; sends that are under way hold their windows themselves. Idempotent."""


class SlotSource:
    """A message that lies in the TX Buffer as a whole."""

    __slots__ = ("_window",)

    def __init__(self, window: Window) -> None:
        window.hold()
        self._window: Window | None = window

    @property
    def staged(self) -> bool:
        return False

    def locate(self, offset: int, size: int) -> tuple[Window, int, int] | None:
        assert self._window is not None
        return self._window, self._window.offset + offset, size

    def gone(self, offset: int, size: int) -> None:
        """Nothing changes: the window is the slot's."""

    def close(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            window.drop()


class _Gone:
    """Of a message that is all on its way already."""

    staged: Final = False

    def locate(self, offset: int, size: int) -> tuple[Window, int, int] | None:
        return None

    def gone(self, offset: int, size: int) -> None:
        """Nothing is left to go."""

    def close(self) -> None:
        """Nothing is held."""


GONE: Final = _Gone()


class StagedSource:
    """A message in other memory, copied into windows of the TX Buffer as it goes: by pieces, or parts of them.

    Args:
        data: all its bytes, format B; not to change until all are gone.
        piece_bytes: how the session stripes it.
    """

    __slots__ = ("_data", "_outbox", "_stage_bytes", "_staged")

    def __init__(self, outbox: Outbox, data: memoryview, piece_bytes: int) -> None:
        self._outbox = outbox
        self._data = data
        self._stage_bytes = outbox.stage_bytes(piece_bytes)
        self._staged: dict[int, Window] = {}  # by where they start

    @property
    def staged(self) -> bool:
        return bool(self._staged)

    def locate(self, offset: int, size: int) -> tuple[Window, int, int] | None:
        start = offset - offset % self._stage_bytes
        window = self._staged.get(start)
        if window is None:
            end = min(start + self._stage_bytes, len(self._data))
            window = self._outbox.take(end - start)
            if window is None:
                return None
            self._outbox.view[window.offset : window.offset + end - start] = self._data[start:end]
            self._staged[start] = window
        return window, window.offset + offset - start, min(size, start + self._stage_bytes - offset)

    def gone(self, offset: int, size: int) -> None:
        end = offset + size
        if end % self._stage_bytes == 0 or end == len(self._data):
            start = offset - offset % self._stage_bytes
            self._staged.pop(start).drop()

    def close(self) -> None:
        while self._staged:
            self._staged.popitem()[1].drop()


class Delivery:
    """What is known of one message that was announced. ``source`` is closed once all its bytes are given to lanes."""

    __slots__ = ("declined", "error", "finished", "left", "message_id", "name", "nbytes", "reading", "source")

    def __init__(self, message_id: int, name: str, nbytes: int, source: Source) -> None:
        self.message_id = message_id
        self.name = name
        self.nbytes = nbytes
        self.left = nbytes  #: bytes not given to a lane yet
        self.reading = 0  #: sends whose bytes the kernel may still read
        self.finished = False  #: the receiver reported it
        self.declined: str | None = None  #: why the receiver does not want it
        self.error: Exception | None = None  #: why the session ended before it was finished
        self.source = source

    @property
    def gone(self) -> bool:
        """Whether no more of it is to be given to a lane."""
        return not self.left or self.declined is not None or self.error is not None

    @property
    def complete(self) -> bool:
        """Whether the memory it was sent from may be used again."""
        return self.gone and not self.reading


class Completions:
    """The sends of one lane that the kernel may still read from, by number."""

    __slots__ = ("_first", "_reads", "_sock")

    def __init__(self, sock: DevmemSocket) -> None:
        self._sock = sock
        self._first = 0  # number of the oldest send here
        self._reads: deque[tuple[Window, Delivery] | None] = deque()  # None: complete, behind one that is not

    def sent(self, window: Window, delivery: Delivery) -> None:
        """Note a successful send."""
        window.hold()
        delivery.reading += 1
        self._reads.append((window, delivery))

    def collect(self) -> None:
        """Let go of what has completed. Never waits."""
        if not self._reads:
            return
        for low, high in self._sock.read_completions():
            for index in range((low - self._first) % _NUMBERS, (high - self._first) % _NUMBERS + 1):
                read, self._reads[index] = self._reads[index], None
                if read is not None:
                    _end(*read)
            while self._reads and self._reads[0] is None:
                self._reads.popleft()
                self._first = (self._first + 1) % _NUMBERS

    def abandon(self) -> None:
        """Let go of everything: the connection is closed."""
        while self._reads:
            read = self._reads.popleft()
            if read is not None:
                _end(*read)

    def __len__(self) -> int:
        return len(self._reads)


def _end(window: Window, delivery: Delivery) -> None:
    """Note that a send has read what it was to."""
    window.drop()
    delivery.reading -= 1
