"""The receiver's end of a session; the rules are in ``sansio.session``."""

from __future__ import annotations

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.credit import Quiet, ReceiveCredit
from devmem_tcp.sansio.frames import (
    MAX_BODY,
    Announce,
    Answer,
    Cancel,
    CancelTaken,
    ChecksumKind,
    Credit,
    Decline,
    Done,
    Limits,
    Request,
    Role,
    SeriesEnd,
    SessionFrame,
    printable,
)
from devmem_tcp.sansio.incoming import ExpectedPiece, Incoming, IncomingMessage
from devmem_tcp.sansio.session import (
    MAX_REQUESTS,
    Answered,
    KeepAlive,
    MessageAnnounced,
    MessageCancelled,
    MessageReceived,
    SeriesEnded,
    Session,
    SessionState,
)


class ReceiverSession(Session):
    """The receiver's end. Read what ``expected`` says from each lane, and release it.

    Args:
        pool_bytes, pool_messages: how much the receiver is ready to hold at a time; granted to the sender at once.
        checksums: kinds that both ends have.
    """

    role = Role.RECEIVER

    def __init__(
        self,
        *,
        limits: Limits,
        now: float,
        pool_bytes: int,
        pool_messages: int,
        keep_alive: KeepAlive | None = None,
        checksums: frozenset[ChecksumKind] = frozenset(),
    ) -> None:
        super().__init__(limits=limits, now=now, keep_alive=keep_alive)
        self._credit = ReceiveCredit(pool_bytes, pool_messages)
        self._incoming = Incoming(self.lanes, self._credit, self._note_announced)
        self._checksums = checksums | {ChecksumKind.NONE}
        self._unverified: int | None = None
        self._confirm_unverified = False
        self._finished = 0
        self._reported = 0
        self._requests = 0
        self._unanswered: set[int] = set()
        self._grant()

    def expected(self, lane: int) -> ExpectedPiece | None:
        """Return what to read next from a lane, at most; None: nothing is announced for it, so do not read it."""
        self._check_not_failed()
        return self._incoming.expected(lane)

    def granted(self, lane: int) -> int | None:
        """Return how many bytes of what is ``expected`` come without another grant; None: nothing is expected."""
        return self._incoming.granted(lane)

    def received(self, lane: int, nbytes: int, now: float) -> bool:
        """Note that the first ``nbytes`` of ``expected`` were read; False: they are not wanted: drop them.

        Bytes that are wanted are to be given back by ``release``; others count as released.

        Raises:
            LocalProtocolError: more was read than expected.
        """
        self._check_not_failed()
        try:
            wanted = self._incoming.received(lane, nbytes)
        except RemoteProtocolError as error:
            self._break(error.message)
            raise
        self._alive(now)
        self._advance()
        return wanted

    def series_room(self) -> int:
        """Return how many of the series' next messages may be read whole, one after the other, without ``expected``.

        0: none, or not so: none is on its way but of a series, of one piece each, or something is to be told first.
        """
        if self.state is not SessionState.OPEN or self._events or self._unverified is not None:
            return 0
        return self._incoming.series_room()

    def series_quiet(self) -> Quiet:
        """Return how many of the series' next messages may be received, and how many like them be released, before
        there is a frame to send; fewer than ``series_room`` may be left.
        """
        header = self._incoming.next_header
        return Quiet(0, 0) if header.confirm else self._credit.quiet(header.nbytes)

    def series_received(self, now: float, count: int = 1) -> None:
        """Note that the next message of the series was read whole, as ``series_room`` allowed; no event tells of it.

        Args:
            count: of several messages.
        """
        confirm = self._incoming.next_header.confirm
        self._incoming.series_received(count)
        self._alive(now)
        self._count_finished(confirm, count)
        self._grant_if_due()

    def release(self, nbytes: int, messages: int = 0) -> None:
        """Give back received bytes, whose memory is free again, and messages that are done with.

        Messages to count: those of MessageReceived; others count as released. Allowed after the session's end, too.

        Raises:
            LocalProtocolError: more than was received.
        """
        self._credit.release(nbytes, messages)
        if self.state not in (SessionState.CLOSED, SessionState.FAILED):
            self._grant_if_due()

    def verified(self, message_id: int) -> None:
        """Say that the checksum of the message just received is right; those after it may finish now.

        Raises:
            LocalProtocolError: it is not that message's turn.
        """
        self._check_not_failed()
        if message_id != self._unverified:
            raise LocalProtocolError(f"message {message_id} is not waiting to be verified")
        self._unverified = None
        self._count_finished(self._confirm_unverified)
        self._advance()

    def decline(self, message_id: int, words: str) -> None:
        """Refuse a message that is announced and not received: the rest of it is drained, and the sender told to stop.

        Raises:
            LocalProtocolError: it is not on its way.
        """
        self._check_not_failed()
        if self._incoming.decline(message_id):
            self._send(Decline(message_id, printable(words)))
            self._advance()

    def request(self, body: bytes) -> int:
        """Ask the sender for something, in words of the programs' own; returns the number that its answer has.

        Raises:
            ValueError: the body is longer than MAX_BODY.
            LocalProtocolError: too many requests wait for an answer, or a side said Goodbye.
        """
        self._check_lives()
        if len(body) > MAX_BODY:
            raise ValueError(f"a request has at most {MAX_BODY} bytes, not {len(body)}")
        if self.state is not SessionState.OPEN or len(self._unanswered) >= MAX_REQUESTS:
            raise LocalProtocolError(f"no request now: {len(self._unanswered)} are not answered, or a side is leaving")
        number = self._requests
        self._requests += 1
        self._unanswered.add(number)
        self._send(Request(number, body))
        return number

    def close(self) -> None:
        """Ask the sender to announce no more, and for an orderly end after what is announced."""
        if self.state in (SessionState.OPEN, SessionState.LEFT):
            self._say_goodbye()
            self._advance()

    def _take_of_role(self, frame: SessionFrame) -> None:
        match frame:
            case Announce():
                self._check_announce(frame)
                self._incoming.announce(frame)
            case SeriesEnd():
                self._incoming.end_series(frame.message_id)
                self._send(CancelTaken(frame.message_id))
                self._events.append(SeriesEnded(frame.message_id))
            case Done():
                self._incoming.take_checksum(frame.message_id, frame.checksum)
            case Cancel():
                wanted = self._incoming.cancel(frame.message_id, frame.lane_bytes)
                self._send(CancelTaken(frame.message_id))
                if wanted:
                    self._events.append(MessageCancelled(frame.message_id, frame.words))
            case Answer():
                self._take_answer(frame)

    def _note_announced(self, message: IncomingMessage) -> None:
        self._events.append(MessageAnnounced(message.message_id, message.header))

    def _take_answer(self, frame: Answer) -> None:
        if frame.number not in self._unanswered:
            raise RemoteProtocolError(f"an answer to request {frame.number}, which waits for none")
        if frame.last:
            self._unanswered.discard(frame.number)
        self._events.append(Answered(frame.number, frame.body, frame.last))

    def _check_announce(self, frame: Announce) -> None:
        if frame.nbytes > self._limits.message_bytes or len(frame.metadata) > self._limits.metadata_bytes:
            raise RemoteProtocolError(f"message {frame.message_id} is over the limits that were agreed")
        if frame.checksum_kind not in self._checksums:
            raise RemoteProtocolError(f"a checksum by {frame.checksum_kind.value}, which was not agreed")

    def _advance(self) -> None:
        while self._unverified is None and (message := self._incoming.take_complete()) is not None:
            message_id = message.message_id
            if message.wanted:
                self._events.append(MessageReceived(message_id, message.checksum))
            else:
                self._credit.release(0, 1)
            if message.wanted and message.checksum:
                self._unverified = message_id
                self._confirm_unverified = message.header.confirm
            else:
                self._count_finished(message.header.confirm)
        self._grant_if_due()
        if self._unverified is None and self._incoming.idle:
            self._part()

    def _part(self) -> None:
        """Everything announced has come: answer a Goodbye, and close after the sender's."""
        if self.state in (SessionState.LEFT, SessionState.PARTING) and self._reported < self._finished:
            self._grant()
        if self.state is SessionState.LEFT:
            self._say_goodbye()
        if self.state is SessionState.PARTING:
            self._close()

    def _count_finished(self, confirm: bool, count: int = 1) -> None:
        self._finished += count
        if confirm:
            self._grant()

    def _grant_if_due(self) -> None:
        if self._credit.grant_is_due:
            self._grant()

    def _grant(self) -> None:
        total_bytes, total_messages = self._credit.take_grant()
        self._reported = self._finished
        self._send(Credit(total_bytes, total_messages, self._finished))

    def _under_way(self) -> str:
        return f": {len(self._incoming)} messages were under way"
