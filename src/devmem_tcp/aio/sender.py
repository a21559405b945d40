"""Send tensors, by asyncio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from devmem_tcp.aio.attendant import Attendant
from devmem_tcp.aio.end import End, Opening
from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.transport.arrangement import DEFAULT_SIZE
from devmem_tcp.transport.delivery import Delivery
from devmem_tcp.transport.sender_engine import SenderEngine
from devmem_tcp.transport.sender_verbs import MessageOptions, SenderVerbs, SentMessage, SeriesVerbs
from devmem_tcp.transport.slot import ReservedArray, Room
from devmem_tcp.transport.terms import SessionArguments, SessionOptions
from devmem_tcp.transport.waiting import Verb
from devmem_tcp.types import Address


class Slot(ReservedArray):
    """A window of the TX Buffer, shaped: fill it, then await ``send``, as often as wanted. ``with`` gives it back.

    It is an array to whatever speaks DLPack or NumPy's protocols, and ``numpy()``. Not to be changed between ``send``
    and the ``wait`` of what that answers.
    """

    def __init__(self, sender: Sender, room: Room) -> None:
        super().__init__(room)
        self._sender = sender

    async def send(self, name: str = "", *, timeout_s: float | None = None, **options: Unpack[MessageOptions]) -> Sent:
        """Send what the slot holds as one message: see ``Sender.send``, which takes the same options."""
        return await self._sender.send_slot(self, name, timeout_s=timeout_s, **options)


class Sent(SentMessage):
    """One message on its way. Cancelling a wait for it does not cancel the message."""

    __slots__ = ("_attendant",)

    def __init__(self, verbs: SenderVerbs, attendant: Attendant, delivery: Delivery) -> None:
        super().__init__(verbs, delivery)
        self._attendant = attendant

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the memory it was sent from may be used again.

        Raises:
            Timeout: not in ``timeout_s`` seconds.
            BrokenError: the receiver declined it, and why.
            DevmemError, ConnectionError: why the session ended before.
        """
        await self._attendant.run(self._verbs.wait_done(self._delivery, timeout_s))

    async def wait_delivered(self, timeout_s: float | None = None) -> None:
        """Wait until the receiver reports it. Without ``confirm=True`` that may take until it needs credit again.

        Raises: as ``wait``.
        """
        await self._attendant.run(self._verbs.wait_delivered(self._delivery, timeout_s))


class Series:
    """Messages alike, at the cost of no frame each. Made by ``Sender.series``; ``async with`` ends it."""

    def __init__(self, verbs: SenderVerbs, attendant: Attendant, series: SeriesVerbs) -> None:
        self._verbs = verbs
        self._attendant = attendant
        self._series = series

    async def send(self, slot: Slot, timeout_s: float | None = None) -> Sent:
        """Send the next message of the series: a slot of its shape and dtype.

        Raises:
            ValueError: the slot is of another shape or dtype.
            LocalProtocolError: as many as were announced have been sent.
            Timeout, BrokenError, DevmemError, ConnectionError: as ``Sender.send``.
        """
        delivery = self._series.send_now(slot, 0.0) if self._attendant.may_act else None
        if delivery is None:
            delivery = await self._attendant.run(self._series.send(slot, timeout_s))
        elif delivery.left:
            await self._attendant.run(self._series.send_rest(delivery, timeout_s))
        return Sent(self._verbs, self._attendant, delivery)

    def close(self) -> None:
        """End it: what follows may be anything. Does not wait. Idempotent."""
        self._series.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Sender(End):
    """Sends messages to one receiver. Made by ``open_sender``.

    Any number of tasks may send at the same time; messages go in the order in which they began to.
    """

    _engine: SenderEngine

    def __init__(self, engine: SenderEngine) -> None:
        super().__init__(engine)
        self._verbs = SenderVerbs(engine)

    def reserve(self, shape: int | Sequence[int], dtype: Any) -> Slot:
        """Set a window of the TX Buffer apart, for an array that is made in place. Does not wait.

        Args:
            shape: of the array; any.
            dtype: its name, or what NumPy, ml_dtypes or PyTorch call it.

        Raises:
            OutOfDeviceMemory: there is no such room, or others wait for some.
            ValueError: no such dtype or shape.
        """
        return Slot(self, self._attendant.run_now(self._verbs.reserve(shape, dtype, 0.0)))

    async def wait_reserve(self, shape: int | Sequence[int], dtype: Any, timeout_s: float | None = None) -> Slot:
        """Reserve as soon as sends and slots of others have made room: ``with await sender.wait_reserve(…) as slot``.

        Raises:
            OutOfDeviceMemory: no such room in ``timeout_s`` seconds.
            ValueError: no such dtype or shape.
        """
        return Slot(self, await self._attendant.run(self._verbs.reserve(shape, dtype, timeout_s)))

    async def send(
        self,
        array: Any,
        name: str = "",
        *,
        copy: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[MessageOptions],
    ) -> Sent:
        """Send an array as one message; returns once all of it was given to TCP, so that it may change again.

        Cancelled before that, the message is cancelled at the receiver, too, unless all of it is with TCP already.

        Args: as ``devmem_tcp.transport.Sender.send``.

        Raises: the same.
        """
        return await self._deliver(self._verbs.send(array, name, copy=copy, timeout_s=timeout_s, **options))

    async def send_slot(
        self, slot: Slot, name: str = "", *, timeout_s: float | None = None, **options: Unpack[MessageOptions]
    ) -> Sent:
        """Send what a slot holds: see ``send``."""
        return await self._deliver(self._verbs.send_slot(slot, name, timeout_s=timeout_s, **options))

    async def _deliver(self, verb: Verb[Delivery]) -> Sent:
        return Sent(self._verbs, self._attendant, await self._attendant.run(verb))

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

        From its first message until it is closed nothing else can be sent, by any task.

        Args:
            count: how many there will be, if that is known; None: any number.
        """
        series = self._verbs.series(shape, dtype, name, metadata, count)
        return Series(self._verbs, self._attendant, series)

    async def wait_connected(self, timeout_s: float | None = None) -> Address:
        """Wait until the session is agreed on, and return where the receiver is.

        Raises:
            Timeout: nobody came in ``timeout_s`` seconds.
        """
        return await self._attendant.run(self._verbs.wait_connected(timeout_s))

    def _reach(self, timeout_s: float | None) -> Verb[Address]:
        return self._verbs.wait_connected(timeout_s)

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
) -> Opening[Sender]:
    """Open a sender of tensors on a NIC: ``async with open_sender(nic, …) as sender``, or await it.

    Args: as ``devmem_tcp.transport.open_sender``.

    Raises: the same, when it is entered or awaited.
    """

    async def open_end() -> Sender:
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
        return await Sender(engine)._reach_if(to, timeout_s)

    return Opening(open_end)
