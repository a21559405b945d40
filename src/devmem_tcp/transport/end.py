"""What the two ends have in common: what they tell, whoever drives them, and how a blocking program closes them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from types import TracebackType

from devmem_tcp.closing import Closing
from devmem_tcp.transport.engine import Engine
from devmem_tcp.transport.poller import READABLE
from devmem_tcp.transport.receiver_engine import ReceiverEngine
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.waiting import Verb
from devmem_tcp.types import Address, SocketStats


class SessionEnd(ABC):
    """A sender or a receiver."""

    def __init__(self, engine: SenderEngine | ReceiverEngine) -> None:
        self._engine = engine

    @property
    def address(self) -> Address | None:
        """Where peers come: host and TCP port of control connections; None: it went to one."""
        return self._engine.address

    def stats(self) -> list[SocketStats]:
        """Return the proof of path of every data connection of the sessions under way."""
        return self._engine.stats()

    @property
    def closed(self) -> bool:
        return self._engine.closed

    @abstractmethod
    def _part(self) -> Verb[None]:
        """Take leave of the peers."""


class _Engines(threading.local):
    """Those of the ends that a thread has opened."""

    def __init__(self) -> None:
        self.opened: weakref.WeakSet[Engine] = weakref.WeakSet()


_OF_THIS_THREAD = _Engines()


class End(SessionEnd, Closing):
    """One that a blocking program drives. ``with`` closes it."""

    def __init__(self, engine: SenderEngine | ReceiverEngine) -> None:
        super().__init__(engine)
        _OF_THIS_THREAD.opened.add(engine)

    def close(self) -> None:
        """Say goodbye, wait for the peers' part of it (five seconds without progress at most), and let go. Idempotent.

        A sender waits until the receiver has everything. Messages that came to a receiver, and were not returned by
        ``receive``, are lost. Meanwhile the other senders and receivers that this thread has opened, and drives, go on
        as if it waited by them: what they receive waits for the program, so that two programs may close in any order.

        Raises:
            DevmemError, ConnectionError: a sender's session ended before all messages were known to have arrived.
        """
        if self._engine.closed:
            return
        try:
            with _others_go_on(self._engine):
                self._engine.run(self._part())
        finally:
            self._engine.close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is None:
            self.close()
        else:
            self._engine.close()  # the exception is what there is to say


@contextlib.contextmanager
def _others_go_on(engine: Engine) -> Iterator[None]:
    """Have the other engines of this thread stepped whenever this one waits and they have something to do."""
    others = [other for other in _OF_THIS_THREAD.opened if other is not engine and other.drives and not other.closed]
    for other in others:
        engine.poller.watch(other.fileno(), READABLE, partial(other.step, 0))
    try:
        yield
    finally:
        for other in others:
            if not other.closed:
                engine.poller.forget(other.fileno())
