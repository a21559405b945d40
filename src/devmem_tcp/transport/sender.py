"""Send tensors, blocking."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import numpy.typing as npt

from devmem_tcp.arrays import ArrayType, DeviceArray, Lease, array_type, source
from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.closing import Closing
from devmem_tcp.contract import Nic
from devmem_tcp.errors import BrokenError, ClosedError, OutOfDeviceMemory
from devmem_tcp.sansio.frames import MAX_TOTAL, check_name, encode_metadata
from devmem_tcp.transport.arrangement import DEFAULT_SIZE
from devmem_tcp.transport.checksums import checksum_kind, checksum_of
from devmem_tcp.transport.delivery import Delivery, SlotSource, Source, StagedSource
from devmem_tcp.transport.outbox import Window
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.sending import MessageHeader, SenderLink
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address, SocketStats

_PATIENCE_S: Final = 5.0  # of close(), with a receiver that does not answer


class Slot:
    """A window of the TX Buffer, shaped: fill it, then ``send`` it, as often as wanted. ``with`` gives it back.

    It is an array to whatever speaks DLPack or NumPy's protocols, and ``numpy()``. Not to be changed between ``send``
    and the ``wait`` of what that answers.
    """

    def __init__(self, sender: Sender, window: Window, type: ArrayType, shape: tuple[int, ...]) -> None:
        self._sender = sender
        self._window = window
        self._lease = Lease(window.drop)
        nbytes = type.nbytes(shape)
        self.data: Final = sender.outbox_view[window.offset : window.offset + nbytes]
        self.array: Final = DeviceArray(self.data, type, shape, lease=self._lease)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        """The name of the element type."""
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def numpy(self) -> npt.NDArray[Any]:
        """Return a writable NumPy array over the slot."""
        return self.array.numpy()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__

    def source(self) -> Source:
        """Return what a message of this slot is sent from."""
        self._lease.check()
        return SlotSource(self._window)

    def send(self, name: str = "", **options: Any) -> Sent:
        """Send what the slot holds as one message: see ``Sender.send``, which takes the same options."""
        return self._sender.send_slot(self, name, **options)

    def release(self) -> None:
        """Give the window back, now or once nobody looks at it and no send reads it. Idempotent."""
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class Sent:
    """One message on its way."""

    __slots__ = ("_delivery", "_sender")

    def __init__(self, sender: Sender, delivery: Delivery) -> None:
        self._sender = sender
        self._delivery = delivery

    @property
    def message_id(self) -> int:
        """Its number in the session, from 0."""
        return self._delivery.message_id

    @property
    def done(self) -> bool:
        """Whether the memory it was sent from may be used again."""
        return self._delivery.complete

    @property
    def delivered(self) -> bool:
        """Whether the receiver has reported it received, and verified if it has a checksum."""
        return self._delivery.finished

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the memory it was sent from may be used again.

        Raises:
            Timeout: not in ``timeout_s`` seconds.
            BrokenError: the receiver declined it, and why.
            DevmemError, ConnectionError: why the session ended before.
        """
        self._sender.wait_for(self._delivery, lambda: self._delivery.complete, timeout_s, "was not sent")

    def wait_delivered(self, timeout_s: float | None = None) -> None:
        """Wait until the receiver reports it. Without ``confirm=True`` that may take until it needs credit again.

        Raises: as ``wait``.
        """
        self._sender.wait_for(self._delivery, lambda: self._delivery.finished, timeout_s, "was not confirmed")


class Series:
    """Messages alike, at the cost of no frame each. Made by ``Sender.series``; ``with`` ends it."""

    def __init__(self, sender: Sender, header: MessageHeader, count: int | None) -> None:
        self._sender = sender
        self._header = header
        self._count = MAX_TOTAL if count is None else count
        self._begun = False
        self._ended = False

    def send(self, slot: Slot, timeout_s: float | None = None) -> Sent:
        """Send the next message of the series: a slot of its shape and dtype.

        Raises:
            ValueError: the slot is of another shape or dtype.
            LocalProtocolError: as many as were announced have been sent.
            Timeout, BrokenError, DevmemError, ConnectionError: as ``Sender.send``.
        """
        if self._ended:
            raise ClosedError("this series has ended")
        header = self._header
        if slot.array.type != header.type or slot.shape != header.shape:
            raise ValueError(
                f"the series is of {header.type.name} {header.shape}, the slot of {slot.dtype} {slot.shape}"
            )
        sent = self._sender.begin(header, slot.source, timeout_s, count=self._count, first=not self._begun)
        self._begun = True
        return sent

    def close(self) -> None:
        """End it: what follows may be anything. Idempotent."""
        if not self._ended:
            self._ended = True
            self._sender.end_series()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Sender(Closing):
    """Sends messages to one receiver. Made by ``open_sender``. Nothing runs behind the program's back.

    ``send`` returns once all bytes were given to TCP, so a message is under way to a receiver that is not looking yet.
    Threads: one at a time.
    """

    def __init__(self, engine: SenderEngine) -> None:
        self._engine = engine

    @property
    def address(self) -> Address | None:
        """Where a receiver comes: host and TCP port; None: this sender went to it."""
        return self._engine.address

    @property
    def outbox_view(self) -> memoryview:
        """All bytes of the TX Buffer."""
        return self._engine.outbox.view

    def reserve(self, shape: int | Sequence[int], dtype: Any, timeout_s: float | None = 0.0) -> Slot:
        """Set a window of the TX Buffer apart, for an array that is made in place.

        Args:
            shape: of the array; any.
            dtype: its name, or what NumPy, ml_dtypes or PyTorch call it.
            timeout_s: how long to wait until sends under way make room.

        Raises:
            OutOfDeviceMemory: there is no such room.
            ValueError: no such dtype or shape.
        """
        type = array_type(dtype)
        dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = type.nbytes(dimensions)
        end = time.monotonic() + (timeout_s if timeout_s is not None else float("inf"))
        while (window := self._take_window(nbytes)) is None:
            left = end - time.monotonic()
            if left <= 0:
                outbox = self._engine.outbox
                raise OutOfDeviceMemory(
                    f"no room for a slot of {nbytes} bytes in the TX buffer of {outbox.buffer.size_bytes}",
                    wanted=nbytes,
                    free=outbox.free_bytes,
                    hint="leave other slots first, or open the sender with a larger size=",
                )
            self._engine.step(min(left, 0.1))
        return Slot(self, window, type, dimensions)

    def _take_window(self, nbytes: int) -> Window | None:
        for link in self._engine.links:
            link.collect()
        return self._engine.outbox.take(nbytes)

    def send(
        self,
        array: Any,
        name: str = "",
        *,
        metadata: Mapping[str, Any] | None = None,
        checksum: str | None = None,
        confirm: bool = False,
        copy: bool = False,
        timeout_s: float | None = None,
    ) -> Sent:
        """Send an array as one message; returns once all of it was given to TCP, so that it may change again.

        It is copied into the TX Buffer as it goes, and may be larger than that. ``reserve`` saves the copy.

        Args:
            array: NumPy, PyTorch, JAX … on the CPU, or anything with the buffer protocol.
            name: told the receiver; at most 1024 characters.
            metadata: the same; a JSON object of at most 64 KiB.
            checksum: ``xxh3`` or ``crc32c``: the receiver verifies it. None: TCP's own has to do.
            confirm: have the receiver report it at once: see ``Sent.wait_delivered``.
            copy: allow to make a copy of an array that is not contiguous.
            timeout_s: for all of it; None: as long as it takes.

        Raises:
            ValueError: not contiguous, no dtype that can be sent, over a limit.
            Timeout: the receiver gave no credit, or took nothing. The message is cancelled.
            BrokenError: the receiver declined it.
            DevmemError, ConnectionError: why the session ended.
        """
        given = source(array, copy=copy)
        header = self._header(name, given.type, given.shape, given.order, given.data, metadata, checksum, confirm)

        def make() -> Source:
            return StagedSource(self._engine.outbox, given.data, self._link().piece_bytes)

        return self.begin(header, make, timeout_s, checksum_of_data=given.data)

    def send_slot(
        self,
        slot: Slot,
        name: str = "",
        *,
        metadata: Mapping[str, Any] | None = None,
        checksum: str | None = None,
        confirm: bool = False,
        timeout_s: float | None = None,
    ) -> Sent:
        """Send what a slot holds: see ``send``."""
        array = slot.array
        header = self._header(name, array.type, array.shape, array.order, slot.data, metadata, checksum, confirm)
        return self.begin(header, slot.source, timeout_s, checksum_of_data=slot.data)

    def series(
        self,
        shape: int | Sequence[int],
        dtype: Any,
        name: str = "",
        *,
        metadata: Mapping[str, Any] | None = None,
        count: int | None = None,
    ) -> Series:
        """Begin a series of messages of one shape, dtype, name and metadata: they cost no frame each.

        Until it is closed nothing else can be sent. For what a program sends at every step.

        Args:
            count: how many there will be, if that is known; None: any number.
        """
        dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
        type = array_type(dtype)
        nbytes = type.nbytes(dimensions)
        header = MessageHeader(name, type, dimensions, nbytes, "C", encode_metadata(metadata or {}))
        return Series(self, header, count)

    def _header(
        self,
        name: str,
        type: ArrayType,
        shape: tuple[int, ...],
        order: Any,
        data: memoryview,
        metadata: Mapping[str, Any] | None,
        checksum: str | None,
        confirm: bool,
    ) -> MessageHeader:
        check_name(name)
        kind = checksum_kind(checksum)
        encoded = encode_metadata(metadata or {})
        return MessageHeader(name, type, shape, data.nbytes, order, encoded, kind, confirm)

    def begin(
        self,
        header: MessageHeader,
        make: Callable[[], Source],
        timeout_s: float | None,
        *,
        checksum_of_data: memoryview | None = None,
        count: int = 1,
        first: bool = True,
    ) -> Sent:
        """Announce a message and give its bytes to TCP."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        link = self._engine.run_until(self._link_with_credit, timeout_s, "the receiver gave no credit")
        made = make()
        try:
            delivery = link.begin(header, made, count) if first else link.begin_next(header, made)
        except BaseException:
            made.close()
            raise
        sent = Sent(self, delivery)
        if header.checksum_kind.value != "none" and checksum_of_data is not None:
            link.finish(delivery, checksum_of(header.checksum_kind, (checksum_of_data,)))
        link.push()
        if delivery.left:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                self._engine.run_until(lambda: delivery.gone or None, left, f"message {header.name!r} was not sent")
            except BaseException:
                link.cancel(delivery, "the sender gave up waiting")
                raise
            self._check(delivery)
        return sent

    def end_series(self) -> None:
        """End the series under way, if there is one."""
        for link in self._engine.links:
            link.end_series()

    def wait_for(self, delivery: Delivery, reached: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        """Wait until a message has reached something."""

        def attempt() -> bool | None:
            for link in self._engine.links:
                link.collect()
            return True if reached() or delivery.error is not None or delivery.declined is not None else None

        self._engine.run_until(attempt, timeout_s, f"message {delivery.name!r} {what}")
        if not reached():
            self._check(delivery)

    def _check(self, delivery: Delivery) -> None:
        if delivery.error is not None:
            raise delivery.error
        if delivery.declined is not None:
            raise BrokenError(f"the receiver declined message {delivery.name!r}: {delivery.declined}")

    def _link(self) -> SenderLink:
        link = self._engine.connected()
        if link is None:
            raise ClosedError("no receiver has come yet", hint="wait_connected() waits for one")
        return link

    def _link_with_credit(self) -> SenderLink | None:
        link = self._link()
        if link.may_begin:
            return link
        if not link.open:
            raise ClosedError("the receiver takes no more messages: it said goodbye")
        return None

    def wait_connected(self, timeout_s: float | None = None) -> Address:
        """Wait until the session is agreed on, and return where the receiver is.

        Raises:
            Timeout: nobody came in ``timeout_s`` seconds.
        """
        return self._engine.run_until(self._engine.connected, timeout_s, "no receiver came").peer

    def stats(self) -> list[SocketStats]:
        """Return the proof of path of every data connection."""
        return self._engine.stats()

    @property
    def closed(self) -> bool:
        return self._engine.closed

    def close(self) -> None:
        """Say goodbye, wait until the receiver has all (five seconds without progress at most), and let go. Idempotent.

        Raises:
            DevmemError, ConnectionError: the session ended before all messages were known to have arrived.
        """
        engine = self._engine
        if engine.closed:
            return
        try:
            self._part()
        finally:
            engine.close()

    def _part(self) -> None:
        engine = self._engine
        before = engine.last_error
        engine.leave()
        end = time.monotonic() + _PATIENCE_S
        left_before = -1
        while engine.links:
            left = sum(link.under_way for link in engine.links)
            if left != left_before:
                left_before, end = left, time.monotonic() + _PATIENCE_S
            if (patience := end - time.monotonic()) <= 0:
                raise BrokenError(f"the receiver did not say that {left} messages have arrived, in {_PATIENCE_S:g} s")
            engine.step(patience)
        if engine.last_error is not None and engine.last_error is not before:
            raise engine.last_error

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is None:
            self.close()
        else:
            self._engine.close()  # the exception is what there is to say


def open_sender(
    nic: Nic,
    *,
    to: Address | None = None,
    listen: Address | None = None,
    data_port: int | None = None,
    memory: Allocator | None = None,
    size: int = DEFAULT_SIZE,
    buffer: Buffer | None = None,
    timeout_s: float | None = None,
    **session: Any,
) -> Sender:
    """Open a sender of tensors on a NIC: bind memory for sending, and go to a receiver or wait for one.

    Args:
        to: (host, port) of a receiver that listens; the call returns once the session is agreed on.
        listen: (host, port) for a receiver's control connection instead; ``wait_connected`` waits for it.
        data_port: TCP port of data connections, with ``listen``; None: ``port + 1``, or any.
        memory: Allocator of the TX Buffer; None: Udmabuf where the NIC needs a dma-buf, else Host.
        size: of the Buffer, in bytes: slots, and what is under way.
        buffer: bind this one instead; it stays the caller's.
        timeout_s: for the call; None: ``handshake_timeout_s``.
        session: key, insecure, lanes, keep_alive, tls … : see ``SessionOptions``.

    Raises:
        ValueError: arguments that do not go together.
        OSError, BindError, OutOfDeviceMemory: what the machine or the NIC refused; nobody listens there.
        AuthenticationFailed, RemoteProtocolError, Timeout: what the receiver did.
    """
    engine = SenderEngine(
        nic,
        SessionOptions(**session),
        to=to,
        listen=listen,
        data_port=data_port,
        memory=memory,
        size_bytes=size,
        buffer=buffer,
    )
    if to is not None:
        try:
            engine.run_until(engine.connected, timeout_s, "no session came about")
        except BaseException:
            engine.close()
            raise
    return Sender(engine)
