"""The sender's end of a session; the rules are in ``sansio.session``."""

from __future__ import annotations

from typing import Literal, NamedTuple

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.credit import SendCredit
from devmem_tcp.sansio.frames import (
    MAX_BODY,
    MAX_CHECKSUM,
    MAX_MESSAGE,
    MAX_TOTAL,
    MIN_PIECE,
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
    Stripes,
    encode_announce,
    printable,
)
from devmem_tcp.sansio.outgoing import Outgoing, Piece
from devmem_tcp.sansio.session import (
    MAX_REQUESTS,
    CreditGranted,
    KeepAlive,
    MessageDeclined,
    MessagesFinished,
    Requested,
    Session,
    SessionState,
)
from devmem_tcp.sansio.stripes import DEFAULT_PIECE_BYTES, choose_stripes


class _Series(NamedTuple):
    nbytes: int
    stripes: Stripes
    end: int  # the first message id after it


class SenderSession(Session):
    """The sender's end. Announce a message, then send what ``next_piece`` says on each lane.

    Args:
        checksums: kinds that both ends have.
        piece_bytes: how large the pieces are that a message is striped in.
    """

    role = Role.SENDER

    def __init__(
        self,
        *,
        limits: Limits,
        now: float,
        keep_alive: KeepAlive | None = None,
        checksums: frozenset[ChecksumKind] = frozenset(),
        piece_bytes: int = DEFAULT_PIECE_BYTES,
    ) -> None:
        super().__init__(limits=limits, now=now, keep_alive=keep_alive)
        if not MIN_PIECE <= piece_bytes <= MAX_MESSAGE:
            raise ValueError(f"pieces of {piece_bytes} bytes: {MIN_PIECE} to {MAX_MESSAGE} are allowed")
        self._credit = SendCredit()
        self._outgoing = Outgoing(self.lanes, self._credit)
        self._checksums = checksums | {ChecksumKind.NONE}
        self._checksums_due: set[int] = set()
        self._piece_bytes = piece_bytes
        self._finished = 0
        self._closing = False
        self._series: _Series | None = None
        self._declined_ahead: tuple[int, str] | None = None  # the next message of the series, and why
        self._series_ends: set[int] = set()  # ids that a SeriesEnd named which the receiver has not read
        self._requests_taken = 0
        self._unanswered: set[int] = set()

    @property
    def may_announce(self) -> bool:
        """Whether there is credit for another message, and nobody said Goodbye."""
        return self.state is SessionState.OPEN and not self._closing and self._credit.messages_left > 0

    @property
    def announced(self) -> int:
        """Messages announced so far, those of a series that have begun among them."""
        return self._credit.taken_messages

    @property
    def series_left(self) -> int:
        """How many messages of the series under way have not begun; 0: there is none."""
        return self._series.end - self.announced if self._series is not None else 0

    def announce(
        self,
        *,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        nbytes: int,
        order: Literal["C", "F"] = "C",
        checksum_kind: ChecksumKind = ChecksumKind.NONE,
        metadata: bytes = b"",
        confirm: bool = False,
        count: int = 1,
    ) -> int:
        """Announce a message, and return its id; ``next_piece`` then says what of it to send where.

        With a ``count``, it is the first of a series of messages alike: ``announce_next`` begins each of the others,
        at the cost of no frame. Nothing else can be announced until all have begun, or ``end_series``.

        Args:
            name, dtype, shape, order: what the receiver is told of it.
            nbytes: its size.
            checksum_kind: ``finish`` must then be called, before or after its bytes are sent.
            metadata: from ``frames.encode_metadata``.
            confirm: have the receiver report at once that it is finished, not with its next grant.
            count: 1 to MAX_TOTAL.

        Raises:
            ValueError: a value is not for the wire, or over what the receiver takes.
            LocalProtocolError: no credit, a side said Goodbye, or a series is under way.
        """
        self._check_may_begin()
        if self._series is not None:
            raise LocalProtocolError(f"a series is under way: {self.series_left} of its messages have not begun")
        if nbytes > self._limits.message_bytes or len(metadata) > self._limits.metadata_bytes:
            raise ValueError(
                f"{nbytes} bytes with {len(metadata)} of metadata: the receiver takes {self._limits.message_bytes} and "
                f"{self._limits.metadata_bytes}"
            )
        if checksum_kind not in self._checksums:
            raise ValueError(f"the receiver cannot verify {checksum_kind.value}")
        stripes = choose_stripes(nbytes, self._outgoing.backlog, self._piece_bytes)
        message_id = self._credit.taken_messages
        data = encode_announce(
            Announce(
                message_id,
                name,
                dtype,
                list(shape),
                order,
                nbytes,
                stripes,
                checksum_kind,
                confirm,
                metadata,
                count,
            )
        )
        self._credit.take_message()
        self._outgoing_bytes += data
        self._outgoing.add(message_id, nbytes, stripes)
        if checksum_kind is not ChecksumKind.NONE:
            self._checksums_due.add(message_id)
        if count > 1:
            self._series = _Series(nbytes, stripes, min(message_id + count, MAX_TOTAL))
        return message_id

    def announce_next(self) -> int:
        """Begin the next message of the series under way, and return its id.

        Raises:
            LocalProtocolError: no series is under way, no credit, or a side said Goodbye.
        """
        self._check_may_begin()
        if self._series is None:
            raise LocalProtocolError("no series is under way")
        message_id = self.announced
        self._credit.take_message()
        self._outgoing.add(message_id, self._series.nbytes, self._series.stripes)
        if self.announced == self._series.end:
            self._series = None
        declined, self._declined_ahead = self._declined_ahead, None
        if declined is not None:
            self._take_back(message_id, declined[1])
        return message_id

    def series_room(self) -> int:
        """Return how many of the series' next messages may be sent at once, each whole: then call ``series_sent``.

        0: none, or not so: there is no credit, a message has several pieces, or something else is to be sent first.
        """
        series = self._series
        if series is None or self._closing or self._declined_ahead or self.state is not SessionState.OPEN:
            return 0
        if series.nbytes > series.stripes.piece_bytes:
            return 0
        return min(self.series_left, self._credit.messages_left, self._outgoing.room_for(series.nbytes))

    @property
    def series_lane(self) -> int:
        """The lane that messages of one piece, of the series under way, go by."""
        return self._series.stripes.first_lane if self._series is not None else 0

    def series_sent(self, now: float) -> int:
        """Note that the next message of the series was sent whole, as ``series_room`` allowed; returns its id.

        The same as ``announce_next``, ``next_piece`` and ``sent``, at a fraction of the cost.
        """
        series, message_id = self._series, self._credit.taken_messages
        assert series is not None
        self._credit.take_message()
        self._outgoing.skip(series.nbytes)
        if message_id + 1 == series.end:
            self._series = None
        self._alive(now)
        return message_id

    def end_series(self) -> None:
        """End the series under way, if there is one: what has not begun of it never comes."""
        if self._series is not None and self.ending is None:
            lanes = self._outgoing.lanes_of(self._series.stripes)
            self._series = self._declined_ahead = None
            self._outgoing.rest(self.announced, lanes)
            self._series_ends.add(self.announced)
            self._send(SeriesEnd(self.announced))

    def answer(self, number: int, body: bytes, *, last: bool = True) -> None:
        """Answer a request; in pieces, where it is longer than MAX_BODY.

        Raises:
            ValueError: the body is too long.
            LocalProtocolError: there is no such request, or it was answered in full; or this side said Goodbye.
        """
        self._check_lives()
        if len(body) > MAX_BODY:
            raise ValueError(f"a piece of an answer has at most {MAX_BODY} bytes, not {len(body)}")
        if number not in self._unanswered or self.state not in (SessionState.OPEN, SessionState.LEFT):
            raise LocalProtocolError(f"request {number} is not waiting for an answer")
        if last:
            self._unanswered.discard(number)
        self._send(Answer(number, body, last))

    def next_piece(self, lane: int) -> Piece | None:
        """Return the bytes to send next on a lane, as far as credit goes; None: none now. Then call ``sent``."""
        self._check_not_failed()
        return self._outgoing.next_piece(lane)

    def sent(self, lane: int, nbytes: int, now: float) -> None:
        """Note that the first ``nbytes`` of ``next_piece`` were given to the data connection.

        Raises:
            LocalProtocolError: that piece is shorter.
        """
        self._check_not_failed()
        self._outgoing.sent(lane, nbytes)
        self._alive(now)
        self._advance()

    def finish(self, message_id: int, checksum: bytes) -> bool:
        """Give the checksum of a message that was announced with one; answers whether it was still due.

        It is not once the message is cancelled, as it is when the receiver has declined it.

        Raises:
            ValueError: a checksum has 1 to 32 bytes.
            LocalProtocolError: the message was not announced.
        """
        self._check_not_failed()
        self._check_announced(message_id)
        if not 0 < len(checksum) <= MAX_CHECKSUM:
            raise ValueError(f"a checksum of {len(checksum)} bytes, where 1 to {MAX_CHECKSUM} are allowed")
        if message_id not in self._checksums_due:
            return False
        self._checksums_due.remove(message_id)
        self._send(Done(message_id, checksum))
        self._advance()
        return True

    def cancel(self, message_id: int, words: str) -> bool:
        """Take a message back; answers whether that was possible: False: all of it is sent.

        First tell by ``sent`` what was given to a lane. The message's memory is free once such sends are complete.
        """
        self._check_not_failed()
        self._check_announced(message_id)
        cancelled = self._cancel(message_id, words)
        self._advance()
        return cancelled

    def close(self) -> None:
        if self.ending is None:
            self._closing = True
            self._advance()

    def _check_may_begin(self) -> None:
        self._check_lives()
        if self._closing or self.state is not SessionState.OPEN:
            who = "this side" if self._closing else "the receiver"
            raise LocalProtocolError(f"{who} is closing the session: no message can be announced")

    def _check_announced(self, message_id: int) -> None:
        if not 0 <= message_id < self.announced:
            raise LocalProtocolError(f"message {message_id} was not announced")

    def _cancel(self, message_id: int, words: str) -> bool:
        if not self._outgoing.is_unsent(message_id):
            return False
        self._checksums_due.discard(message_id)
        self._send(Cancel(message_id, self._outgoing.cancel(message_id), printable(words)))
        return True

    def _take_of_role(self, frame: SessionFrame) -> None:
        match frame:
            case Credit():
                if not self._finished <= frame.finished <= self.announced:
                    raise RemoteProtocolError(f"{frame.finished} messages finished, of {self.announced} announced")
                self._credit.grant(frame.total_bytes, frame.total_messages)
                if frame.finished > self._finished:
                    self._finished = frame.finished
                    self._events.append(MessagesFinished(frame.finished))
                self._events.append(CreditGranted())
            case CancelTaken():
                self._outgoing.cancel_taken(frame.message_id)
                self._series_ends.discard(frame.message_id)
            case Decline():
                self._take_decline(frame)
            case Request():
                self._take_request(frame)

    def _take_decline(self, frame: Decline) -> None:
        if frame.message_id in self._series_ends:
            return  # said of the message that never came, not of the one that has its id now
        if frame.message_id < self.announced:
            self._take_back(frame.message_id, frame.words)
        elif frame.message_id == self.announced and self._series is not None:
            self._declined_ahead = (frame.message_id, frame.words)
        else:
            raise RemoteProtocolError(f"message {frame.message_id} was declined, and never announced")

    def _take_back(self, message_id: int, words: str) -> None:
        """Cancel a message for the receiver's reasons."""
        self._cancel(message_id, words)
        self._events.append(MessageDeclined(message_id, words))

    def _take_request(self, frame: Request) -> None:
        if frame.number != self._requests_taken or len(self._unanswered) >= MAX_REQUESTS:
            raise RemoteProtocolError(
                f"request {frame.number} in place of {self._requests_taken}, with {len(self._unanswered)} not answered"
            )
        self._requests_taken += 1
        self._unanswered.add(frame.number)
        if self.state is SessionState.OPEN:  # after this side's Goodbye, which was on its way, there is no answer
            self._events.append(Requested(frame.number, frame.body))

    def _advance(self) -> None:
        leaving = self._closing or self.state is SessionState.LEFT
        silent = self.state in (SessionState.OPEN, SessionState.LEFT)
        if leaving and silent and not self._outgoing and not self._checksums_due:
            self.end_series()
            self._say_goodbye()
        if self.state is SessionState.PARTING and self._finished == self.announced:
            self._close()

    def _under_way(self) -> str:
        return f": {self._finished} of {self.announced} messages are known to have arrived"
