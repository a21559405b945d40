"""An established session: messages from one sender to one receiver, over one control connection and N lanes.

This file holds what both roles share; the two ends are in ``sansio.sending`` and ``sansio.receiving``. A lane is a data
connection; it carries the bytes of messages and nothing else. What happens to a session, by state:

    sender, to whom …             OPEN    LEAVING  LEFT     PARTING  CLOSED  FAILED
    Credit, Decline, CancelTaken  take    take     take     take     pass    pass
    Request                       take    take     broken   broken   pass    pass
    Ping, Pong, Abort             take    take     take     take     pass    pass
    Goodbye                       take    take     broken   broken   pass    pass
    Announce, SeriesEnd, Done     broken  broken   broken   broken   pass    pass
    Cancel, Answer                broken  broken   broken   broken   pass    pass
    the control connection ends   lost    lost     lost     lost     pass    pass
    a lane ends                   lost    lost     lost     lost     pass    pass
    silence                       lost    lost     lost     lost     pass    pass

    receiver, to whom …           OPEN    LEAVING  LEFT     PARTING  CLOSED  FAILED
    Announce, SeriesEnd, Done     take    take     broken   broken   pass    pass
    Cancel, Answer                take    take     broken   broken   pass    pass
    Ping, Pong, Abort             take    take     take     take     pass    pass
    Goodbye                       take    take     broken   broken   pass    pass
    Credit, Decline, CancelTaken  broken  broken   broken   broken   pass    pass
    Request                       broken  broken   broken   broken   pass    pass
    connections, silence          as for the sender

  - LEAVING: this side said Goodbye. LEFT: the peer did. PARTING: both, and messages or reports are under way yet.
    CLOSED: nothing is. FAILED: as ``ending`` says, by whom and why; it is final, and every later call says it again;
  - a sender says Goodbye once all it announced is sent; a receiver says it when asked to close, or in answer once all
    has come. Each answers the other's by itself;
  - a lane that ends is judged LANE_GRACE_S later: until then the control connection may tell why, or that all is well;
  - silence: after ``idle_s`` without a sign of life the peer is pinged, and after ``pings`` unanswered ones given up.
    Bytes moving on any lane are a sign of life, so a slow transfer is never taken for a dead peer;
  - broken: the peer is told by Abort, and the session fails with RemoteProtocolError;
  - the driver reads before it lets time pass (``tick``): a program that was busy must not take that for silence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from enum import Enum, auto
from typing import Final, NamedTuple, TypeAlias

import msgspec

from devmem_tcp.errors import (
    BrokenError,
    ClosedError,
    RemoteProtocolError,
    Timeout,
)
from devmem_tcp.sansio.endings import Ending, Party
from devmem_tcp.sansio.frames import (
    Abort,
    Announce,
    Answer,
    Cancel,
    CancelTaken,
    Credit,
    Decline,
    Done,
    Goodbye,
    Limits,
    Ping,
    Pong,
    Request,
    Role,
    SeriesEnd,
    SessionFrame,
    encode,
    printable,
    session_decoder,
)

LANE_GRACE_S: Final = 1.0
MAX_REQUESTS: Final = 64  #: of a receiver, not answered in full
_PING_BURST: Final = 64  # pings that a peer may send at once, and then a second


class SessionState(Enum):
    """Where a session stands."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and this is looked up for every frame

    OPEN = auto()
    LEAVING = auto()
    LEFT = auto()
    PARTING = auto()
    CLOSED = auto()
    FAILED = auto()


_BEFORE_GOODBYE: Final = (SessionState.OPEN, SessionState.LEAVING)  # the peer's


class Happening(Enum):
    """What happens to a session, besides frames."""

    CONTROL_END = auto()
    LANE_END = auto()
    SILENCE = auto()


class Outcome(Enum):
    """What comes of it."""

    TAKE = auto()
    BROKEN = auto()
    LOST = auto()
    PASS = auto()


_ALWAYS: Final = (Outcome.TAKE,) * 4 + (Outcome.PASS,) * 2
_UNTIL_GOODBYE: Final = (Outcome.TAKE,) * 2 + (Outcome.BROKEN,) * 2 + (Outcome.PASS,) * 2
_NEVER: Final = (Outcome.BROKEN,) * 4 + (Outcome.PASS,) * 2
_LOST: Final = (Outcome.LOST,) * 4 + (Outcome.PASS,) * 2

What: TypeAlias = type[SessionFrame] | Happening

_FOR_BOTH: Final[dict[What, tuple[Outcome, ...]]] = {
    Ping: _ALWAYS,
    Pong: _ALWAYS,
    Abort: _ALWAYS,
    Goodbye: _UNTIL_GOODBYE,
    Happening.CONTROL_END: _LOST,
    Happening.LANE_END: _LOST,
    Happening.SILENCE: _LOST,
}
_FOR_SENDER: Final = _FOR_BOTH | {
    Credit: _ALWAYS,
    Decline: _ALWAYS,
    CancelTaken: _ALWAYS,
    Request: _UNTIL_GOODBYE,
    Announce: _NEVER,
    SeriesEnd: _NEVER,
    Done: _NEVER,
    Cancel: _NEVER,
    Answer: _NEVER,
}
_FOR_RECEIVER: Final = _FOR_BOTH | {
    Credit: _NEVER,
    Decline: _NEVER,
    CancelTaken: _NEVER,
    Request: _NEVER,
    Announce: _UNTIL_GOODBYE,
    SeriesEnd: _UNTIL_GOODBYE,
    Done: _UNTIL_GOODBYE,
    Cancel: _UNTIL_GOODBYE,
    Answer: _UNTIL_GOODBYE,
}
TABLE: Final[dict[Role, dict[What, dict[SessionState, Outcome]]]] = {
    role: {what: dict(zip(SessionState, outcomes, strict=True)) for what, outcomes in rows.items()}
    for role, rows in ((Role.SENDER, _FOR_SENDER), (Role.RECEIVER, _FOR_RECEIVER))
}


class KeepAlive(NamedTuple):
    """How long a peer may be silent: ``idle_s`` seconds before each of ``pings`` pings, and after the last."""

    idle_s: float = 15.0
    pings: int = 3


class MessageAnnounced(msgspec.Struct, frozen=True):
    """A message is on its way; ``expected`` may ask for its bytes from now on.

    The header of a message of a series is that of the first one, with the first one's id.
    """

    message_id: int
    header: Announce


class MessageReceived(msgspec.Struct, frozen=True):
    """All bytes of a message are there. With a checksum: compare, then call ``verified``, or ``abort``."""

    message_id: int
    checksum: bytes


class MessageCancelled(msgspec.Struct, frozen=True):
    """The sender took a message back; release what was received of it."""

    message_id: int
    words: str


class CreditGranted(msgspec.Struct, frozen=True):
    """More may be sent, or announced."""


class MessagesFinished(msgspec.Struct, frozen=True):
    """The first ``messages`` messages of the session are received and verified, or cancelled."""

    messages: int


class MessageDeclined(msgspec.Struct, frozen=True):
    """The receiver does not want a message. Unless all its bytes were sent, it is cancelled now."""

    message_id: int
    words: str


class SeriesEnded(msgspec.Struct, frozen=True):
    """The series is over: message ``message_id``, which may have been told of, does not come, nor any after it."""

    message_id: int


class Requested(msgspec.Struct, frozen=True):
    """The receiver asks for something; to be answered by ``answer``."""

    number: int
    body: bytes


class Answered(msgspec.Struct, frozen=True):
    """A piece of the answer to a request of this side."""

    number: int
    body: bytes
    last: bool


class PeerLeaves(msgspec.Struct, frozen=True):
    """The peer said Goodbye: a sender announces nothing more, a receiver takes nothing more."""


class SessionClosed(msgspec.Struct, frozen=True):
    """Both sides said Goodbye, and nothing is under way: the connections may be closed."""


Event: TypeAlias = (
    MessageAnnounced
    | MessageReceived
    | MessageCancelled
    | CreditGranted
    | MessagesFinished
    | MessageDeclined
    | SeriesEnded
    | Requested
    | Answered
    | PeerLeaves
    | SessionClosed
)


class Session(ABC):
    """What both roles share. Feed ``receive_control``, ask ``next_event`` until None, send ``data_to_send``.

    Args:
        limits: as agreed in the handshake; all its lanes are joined.
        now: the driver's clock, in seconds.
        keep_alive: None: wait for ever.
    """

    role: Role

    def __init__(self, *, limits: Limits, now: float, keep_alive: KeepAlive | None = None) -> None:
        self.lanes: Final = limits.lanes  #: numbered from 0
        self.state = SessionState.OPEN
        self.ending: Ending | None = None  #: by whom it failed and why, once it has
        self._limits = limits
        self._table = TABLE[self.role]
        self._decoder = session_decoder()
        self._outgoing_bytes = bytearray()
        self._events: deque[Event] = deque()
        self._control_ended = False
        self._lost_lane: tuple[int, float] | None = None
        self._keep_alive = keep_alive
        self._now = self._began = self._last_life = self._last_ping = now
        self._pings_unanswered = 0
        self._pings_taken = 0

    # The driver's side: bytes and time in, events and bytes out.

    def receive_control(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take bytes from the control connection; once CLOSED or FAILED, drop them."""
        self._now = now
        if data and self.state not in (SessionState.CLOSED, SessionState.FAILED):
            self._alive(now)
            self._decoder.feed(data)

    def control_ended(self, now: float) -> None:
        """Note that the peer ended the control connection, or that it broke."""
        self._now = now
        self._control_ended = True

    def lane_ended(self, lane: int, now: float) -> None:
        """Note that the peer ended a data connection, or that it broke."""
        self._now = now
        if self._lost_lane is None:
            self._lost_lane = (lane, now + LANE_GRACE_S)

    def data_to_send(self) -> bytes:
        """Return, and forget, what is to be sent by the control connection: also once FAILED or CLOSED."""
        data = bytes(self._outgoing_bytes)
        self._outgoing_bytes.clear()
        return data

    def next_event(self) -> Event | None:
        """Return the next event; None: nothing more happens until the driver brings bytes or time.

        Raises:
            RemoteProtocolError: the peer broke the protocol.
            BrokenError: the peer aborted the session; the text has its words.
            ConnectionResetError: a connection ended before the session did.
            Timeout: the peer gave no sign of life.
            ClosedError: this side aborted.
        """
        while not self._events:
            if self.ending is not None:
                raise self.ending.error()
            try:
                frame = self._decoder.next_frame() if self.state is not SessionState.CLOSED else None
                if frame is None:
                    break
                self._take(frame)
            except RemoteProtocolError as error:
                self._break(error.message)
        if self._events:
            return self._events.popleft()
        if self._control_ended:
            early = (
                "without a goodbye" if self.state in _BEFORE_GOODBYE else "after its goodbye, before all was settled"
            )
            self._lose(Happening.CONTROL_END, f"the peer ended the control connection {early}")
        return None

    @property
    def has_news(self) -> bool:
        """Whether ``next_event`` or ``data_to_send`` has something that was not asked for yet, frames aside."""
        return bool(self._events or self._outgoing_bytes) or self.ending is not None

    def deadline(self) -> float | None:
        """Return when to call ``tick``; None: never."""
        if self.state in (SessionState.CLOSED, SessionState.FAILED):
            return None
        times = []
        if self._lost_lane is not None:
            times.append(self._lost_lane[1])
        if self._keep_alive is not None:
            times.append(max(self._last_life, self._last_ping) + self._keep_alive.idle_s)
        return min(times, default=None)

    def tick(self, now: float) -> None:
        """Let time pass: ping, or give up, as ``next_event`` then says. Read what came before calling this."""
        self._now = now
        due = self.deadline()
        if due is None or now < due:
            return
        if self._lost_lane is not None and now >= self._lost_lane[1]:
            words = f"data connection {self._lost_lane[0]} ended before the session did"
            self._note_loss(Happening.LANE_END, ConnectionResetError, words)
        elif self._keep_alive is not None and self._pings_unanswered < self._keep_alive.pings:
            self._pings_unanswered += 1
            self._last_ping = now
            self._send(Ping(self._pings_unanswered))
        else:
            words = f"no sign of life from the peer in {now - self._last_life:.1f} s, and no answer to pings"
            self._note_loss(Happening.SILENCE, Timeout, words)

    def abort(self, words: str) -> None:
        """End the session at once, and tell the peer why; send ``data_to_send``, then close. Idempotent."""
        if self.state not in (SessionState.CLOSED, SessionState.FAILED):
            self._send(Abort(printable(words)))
            self._fail(Ending(Party.HERE, ClosedError, f"this side aborted the session: {words}"))

    @abstractmethod
    def close(self) -> None:
        """Ask for an orderly end; SessionClosed says that it has come. Idempotent."""

    # What both roles do with frames.

    def _take(self, frame: SessionFrame) -> None:
        outcome = self._table[type(frame)][self.state]
        if outcome is not Outcome.TAKE:
            raise RemoteProtocolError(
                f"{type(frame).__name__} does not go to a {self.role.value} that is {self.state.name}"
            )
        match frame:
            case Abort():
                words = f"the peer aborted the session: {frame.words}"
                self._fail(Ending(Party.PEER, BrokenError, words))
            case Ping():
                self._answer(frame)
            case Pong():
                pass  # any byte of the control connection is a sign of life
            case Goodbye():
                self._events.append(PeerLeaves())
                parting = self.state is SessionState.LEAVING
                self.state = SessionState.PARTING if parting else SessionState.LEFT
                self._advance()
            case _:
                self._take_of_role(frame)
                self._advance()

    @abstractmethod
    def _take_of_role(self, frame: SessionFrame) -> None:
        """Act on a frame that only this role gets."""

    @abstractmethod
    def _advance(self) -> None:
        """Do what has become possible: finish messages, say Goodbye, close."""

    def _answer(self, ping: Ping) -> None:
        self._pings_taken += 1
        if self._pings_taken > _PING_BURST * (1 + self._now - self._began):
            raise RemoteProtocolError(f"{self._pings_taken} pings in {self._now - self._began:.1f} s")
        self._send(Pong(ping.number))

    def _send(self, frame: SessionFrame) -> None:
        self._outgoing_bytes += encode(frame)

    def _say_goodbye(self) -> None:
        self._send(Goodbye())
        self.state = SessionState.PARTING if self.state is SessionState.LEFT else SessionState.LEAVING

    def _close(self) -> None:
        self.state = SessionState.CLOSED
        self._events.append(SessionClosed())

    def _alive(self, now: float) -> None:
        self._now = self._last_life = now
        self._pings_unanswered = 0

    def _break(self, words: str) -> None:
        """Fail because the peer broke the protocol, and tell it."""
        self._send(Abort(printable(words)))
        self._fail(Ending(Party.PEER, RemoteProtocolError, words))

    def _lose(self, what: Happening, words: str) -> None:
        self._note_loss(what, ConnectionResetError, words)
        if self.ending is not None:
            raise self.ending.error()

    def _note_loss(self, what: Happening, kind: type[Exception], words: str) -> None:
        if self._table[what][self.state] is Outcome.LOST:
            if what is not Happening.CONTROL_END:
                self._send(Abort(printable(words)))
            party = Party.PEER if what is Happening.CONTROL_END else Party.NETWORK
            self._fail(Ending(party, kind, f"{words}{self._under_way()}"))

    @abstractmethod
    def _under_way(self) -> str:
        """Say, for an error's text, what was not finished."""

    def _fail(self, ending: Ending) -> None:
        self.state = SessionState.FAILED
        self.ending = ending

    def _check_not_failed(self) -> None:
        """Raise what ended the session, if it failed."""
        if self.ending is not None:
            raise self.ending.error()

    def _check_lives(self) -> None:
        """Raise what ended the session, if it has ended in whatever way."""
        self._check_not_failed()
        if self.state is SessionState.CLOSED:
            raise ClosedError("the session is closed")
