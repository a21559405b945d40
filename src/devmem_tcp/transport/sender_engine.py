"""A sender without waiting: one session with a receiver, and the TX Buffer that messages go from."""

from __future__ import annotations

from collections.abc import Callable

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.contract import Nic
from devmem_tcp.errors import ClosedError
from devmem_tcp.sansio.frames import Role
from devmem_tcp.transport.arrangement import listening_addresses
from devmem_tcp.transport.link import Link
from devmem_tcp.transport.outbox import Outbox
from devmem_tcp.transport.reception import Established
from devmem_tcp.transport.sending import SenderLink
from devmem_tcp.transport.session_engine import SessionEngine
from devmem_tcp.transport.terms import SessionOptions
from devmem_tcp.types import Address

OnRequest = Callable[[SenderLink, int, bytes], None]


def refuse_request(link: SenderLink, number: int, body: bytes) -> None:
    """Answer nothing: this program has nothing to offer."""
    link.answer(number, b"")


class SenderEngine(SessionEngine[SenderLink]):
    """See ``Sender``; this is all of it that does not wait."""

    role = Role.SENDER

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
        super().__init__(nic, options, memory=memory, size_bytes=size_bytes, buffer=buffer, max_peers=max_peers)
        self._on_request = on_request
        self._on_session = on_session
        self.last_error: Exception | None = None  #: why a session failed, of the last one that did
        self.untold_error: Exception | None = None  #: the same, until the program has heard of it
        try:
            self.outbox = Outbox(self._arrangement.buffer, self._arrangement.bind_tx(), self.wake)
            if to is not None:
                self._go_to(to)  # no lane need be steered: what comes back is acknowledgements
            elif listen is not None:
                control_address, data_address = listening_addresses(listen, data_port)
                self._take_in(control_address, self._arrangement.held.enter_context(nic.listen(data_address)), None)
        except BaseException:
            self.close()
            raise

    def _begin(self, made: Established) -> None:
        link = SenderLink(
            made,
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
        super()._ended(link)
        if link.error is not None:
            self.last_error = self.untold_error = link.error

    # --- what the drivers ask ---

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

    # --- Engine ---

    def _settle(self) -> None:
        """Nothing comes from other threads."""

    def close(self) -> None:
        """End everything at once. Idempotent."""
        if self.closed:
            return
        self._close_sessions()
        if hasattr(self, "outbox"):
            self.outbox.close()
        self._arrangement.close()
