"""The messages of a receiver that are not finished: which bytes come next on each lane, and which message is complete.

Rules of the machine:
  - messages finish in the order of their announcement, a complete one waiting for those before it;
  - a message is complete once its last byte is there, and its checksum if one was announced;
  - a cancelled message ends early, at the bytes that were under way. These, and those of a declined one, are drained;
  - what is drained is released here. What was wanted when it came is the driver's to release;
  - of a series, the next message is known once a lane is done with the one before it. It *begins* with its first byte:
    until then it has used no credit, and may turn out never to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.credit import ReceiveCredit
from devmem_tcp.sansio.frames import MAX_TOTAL, Announce, ChecksumKind
from devmem_tcp.sansio.stripes import Progress, Striping


class ExpectedPiece(NamedTuple):
    """What comes next on a lane: ``size`` bytes at ``offset`` of a message; if not ``wanted``, to be discarded."""

    message_id: int
    offset: int
    size: int
    wanted: bool


class IncomingMessage:
    """One message that was announced and is not finished."""

    __slots__ = ("begun", "cancelled", "checksum", "header", "message_id", "place", "progress", "skipped", "wanted")

    def __init__(self, message_id: int, header: Announce, place: int, lanes: int) -> None:
        self.message_id = message_id
        self.header = header
        self.begun = False
        self.place = place  # of its first byte, in the order of all bytes of the session
        self.progress = Progress(Striping(header.nbytes, header.stripes, lanes))
        self.checksum = b""
        self.wanted = True
        self.cancelled = False
        self.skipped = 0  # bytes that never come

    @property
    def complete(self) -> bool:
        if self.progress.missing:
            return False
        return self.cancelled or bool(self.checksum) or self.header.checksum_kind is ChecksumKind.NONE


class Incoming:
    """What is still to come, by lane and by message."""

    __slots__ = ("_by_id", "_credit", "_lanes", "_next_id", "_next_place", "_on_announced", "_order", "_series_end")

    def __init__(
        self, lanes: int, credit: ReceiveCredit, on_announced: Callable[[IncomingMessage], None] = lambda message: None
    ) -> None:
        self._lanes: list[deque[IncomingMessage]] = [deque() for _ in range(lanes)]
        self._order: deque[IncomingMessage] = deque()
        self._by_id: dict[int, IncomingMessage] = {}
        self._credit = credit
        self._on_announced = on_announced
        self._next_id = 0
        self._next_place = 0
        self._series_end = 0  # the first id after the series under way; not over _next_id: there is none

    def announce(self, header: Announce) -> None:
        """Take in a message.

        Raises:
            RemoteProtocolError: its id is not the next, its stripes are not over this session's lanes, or no credit.
        """
        if header.message_id == self._series_end:
            self._begin_rest_of_series()
        if header.message_id != self._next_id or self._series_end > self._next_id:
            raise RemoteProtocolError(
                f"message {header.message_id} was announced where {self._next_id} comes next, of a series or by itself"
            )
        self._credit.message_arrived()
        self._series_end = min(header.message_id + header.count, MAX_TOTAL)
        self._add(header).begun = True

    def _add(self, header: Announce) -> IncomingMessage:
        message = IncomingMessage(self._next_id, header, self._next_place, len(self._lanes))
        self._next_id += 1
        self._next_place += header.nbytes
        self._order.append(message)
        self._by_id[message.message_id] = message
        for lane in message.progress.lanes:
            self._lanes[lane].append(message)
        self._on_announced(message)
        return message

    def _continue_series(self, message: IncomingMessage) -> None:
        """Take in the next message of the series, after one that is done with on some lane."""
        if message.message_id == self._next_id - 1 and self._next_id < self._series_end:
            self._add(message.header)

    def _begin_rest_of_series(self) -> None:
        """Take in what is left of the series under way: who announces what follows it has begun all of it."""
        while self._order:
            self._begin(self._order[-1])
            if self._next_id >= self._series_end:
                return
            self._continue_series(self._order[-1])

    def _begin(self, message: IncomingMessage) -> None:
        if not message.begun:
            self._credit.message_arrived()
            message.begun = True

    def end_series(self, message_id: int) -> None:
        """Note that of the series under way ``message_id`` is the first message that does not come.

        Raises:
            RemoteProtocolError: none is under way, or that message has begun, or is past its end.
        """
        pending = self._order[-1] if self._order and not self._order[-1].begun else None
        first = self._next_id if pending is None else pending.message_id
        if self._series_end <= first or not first <= message_id < self._series_end:
            raise RemoteProtocolError(f"a series ends before message {message_id}, and {first} is its next")
        self._series_end = message_id
        if pending is not None and message_id == first:
            self._order.pop()
            del self._by_id[message_id]
            for lane in pending.progress.lanes:
                self._lanes[lane].remove(pending)
            self._next_id -= 1
            self._next_place -= pending.header.nbytes

    def expected(self, lane: int) -> ExpectedPiece | None:
        """Return what comes next on a lane; None: nothing was announced for it, so nothing is to be read."""
        if not self._lanes[lane]:
            return None
        message = self._lanes[lane][0]
        offset, size = message.progress.next_span(lane)
        return ExpectedPiece(message.message_id, offset, size, message.wanted)

    def granted(self, lane: int) -> int | None:
        """Return how many bytes of ``expected`` the sender has credit for; they come, unless it cancels the message."""
        piece = self.expected(lane)
        if piece is None:
            return None
        place = self._lanes[lane][0].place + piece.offset
        return min(piece.size, max(0, self._credit.granted_bytes - place))

    def received(self, lane: int, nbytes: int) -> bool:
        """Note that the first ``nbytes`` of ``expected`` are there; returns whether they are wanted now.

        Raises:
            LocalProtocolError: more was read than that.
            RemoteProtocolError: they were sent without credit.
        """
        piece = self.expected(lane)
        if piece is None or not 0 < nbytes <= piece.size:
            raise LocalProtocolError(f"{nbytes} bytes read on lane {lane}, where {piece} was expected")
        message = self._lanes[lane][0]
        self._begin(message)
        self._credit.bytes_arrived(message.place + piece.offset, nbytes)
        message.progress.advance(lane, nbytes)
        if not message.wanted:
            self._credit.release(nbytes)
        if not message.progress.left(lane):
            self._lanes[lane].popleft()
            self._continue_series(message)
        return message.wanted

    def take_checksum(self, message_id: int, checksum: bytes) -> None:
        """Note the checksum of a message.

        Raises:
            RemoteProtocolError: none is due.
        """
        message = self._announced(message_id)
        if message.cancelled or message.checksum or message.header.checksum_kind is ChecksumKind.NONE:
            raise RemoteProtocolError(f"a checksum of message {message_id}, where none is due")
        message.checksum = checksum

    def cancel(self, message_id: int, lane_bytes: list[int]) -> bool:
        """Let a message end early, at so many bytes on each lane; returns whether it was wanted until now.

        Raises:
            RemoteProtocolError: it is not on its way, or what is to come of it makes no sense.
        """
        message = self._announced(message_id)
        self._begin(message)
        if message.cancelled or message.complete:
            raise RemoteProtocolError(f"message {message_id} was cancelled, and is {_state(message)} already")
        message.skipped = message.progress.cut(lane_bytes)
        message.cancelled = True
        wanted, message.wanted = message.wanted, False
        for lane in message.progress.lanes:
            if not message.progress.left(lane) and message in self._lanes[lane]:
                self._lanes[lane].remove(message)
        self._continue_series(message)
        return wanted

    def decline(self, message_id: int) -> bool:
        """Drain a message from now on; returns whether that is news, to be told to the sender.

        Raises:
            LocalProtocolError: it was not announced, or has been received.
        """
        message = self._by_id.get(message_id)
        if message is None:
            raise LocalProtocolError(f"message {message_id} is not on its way")
        wanted, message.wanted = message.wanted, False
        return wanted

    def take_complete(self) -> IncomingMessage | None:
        """Return, and forget, the oldest message if it is complete."""
        if not self._order or not self._order[0].complete:
            return None
        message = self._order.popleft()
        del self._by_id[message.message_id]
        self._credit.bytes_skipped(message.skipped)
        return message

    @property
    def next_header(self) -> Announce:
        """What is said of the oldest message that is not finished."""
        return self._order[0].header

    def series_room(self) -> int:
        """Return how many messages of the series may come whole, with nothing else before; see ``series_received``."""
        if len(self._order) != 1 or self._order[0].begun:
            return 0
        (message,) = self._order
        header = message.header
        if not message.wanted or header.nbytes > header.stripes.piece_bytes:
            return 0
        credit = self._credit
        return min(
            self._series_end - message.message_id,
            credit.granted_messages - credit.arrived_messages,
            (credit.granted_bytes - message.place) // header.nbytes,
        )

    def series_received(self, count: int) -> None:
        """Count the next messages of the series as received whole: as ``received`` and ``take_complete`` would."""
        (message,) = self._order
        came_bytes = count * message.header.nbytes
        self._credit.message_arrived(count)
        self._credit.bytes_arrived(message.place, came_bytes)
        del self._by_id[message.message_id]
        message.message_id += count  # the same object stands for the next one
        message.place += came_bytes
        self._next_id, self._next_place = message.message_id, message.place
        if self._next_id < self._series_end:
            self._by_id[message.message_id] = message
            self._next_id += 1
            self._next_place += message.header.nbytes
        else:
            self._order.clear()
            for lane in message.progress.lanes:
                self._lanes[lane].clear()

    def _announced(self, message_id: int) -> IncomingMessage:
        """Return a message that is not finished; of a series, what is told of it may come before the bytes of others.

        Raises:
            RemoteProtocolError: there is none.
        """
        while self._next_id <= message_id < min(self._series_end, self._credit.granted_messages):
            self._continue_series(self._order[-1])
        message = self._by_id.get(message_id)
        if message is None:
            raise RemoteProtocolError(f"message {message_id} is not on its way")
        return message

    @property
    def idle(self) -> bool:
        """Whether nothing is to come, of a sender that said Goodbye: it has begun all of its series, or ended it."""
        return not self._order and self._next_id >= self._series_end

    def __len__(self) -> int:
        """Count messages that are not finished, without the one of a series that may never come."""
        return sum(message.begun for message in self._order)


def _state(message: IncomingMessage) -> str:
    return "cancelled" if message.cancelled else "complete"
