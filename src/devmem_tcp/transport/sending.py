"""The sender's end of one session: announces messages and gives their bytes to lanes, as far as these take them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from devmem_tcp.arrays import ArrayType
from devmem_tcp.errors import ClosedError, DevmemError, KernelError, OutOfDeviceMemory, Timeout
from devmem_tcp.sansio.frames import ChecksumKind
from devmem_tcp.sansio.outgoing import Piece
from devmem_tcp.sansio.sending import SenderSession
from devmem_tcp.sansio.session import Event, KeepAlive, MessageDeclined, MessagesFinished, Requested
from devmem_tcp.sansio.stripes import DEFAULT_PIECE_BYTES
from devmem_tcp.transport.delivery import GONE, Completions, Delivery, SlotSource, Source
from devmem_tcp.transport.link import Link
from devmem_tcp.transport.outbox import Outbox, Window
from devmem_tcp.transport.poller import READABLE, WRITABLE, Poller
from devmem_tcp.transport.reception import Established

_FULL: Final = (errno.ENOBUFS, errno.ENOMEM)  # what sendmsg says when completions are to be collected first
_MANY_COMPLETIONS: Final = 16  # worth a call
_NOTHING: Final = (False, False)
_ROUNDS_A_TURN: Final = 16  # pieces that each lane is given before others have their turn


class MessageHeader(msgspec.Struct, frozen=True):
    """What a receiver is told of a message. ``metadata`` is JSON, or nothing."""

    name: str
    type: ArrayType
    shape: tuple[int, ...]
    nbytes: int
    order: Literal["C", "F"] = "C"
    metadata: bytes = b""
    checksum_kind: ChecksumKind = ChecksumKind.NONE
    confirm: bool = False


class SenderLink(Link):
    """See ``Link``.

    Args:
        outbox: the bound TX Buffer that messages go from.
        on_request: called with the number and the body of what the receiver asks for.
    """

    _session: SenderSession

    def __init__(
        self,
        made: Established,
        poller: Poller,
        on_end: Callable[[Link], None],
        on_timed: Callable[[Link], None],
        *,
        outbox: Outbox,
        keep_alive: KeepAlive | None,
        on_request: Callable[[SenderLink, int, bytes], None],
        piece_bytes: int = DEFAULT_PIECE_BYTES,
    ) -> None:
        session = SenderSession(
            limits=made.agreed.limits,
            now=time.monotonic(),
            keep_alive=keep_alive,
            checksums=made.agreed.checksums,
            piece_bytes=piece_bytes,
        )
        super().__init__(session, made, poller, on_end, on_timed)
        self.outbox: Final = outbox
        self.piece_bytes: Final = piece_bytes
        self._deliveries: dict[int, Delivery] = {}
        self._completions = [Completions(sock) for sock in self.lanes]
        self._full: set[int] = set()  # lanes that took less than they were given
        self._watched = [_NOTHING] * len(self.lanes)  # of each: whether it is watched for writing, for completions
        self._series_room = 0  # messages that may go the quick way, whatever else; 0: ask the session
        self._on_request = on_request
        try:
            for sock in self.lanes:
                sock.set_zerocopy()
                sock.settimeout(0)
        except OSError as error:
            self.fail(error)
        self.pump()

    # --- messages ---

    @property
    def may_begin(self) -> bool:
        """Whether the receiver has granted another message."""
        return not self.ended and self._session.may_announce

    @property
    def under_way(self) -> int:
        """How many messages are not known to have arrived."""
        return len(self._deliveries)

    def begin(self, header: MessageHeader, source: Source, count: int = 1) -> Delivery:
        """Announce a message, or a series; ``push`` sends it.

        Raises:
            ValueError, LocalProtocolError: as ``SenderSession.announce``.
        """
        self.check_lives()
        message_id = self._session.announce(
            name=header.name,
            dtype=header.type.name,
            shape=header.shape,
            nbytes=header.nbytes,
            order=header.order,
            checksum_kind=header.checksum_kind,
            metadata=header.metadata,
            confirm=header.confirm,
            count=count,
        )
        return self._deliver(message_id, header, source)

    def begin_next(self, header: MessageHeader, source: Source) -> Delivery:
        """Begin the next message of the series under way."""
        self.check_lives()
        return self._deliver(self._session.announce_next(), header, source)

    def send_next(self, header: MessageHeader, window: Window, patience_s: float) -> Delivery | None:
        """Send the next message of the series under way from a window, in one call, which may wait for room so long.

        None: it cannot be done so now.
        """
        if not (self._series_room or self._find_series_room()):
            return None
        lane = self._session.series_lane
        sock, completions = self.lanes[lane], self._completions[lane]
        sock.settimeout(patience_s)
        try:
            taken = sock.send_frags(self.outbox.binding, (window.offset,), (header.nbytes,))
        except (BlockingIOError, Timeout, KernelError, ConnectionError):
            return None  # the long way says what is wrong, if anything is
        finally:
            sock.settimeout(0)
        now = time.monotonic()
        if taken == header.nbytes:
            self._series_room -= 1
            delivery = Delivery(self._session.series_sent(now), header.name, header.nbytes, GONE)
            delivery.left = 0
            self._deliveries[delivery.message_id] = delivery
            completions.sent(window, delivery)
            if len(completions) >= _MANY_COMPLETIONS:
                completions.collect()
            return delivery
        delivery = self._deliver(self._session.announce_next(), header, SlotSource(window))
        completions.sent(window, delivery)
        self._session.sent(lane, taken, now)
        delivery.left -= taken
        return delivery

    def _find_series_room(self) -> int:
        """Return how many messages of the series may go the quick way now; there may be credit that came unseen."""
        if not self.ended and not self._session.series_room():
            self._control_ready()
        self._series_room = 0 if self.ended else self._session.series_room()
        return self._series_room

    def pump(self) -> None:
        self._series_room = 0
        super().pump()

    def end_series(self) -> None:
        """End the series under way, if there is one."""
        self._series_room = 0
        if not self.ended:
            self._session.end_series()
            self.flush()

    def finish(self, delivery: Delivery, checksum: bytes) -> None:
        """Tell the checksum of a message that was announced with one."""
        self.check_lives()
        self._session.finish(delivery.message_id, checksum)
        self.flush()

    def cancel(self, delivery: Delivery, words: str) -> bool:
        """Take a message back; False: all of it is on its way already."""
        self._series_room = 0
        if self.ended or not self._session.cancel(delivery.message_id, words):
            return False
        delivery.declined = words
        delivery.source.close()
        self.flush()
        return True

    def answer(self, number: int, body: bytes, *, last: bool = True) -> None:
        """Answer a request of the receiver's."""
        self.check_lives()
        self._session.answer(number, body, last=last)
        self.flush()

    @property
    def unsent_control_bytes(self) -> int:
        """Bytes that the control connection has not taken yet: wait before answering more."""
        return self._control.unsent_bytes

    def check_lives(self) -> None:
        """Raise what ended this session, if it has ended."""
        if self.ended:
            raise self.error or ClosedError("the session has ended: both sides said goodbye")

    def _deliver(self, message_id: int, header: MessageHeader, source: Source) -> Delivery:
        self._series_room = 0
        delivery = Delivery(message_id, header.name, header.nbytes, source)
        self._deliveries[message_id] = delivery
        if not header.nbytes:
            source.close()
        self.flush()
        return delivery

    # --- bytes ---

    def push(self) -> None:
        """Give lanes what they take now, a piece each by turns, and see to it that this goes on when they take more.

        One that takes ever more is left alone after a while, so that other sessions have their turn.
        """
        self._full.clear()
        rounds = _ROUNDS_A_TURN
        moving = not self.ended
        while moving and rounds:
            rounds -= 1
            moving = False
            for lane in range(len(self.lanes)):
                moving |= lane not in self._full and self._push_lane(lane)
                if self.ended:
                    return
        if moving:
            self._full.update(range(len(self.lanes)))  # they may take more, and the poller says so at once
        self.collect()
        for lane in range(len(self.lanes)):
            self._watch(lane)
        self.pump()

    def _push_lane(self, lane: int) -> bool:
        """Give a lane its next piece, or a part of it; False: there is none, or it does not take any now."""
        piece = self._session.next_piece(lane)
        if piece is None:
            return False
        delivery = self._deliveries[piece.message_id]
        where = self._locate(delivery, piece)
        if where is None:
            return False
        window, offset, size = where
        sock = self.lanes[lane]
        try:
            taken = sock.send_frags(self.outbox.binding, (offset,), (size,))
        except BlockingIOError:
            self._full.add(lane)
            return False
        except KernelError as error:
            if error.errno in _FULL and len(self._completions[lane]):
                return False
            self.fail(error)
            return False
        except OSError:  # it broke; the control connection may tell why
            self.lane_lost(lane)
            return False
        self._completions[lane].sent(window, delivery)
        self._session.sent(lane, taken, time.monotonic())
        delivery.source.gone(piece.offset, taken)
        delivery.left -= taken
        if not delivery.left:
            delivery.source.close()
        return True

    def _locate(self, delivery: Delivery, piece: Piece) -> tuple[Any, int, int] | None:
        where = delivery.source.locate(piece.offset, piece.size)
        if where is None:
            self.collect()
            where = delivery.source.locate(piece.offset, piece.size)
        if where is None and not (any(map(len, self._completions)) or self._holds_staged()):
            size = min(delivery.nbytes, self.outbox.stage_bytes(self.piece_bytes))
            delivery.error = OutOfDeviceMemory(
                f"no room for {size} bytes in the TX buffer of {self.outbox.buffer.size_bytes}: slots hold it",
                wanted=size,
                free=self.outbox.free_bytes,
                hint="leave slots (with) before sending arrays, or open the sender with a larger size=",
            )
            self.cancel(delivery, "the sender is out of device memory")
        return where

    def _holds_staged(self) -> bool:
        return any(delivery.source.staged for delivery in self._deliveries.values())

    def collect(self) -> None:
        """Let go of the windows that the kernel has read."""
        for completions in self._completions:
            completions.collect()

    def _watch(self, lane: int) -> None:
        """Have ``push`` called once a lane takes more, or has completions, if that is to be waited for."""
        sock, wanted = self.lanes[lane], (lane in self._full, len(self._completions[lane]) > 0)
        if self.ended or wanted == self._watched[lane]:
            return
        self._forget(lane)
        self._watched[lane] = wanted
        events: dict[int, int] = {}
        for fd_of, event, is_wanted in ((sock.send_fileno, WRITABLE, wanted[0]), (sock.fileno, READABLE, wanted[1])):
            if is_wanted:
                fd = fd_of()
                events[fd] = events.get(fd, 0) | event
        for fd, all_events in events.items():
            self._poller.watch(fd, all_events, self.push)

    def _forget(self, lane: int) -> None:
        sock, (writing, reading) = self.lanes[lane], self._watched[lane]
        self._watched[lane] = _NOTHING
        if writing:
            self._poller.forget(sock.send_fileno())
        if reading:
            self._poller.forget(sock.fileno())

    # --- events ---

    def _take(self, event: Event) -> None:
        match event:
            case MessagesFinished():
                for message_id in [known for known in self._deliveries if known < event.messages]:
                    drained = self._deliveries.pop(message_id)
                    drained.finished = drained.declined is None
            case MessageDeclined():
                delivery = self._deliveries.get(event.message_id)
                if delivery is not None:
                    delivery.declined = event.words
                    delivery.source.close()
            case Requested():
                self._on_request(self, event.number, event.body)

    def _control_ready(self) -> None:
        super()._control_ready()
        if not self.ended:
            self.push()  # there may be credit now

    def _close_lanes(self) -> None:
        self._series_room = 0
        for lane in range(len(self.lanes)):
            self._forget(lane)
        super()._close_lanes()
        for completions in self._completions:
            completions.abandon()
        error = self.error
        for delivery in self._deliveries.values():
            if not delivery.finished:
                delivery.error = error or DevmemError("the session ended before this message was delivered")
            delivery.source.close()
        self._deliveries.clear()
