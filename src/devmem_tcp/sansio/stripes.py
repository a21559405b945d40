"""Which bytes of a message go by which lane: pure arithmetic, the same at both ends. A lane is one data connection.

Rules of the machine:
  - a message is cut into pieces of ``piece_bytes``, the last one may be shorter;
  - piece i goes by lane (first_lane + i % width) modulo the lanes of the session;
  - on one lane, pieces go in order, and those of an earlier message before those of a later one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from devmem_tcp.errors import RemoteProtocolError
from devmem_tcp.sansio.frames import Stripes

DEFAULT_PIECE_BYTES: Final = 1 << 20


class Striping:
    """How one message of ``nbytes`` lies on the ``lanes`` of a session.

    Raises:
        RemoteProtocolError: the stripes name a lane that the session has not.
    """

    __slots__ = ("first_lane", "lanes", "nbytes", "piece_bytes", "width")

    def __init__(self, nbytes: int, stripes: Stripes, lanes: int) -> None:
        self.nbytes = nbytes
        self.lanes = lanes
        self.piece_bytes = stripes.piece_bytes
        self.first_lane = stripes.first_lane
        self.width = stripes.width
        if self.first_lane >= lanes or self.width > lanes:
            raise RemoteProtocolError(
                f"stripes over {self.width} lanes from lane {self.first_lane} on: the session has {lanes}"
            )

    def used_lanes(self) -> list[int]:
        """Return the lanes that the stripes are over."""
        return [(self.first_lane + turn) % self.lanes for turn in range(self.width)]

    def lane_nbytes(self, lane: int) -> int:
        """Return how many bytes of the message go by a lane."""
        piece_bytes, width = self.piece_bytes, self.width
        turn = (lane - self.first_lane) % self.lanes
        if turn >= width:
            return 0
        whole, rest = divmod(self.nbytes, piece_bytes)
        pieces = (whole - turn + width - 1) // width if whole > turn else 0
        return pieces * piece_bytes + (rest if whole % width == turn else 0)


def choose_stripes(nbytes: int, backlog: list[int], piece_bytes: int = DEFAULT_PIECE_BYTES) -> Stripes:
    """Return stripes for a message, its first piece on the lane with the least backlog (bytes not sent, by lane).

    By one lane it goes in one piece.
    """
    lanes = len(backlog)
    width = min(lanes, -(-nbytes // piece_bytes)) or 1
    if width == 1:
        piece_bytes = max(piece_bytes, nbytes)
    first_lane = backlog.index(min(backlog)) if lanes > 1 else 0
    return Stripes(piece_bytes, first_lane, width)


class Progress:
    """How far one message has come on each of its lanes.

    ``missing`` is in bytes, over all lanes. Lanes that no byte of the message goes by are in none of the tables.
    """

    __slots__ = ("_ends", "_positions", "_striping", "missing")

    def __init__(self, striping: Striping) -> None:
        self._striping = striping
        self._ends = {lane: size for lane in striping.used_lanes() if (size := striping.lane_nbytes(lane))}
        self._positions = dict.fromkeys(self._ends, 0)
        self.missing = striping.nbytes

    @property
    def lanes(self) -> Iterable[int]:
        """The lanes that bytes of the message go by."""
        return self._ends.keys()

    def left(self, lane: int) -> int:
        """Return how many bytes are missing on a lane."""
        return self._ends.get(lane, 0) - self._positions.get(lane, 0)

    def next_span(self, lane: int) -> tuple[int, int]:
        """Return offset and size of what comes next on a lane that bytes are missing on: to the end of its piece."""
        striping = self._striping
        position = self._positions[lane]
        row, within = divmod(position, striping.piece_bytes)
        piece = row * striping.width + (lane - striping.first_lane) % striping.lanes
        size = min(striping.piece_bytes - within, self._ends[lane] - position)
        return piece * striping.piece_bytes + within, size

    def advance(self, lane: int, nbytes: int) -> None:
        """Note bytes that went by a lane."""
        self._positions[lane] += nbytes
        self.missing -= nbytes

    def positions(self) -> list[int]:
        """Return how many bytes went by each lane of the session."""
        return [self._positions.get(lane, 0) for lane in range(self._striping.lanes)]

    def cut(self, lane_bytes: list[int]) -> int:
        """Shorten the message to so many bytes on each lane; returns by how much.

        Raises:
            RemoteProtocolError: that is less than came already, or more than the message has, or not one for each lane.
        """
        if len(lane_bytes) != self._striping.lanes:
            raise RemoteProtocolError(f"bytes of {len(lane_bytes)} lanes, where the session has {self._striping.lanes}")
        for lane, end in enumerate(lane_bytes):
            if not self._positions.get(lane, 0) <= end <= self._ends.get(lane, 0):
                raise RemoteProtocolError(
                    f"a cancelled message ends after {end} bytes on lane {lane}, where {self._positions.get(lane, 0)} "
                    f"of {self._ends.get(lane, 0)} had come"
                )
        skipped = sum(self._ends.values()) - sum(lane_bytes)
        self._ends = {lane: lane_bytes[lane] for lane in self._ends}
        self.missing -= skipped
        return skipped
