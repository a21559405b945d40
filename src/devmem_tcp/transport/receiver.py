"""Receive tensors, blocking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.transport.arrangement import DEFAULT_SIZE
from devmem_tcp.transport.end import End
from devmem_tcp.transport.message import Message
from devmem_tcp.transport.receiver_engine import ReceiverEngine
from devmem_tcp.transport.receiver_verbs import ReceiverVerbs
from devmem_tcp.transport.receiving import Into
from devmem_tcp.transport.terms import SessionArguments, SessionOptions
from devmem_tcp.transport.waiting import Verb
from devmem_tcp.types import Address


class Receiver(End):
    """Receives messages from senders. Made by ``open_receiver``. Nothing runs behind the program's back: what comes
    is taken while one of its methods waits.

    Threads: one at a time; messages may be released by any.
    """

    _engine: ReceiverEngine

    def __init__(self, engine: ReceiverEngine) -> None:
        super().__init__(engine)
        self._verbs = ReceiverVerbs(engine)

    @property
    def peers(self) -> tuple[Address, ...]:
        """The senders of sessions under way."""
        return tuple(link.peer for link in self._engine.links)

    def wait_connected(self, peers: int = 1, timeout_s: float | None = None) -> None:
        """Wait until sessions with so many senders are under way.

        Raises:
            Timeout: fewer came in ``timeout_s`` seconds.
            DevmemError, ConnectionError: with ``to``, why there is no session.
        """
        self._engine.run(self._verbs.wait_peers(peers, timeout_s))

    def receive(self, timeout_s: float | None = None) -> Message:
        """Return the next message that is whole, in its sender's order; between senders, as they come.

        Raises:
            Timeout: none in ``timeout_s`` seconds; call again.
            BrokenError, RemoteProtocolError, ConnectionError, NotZeroCopy, Timeout: why a session ended, once for each
                that did; a note says with whom. Other senders are not concerned: call again.
            ClosedError: this receiver is closed.
        """
        message = self._engine.take_next()
        return message if message is not None else self._engine.run(self._verbs.receive(timeout_s))

    def __iter__(self) -> Iterator[Message]:
        """Yield messages until every sender that came has said goodbye; waits for the first one."""
        while message := self._engine.take_next() or self._engine.run(self._verbs.receive_next()):
            yield message

    def request(self, body: bytes, timeout_s: float | None = None) -> bytes:
        """Ask the sender for something, in words of the programs' own, and return its answer.

        Args:
            body: at most 64 KiB.

        Raises:
            Timeout: no answer in ``timeout_s`` seconds.
            LocalProtocolError: there is not one sender to ask.
        """
        return self._engine.run(self._verbs.request(body, timeout_s))

    @property
    def refused(self) -> int:
        """How many connections were turned away: strangers, wrong keys, too many peers."""
        return self._engine.reception.refused if self._engine.reception is not None else 0

    @property
    def last_refusal(self) -> str:
        """Why the last one was."""
        return self._engine.reception.last_refusal if self._engine.reception is not None else ""

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
) -> Receiver:
    """Open a receiver of tensors on a NIC: bind memory to queues, steer to them, and wait for senders or go to one.

    Args:
        listen: (host, port) for control connections; port 0 takes any free one.
        to: (host, port) of a sender that listens; the call returns once the session is agreed on.
        data_port: TCP port of data connections; None: ``port + 1``, or any.
        queues: RX queues to bind; None: the NIC's last one.
        memory: Allocator of the Buffer; None: Udmabuf where the NIC needs a dma-buf, else Host.
        size: of the Buffer, in bytes. Each of ``max_peers`` senders has an even share; a message larger than that, or
            than its quarter where frags are not merged, goes to host memory as it comes.
        buffer: bind this one instead; it stays the caller's.
        max_peers: senders at a time; more are refused.
        into: asked of each message: a writable array to copy it to, or None.
        strict: any byte in host memory ends the session with NotZeroCopy.
        steer: set header split, RSS and an ntuple rule; put back at the end. If False they are somebody else's to set.
        timeout_s: for the call, with ``to``; None: ``handshake_timeout_s``.
        session: key, insecure, lanes, keep_alive, tls … : see ``SessionOptions``.

    Raises:
        ValueError: arguments that do not go together.
        OSError, BindError, NicSettingError, OutOfDeviceMemory: what the NIC or the machine refused.
        AuthenticationFailed, RemoteProtocolError, Timeout: with ``to``, what the sender did.
    """
    options = SessionOptions(**session)
    engine = ReceiverEngine(
        nic,
        options,
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
    if to is not None:
        try:
            engine.run(ReceiverVerbs(engine).wait_connected(timeout_s))
        except BaseException:
            engine.close()
            raise
    return Receiver(engine)
