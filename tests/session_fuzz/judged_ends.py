"""The two ends of a session, each used as a driver uses it, and judged by what it hears, says, tells and takes.

What must hold of each end, whatever it hears:
  - it raises what is documented and nothing else; an error is final, and every call says it again;
  - states follow each other as they may, and a frame does what the table says of it in the state that it comes in;
  - what it says is well-formed, not much more than it heard, and ends with an Abort if there is one;
  - a sender sends no byte, and announces no message, that it has no credit for, and nothing of what it took back; a
    receiver takes none that it granted no credit for, and never holds more than its pool;
  - it keeps no more of what it hears than a frame, and nothing once it is at its end.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from devmem_tcp.errors import BrokenError, ClosedError, RemoteProtocolError, Timeout
from devmem_tcp.sansio.frames import (
    LENGTH_BYTES,
    MAX_FRAME,
    Abort,
    Announce,
    ChecksumKind,
    Credit,
    session_decoder,
)
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import (
    TABLE,
    Answered,
    Event,
    MessageAnnounced,
    MessageCancelled,
    MessageDeclined,
    MessageReceived,
    MessagesFinished,
    Outcome,
    PeerLeaves,
    Requested,
    SeriesEnded,
    Session,
    SessionClosed,
    SessionState,
)
from frame_maker import Cutter

MAX_SIZE: Final = 1 << 16  # of a message of an honest sender
_PATTERN: Final = bytes(random.Random(0).choices(range(1, 256), k=2 * MAX_SIZE))  # no zeros: those are what is missing
_ANSWER_TO_BYTE: Final = 64  # bytes said for one heard, at most: a Goodbye of 6 bytes gets one, and a Credit
_ANSWER_FREE: Final = 1 << 12  # and for the first bytes: an Abort with words
_DOCUMENTED: Final = (RemoteProtocolError, BrokenError, ConnectionResetError, Timeout, ClosedError)
_FOLLOWING: Final = {
    SessionState.OPEN: frozenset(SessionState),
    SessionState.LEAVING: frozenset(SessionState) - {SessionState.OPEN, SessionState.LEFT},
    SessionState.LEFT: frozenset(SessionState) - {SessionState.OPEN, SessionState.LEAVING},
    SessionState.PARTING: frozenset({SessionState.PARTING, SessionState.CLOSED, SessionState.FAILED}),
    SessionState.CLOSED: frozenset({SessionState.CLOSED}),
    SessionState.FAILED: frozenset({SessionState.FAILED}),
}
ENDED: Final = frozenset({SessionState.CLOSED, SessionState.FAILED})


class JudgedEnd(ABC):
    """What both ends share.

    Args:
        end: the session.
        honest: whether nobody interferes: then it must not fail.
        tally: gets what happens.
    """

    def __init__(self, end: Session, honest: bool, tally: Counter[str]) -> None:
        self.end: Any = end
        self.honest = honest
        self.tally = tally
        self.queue = bytearray()  #: control bytes on their way to this end
        self.failure: tuple[type[Exception], str] | None = None
        self.said: list[bytes] = []  #: bodies, the last ones
        self._heard, self._said = Cutter(MAX_FRAME), Cutter(MAX_FRAME)
        self._state = end.state
        self._told_leaving = self._told_closed = 0
        self._silent = False
        self._kept: int | None = None  # bytes that were heard, and not read before the end

    @property
    def lives(self) -> bool:
        return self._state not in ENDED

    # --- control ---

    def hear(self, data: bytes, now: float, *, by_frame: bool) -> None:
        """Let this end hear bytes, all at once or frame by frame, and judge what comes of them."""
        said = len(self.end._outgoing_bytes)
        parts = self._heard.cut(data)
        for part in parts:
            if part.body is not None:
                self.note_heard(part.body)
        if by_frame:
            for part in parts:
                self._hear_part(part.data, part.body, now)
        else:
            self.end.receive_control(data, now)
            self.ask()
        assert not self.lives or not self._heard.bad, "a length over the limit was not refused"
        said = len(self.end._outgoing_bytes) - said
        assert said <= _ANSWER_FREE + _ANSWER_TO_BYTE * len(data), f"{said} bytes said to {len(data)}"

    def _hear_part(self, data: bytes, body: bytes | None, now: float) -> None:
        before, said = self.end.state, len(self.end._outgoing_bytes)
        self.end.receive_control(data, now)
        self.ask()
        if body is None:
            return
        try:
            frame = session_decoder().decode(body)
        except RemoteProtocolError:
            outcome = Outcome.PASS if before in ENDED else Outcome.BROKEN
        else:
            outcome = TABLE[self.end.role][type(frame)][before]
            if isinstance(frame, Abort) and outcome is Outcome.TAKE:
                assert self.end.ending.kind is BrokenError
        if outcome is Outcome.BROKEN:
            assert self._state is SessionState.FAILED, f"{body!r} was taken by an end that was {before}"
            assert self.end.ending.kind is RemoteProtocolError
        elif outcome is Outcome.PASS:
            assert (self._state, len(self.end._outgoing_bytes)) == (before, said), "an end goes on behind its end"

    def pull(self) -> bytes:
        """Return what this end says now; it must be well-formed."""
        data: bytes = self.end.data_to_send()
        for part in self._said.cut(data):
            assert part.body is not None, "half a frame was said"
            assert not self._silent, "something was said behind an Abort"
            frame = session_decoder().decode(part.body)
            self._silent = isinstance(frame, Abort)
            self.said.append(part.body)
        del self.said[:-16]
        return data

    def ask(self) -> None:
        """Take events until there are none, and judge what became of the session."""
        try:
            while (event := self.end.next_event()) is not None:
                assert self.failure is None, f"an error was not final: {self.failure}"
                self._take(event)
            assert self.failure is None, f"an error was not final: {self.failure}"
        except _DOCUMENTED as error:
            self.judge_failure(error)
        self._judge_state()

    def judge_failure(self, error: Exception) -> None:
        """Check an error against the session's ending, and that there may be one."""
        ending = self.end.ending
        assert not self.honest, f"a session that nobody disturbed failed: {error!r}"
        assert ending is not None
        assert type(error) is ending.kind, f"{error!r} is not how it ended: {ending}"
        assert self.failure in (None, (type(error), str(error))), "an error changed"
        if self.failure is None:
            self.tally[f"failed by {type(error).__name__}"] += 1
        self.failure = type(error), str(error)

    def _judge_state(self) -> None:
        end = self.end
        assert end.state in _FOLLOWING[self._state], f"{end.state} followed {self._state}"
        self._state = end.state
        assert (end.state is SessionState.FAILED) == (end.ending is not None) == (self.failure is not None)
        pending = end._decoder.pending_bytes
        if self.lives:
            assert pending < MAX_FRAME + LENGTH_BYTES, f"{pending} bytes are kept"
        else:
            assert end.deadline() is None
            assert self._kept is None or pending <= self._kept, "what came behind the end is kept"
            self._kept = pending
        assert (end.state is SessionState.CLOSED) == bool(self._told_closed)
        assert max(self._told_leaving, self._told_closed) <= 1

    def _take(self, event: Event) -> None:
        if isinstance(event, PeerLeaves):
            self._told_leaving += 1
        elif isinstance(event, SessionClosed):
            self._told_closed += 1
        else:
            self.take(event)

    @abstractmethod
    def take(self, event: Event) -> None:
        """Judge an event of this role, and do what a driver does at once."""

    @abstractmethod
    def note_heard(self, body: bytes) -> None:
        """Look at a frame that this end hears."""

    @abstractmethod
    def calls(self) -> list[Callable[[], object]]:
        """Return calls that say how the session failed, once it has."""

    def judge_dead(self, now: float) -> None:
        """Check that an end that failed says so at every call, and takes nothing more."""
        assert self.failure is not None
        self.hear(bytes(100), now, by_frame=False)
        self.end.tick(now + 1000)
        for call in self.calls():
            try:
                call()
            except _DOCUMENTED as error:
                self.judge_failure(error)
            else:
                raise AssertionError("a call was answered by a session that has failed")
        self.ask()


class Sent:
    """A message of the sender."""

    def __init__(self, message_id: int, place: int, size: int, kind: ChecksumKind) -> None:
        self.payload = _PATTERN[message_id * 61 % MAX_SIZE :][:size]
        self.place = place  # of its first byte among all of the session
        self.sent = 0  # bytes
        self.kind = kind
        self.cancelled = False
        self.taken_back = False  # by this side's own wish


class JudgedSender(JudgedEnd):
    """A sender and its driver."""

    end: SenderSession

    def __init__(self, end: SenderSession, honest: bool, tally: Counter[str]) -> None:
        super().__init__(end, honest, tally)
        self.messages: list[Sent] = []
        self.due: set[int] = set()  #: messages whose checksums are
        self.finished = 0
        self.requests: dict[int, bytes] = {}  #: not answered
        self.was_declined: Callable[[int], bool] = lambda message_id: True  #: by an honest receiver
        self.granted_bytes = self.granted_messages = 0

    def note_heard(self, body: bytes) -> None:
        if body[1:2] == b"\x0b":  # the tag; a Credit that is refused may make these too large, of a session that fails
            try:
                frame = session_decoder().decode(body)
            except RemoteProtocolError:
                return
            assert isinstance(frame, Credit)
            self.granted_bytes = max(self.granted_bytes, frame.total_bytes)
            self.granted_messages = max(self.granted_messages, frame.total_messages)

    def announce(self, size: int, kind: ChecksumKind, confirm: bool, count: int) -> None:
        dtype, metadata = ("uint8", b"") if confirm else ("bfloat16", b'{"layer": 1}')
        message_id = self.end.announce(
            name="w",
            dtype=dtype,
            shape=(size,),
            nbytes=size,
            order="F" if confirm else "C",
            checksum_kind=kind,
            confirm=confirm,
            metadata=metadata,
            count=count,
        )
        self._note_begun(message_id, size, kind)

    def announce_next(self) -> None:
        self._note_begun(self.end.announce_next(), len(self.messages[-1].payload), ChecksumKind.NONE)
        self.ask()

    def _note_begun(self, message_id: int, size: int, kind: ChecksumKind) -> None:
        assert message_id == len(self.messages)
        assert message_id < self.granted_messages, "a message was announced without credit"
        last = self.messages[-1] if self.messages else None
        place = last.place + len(last.payload) if last is not None else 0
        self.messages.append(Sent(message_id, place, size, kind))
        if kind is not ChecksumKind.NONE:
            self.due.add(message_id)

    def send(self, lane: int, nbytes: int, now: float) -> bytes:
        """Return up to ``nbytes`` of what goes next by a lane."""
        piece = self.end.next_piece(lane)
        if piece is None:
            return b""
        message = self.messages[piece.message_id]
        end = piece.offset + piece.size
        assert piece.size > 0
        assert end <= len(message.payload), "bytes behind the end of a message are asked for"
        assert message.place + end <= self.granted_bytes, "bytes go without credit"
        assert not message.cancelled, "bytes of a message go that was taken back"
        size = min(piece.size, nbytes)
        self.end.sent(lane, size, now)
        message.sent += size
        assert message.sent <= len(message.payload), "bytes go twice"
        self.ask()
        return message.payload[piece.offset : piece.offset + size]

    def send_series(self, now: float) -> tuple[int, bytes]:
        """Return the lane that the next message of a series goes by whole, and its bytes; none: it does not."""
        if not self.end.series_room():
            return 0, b""
        lane = self.end.series_lane
        self._note_begun(self.end.series_sent(now), len(self.messages[-1].payload), ChecksumKind.NONE)
        message = self.messages[-1]
        message.sent = len(message.payload)
        self.tally["sent whole, of a series"] += 1
        assert message.place + message.sent <= self.granted_bytes, "bytes go without credit"
        self.ask()
        return lane, message.payload

    def cancel(self, message_id: int) -> None:
        message = self.messages[message_id]
        was_all_sent = message.sent == len(message.payload)
        if self.end.cancel(message_id, "not needed\n"):
            assert not message.cancelled, "a message was taken back twice"
            assert not was_all_sent, "a message was taken back that is all sent"
            message.cancelled = message.taken_back = True
            self.due.discard(message_id)
        else:
            assert message.cancelled or was_all_sent
        self.ask()

    def finish(self, message_id: int) -> None:
        due = self.end.finish(message_id, checksum(message_id))
        assert due == (message_id in self.due)
        self.due.discard(message_id)
        self.ask()

    def take(self, event: Event) -> None:
        if isinstance(event, MessagesFinished):
            assert self.finished < event.messages <= len(self.messages)
            self.finished = event.messages
        elif isinstance(event, MessageDeclined):
            message = self.messages[event.message_id]
            assert self.was_declined(event.message_id), "a message was declined that the receiver did not decline"
            message.cancelled |= message.sent < len(message.payload)
            if message.cancelled:
                self.due.discard(event.message_id)
        elif isinstance(event, Requested):
            assert event.number not in self.requests
            self.requests[event.number] = event.body

    def calls(self) -> list[Callable[[], object]]:
        end = self.end
        calls: list[Callable[[], object]] = [
            end.next_event,
            lambda: end.next_piece(0),
            lambda: end.sent(0, 1, 0.0),
            lambda: end.cancel(0, ""),
            lambda: end.finish(0, b"1"),
            lambda: end.announce(name="w", dtype="uint8", shape=(), nbytes=1),
            end.announce_next,
            lambda: end.answer(0, b""),
        ]
        return calls


class JudgedReceiver(JudgedEnd):
    """A receiver and its driver.

    Args:
        pool_bytes, pool_messages: as the session was given them.
    """

    end: ReceiverSession

    def __init__(
        self, end: ReceiverSession, pool_bytes: int, pool_messages: int, honest: bool, tally: Counter[str]
    ) -> None:
        super().__init__(end, honest, tally)
        self.pool_bytes = pool_bytes
        self.pool_messages = pool_messages
        self.seen = 0  #: messages that were told of, the first ones
        self.open: dict[int, tuple[Announce, bytearray]] = {}  #: not received nor cancelled: what came of them
        self.received: set[int] = set()
        self.cancelled: set[int] = set()
        self.declined: set[int] = set()
        self.unverified: int | None = None
        self.held_bytes = self.held_messages = 0  #: received and not released
        self.taken_bytes = 0
        self.requests: dict[int, bytes] = {}  #: not answered
        self.sent: Callable[[int], Sent] | None = None  #: what an honest sender sent

    def note_heard(self, body: bytes) -> None:
        """Nothing that a sender says is needed to judge what a receiver tells."""

    def receive(self, lane: int, wire: bytearray, nbytes: int, now: float) -> bool:
        """Take up to ``nbytes`` of what is expected from a lane; returns whether anything was."""
        piece = self.end.expected(lane)
        size = min(piece.size if piece else 0, nbytes, len(wire))
        if piece is None or not size:
            return False
        message_id, offset, expected_size, wanted = piece
        assert message_id < self.seen, "bytes are expected of a message that was not told of"
        data = bytes(wire[:size])
        del wire[:size]
        granted = self.end._credit.granted_bytes
        try:
            taken = self.end.received(lane, size, now)
        except RemoteProtocolError as error:
            self.judge_failure(error)
            self._judge_state()
            return True
        self.taken_bytes += size
        assert self.taken_bytes <= granted, "bytes were taken that no credit was given for"
        assert taken is wanted is (message_id in self.open and message_id not in self.declined)
        if taken:
            header, payload = self.open[message_id]
            assert offset + expected_size <= header.nbytes
            self.held_bytes += size
            if self.honest:
                assert not any(payload[offset : offset + size]), "bytes came twice"
                payload[offset : offset + size] = data
        assert self.held_bytes <= self.pool_bytes, "more is held than the pool has"
        self.ask()
        return True

    def receive_series(self, wires: list[bytearray], most: int, now: float) -> bool:
        """Take the next messages of a series whole, at once: as many as may come so and are there, but for ``most``.

        Returns whether there were any.
        """
        room = self.end.series_room()
        if not room:
            return False
        expected = [(lane, piece) for lane in range(len(wires)) if (piece := self.end.expected(lane)) is not None]
        assert len(expected) == 1, "a series has room where other things are to come"
        ((lane, piece),) = expected
        header, _ = self.open[piece.message_id]
        assert piece == (piece.message_id, 0, header.nbytes, True)
        count = min(most, room, len(wires[lane]) // piece.size)
        if not count:
            return False
        granted, quiet, news = self.end._credit.granted_bytes, self.end.series_quiet(), self.end.has_news
        self.end.series_received(now, count)
        if count <= quiet.arrivals and not news:
            assert not self.end.has_news, "it was said that there would be nothing to tell"
        self.taken_bytes += count * piece.size
        self.held_bytes += count * piece.size
        assert self.taken_bytes <= granted, "bytes were taken that no credit was given for"
        assert self.held_bytes <= self.pool_bytes, "more is held than the pool has"
        for message_id in range(piece.message_id, piece.message_id + count):
            self._note_following(message_id, header)
            self.open[message_id][1][: piece.size] = wires[lane][: piece.size]
            del wires[lane][: piece.size]
            self._take_received(MessageReceived(message_id, b""))
        self.tally["received whole, of a series"] += count
        self.tally["received at once, of a series"] += count > 1
        following = self.end.expected(lane)
        if following is not None:
            self._note_following(following.message_id, header)
        self.ask()
        return True

    def _note_following(self, message_id: int, header: Announce) -> None:
        """Note the next message of a series, if no event told of it."""
        if message_id == self.seen:
            self.seen += 1
            self.open[message_id] = header, bytearray(header.nbytes if self.honest else 0)

    def release(self, nbytes: int, messages: int) -> None:
        self.end.release(nbytes, messages)
        self.held_bytes -= nbytes
        self.held_messages -= messages
        self.ask()

    def verify(self) -> None:
        message_id, self.unverified = self.unverified, None
        assert message_id is not None
        self.end.verified(message_id)
        self.ask()

    def decline(self, message_id: int) -> None:
        self.declined.add(message_id)
        self.end.decline(message_id, "not wanted\n")
        self.ask()

    def may_decline(self) -> list[int]:
        """Return the messages that can be declined, and were not."""
        return [message_id for message_id in self.open if message_id not in self.declined]

    def request(self, body: bytes) -> None:
        self.requests[self.end.request(body)] = body

    def take(self, event: Event) -> None:
        if isinstance(event, MessageAnnounced):
            assert event.message_id == self.seen, "messages were not told of in their order"
            self.seen += 1
            self.open[event.message_id] = event.header, bytearray(event.header.nbytes if self.honest else 0)
            granted = self.end._credit.granted_messages
            assert event.header.count > 1 or event.message_id < granted, "a message was taken without credit"
            kept = len(self.end._incoming._order)
            assert kept <= self.pool_messages + 1, "more messages are under way than there is credit for"
        elif isinstance(event, SeriesEnded):
            for message_id in [one for one in self.open if one >= event.message_id]:
                del self.open[message_id]
                self.declined.discard(message_id)
            self.seen = min(self.seen, event.message_id)
        elif isinstance(event, MessageCancelled):
            del self.open[event.message_id]
            assert event.message_id not in self.declined
            assert self.sent is None or self.sent(event.message_id).taken_back, "nobody took this message back"
            self.cancelled.add(event.message_id)
        elif isinstance(event, MessageReceived):
            self._take_received(event)
        elif isinstance(event, Answered):
            assert event.number in self.requests
            if self.honest:
                assert event.body == self.requests[event.number] + b"!"
            if event.last:
                del self.requests[event.number]

    def _take_received(self, event: MessageReceived) -> None:
        message_id = event.message_id
        header, payload = self.open.pop(message_id)
        assert message_id not in self.declined
        assert all(other in self.declined for other in self.open if other < message_id), "messages changed places"
        assert self.unverified is None, "a message passed one that is not verified"
        assert (header.checksum_kind is ChecksumKind.NONE) == (event.checksum == b"")
        self.received.add(message_id)
        self.held_messages += 1
        assert self.held_messages <= self.pool_messages, "more messages are held than the pool has"
        if event.checksum:
            self.unverified = message_id
        if self.sent is not None:
            message = self.sent(message_id)
            assert payload == message.payload, "a message is not what was sent"
            assert event.checksum == (checksum(message_id) if message.kind is not ChecksumKind.NONE else b"")
        self.tally["messages received"] += 1

    def calls(self) -> list[Callable[[], object]]:
        end = self.end
        return [
            end.next_event,
            lambda: end.expected(0),
            lambda: end.received(0, 1, 0.0),
            lambda: end.verified(0),
            lambda: end.decline(0, ""),
            lambda: end.request(b""),
        ]


def checksum(message_id: int) -> bytes:
    """Return what stands in for the checksum of a message."""
    return message_id.to_bytes(4)
