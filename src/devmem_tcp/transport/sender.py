"""Send tensors, blocking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.transport.arrangement import DEFAULT_SIZE
from devmem_tcp.transport.end import End
from devmem_tcp.transport.engine import MOMENT_S
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.sender_verbs import MessageOptions, SenderVerbs, SentMessage, SeriesVerbs
from devmem_tcp.transport.slot import ReservedArray, Room
from devmem_tcp.transport.terms import SessionArguments, SessionOptions
from devmem_tcp.transport.waiting import Verb
from devmem_tcp.types import Address


class Slot(ReservedArray):
    """A window of the TX Buffer, shaped: fill it, then ``send`` it, as often as wanted. ``with`` gives it back.

    It is an array to whatever speaks DLPack or NumPy's protocols, and ``numpy()``. Not to be changed between ``send``
    and the ``wait`` of what that answers.
    """

    def __init__(self, sender: Sender, room: Room) -> None:
        super().__init__(room)
        self._sender = sender

    def send(self, name: str = "", *, timeout_s: float | None = None, **options: Unpack[MessageOptions]) -> Sent:
        """Send what the slot holds as one message: see ``Sender.send``, which takes the same options."""
        return self._sender.send_slot(self, name, timeout_s=timeout_s, **options)


class Sent(SentMessage):
    """One message on its way."""

    __slots__ = ()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the memory it was sent from may be used again.

        Raises:
            Timeout: not in ``timeout_s`` seconds.
            BrokenError: the receiver declined it, and why.
            DevmemError, ConnectionError: why the session ended before.
        """
        self._verbs.engine.run(self._verbs.wait_done(self._delivery, timeout_s))

    def wait_delivered(self, timeout_s: float | None = None) -> None:
        """Wait until the receiver reports it. Without ``confirm=True`` that may take until it needs credit again.

        Raises: as ``wait``.
        """
        self._verbs.engine.run(self._verbs.wait_delivered(self._delivery, timeout_s))


class Series:
    """Messages alike, at the cost of no frame each. Made by ``Sender.series``; ``with`` ends it."""

    def __init__(self, verbs: SenderVerbs, series: SeriesVerbs) -> None:
        self._verbs = verbs
        self._series = series

    def send(self, slot: Slot, timeout_s: float | None = None) -> Sent:
        """Send the next message of the series: a slot of its shape and dtype.

        Raises:
            ValueError: the slot is of another shape or dtype.
            LocalProtocolError: as many as were announced have been sent.
            Timeout, BrokenError, DevmemError, ConnectionError: as ``Sender.send``.
        """
        delivery = self._series.send_now(slot, MOMENT_S)
        if delivery is None:
            delivery = self._verbs.engine.run(self._series.send(slot, timeout_s))
        elif delivery.left:
            self._verbs.engine.run(self._series.send_rest(delivery, timeout_s))
        return Sent(self._verbs, delivery)

    def close(self) -> None:
        """End it: what follows may be anything. Idempotent."""
        self._series.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Sender(End):
    """Sends messages to one receiver. Made by ``open_sender``. Nothing runs behind the program's back.

    ``send`` returns once all bytes were given to TCP, so a message is under way to a receiver that is not looking yet.
    Threads: one at a time.
    """

    _engine: SenderEngine

    def __init__(self, engine: SenderEngine) -> None:
        super().__init__(engine)
        self._verbs = SenderVerbs(engine)

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
        return Slot(self, self._engine.run(self._verbs.reserve(shape, dtype, timeout_s)))

    def send(
        self,
        array: Any,
        name: str = "",
        *,
        copy: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[MessageOptions],
    ) -> Sent:
        """Send an array as one message; returns once all of it was given to TCP, so that it may change again.

        It is copied into the TX Buffer as it goes, and may be larger than that. ``reserve`` saves the copy.

        Args:
            array: NumPy, PyTorch, JAX … on the CPU, or anything with the buffer protocol.
            name: told the receiver; at most 1024 characters.
            copy: allow to make a copy of an array that is not contiguous.
            timeout_s: for all of it; None: as long as it takes.
            metadata: told the receiver, too; a JSON object of at most 64 KiB.
            checksum: ``xxh3`` or ``crc32c``: the receiver verifies it. None: TCP's own has to do.
            confirm: have the receiver report it at once: see ``Sent.wait_delivered``.

        Raises:
            ValueError: not contiguous, no dtype that can be sent, over a limit.
            Timeout: the receiver gave no credit, or took nothing. The message is cancelled.
            BrokenError: the receiver declined it.
            DevmemError, ConnectionError: why the session ended.
        """
        verb = self._verbs.send(array, name, copy=copy, timeout_s=timeout_s, **options)
        return Sent(self._verbs, self._engine.run(verb))

    def send_slot(
        self, slot: Slot, name: str = "", *, timeout_s: float | None = None, **options: Unpack[MessageOptions]
    ) -> Sent:
        """Send what a slot holds: see ``send``."""
        verb = self._verbs.send_slot(slot, name, timeout_s=timeout_s, **options)
        return Sent(self._verbs, self._engine.run(verb))

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
        return Series(self._verbs, self._verbs.series(shape, dtype, name, metadata, count))

    def wait_connected(self, timeout_s: float | None = None) -> Address:
        """Wait until the session is agreed on, and return where the receiver is.

        Raises:
            Timeout: nobody came in ``timeout_s`` seconds.
        """
        return self._engine.run(self._verbs.wait_connected(timeout_s))

    def _part(self) -> Verb[None]:
        return self._verbs.part()


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
    **session: Unpack[SessionArguments],
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
    sender = Sender(engine)
    if to is not None:
        try:
            sender.wait_connected(timeout_s)
        except BaseException:
            engine.close()
            raise
    return sender
