"""A receiver without waiting: peers come in, messages come out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, TypeAlias

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.errors import BrokenError, ClosedError, LocalProtocolError
from devmem_tcp.sansio.frames import Role
from devmem_tcp.transport.arrangement import listening_addresses
from devmem_tcp.transport.inbox import Share, SparePlaces
from devmem_tcp.transport.landing import Landing
from devmem_tcp.transport.link import Link
from devmem_tcp.transport.message import Message
from devmem_tcp.transport.receiving import Into, ReceiverLink
from devmem_tcp.transport.reception import Established
from devmem_tcp.transport.session_engine import SessionEngine
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address

_MAX_ANSWER: Final = 64 << 20  # bytes
_BYTES_IN_A_ROW: Final = 1 << 20  # of the messages that are taken from one sender while others wait
_BYTES_BLIND: Final = 16 << 20  # that one sender may send without a pause before others that come are seen
_BYTES_A_MESSAGE: Final = 16 << 10  # what a message costs besides its bytes, as bytes

Asked: TypeAlias = tuple[ReceiverLink, int]
"""A request, by its session and number."""


class ReceiverEngine(SessionEngine[ReceiverLink]):
    """See ``Receiver``; this is all of it that does not wait."""

    role = Role.RECEIVER

    def __init__(
        self,
        nic: Nic,
        options: SessionOptions,
        *,
        listen: Address | None,
        to: Address | None,
        data_port: int | None,
        queues: Sequence[int] | None,
        memory: Allocator | None,
        size_bytes: int,
        buffer: Buffer | None,
        max_peers: int,
        into: Into | None,
        strict: bool,
        steer: bool,
    ) -> None:
        if (listen is None) == (to is None):
            raise ValueError("give listen= to wait for senders, or to= to go to one: exactly one of them")
        if max_peers < 1:
            raise ValueError(f"max_peers must be at least 1, got {max_peers}")
        peers = max_peers if to is None else 1
        steer = steer and nic.capabilities.settings  # else the host of a leased queue sees to that
        super().__init__(nic, options, memory=memory, size_bytes=size_bytes, buffer=buffer, max_peers=peers)
        self._into = into
        self._ready: deque[Message | Exception] = deque()
        self._returned: deque[tuple[ReceiverLink, Landing]] = deque()  # memory given back, not yet taken back
        self._answers: dict[Asked, bytearray | bytes] = {}  # whole ones are bytes
        self._latest: ReceiverLink | None = None  # whose turn it is, while others wait for theirs
        self._turn_left = 0  # bytes
        self._blind_left = _BYTES_BLIND  # bytes from the only sender, before a look at everything else
        self.sessions = 0  #: how many there have been
        try:
            self._binding = self._arrangement.bind_rx(queues, steer=steer)
            self._placement = nic.capabilities.placement
            self._pages = sum(nic.queue_stats(queue).pages_total for queue in self._binding.queues)
            self._spare = SparePlaces(self._binding, self._pages)
            self._new_share()  # the smallest there will be: an error belongs here
            if listen is not None:
                self._listen(nic, listen, data_port, strict=strict, steer=steer)
            elif to is not None:
                self._go_to(to, before_lanes=self._steer_from if steer else lambda address: None, strict=strict)
        except BaseException:
            self.close()
            raise

    def _listen(self, nic: Nic, listen: Address, data_port: int | None, *, strict: bool, steer: bool) -> None:
        control_address, data_address = listening_addresses(listen, data_port)
        data = self._arrangement.held.enter_context(nic.listen(data_address, strict=strict))
        if steer:
            self._arrangement.steer_to(data.address[1], self._binding.queues[0])
        self._take_in(control_address, data, self._binding.buffer)

    def _steer_from(self, peer: Address) -> None:
        self._arrangement.steer_from(peer, self._binding.queues[0])

    def _new_share(self) -> Share:
        size = self._binding.buffer.size_bytes // self._max_peers
        return Share(self._binding, self._spare, size, self._pages // self._max_peers, placement=self._placement)

    def _begin(self, made: Established) -> None:
        self.sessions += 1
        link = ReceiverLink(
            made,
            self.poller,
            self._ended,
            self._timed_links.add,
            backend=self._backend,
            share=self._new_share(),
            keep_alive=self._options.keep_alive,
            deliver=self._ready.append,
            into=self._into,
            on_answer=self._take_answer,
            engine=self,
        )
        if not link.ended:
            self._links.append(link)
            self.may_block = self.may_block and self.alone

    def _ended(self, link: Link) -> None:
        super()._ended(link)
        if link is self._latest:
            self._latest = None
        if link.error is not None and not self.closed:
            self._ready.append(link.error)

    # --- what the drivers ask ---

    def has_news(self) -> bool | None:
        """Return True if ``take`` has something to answer; None: not yet.

        Raises:
            ClosedError: the receiver is closed.
            Exception: as ``Calling.check``.
        """
        if self.closed:
            raise ClosedError("this receiver is closed")
        if self._calling is not None:
            self._calling.check()
        return True if self._ready else None

    def take(self) -> Message | None:
        """Return the next message; None: it has not come.

        Raises:
            DevmemError, ConnectionError: why a session failed, once; those with other senders go on.
            ClosedError: the receiver is closed.
        """
        if not self.has_news():
            return None
        first = self._ready.popleft()
        if isinstance(first, Exception):
            raise first
        return first

    def take_next(self) -> Message | None:
        """Return the next message if it is here, or of a series and from the only sender; None: ``take`` waits for it.

        Of a series from the only sender it may wait for a moment. With several that are behind, each has a turn of some
        messages, one after the other: what they take of the CPU's cache is not fetched for each of them.

        Raises: as ``take``.
        """
        self._take_the_wheel()
        if self._returned:
            self._settle()
        if self._blind_left < 0 and not self.closed:
            self._blind_left = _BYTES_BLIND
            self.step(0)
        if not self._ready:
            message = self._take_of_series()
            if message is not None:
                return message
            self.poller.go_on(self._ready)
        return self.take() if self._ready else None

    def _take_of_series(self) -> Message | None:
        if self._latest is not None:
            return self._take_more(self._latest)
        link = self.only_link
        message = link.receive_next() if link is not None and self.may_block else None
        if message is not None:
            self._blind_left -= message.nbytes + _BYTES_A_MESSAGE
        return message

    def _take_more(self, link: ReceiverLink) -> Message | None:
        message = None
        if self._turn_left > 0 and not self.closed:
            message = link.receive_more()
        if message is None:
            self._latest = None
        else:
            self._turn_left -= message.nbytes + _BYTES_A_MESSAGE
        return message

    def stay_with(self, link: ReceiverLink) -> None:
        """See ``Keeper``: only while others wait; else there is nothing to gain, and a read more to make."""
        if self.poller.behind:
            self._latest, self._turn_left = link, _BYTES_IN_A_ROW

    @property
    def over(self) -> bool:
        """Whether there was a session, and none is under way nor anything left of it."""
        return self.sessions > 0 and not self._links and not self._ready and not self._arriving

    @property
    def _arriving(self) -> bool:
        return self._reception is not None and self._reception.waiting > 0

    def connected(self) -> ReceiverLink | None:
        """Return the session with a sender that was gone to; None: not yet."""
        if self._calling is not None:
            self._calling.check()
        return self._links[0] if self._links else None

    def request(self, body: bytes) -> Asked:
        """Ask the sender for something; ``answer`` says what came, until ``forget``.

        Raises:
            LocalProtocolError: there is no session, or more than one.
        """
        link = self.only_link
        if link is None:
            raise LocalProtocolError(f"a request goes to one sender, and {len(self._links)} are connected")
        asked = (link, link.request(body))
        self._answers[asked] = bytearray()
        return asked

    def answer(self, asked: Asked) -> bytes | None:
        """Return the whole answer to a request; None: it is not here yet.

        Raises:
            DevmemError, ConnectionError: the session ended before.
        """
        found = self._answers[asked]
        if isinstance(found, bytes):
            return found
        link = asked[0]
        if link.ended:
            raise link.error or BrokenError("the sender left without an answer")
        return None

    def forget(self, asked: Asked) -> None:
        """Drop the answer to a request, whether it has come or comes yet."""
        self._answers.pop(asked, None)

    def _take_answer(self, link: ReceiverLink, number: int, body: bytes, last: bool) -> None:
        found = self._answers.get((link, number))
        if not isinstance(found, bytearray):
            return
        found += body
        if len(found) > _MAX_ANSWER:
            raise BrokenError(f"an answer of over {_MAX_ANSWER} bytes")
        if last:
            self._answers[link, number] = bytes(found)

    # --- what is given back ---

    def give_back(self, link: ReceiverLink, landing: Landing) -> None:
        """Take back the memory of a message, with the next step. From any thread, and in the middle of anything."""
        self._returned.append((link, landing))
        if self.closed:
            self._settle()
        else:
            self.wake()

    def settle(self, link: ReceiverLink, landing: Landing) -> None:
        """Take back the memory of a message: now if this thread drives the engine, else with the next step."""
        if not self.drives:
            self.give_back(link, landing)
        else:
            link.take_back(landing)

    def _settle(self) -> None:
        while self._returned:
            link, landing = self._returned.popleft()
            link.take_back(landing)

    def close(self) -> None:
        """End everything at once; messages that were taken out stay readable until they are released. Idempotent."""
        if self.closed:
            return
        for message in self._ready:
            if isinstance(message, Message):
                message.release()
        self._ready.clear()
        self._close_sessions()
        self._settle()
        self._arrangement.close()
