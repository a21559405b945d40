"""The quick way in, for messages of a series: each is read whole where it is to lie, and the session hears of many at
once.

That is for as long as there is nothing to tell the sender: the session says how many messages may come, and how many
be given back, before it has a frame to send (``ReceiverSession.series_quiet``).
"""

from __future__ import annotations

import time

from devmem_tcp.contract import DevmemSocket
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.transport.inbox import Share
from devmem_tcp.transport.landing import Landing, PlacedLanding, Waiter


class SeriesIntake:
    """Takes in messages of a series. What it has done is to be ``settle``d before the session is asked for anything.

    Args:
        sock: the lane that they come by.
    """

    __slots__ = (
        "_came_at",
        "_come_left",
        "_free_left",
        "_freed",
        "_nbytes",
        "_session",
        "_share",
        "_sock",
        "came",
        "landing",
    )

    def __init__(self, session: ReceiverSession, share: Share, sock: DevmemSocket) -> None:
        self._session = session
        self._share = share
        self._sock = sock
        self.landing: PlacedLanding | None = None  #: of the next message, once there is memory for it
        self._nbytes = 0  # of each
        self._come_left = self._free_left = 0  # messages, before there may be something to tell
        self.came = 0  #: messages that the session has not heard of
        self._freed = 0  # the same of those that were given back
        self._came_at = 0.0  # when the last one did, by time.monotonic

    @property
    def may_go_on(self) -> bool:
        """Whether another message may come so."""
        return self._come_left > 0

    def begin(self, nbytes: int) -> bool:
        """Look how many messages of ``nbytes`` may come so; False: none."""
        room = self._session.series_room()
        if not room:
            return False
        quiet = self._session.series_quiet()
        self._nbytes = nbytes
        arrivals = min(room, quiet.arrivals)
        self._come_left = arrivals or 1  # which may be worth a frame
        self._free_left = quiet.releases if arrivals else 0
        return True

    def receive(self, waiter: Waiter | None) -> PlacedLanding | None:
        """Receive the next message; None: it has not come as a whole.

        Args, raises: as ``PlacedLanding.receive_whole``; MemoryError: there is no place for it.
        """
        landing = self.landing
        if landing is None:
            place = self._share.take(self._nbytes)
            if place is None:
                raise MemoryError
            landing = self.landing = PlacedLanding(self._nbytes, place, self._share)
        if not landing.receive_whole(self._sock, waiter):
            return None
        self.landing = None
        self._come_left -= 1
        self.came += 1
        self._came_at = time.monotonic()
        return landing

    def take_back(self, landing: Landing) -> bool:
        """Give the memory of a message back, if there is nothing to tell of it now; False: there is."""
        alike = landing.nbytes == self._nbytes and landing.counted and isinstance(landing, PlacedLanding)
        if not (self._free_left and alike):
            return False
        self._free_left -= 1
        self._freed += 1
        landing.close()
        return True

    def settle(self) -> int:
        """Tell the session what has come, and what was given back; answers how many came."""
        came, freed = self.came, self._freed
        self.came = self._freed = self._come_left = self._free_left = 0
        if came:
            self._session.series_received(self._came_at, came)
        if freed:
            self._session.release(freed * self._nbytes, freed)
        return came

    def close(self) -> None:
        """Give the memory of a message that does not come back."""
        landing, self.landing = self.landing, None
        if landing is not None:
            landing.close()
