"""The 4-tuple of a connection, as steering looks at it."""

from __future__ import annotations

from typing import Any

from devmem_tcp.endpoints import plain
from devmem_tcp.nicmodel.flow import Flow
from devmem_tcp.nicmodel.steering import Steering
from devmem_tcp.types import Address


class SteeredFlow:
    """One connection as the NIC sees its incoming packets; caches the queue until steering changes."""

    __slots__ = ("_flow", "_queue", "_steering", "_version", "local", "remote")

    def __init__(self, local: tuple[Any, ...], remote: tuple[Any, ...], steering: Steering) -> None:
        self.local: Address = plain(local)
        self.remote: Address = plain(remote)
        self._flow = Flow.between(self.remote, self.local)
        self._steering = steering
        self._version = -1
        self._queue = -1

    @property
    def queue(self) -> int:
        """The RX queue that packets of this connection go to now."""
        if self._version != self._steering.version:
            self._version = self._steering.version
            self._queue = self._steering.queue_for(*self._flow)
        return self._queue
