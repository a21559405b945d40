"""The messages of a sender that are not all sent: what goes next on each lane.

Rules of the machine:
  - a message is added whole and takes its place at the end of all bytes of the session;
  - on each lane, the oldest message goes first; lanes do not wait for each other, but for credit all do in one order;
  - a message is finished once its last byte is sent, or it is cancelled: then what was not sent never is;
  - the lanes that a cancelled message had bytes left for rest until the receiver has read of it: a lane carries bytes
    alone, and the next message's would be taken for those. The same at the end of a series.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.credit import SendCredit
from devmem_tcp.sansio.frames import Stripes
from devmem_tcp.sansio.stripes import Progress, Striping


class Piece(NamedTuple):
    """``size`` bytes at ``offset`` of a message: to be sent next on a lane."""

    message_id: int
    offset: int
    size: int


class _Message(NamedTuple):
    message_id: int
    place: int  # of its first byte, in the order of all bytes of the session
    progress: Progress


class Outgoing:
    """What is still to be sent, by lane."""

    __slots__ = ("_credit", "_lanes", "_next_place", "_resting", "_unsent", "backlog")

    def __init__(self, lanes: int, credit: SendCredit) -> None:
        self._credit = credit
        self._lanes: list[deque[_Message]] = [deque() for _ in range(lanes)]
        self._unsent: dict[int, _Message] = {}
        self._resting: list[tuple[int, list[int]]] = []  # cancelled messages, and the lanes that rest for each
        self._next_place = 0
        self.backlog = [0] * lanes  #: bytes not sent, by lane

    def add(self, message_id: int, nbytes: int, stripes: Stripes) -> None:
        """Take in a message."""
        progress = Progress(Striping(nbytes, stripes, len(self._lanes)))
        message = _Message(message_id, self._next_place, progress)
        self._next_place += nbytes
        if nbytes:
            self._unsent[message_id] = message
        for lane in progress.lanes:
            self._lanes[lane].append(message)
            self.backlog[lane] += progress.left(lane)

    def room_for(self, nbytes: int) -> int:
        """Return how many messages of ``nbytes`` may go one after the other, by credit; 0 if anything else is to go."""
        return 0 if self._unsent or self._resting else self._credit.room(self._next_place) // nbytes

    def skip(self, nbytes: int) -> None:
        """Count bytes of messages that were added and sent in one go."""
        self._next_place += nbytes

    def next_piece(self, lane: int) -> Piece | None:
        """Return what is to be sent next on a lane, as far as credit goes; None: nothing now."""
        if not self._lanes[lane] or self._rests(lane):
            return None
        message_id, place, progress = self._lanes[lane][0]
        offset, size = progress.next_span(lane)
        room = self._credit.room(place + offset)
        return Piece(message_id, offset, min(size, room)) if room else None

    def sent(self, lane: int, nbytes: int) -> None:
        """Note that the first ``nbytes`` of ``next_piece`` are sent.

        Raises:
            LocalProtocolError: it is shorter.
        """
        piece = self.next_piece(lane)
        if piece is None or not 0 < nbytes <= piece.size:
            raise LocalProtocolError(f"{nbytes} bytes sent on lane {lane}, where {piece} was next")
        message = self._lanes[lane][0]
        message.progress.advance(lane, nbytes)
        self.backlog[lane] -= nbytes
        if not message.progress.left(lane):
            self._lanes[lane].popleft()
            if not message.progress.missing:
                del self._unsent[message.message_id]

    def is_unsent(self, message_id: int) -> bool:
        """Whether bytes of a message are still to be sent."""
        return message_id in self._unsent

    def cancel(self, message_id: int) -> list[int]:
        """Drop the rest of a message that is not all sent; returns how many of its bytes were sent, by lane."""
        message = self._unsent.pop(message_id)
        lanes = [lane for lane in message.progress.lanes if message.progress.left(lane)]
        for lane in lanes:
            self._lanes[lane].remove(message)
            self.backlog[lane] -= message.progress.left(lane)
        self.rest(message_id, lanes)
        return message.progress.positions()

    def lanes_of(self, stripes: Stripes) -> list[int]:
        """Return the lanes that stripes are over."""
        lanes = len(self._lanes)
        return [(stripes.first_lane + turn) % lanes for turn in range(stripes.width)]

    def rest(self, message_id: int, lanes: list[int]) -> None:
        """Let lanes rest until the receiver has read that a message ends early, or never comes."""
        self._resting.append((message_id, lanes))

    def cancel_taken(self, message_id: int) -> None:
        """Let the lanes go on that rest for a cancelled message.

        Raises:
            RemoteProtocolError: none does.
        """
        for index, (resting_for, _) in enumerate(self._resting):
            if resting_for == message_id:
                del self._resting[index]
                return
        raise RemoteProtocolError(f"a cancel of message {message_id} was taken, and none is under way")

    def _rests(self, lane: int) -> bool:
        return bool(self._resting) and any(lane in lanes for _, lanes in self._resting)

    def __len__(self) -> int:
        """Count messages that are not all sent."""
        return len(self._unsent)
