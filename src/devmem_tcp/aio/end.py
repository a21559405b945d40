"""What the two ends have in common when an event loop drives them: how they are opened and closed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from devmem_tcp.aio.attendant import Attendant
from devmem_tcp.transport.end import SessionEnd
from devmem_tcp.transport.receiver_engine import ReceiverEngine
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.waiting import Verb
from devmem_tcp.types import Address


class End(SessionEnd):
    """A sender or a receiver, of the event loop that it was opened in. ``async with`` closes it."""

    def __init__(self, engine: SenderEngine | ReceiverEngine) -> None:
        super().__init__(engine)
        self._attendant = Attendant(engine)

    @abstractmethod
    def _reach(self, timeout_s: float | None) -> Verb[Address]:
        """Wait for the session with a peer."""

    async def aclose(self) -> None:
        """Say goodbye, wait for the peers' part of it as the blocking ``close`` does, and let go. Idempotent.

        Cancelled, or once the event loop it was opened in is closed, it lets go at once.

        Raises:
            DevmemError, ConnectionError: a sender's session ended before all messages were known to have arrived.
            RuntimeError: this is another event loop; nothing was closed.
        """
        if self._engine.closed:
            return
        if self._attendant.orphaned:
            self._attendant.close()
            return
        self._attendant.check_loop()
        try:
            await self._attendant.run(self._part())
        finally:
            self._attendant.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        if value is None:
            await self.aclose()
        else:
            self._attendant.close()  # the exception is what there is to say

    async def _reach_if(self, to: Address | None, timeout_s: float | None) -> Self:
        """Wait for the session, if this end goes to a peer; closed if that fails."""
        if to is not None:
            try:
                await self._attendant.run(self._reach(timeout_s))
            except BaseException:
                self._attendant.close()
                raise
        return self


AnEnd = TypeVar("AnEnd", bound=End)


class Opening(Generic[AnEnd]):
    """What ``open_receiver`` and ``open_sender`` answer: enter it by ``async with``, or await it and ``aclose`` later.

    Nothing is opened before.
    """

    def __init__(self, open_end: Callable[[], Coroutine[Any, Any, AnEnd]]) -> None:
        self._open_end = open_end

    def __await__(self) -> Generator[Any, Any, AnEnd]:
        return self._open_end().__await__()

    async def __aenter__(self) -> AnEnd:
        self._end = await self._open_end()
        return self._end

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._end.__aexit__(kind, value, tb)
