"""Receive tensors, by asyncio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, Unpack

from devmem_tcp.aio.end import End, Opening
from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.transport.arrangement import DEFAULT_SIZE
from devmem_tcp.transport.message import Message
from devmem_tcp.transport.receiver_engine import ReceiverEngine
from devmem_tcp.transport.receiver_verbs import ReceiverVerbs
from devmem_tcp.transport.receiving import Into
from devmem_tcp.transport.terms import SessionArguments, SessionOptions
from devmem_tcp.transport.waiting import Verb
from devmem_tcp.types import Address


class Receiver(End):
    """Receives messages from senders. Made by ``open_receiver``.

    Messages are taken from the network whenever the event loop runs, as far as the Buffer has room for them. Any number
    of tasks may wait at the same time; messages go to them in the order in which they began to.
    """

    _engine: ReceiverEngine

    def __init__(self, engine: ReceiverEngine) -> None:
        super().__init__(engine)
        self._verbs = ReceiverVerbs(engine)

    @property
    def peers(self) -> tuple[Address, ...]:
        """The senders of sessions under way."""
        return tuple(link.peer for link in self._engine.links)

    async def wait_connected(self, peers: int = 1, timeout_s: float | None = None) -> None:
        """Wait until sessions with so many senders are under way: see ``devmem_tcp.transport.Receiver``."""
        await self._attendant.run(self._verbs.wait_peers(peers, timeout_s))

    async def receive(self, timeout_s: float | None = None) -> Message:
        """Return the next message that is whole, in its sender's order; between senders, as they come.

        Cancelled, it loses no message: the next call returns it.

        Raises:
            Timeout: none in ``timeout_s`` seconds; call again.
            BrokenError, RemoteProtocolError, ConnectionError, NotZeroCopy, Timeout: why a session ended, once for each
                that did; a note says with whom. Other senders are not concerned: call again.
            ClosedError: this receiver is closed.
        """
        return await self._attendant.run(self._verbs.receive(timeout_s))

    def __aiter__(self) -> Self:
        """Yield messages until every sender that came has said goodbye; waits for the first one."""
        return self

    async def __anext__(self) -> Message:
        message = await self._attendant.run(self._verbs.receive_next())
        if message is None:
            raise StopAsyncIteration
        return message

    async def request(self, body: bytes, timeout_s: float | None = None) -> bytes:
        """Ask the sender for something, in words of the programs' own, and return its answer.

        Args:
            body: at most 64 KiB.

        Raises:
            Timeout: no answer in ``timeout_s`` seconds.
            LocalProtocolError: there is not one sender to ask.
        """
        return await self._attendant.run(self._verbs.request(body, timeout_s))

    @property
    def refused(self) -> int:
        """How many connections were turned away: strangers, wrong keys, too many peers."""
        return self._engine.reception.refused if self._engine.reception is not None else 0

    @property
    def last_refusal(self) -> str:
        """Why the last one was."""
        return self._engine.reception.last_refusal if self._engine.reception is not None else ""

    def _reach(self, timeout_s: float | None) -> Verb[Address]:
        return self._verbs.wait_connected(timeout_s)

    def _part(self) -> Verb[None]:
        return self._verbs.part()


def open_receiver(
    nic: Nic,
    *,
    listen: Address | None = None,
    to: Address | None = None,
    data_port: int | None = None,
    queues: Sequence[int] | None = None,
    memory: Allocator | None = None,
    size: int = DEFAULT_SIZE,
    buffer: Buffer | None = None,
    max_peers: int = 1,
    into: Into | None = None,
    strict: bool = False,
    steer: bool = True,
    timeout_s: float | None = None,
    **session: Unpack[SessionArguments],
) -> Opening[Receiver]:
    """Open a receiver of tensors on a NIC: ``async with open_receiver(nic, …) as receiver``, or await it.

    Args: as ``devmem_tcp.transport.open_receiver``. ``into`` is called by the event loop, and must not wait.

    Raises: the same, when it is entered or awaited.
    """

    async def open_end() -> Receiver:
        engine = ReceiverEngine(
            nic,
            SessionOptions(**session),
            listen=listen,
            to=to,
            data_port=data_port,
            queues=queues,
            memory=memory,
            size_bytes=size,
            buffer=buffer,
            max_peers=max_peers,
            into=into,
            strict=strict,
            steer=steer,
        )
        return await Receiver(engine)._reach_if(to, timeout_s)

    return Opening(open_end)
