"""What a sender does, up to where it waits: the same for the blocking and the asyncio driver (``waiting``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypedDict, Unpack

from devmem_tcp.arrays import ArrayType, Order, array_type, source
from devmem_tcp.errors import BrokenError, ClosedError, LocalProtocolError, OutOfDeviceMemory, Timeout
from devmem_tcp.sansio.frames import MAX_TOTAL, ChecksumKind, check_name, encode_metadata
from devmem_tcp.transport.checksums import checksum_kind, checksum_of
from devmem_tcp.transport.delivery import Delivery, Source, StagedSource
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.sending import MessageHeader, SenderLink
from devmem_tcp.transport.slot import ReservedArray, Room
from devmem_tcp.transport.waiting import Limit, Line, Verb, until
from devmem_tcp.types import Address

_PATIENCE_S: Final = 5.0  # with a receiver that does not answer a goodbye


class MessageOptions(TypedDict, total=False):
    """What may be said of a message besides its name: see ``Sender.send``."""

    metadata: Mapping[str, Any] | None
    checksum: str | None
    confirm: bool


class SentMessage:
    """One message on its way."""

    __slots__ = ("_delivery", "_verbs")

    def __init__(self, verbs: SenderVerbs, delivery: Delivery) -> None:
        self._verbs = verbs
        self._delivery = delivery

    @property
    def message_id(self) -> int:
        """Its number in the session, from 0."""
        return self._delivery.message_id

    @property
    def done(self) -> bool:
        """Whether the memory it was sent from may be used again."""
        if not self._delivery.complete:
            self._verbs.collect()
        return self._delivery.complete

    @property
    def delivered(self) -> bool:
        """Whether the receiver has reported it received, and verified if it has a checksum."""
        return self._delivery.finished


class SenderVerbs:
    """The verbs of one sender. Messages are announced in the order in which ``send`` was called."""

    def __init__(self, engine: SenderEngine) -> None:
        self.engine: Final = engine
        self._for_credit: Line = deque()
        self._for_room: Line = deque()
        self.last_series: SeriesVerbs | None = None  #: that has begun

    @property
    def waiting_for_credit(self) -> bool:
        """Whether somebody has waited for credit before whoever asks."""
        return bool(self._for_credit)

    # --- room ---

    def reserve(self, shape: int | Sequence[int], dtype: Any, timeout_s: float | None) -> Verb[Room]:
        """See ``Sender.reserve``."""
        type = array_type(dtype)
        dimensions = _dimensions(shape)
        nbytes = type.nbytes(dimensions)
        outbox = self.engine.outbox
        try:
            yield from until(partial(self._has_room, nbytes), Limit.after(timeout_s), "", self._for_room)
        except Timeout:
            raise OutOfDeviceMemory(
                f"no room for a slot of {nbytes} bytes in the TX buffer of {outbox.buffer.size_bytes}",
                wanted=nbytes,
                free=outbox.free_bytes,
                hint="leave other slots first, or open the sender with a larger size=",
            ) from None
        window = outbox.take(nbytes)
        assert window is not None
        return Room(window, outbox.view[window.offset : window.offset + nbytes], type, dimensions)

    def _has_room(self, nbytes: int) -> bool | None:
        if self.engine.closed:
            raise ClosedError("this sender is closed")
        self.collect()
        return self.engine.outbox.fits(nbytes) or None

    def collect(self) -> None:
        """Let go of what the kernel has read."""
        for link in self.engine.links:
            link.collect()

    # --- messages ---

    def send(
        self, array: Any, name: str, *, copy: bool, timeout_s: float | None, **options: Unpack[MessageOptions]
    ) -> Verb[Delivery]:
        """See ``Sender.send``."""
        given = source(array, copy=copy)
        header = _header(name, given.type, given.shape, given.data.nbytes, given.order, **options)

        def announce(link: SenderLink) -> Delivery:
            return link.begin(header, StagedSource(self.engine.outbox, given.data, link.piece_bytes))

        return self.deliver(announce, header, given.data, timeout_s)

    def send_slot(
        self, slot: ReservedArray, name: str, *, timeout_s: float | None, **options: Unpack[MessageOptions]
    ) -> Verb[Delivery]:
        """See ``Slot.send``."""
        array = slot.array
        header = _header(name, array.type, array.shape, array.nbytes, array.order, **options)

        def announce(link: SenderLink) -> Delivery:
            return _hand_over(slot.source(), lambda made: link.begin(header, made))

        return self.deliver(announce, header, slot.data, timeout_s)

    def series(
        self,
        shape: int | Sequence[int],
        dtype: Any,
        name: str,
        metadata: Mapping[str, Any] | None,
        count: int | None,
    ) -> SeriesVerbs:
        """See ``Sender.series``."""
        type = array_type(dtype)
        dimensions = _dimensions(shape)
        header = _header(name, type, dimensions, type.nbytes(dimensions), "C", metadata=metadata)
        return SeriesVerbs(self, header, MAX_TOTAL if count is None else count)

    def deliver(
        self,
        announce: Callable[[SenderLink], Delivery],
        header: MessageHeader,
        data: memoryview,
        timeout_s: float | None,
    ) -> Verb[Delivery]:
        """Announce a message once there is credit, and wait until its bytes are given to TCP."""
        limit = Limit.after(timeout_s)
        link = yield from until(self._link_with_credit, limit, "the receiver gave no credit", self._for_credit)
        delivery = announce(link)
        if header.checksum_kind is not ChecksumKind.NONE:
            link.finish(delivery, checksum_of(header.checksum_kind, (data,)))
        yield from self.send_rest(link, delivery, limit)
        return delivery

    def send_rest(self, link: SenderLink, delivery: Delivery, limit: Limit) -> Verb[None]:
        """Wait until what is left of a message is given to TCP; take it back if that does not come about."""
        link.push()
        if delivery.left:
            try:
                yield from until(lambda: delivery.gone or None, limit, f"message {delivery.name!r} was not sent")
            except BaseException:
                link.cancel(delivery, "the sender gave up waiting")
                raise
            self.check(delivery)

    def wait_done(self, delivery: Delivery, timeout_s: float | None) -> Verb[None]:
        """See ``Sent.wait``."""
        self.collect()
        return self._wait_for(delivery, lambda: delivery.complete, timeout_s, "was not sent")

    def wait_delivered(self, delivery: Delivery, timeout_s: float | None) -> Verb[None]:
        """See ``Sent.wait_delivered``."""
        return self._wait_for(delivery, lambda: delivery.finished, timeout_s, "was not confirmed")

    def _wait_for(
        self, delivery: Delivery, reached: Callable[[], bool], timeout_s: float | None, what: str
    ) -> Verb[None]:
        def over() -> bool | None:
            return reached() or delivery.error is not None or delivery.declined is not None or None

        yield from until(over, Limit.after(timeout_s), f"message {delivery.name!r} {what}")
        if not reached():
            self.check(delivery)

    def check(self, delivery: Delivery) -> None:
        """Raise why a message does not arrive, if that is known."""
        if delivery.error is not None:
            raise self.engine.tell(delivery.error)
        if delivery.declined is not None:
            raise BrokenError(f"the receiver declined message {delivery.name!r}: {delivery.declined}")

    # --- the session ---

    def _link_with_credit(self) -> SenderLink | None:
        link = self.engine.connected()
        if link is None:
            raise ClosedError("no receiver has come yet", hint="wait_connected() waits for one")
        if link.may_begin:
            return link
        if not link.open:
            raise ClosedError("the receiver takes no more messages: it said goodbye")
        return None

    def wait_connected(self, timeout_s: float | None) -> Verb[Address]:
        """See ``Sender.wait_connected``."""
        link = yield from until(self.engine.arrived, Limit.after(timeout_s), "no session with a receiver came about")
        return link.peer

    def part(self) -> Verb[None]:
        """Say goodbye, and wait until the receiver has all: see ``Sender.close``."""
        engine = self.engine
        engine.leave()
        while engine.links:
            left = self._under_way
            try:
                yield from until(partial(self._progress, left), Limit.after(_PATIENCE_S), "no answer to the goodbye")
            except Timeout:
                words = f"the receiver did not say that {left} messages have arrived, in {_PATIENCE_S:g} s"
                raise BrokenError(words) from None
        if engine.untold_error is not None:
            raise engine.tell(engine.untold_error)

    @property
    def _under_way(self) -> int:
        return sum(link.under_way for link in self.engine.links)

    def _progress(self, left_before: int) -> bool | None:
        return not self.engine.links or self._under_way != left_before or None


class SeriesVerbs:
    """The verbs of one series."""

    def __init__(self, verbs: SenderVerbs, header: MessageHeader, count: int) -> None:
        self._verbs = verbs
        self._header = header
        self._count = count
        self._begun = False
        self._ended = False
        self._last_slot: ReservedArray | None = None  # one that was found to fit

    def send(self, slot: ReservedArray, timeout_s: float | None) -> Verb[Delivery]:
        """See ``Series.send``."""
        header = self._header
        self._check_goes_on()
        if slot.array.type != header.type or slot.shape != header.shape:
            raise ValueError(
                f"the series is of {header.type.name} {header.shape}, the slot of {slot.dtype} {slot.shape}"
            )

        def announce(link: SenderLink) -> Delivery:
            self._check_goes_on()  # what may have changed while this waited
            if self._begun:
                return _hand_over(slot.source(), lambda made: link.begin_next(header, made))
            delivery = _hand_over(slot.source(), lambda made: link.begin(header, made, self._count))
            self._begun = True
            self._verbs.last_series = self
            return delivery

        self._last_slot = slot
        return self._verbs.deliver(announce, header, slot.data, timeout_s)

    def send_now(self, slot: ReservedArray, patience_s: float) -> Delivery | None:
        """Send a slot without waiting for credit, if there is some; None: ``send`` it. Some of it may be left to send.

        A generator alone costs as much as a small message.

        Args:
            patience_s: how long it may wait for room in the connection, and do nothing else.
        """
        verbs = self._verbs
        if slot is not self._last_slot or verbs.last_series is not self or self._ended or verbs.waiting_for_credit:
            return None
        link, window = verbs.engine.only_link, slot.window
        return link.send_next(self._header, window, patience_s) if link is not None and window is not None else None

    def send_rest(self, delivery: Delivery, timeout_s: float | None) -> Verb[None]:
        """Send what ``send_now`` left."""
        link = self._verbs.engine.only_link
        if link is None:
            self._verbs.check(delivery)
        else:
            yield from self._verbs.send_rest(link, delivery, Limit.after(timeout_s))

    def _check_goes_on(self) -> None:
        if self._ended:
            raise ClosedError("this series has ended")
        if self._begun and self._verbs.last_series is not self:
            raise LocalProtocolError("this series is complete, and another one has begun")

    def close(self) -> None:
        """See ``Series.close``."""
        if not self._ended:
            self._ended = True
            if self._verbs.last_series is self:
                for link in self._verbs.engine.links:
                    link.end_series()


def _dimensions(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _header(
    name: str,
    type: ArrayType,
    shape: tuple[int, ...],
    nbytes: int,
    order: Order,
    *,
    metadata: Mapping[str, Any] | None = None,
    checksum: str | None = None,
    confirm: bool = False,
) -> MessageHeader:
    check_name(name)
    kind = checksum_kind(checksum)
    return MessageHeader(name, type, shape, nbytes, order, encode_metadata(metadata or {}), kind, confirm)


def _hand_over(made: Source, begin: Callable[[Source], Delivery]) -> Delivery:
    """Begin a delivery from a source, which is closed if that fails."""
    try:
        return begin(made)
    except BaseException:
        made.close()
        raise
