"""The messages of a receiver that are not finished: which bytes come next on each lane, and which message is complete.

Rules of the machine:
  - messages finish in the order of their announcement, a complete one waiting for those before it;
  - a message is complete once its last byte is there, and its checksum if one was announced;
  - a cancelled message ends early, at the bytes that were under way. These, and those of a declined one, are drained;
  - what is drained is released here. What was wanted when it came is the driver's to release.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.credit import ReceiveCredit
from devmem_tcp.sansio.frames import Announce, ChecksumKind
from devmem_tcp.sansio.stripes import Progress, Striping


class ExpectedPiece(NamedTuple):
    """What comes next on a lane: ``size`` bytes at ``offset`` of a message; if not ``wanted``, to be discarded."""

    message_id: int
    offset: int
    size: int
    wanted: bool


class IncomingMessage:
    """One message that was announced and is not finished."""

    __slots__ = ("cancelled", "checksum", "header", "place", "progress", "skipped", "wanted")

    def __init__(self, header: Announce, place: int, lanes: int) -> None:
        self.header = header
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

    __slots__ = ("_by_id", "_credit", "_lanes", "_next_id", "_next_place", "_order")

    def __init__(self, lanes: int, credit: ReceiveCredit) -> None:
        self._lanes: list[deque[IncomingMessage]] = [deque() for _ in range(lanes)]
        self._order: deque[IncomingMessage] = deque()
        self._by_id: dict[int, IncomingMessage] = {}
        self._credit = credit
        self._next_id = 0
        self._next_place = 0

    def announce(self, header: Announce) -> None:
        """Take in a message.

        Raises:
            RemoteProtocolError: its id is not the next, its stripes are not over this session's lanes, or no credit.
        """
        if header.message_id != self._next_id:
            raise RemoteProtocolError(f"message {header.message_id} was announced where {self._next_id} comes next")
        message = IncomingMessage(header, self._next_place, len(self._lanes))
        self._credit.message_arrived()
        self._next_id += 1
        self._next_place += header.nbytes
        self._order.append(message)
        self._by_id[header.message_id] = message
        for lane in message.progress.lanes:
            self._lanes[lane].append(message)

    def expected(self, lane: int) -> ExpectedPiece | None:
        """Return what comes next on a lane; None: nothing was announced for it, so nothing is to be read."""
        if not self._lanes[lane]:
            return None
        message = self._lanes[lane][0]
        offset, size = message.progress.next_span(lane)
        return ExpectedPiece(message.header.message_id, offset, size, message.wanted)

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
        self._credit.bytes_arrived(message.place + piece.offset, nbytes)
        message.progress.advance(lane, nbytes)
        if not message.wanted:
            self._credit.release(nbytes)
        if not message.progress.left(lane):
            self._lanes[lane].popleft()
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
        if message.cancelled or message.complete:
            raise RemoteProtocolError(f"message {message_id} was cancelled, and is {_state(message)} already")
        message.skipped = message.progress.cut(lane_bytes)
        message.cancelled = True
        wanted, message.wanted = message.wanted, False
        for lane in message.progress.lanes:
            if not message.progress.left(lane) and message in self._lanes[lane]:
                self._lanes[lane].remove(message)
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
        del self._by_id[message.header.message_id]
        self._credit.bytes_skipped(message.skipped)
        return message

    def _announced(self, message_id: int) -> IncomingMessage:
        message = self._by_id.get(message_id)
        if message is None:
            raise RemoteProtocolError(f"message {message_id} is not on its way")
        return message

    def __len__(self) -> int:
        """Count messages that are not finished."""
        return len(self._order)


def _state(message: IncomingMessage) -> str:
    return "cancelled" if message.cancelled else "complete"
