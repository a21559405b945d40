"""What the engines of senders and receivers share: peers come in, or are gone to, and sessions with them end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Generic, TypeVar

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Listener, Nic
from devmem_tcp.endpoints import open_listening, show
from devmem_tcp.sansio.frames import Role
from devmem_tcp.transport.arrangement import Arrangement
from devmem_tcp.transport.calling import Calling
from devmem_tcp.transport.engine import Engine, Timed
from devmem_tcp.transport.link import Link
from devmem_tcp.transport.reception import Established, Reception
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address, SocketStats

AnyLink = TypeVar("AnyLink", bound=Link)


class SessionEngine(Engine, Generic[AnyLink]):
    """An engine with the sessions of one role, and what it has set up on its NIC."""

    role: ClassVar[Role]

    def __init__(
        self,
        nic: Nic,
        options: SessionOptions,
        *,
        memory: Allocator | None,
        size_bytes: int,
        buffer: Buffer | None,
        max_peers: int,
    ) -> None:
        super().__init__()
        self._nic = nic
        self._options = options
        self._max_peers = max_peers
        self._backend = nic.capabilities.backend
        self._links: list[AnyLink] = []
        self._timed_links: set[Link] = set()  # those that have deadlines
        self._reception: Reception | None = None
        self._calling: Calling | None = None
        try:
            self._arrangement = Arrangement(nic, memory, size_bytes, buffer)
        except BaseException:
            Engine.close(self)
            raise

    # --- how sessions come about, and end ---

    def _go_to(
        self, to: Address, *, before_lanes: Callable[[Address], None] = lambda address: None, strict: bool = False
    ) -> None:
        """Begin to reach a peer that listens."""
        self._calling = Calling(
            self._nic,
            to,
            self.poller,
            self._options,
            role=self.role,
            before_lanes=before_lanes,
            on_session=self._begin,
            strict=strict,
        )

    def _take_in(self, control: Address, data: Listener, buffer: Buffer | None) -> None:
        """Wait for peers: control connections at an address, data connections by a listener."""
        self._reception = Reception(
            open_listening(control, 128),
            data,
            self.poller,
            self._options,
            role=self.role,
            backend=self._backend,
            buffer=buffer,
            on_session=self._begin,
            may_enter=self._may_enter,
        )

    def _may_enter(self) -> str:
        entering = self._reception.entering if self._reception is not None else 0
        if len(self._links) + entering > self._max_peers:
            return f"this {self.role.value} takes {self._max_peers} {self.role.other.value}s at a time (max_peers)"
        return ""

    @abstractmethod
    def _begin(self, made: Established) -> None:
        """Take over a session that was agreed on."""

    def _ended(self, link: Link) -> None:
        """Forget a session that is over."""
        if link in self._links:
            self._links.remove(link)
        self._timed_links.discard(link)
        if link.error is not None:
            link.error.add_note(f"the session with the {self.role.other.value} at {show(link.peer)}")

    # --- what the drivers ask ---

    @property
    def address(self) -> Address | None:
        """Where peers come; None: it went to one."""
        return self._reception.address if self._reception is not None else None

    @property
    def links(self) -> tuple[AnyLink, ...]:
        """The sessions under way."""
        return tuple(self._links)

    @property
    def only_link(self) -> AnyLink | None:
        """The session, if there is just one."""
        return self._links[0] if len(self._links) == 1 else None

    @property
    def reception(self) -> Reception | None:
        return self._reception

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
    def alone(self) -> bool:
        return len(self._links) <= 1

    def leave(self) -> None:
        """Take in nobody any more, and have sessions end in good order."""
        if self._reception is not None:
            self._reception.close()
        for link in list(self._links):
            link.leave()

    def _close_sessions(self) -> None:
        """End every session at once, and let go of the engine's own fds."""
        if self._calling is not None:
            self._calling.close()
        if self._reception is not None:
            self._reception.close()
        for link in list(self._links):
            link.abort(f"the {self.role.value} was closed")
        Engine.close(self)
