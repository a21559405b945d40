"""What ties the sockets of one kernel NIC to its bindings: who holds tokens of which, and when a Buffer is free."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from devmem_tcp.contract import RxBinding, TxBinding
from devmem_tcp.types import QueueStats, TokenHolder


class TokenSocket(Protocol):
    """A socket, as the registry sees it. All of it may be called from any thread."""

    @property
    def has_unread(self) -> bool:
        """Whether data is queued that was not received; nobody but the kernel knows in whose memory."""

    def holds(self, dmabuf_id: int) -> bool:
        """Whether a token of a binding is out."""

    def holder(self, dmabuf_id: int) -> TokenHolder | None:
        """Return what the socket holds of a binding, or None."""


class Unbound(Protocol):
    """A closed binding whose Buffer may not be free yet."""

    @property
    def dmabuf_id(self) -> int: ...

    def let_go(self) -> None:
        """Give the Buffer up: none of its pages is in use. May be called twice."""


@dataclass(slots=True)
class _Draining:
    """A closed binding, and the sockets that had unread data when it closed and have had some ever since, by key."""

    binding: Unbound
    suspects: frozenset[int]


class Registry:
    """The sockets and bindings of one NIC. The NIC makes it, and gives it to each socket and each binding.

    Thread-safe. Sockets are known but not kept alive.

    Args:
        queue_of_napi: the RX queue of a NAPI id (SO_INCOMING_NAPI_ID), -1 if no queue of the NIC has it; 0 is the id
            of a connection that no packet of a NIC has come for yet.
        queue_stats: what ``Nic.queue_stats`` answers; asked only while a socket waits and tokens are out.
    """

    def __init__(self, queue_of_napi: Callable[[int], int], queue_stats: Callable[[int], QueueStats]) -> None:
        self.queue_of_napi: Final = queue_of_napi
        self.queue_stats: Final = queue_stats
        self.rx: Final[dict[int, RxBinding]] = {}  # that are bound, by dmabuf_id
        self.tx: Final[dict[int, TxBinding]] = {}
        self._draining: dict[int, _Draining] = {}
        self._sockets: dict[int, weakref.ref[TokenSocket]] = {}
        self._keys = itertools.count()

    # Each access to these dicts is one operation that no thread can come between; a lock would be taken by __del__ too,
    # and that may run in the thread that has it.

    def add(self, sock: TokenSocket) -> int:
        """Know a socket from now on; returns the key to ``forget`` it by."""
        key = next(self._keys)
        self._sockets[key] = weakref.ref(sock)
        return key

    def forget(self, key: int) -> None:
        """Know a socket no more: it closed, so what it held is free."""
        self._sockets.pop(key, None)
        self.look_for_drained()

    def holders(self, dmabuf_id: int) -> tuple[TokenHolder, ...]:
        """Return who holds tokens of a binding, the oldest first."""
        found = [holder for sock in self._open().values() if (holder := sock.holder(dmabuf_id)) is not None]
        return tuple(sorted(found, key=lambda holder: -holder.oldest_age_s))

    def in_use(self, dmabuf_id: int) -> bool:
        """Whether a page of a binding may be in use: a token is out, or data is unread that may lie there."""
        self.look_for_drained()
        if dmabuf_id not in self.rx:
            return dmabuf_id in self._draining
        return any(sock.holds(dmabuf_id) or sock.has_unread for sock in self._open().values())

    def unbound(self, binding: Unbound) -> None:
        """Let go of a closed binding's Buffer once nothing of it is in use, which may be now."""
        suspects = frozenset(key for key, sock in self._open().items() if sock.has_unread)
        self._draining[binding.dmabuf_id] = _Draining(binding, suspects)
        self.look_for_drained()

    def look_for_drained(self) -> None:
        """Let go of the Buffers of closed bindings that nothing is in use of any more; quick if there are none.

        A socket that had nothing unread once, after the binding closed, can get nothing of it any more.
        """
        if not self._draining:
            return
        sockets = self._open()
        for dmabuf_id in list(self._draining):
            draining = self._draining.get(dmabuf_id)
            if draining is None:
                continue
            still = (key for key in draining.suspects if key in sockets and sockets[key].has_unread)
            draining.suspects = frozenset(still)
            if not draining.suspects and not any(sock.holds(dmabuf_id) for sock in sockets.values()):
                self._draining.pop(dmabuf_id, None)
                draining.binding.let_go()

    def _open(self) -> dict[int, TokenSocket]:
        found = ((key, self._sockets.get(key)) for key in list(self._sockets))
        return {key: sock for key, known in found if known is not None and (sock := known()) is not None}
