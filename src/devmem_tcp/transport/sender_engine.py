"""A sender without waiting: one session with a receiver, and the TX Buffer that messages go from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.endpoints import open_listening, show
from devmem_tcp.errors import ClosedError
from devmem_tcp.sansio.frames import Role
from devmem_tcp.transport.arrangement import Arrangement, listening_addresses
from devmem_tcp.transport.calling import Calling
from devmem_tcp.transport.engine import Engine, Timed
from devmem_tcp.transport.link import Link
from devmem_tcp.transport.outbox import Outbox
from devmem_tcp.transport.reception import Established, Reception
from devmem_tcp.transport.sending import SenderLink
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address, SocketStats

OnRequest = Callable[[SenderLink, int, bytes], None]


def refuse_request(link: SenderLink, number: int, body: bytes) -> None:
    """Answer nothing: this program has nothing to offer."""
    link.answer(number, b"")


class SenderEngine(Engine):
    """See ``Sender``; this is all of it that does not wait."""

    def __init__(
        self,
        nic: Nic,
        options: SessionOptions,
        *,
        to: Address | None,
        listen: Address | None,
        data_port: int | None,
        memory: Allocator | None,
        size_bytes: int,
        buffer: Buffer | None,
        max_peers: int = 1,
        on_request: OnRequest = refuse_request,
        on_session: Callable[[SenderLink], None] = lambda link: None,
    ) -> None:
        if (listen is None) == (to is None):
            raise ValueError("give to= to go to a receiver, or listen= to wait for one: exactly one of them")
        super().__init__()
        self._options = options
        self._max_peers = max_peers
        self._on_request = on_request
        self._on_session = on_session
        self._links: list[SenderLink] = []
        self._timed_links: set[Link] = set()  # those that have deadlines
        self._reception: Reception | None = None
        self._calling: Calling | None = None
        self.last_error: Exception | None = None  #: why a session failed, of the last one that did
        self.untold_error: Exception | None = None  #: the same, until the program has heard of it
        try:
            self._arrangement = Arrangement(nic, memory, size_bytes, buffer)
        except BaseException:
            super().close()
            raise
        try:
            self.outbox = Outbox(self._arrangement.buffer, self._arrangement.bind_tx(), self.wake)
            self._backend = nic.capabilities.backend
            if to is not None:
                self._calling = Calling(
                    nic,
                    to,
                    self.poller,
                    options,
                    role=Role.SENDER,
                    before_lanes=lambda address: None,  # what comes back is acknowledgements
                    on_session=self._begin,
                )
            elif listen is not None:
                self._listen(nic, listen, data_port)
        except BaseException:
            self.close()
            raise

    def _listen(self, nic: Nic, listen: Address, data_port: int | None) -> None:
        control_address, data_address = listening_addresses(listen, data_port)
        self._reception = Reception(
            open_listening(control_address, 128),
            self._arrangement.held.enter_context(nic.listen(data_address)),
            self.poller,
            self._options,
            role=Role.SENDER,
            backend=self._backend,
            buffer=None,
            on_session=self._begin,
            may_enter=self._may_enter,
        )

    def _may_enter(self) -> str:
        entering = self._reception.entering if self._reception is not None else 0
        if len(self._links) + entering > self._max_peers:
            return f"this sender takes {self._max_peers} receivers at a time (max_peers)"
        return ""

    def _begin(self, made: Established) -> None:
        link = SenderLink(
            made.agreed,
            made.control,
            made.rest,
            made.lanes,
            self.poller,
            self._ended,
            self._timed_links.add,
            outbox=self.outbox,
            keep_alive=self._options.keep_alive,
            on_request=self._on_request,
        )
        if not link.ended:
            self._links.append(link)
            self._on_session(link)

    def _ended(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
        self._timed_links.discard(link)
        if link.error is not None:
            link.error.add_note(f"the session with the receiver at {show(link.peer)}")
            self.last_error = self.untold_error = link.error

    # --- what the drivers ask ---

    @property
    def address(self) -> Address | None:
        """Where receivers come; None: it went to one."""
        return self._reception.address if self._reception is not None else None

    @property
    def links(self) -> tuple[SenderLink, ...]:
        """The sessions under way."""
        return tuple(self._links)

    @property
    def only_link(self) -> SenderLink | None:
        """The session, if there is just one."""
        return self._links[0] if len(self._links) == 1 else None

    @property
    def reception(self) -> Reception | None:
        return self._reception

    def connected(self) -> SenderLink | None:
        """Return the session; None: not yet.

        Raises:
            Exception: why there is none: as ``Calling.check``, or how it ended.
        """
        if self.closed:
            raise ClosedError("this sender is closed")
        if self._links:
            return self._links[0]
        if self._calling is not None:
            self._calling.check()
        if self.last_error is not None:
            raise self.tell(self.last_error)
        return None

    def arrived(self) -> SenderLink | None:
        """Return the session, as ``connected``; but where receivers come, one that failed is no reason not to wait."""
        return self.connected() if self._links or self.closed or self._reception is None else None

    def tell(self, error: Exception) -> Exception:
        """Return an error that the program hears of now."""
        if error is self.untold_error:
            self.untold_error = None
        return error

    def stats(self) -> list[SocketStats]:
        """Return the counters of every data connection of the sessions under way."""
        return [sock.stats for link in self._links for sock in link.lanes]

    # --- Engine ---

    def _timed(self) -> Iterable[Timed]:
        yield from self._timed_links
        if self._reception is not None:
            yield self._reception
        if self._calling is not None:
            yield self._calling

    @property
    def _alone(self) -> bool:
        return len(self._links) <= 1

    def _settle(self) -> None:
        """Nothing comes from other threads."""

    def leave(self) -> None:
        """Take in nobody any more, and end sessions once all that was begun is sent."""
        if self._reception is not None:
            self._reception.close()
        for link in list(self._links):
            link.leave()

    def close(self) -> None:
        """End everything at once. Idempotent."""
        if self.closed:
            return
        if self._calling is not None:
            self._calling.close()
        if self._reception is not None:
            self._reception.close()
        for link in list(self._links):
            link.abort("the sender was closed")
        super().close()
        if hasattr(self, "outbox"):
            self.outbox.close()
        self._arrangement.close()
