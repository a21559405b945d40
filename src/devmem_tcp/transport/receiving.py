"""The receiver's end of one session: reads lanes into landings, and makes messages of what is complete."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from devmem_tcp.endpoints import worth_waking
from devmem_tcp.errors import DevmemError, KernelError, LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.receiving import ReceiverSession
from devmem_tcp.sansio.session import (
    Answered,
    Event,
    KeepAlive,
    MessageAnnounced,
    MessageCancelled,
    MessageReceived,
    SeriesEnded,
)
from devmem_tcp.transport.checksums import checksum_of
from devmem_tcp.transport.inbox import Share, host_memory
from devmem_tcp.transport.landing import FragLanding, IntoLanding, Landing, PlacedLanding, Waiter
from devmem_tcp.transport.link import Link
from devmem_tcp.transport.message import Header, Message, writable_bytes
from devmem_tcp.transport.poller import READABLE, Poller
from devmem_tcp.transport.reception import Established
from devmem_tcp.transport.series_intake import SeriesIntake

_BYTES_A_TURN: Final = 4 << 20
_BYTES_A_PIECE: Final = 64 << 10  # what a read costs besides its bytes, as bytes
_FEW: Final = 16 << 10  # bytes that are read as they come, and as long as there are some

Into = Callable[[Header], Any]
"""Asked of each message before its bytes come: where to copy them (a writable array), or None: leave them where they
land."""


class _Glance:
    """Looks again a few times, and does not wait: the rest of a message is mostly here sooner than it could return."""

    looks = 4

    def wait_briefly(self) -> bool:
        return False


_GLANCE: Final = _Glance()


class Keeper(Waiter, Protocol):
    """Takes memory back, and waits."""

    @property
    def alone(self) -> bool:
        """Whether there is one session at most."""

    def give_back(self, link: ReceiverLink, landing: Landing) -> None:
        """From any thread, in the middle of anything."""

    def settle(self, link: ReceiverLink, landing: Landing) -> None:
        """From any thread, as a call of the program's."""

    def stay_with(self, link: ReceiverLink) -> None:
        """See whether a session that just brought a message has another one here, before others have their turn."""


class ReceiverLink(Link):
    """See ``Link``.

    Args:
        share: this session's part of the bound Buffer.
        deliver: takes each message that is complete, in order; and what ``into`` raised that is no refusal.
        into: see Into.
        on_answer: takes the pieces of answers to requests.
        engine: takes back the memory of messages, from whatever thread.
    """

    _session: ReceiverSession

    def __init__(
        self,
        made: Established,
        poller: Poller,
        on_end: Callable[[Link], None],
        on_timed: Callable[[Link], None],
        *,
        backend: str,
        share: Share,
        keep_alive: KeepAlive | None,
        deliver: Callable[[Message | Exception], None],
        into: Into | None,
        on_answer: Callable[[ReceiverLink, int, bytes, bool], None],
        engine: Keeper,
    ) -> None:
        session = ReceiverSession(
            limits=made.agreed.limits,
            now=time.monotonic(),
            pool_bytes=share.credit_bytes,
            pool_messages=share.credit_messages,
            keep_alive=keep_alive,
            checksums=made.agreed.checksums,
        )
        super().__init__(session, made, poller, on_end, on_timed)
        self.backend: Final = backend
        self._share = share
        self._deliver = deliver
        self._into = into
        self._on_answer = on_answer
        self.engine: Final = engine
        self._headers: dict[int, MessageAnnounced] = {}  # of messages on their way
        self._in_frags: set[FragLanding] = set()  # of messages delivered and not given back
        self._intake = SeriesIntake(session, share, self.lanes[0])
        self._first: MessageAnnounced  # of those that the intake began with
        self._landings: dict[int, Landing] = {}  # of those that have begun to come
        self._watching = [False] * len(self.lanes)
        for sock in self.lanes:
            sock.settimeout(0)
        self.pump()

    # --- bytes ---

    def pull(self, lane: int) -> None:
        """Read what a lane has, but no more than its turn."""
        left = _BYTES_A_TURN
        while left > 0 and not self.ended:
            try:
                taken, more = self._pull_next() or self._pull_piece(lane)
            except (DevmemError, OSError) as error:  # of this session alone
                self.fail(error)
                return
            if not more:
                return
            left -= taken + _BYTES_A_PIECE

    def _pull_piece(self, lane: int) -> tuple[int, bool]:
        """Read a lane's next piece, as far as it has come.

        Returns: how many bytes, and whether to look for more at once: not after a piece that was worth waiting for.
        """
        piece = self._session.expected(lane)
        if piece is None:
            self._watch(lane, False)
            return 0, False
        sock = self.lanes[lane]
        landing = self._landing_of(piece.message_id) if piece.wanted else None
        try:
            taken = sock.discard(piece.size) if landing is None else landing.receive(sock, piece.offset, piece.size)
        except BlockingIOError:
            return 0, False
        except KernelError:
            raise
        except OSError:  # it broke; the control connection may tell why
            taken = 0
        if not taken:
            self._watch(lane, False)
            self.lane_lost(lane)
            return 0, False
        wanted = self._session.received(lane, taken, time.monotonic())
        if isinstance(landing, IntoLanding) and wanted:
            self._session.release(taken)
        if self._session.has_news:
            self.pump()
        else:
            self._watch_lane(lane)
        return taken, taken == piece.size and taken <= _FEW

    def _landing_of(self, message_id: int) -> Landing | None:
        """Return where a message lands; None: it is declined, since there is no memory for it."""
        landing = self._landings.get(message_id)
        if landing is None and self._intake.landing is not None:
            landing, self._intake.landing = self._intake.landing, None
            self._landings[message_id] = landing
        if landing is None:
            announced = self._headers[message_id]
            try:
                landing = self._choose(announced)
            except Exception as error:
                del self._headers[message_id]
                self._session.decline(message_id, str(error) or type(error).__name__)
                if not isinstance(error, (DevmemError, MemoryError, ValueError)):
                    error.add_note(f"raised by into=; message {announced.header.name!r} was declined")
                    self._deliver(error)  # a mistake of the program's own, which it is to hear of
                return None
            self._landings[message_id] = landing
        return landing

    def _choose(self, announced: MessageAnnounced) -> Landing:
        nbytes = announced.header.nbytes
        if self._into is not None:
            target = self._into(Header(announced.message_id, announced.header, self.peer))
            if target is not None:
                return IntoLanding(nbytes, self._share.buffer, writable_bytes(target, nbytes))
        if nbytes > self._share.credit_bytes:
            return IntoLanding(nbytes, self._share.buffer, host_memory(nbytes))
        place = self._share.take(nbytes)
        if place is not None:
            return PlacedLanding(nbytes, place, self._share)
        return FragLanding(nbytes, self._share)

    def _watch_lanes(self) -> None:
        """Watch those lanes that something is expected from."""
        if not self.ended:
            for lane in range(len(self.lanes)):
                self._watch_lane(lane)

    def _watch_lane(self, lane: int) -> None:
        """Watch a lane if something is expected from it; once that is worth reading, and all of it is sure to come."""
        sure = self._session.granted(lane)
        if sure is not None and self._share.placement:  # else the NIC may be short of pages before that much is here
            self.lanes[lane].set_low_water(worth_waking(sure) if sure > _FEW else 1)
        self._watch(lane, sure is not None)

    def _watch(self, lane: int, wanted: bool) -> None:
        if wanted is not self._watching[lane]:
            fd = self.lanes[lane].fileno()
            if wanted:
                self._poller.watch(fd, READABLE, lambda: self.pull(lane))
            else:
                self._poller.forget(fd)
            self._watching[lane] = wanted

    # --- the quick way, for messages of a series ---

    def receive_next(self) -> Message | None:
        """Receive the next message of a series, and wait for it for a moment; None: not now, or not so.

        What is to be done about it is left for later: for as long as the sender takes to answer.
        """
        return self._receive_whole(self.engine)

    def receive_more(self) -> Message | None:
        """Receive the next message of a series if it is here as a whole; None: it is not, or not so."""
        return self._receive_whole(None)

    def _pull_next(self) -> tuple[int, bool] | None:
        """Read the next message of a series, as far as it is here; answers as ``_pull_piece``. None: not so."""
        message = self._receive_whole(_GLANCE if self.engine.alone else None)
        if message is not None:
            self._deliver(message)
            self.engine.stay_with(self)
            return message.nbytes, message.nbytes <= _FEW
        return (0, False) if self._intake.may_go_on else None

    def _receive_whole(self, waiter: Waiter | None) -> Message | None:
        intake = self._intake
        if not (intake.may_go_on or self._begin_intake()):
            return None
        try:
            landing = intake.receive(waiter)
        except (MemoryError, LocalProtocolError, OSError, EOFError):
            self.settle_next()  # the long way says what is wrong, if anything is
            return None
        if landing is None:
            return None
        return Message(self, self._first.message_id + intake.came - 1, self._first.header, landing)

    def _begin_intake(self) -> bool:
        """See whether the next message can be received so, whatever became of the one before."""
        self._settle_came()
        if self.ended or len(self.lanes) > 1 or self._into is not None or len(self._headers) != 1:
            return False
        (self._first,) = self._headers.values()
        return self._intake.begin(self._first.header.nbytes)

    def settle_next(self) -> None:
        """Do what the quick way has left to do; the long way goes on. Everything else of this link does that first."""
        self._settle_came()
        landing = self._intake.landing
        if landing is not None and landing.landed:
            self._intake.landing = None
            (message_id,) = self._headers
            self._landings[message_id] = landing
            self._session.received(0, landing.landed, time.monotonic())
            self.pump()

    def _settle_came(self) -> None:
        came = self._intake.settle()
        if came:
            message_id, announced = self._headers.popitem()
            if self._session.expected(0) is not None:
                self._headers[message_id + came] = MessageAnnounced(message_id + came, announced.header)
            if self._session.has_news:
                self.pump()
            elif not self._session.series_room():
                self._watch_lane(0)

    # --- events ---

    def _take(self, event: Event) -> None:
        match event:
            case MessageAnnounced():
                self._headers[event.message_id] = event
                if not event.header.nbytes:
                    self._landings[event.message_id] = IntoLanding(0, None, memoryview(bytearray()))
            case MessageReceived():
                self._complete(event)
            case MessageCancelled() | SeriesEnded():
                self._intake.close()
                self._headers.pop(event.message_id, None)
                self._drop(event.message_id)
            case Answered():
                self._on_answer(self, event.number, event.body, event.last)

    def _complete(self, event: MessageReceived) -> None:
        header = self._headers.pop(event.message_id).header
        landing = self._landings.pop(event.message_id)
        if event.checksum:
            found = checksum_of(header.checksum_kind, landing.pieces())
            if found != event.checksum:
                landing.close()
                raise RemoteProtocolError(
                    f"message {event.message_id} ({header.name!r}) was damaged on its way: its "
                    f"{header.checksum_kind.value} is {found.hex()}, the sender's {event.checksum.hex()}"
                )
            self._session.verified(event.message_id)
        if isinstance(landing, FragLanding):
            self._in_frags.add(landing)
        self._deliver(Message(self, event.message_id, header, landing, event.checksum))

    def _drop(self, message_id: int) -> None:
        """Give back what was received of a message that does not come."""
        landing = self._landings.pop(message_id, None)
        if landing is not None:
            self._give_back(landing, messages=0)

    def pump(self) -> None:
        super().pump()
        try:
            self._watch_lanes()
        except OSError as error:
            self.fail(error)

    def _control_ready(self) -> None:
        self.settle_next()
        super()._control_ready()

    def _control_ended(self, now: float) -> None:
        """Take what has come by the lanes first: it was sent before, and may be all that was to come."""
        super().pump()
        try:
            for lane in range(len(self.lanes)):
                while not self.ended and self._pull_piece(lane)[0]:
                    pass
        except (DevmemError, OSError) as error:
            self.fail(error)
        super()._control_ended(now)

    def fail(self, error: Exception) -> None:
        self._intake.settle()
        super().fail(error)

    def leave(self) -> None:
        self.settle_next()
        super().leave()

    def abort(self, words: str) -> None:
        self.settle_next()
        super().abort(words)

    def _close_lanes(self) -> None:
        for lane in range(len(self.lanes)):
            self._watch(lane, False)
        self._intake.close()
        while self._landings:
            self._landings.popitem()[1].close()
        self._share.drop_spare()
        if not self._in_frags:  # else tokens are out: a lane takes them back when it is closed, read or not
            super()._close_lanes()

    # --- what is given back ---

    def take_back(self, landing: Landing) -> None:
        """Return the memory of a message to the NIC, and grant it to the sender anew."""
        if self._intake.take_back(landing):
            return
        self.settle_next()
        self._give_back(landing, messages=int(landing.counted))
        if not self.ended:
            self.flush()

    def count_off(self, landing: Landing) -> None:
        """Grant another message in place of one whose bytes are kept."""
        if landing.counted and not self.ended:
            landing.counted = False
            self.settle_next()
            self._session.release(0, 1)
            self.flush()

    @property
    def room_bytes(self) -> int:
        """How many bytes of messages may be held at a time."""
        return self._share.credit_bytes

    def _give_back(self, landing: Landing, messages: int) -> None:
        received = 0 if isinstance(landing, IntoLanding) else landing.path.received
        landing.close()
        if isinstance(landing, FragLanding):
            self._in_frags.discard(landing)
        if self.ended:
            self._share.drop_spare()
            if not self._in_frags:
                super()._close_lanes()
        self._session.release(received, messages)

    # --- requests ---

    def request(self, body: bytes) -> int:
        """Ask the sender for something; returns the number that its answer has."""
        self.settle_next()
        number = self._session.request(body)
        self.flush()
        return number
