"""One session's connections: bytes between its state machine and its sockets. What the two roles share.

A link never waits. ``pump`` turns what came into events; ``flush`` sends what the session has to say. Its owner, a
sender or a receiver, waits by the Poller and calls ``tick`` in time.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from devmem_tcp.errors import BrokenError, ClosedError, DevmemError
from devmem_tcp.sansio.session import Event, Session, SessionClosed, SessionState
from devmem_tcp.transport.poller import Poller
from devmem_tcp.transport.reception import Established
from devmem_tcp.types import Address


class Link(ABC):
    """One end of an established session.

    Args:
        session: the state machine, fresh.
        made: what the handshake came to, and the connections, the link's from here on.
        on_end: called once, when the session is over, well or not.
        on_timed: called when it has a deadline where it had none.
    """

    def __init__(
        self,
        session: Session,
        made: Established,
        poller: Poller,
        on_end: Callable[[Link], None],
        on_timed: Callable[[Link], None],
    ) -> None:
        self.agreed: Final = made.agreed
        self.peer: Final[Address] = made.control.remote
        self.lanes: Final = tuple(made.lanes)
        self.error: Exception | None = None  #: why it failed, if it did
        self.ended = False
        self._session = session
        self._control = made.control
        self._poller = poller
        self._on_end = on_end
        self._on_timed = on_timed
        made.control.on_ready = self._control_ready
        if made.rest:
            session.receive_control(made.rest, time.monotonic())
        if session.deadline() is not None:
            on_timed(self)

    # --- what comes ---

    def _control_ready(self) -> None:
        try:
            while (data := self._control.receive()) is not None:
                now = time.monotonic()
                if not data:
                    self._control_ended(now)
                    break
                self._session.receive_control(data, now)
        except BrokenError as error:
            self.fail(error)
            return
        self.pump()

    def _control_ended(self, now: float) -> None:
        self._session.control_ended(now)

    def pump(self) -> None:
        """Act on everything the session has to tell, and send what it has to say."""
        if self.ended:
            return
        try:
            while (event := self._session.next_event()) is not None:
                if isinstance(event, SessionClosed):
                    self.flush()
                    self._end()
                    return
                self._take(event)
            self.flush()
        except (DevmemError, OSError) as error:
            self.fail(error)

    @abstractmethod
    def _take(self, event: Event) -> None:
        """Act on an event of this role."""

    def lane_lost(self, lane: int) -> None:
        """Note that a data connection has ended; the session decides what that means."""
        self._session.lane_ended(lane, time.monotonic())
        self._on_timed(self)
        self.pump()

    # --- what goes ---

    def flush(self) -> None:
        """Send what the session has to say by the control connection."""
        data = self._session.data_to_send()
        if data:
            self._control.send(data)

    # --- time ---

    def deadline(self) -> float | None:
        """Return when to call ``tick``, by time.monotonic; None: never."""
        return None if self.ended else self._session.deadline()

    def tick(self, now: float) -> None:
        """Let time pass; what came is read first, since a program that was busy is no dead peer."""
        due = self.deadline()
        if due is not None and now >= due:
            self._control_ready()
            self._session.tick(now)
            self.pump()

    # --- the end ---

    @property
    def open(self) -> bool:
        """Whether messages may still go by it."""
        return not self.ended and self._session.state is SessionState.OPEN

    def leave(self) -> None:
        """Ask for an orderly end."""
        if not self.ended:
            self._session.close()
            self.pump()

    def abort(self, words: str) -> None:
        """End the session at once, and tell the peer why. Idempotent."""
        if not self.ended:
            self._session.abort(words)
            self.fail(ClosedError(f"this side ended the session: {words}"))

    def fail(self, error: Exception) -> None:
        """End the session because of an error, which is told whoever asks."""
        if self.ended:
            return
        self.error = error
        self._session.abort(str(error))  # nothing, if the session knows already
        with contextlib.suppress(BrokenError):  # the peer did not read before either
            self.flush()
        self._end()

    def _end(self) -> None:
        self.ended = True
        self._control.close()
        self._close_lanes()
        self._on_end(self)

    def _close_lanes(self) -> None:
        for sock in self.lanes:
            sock.close()
