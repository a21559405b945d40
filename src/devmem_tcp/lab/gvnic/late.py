"""Packets whose time has not come."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Final

from devmem_tcp.lab.wire import Packet

MAX_LATE_PACKETS: Final = 1 << 16
MAX_LATE_BYTES: Final = 256 << 20


class LatePackets:
    """Packets in order of the time they are due; those of one time in the order in which they came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Packet]] = []
        self._bytes = 0
        self._numbers = count()

    @property
    def due_s(self) -> float | None:
        """When the first is due; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def add(self, due_s: float, packet: Packet) -> bool:
        """Keep a packet until ``due_s``; False if there are too many."""
        if len(self._heap) >= MAX_LATE_PACKETS or self._bytes + len(packet.data) > MAX_LATE_BYTES:
            return False
        heapq.heappush(self._heap, (due_s, next(self._numbers), packet))
        self._bytes += len(packet.data)
        return True

    def pop_due(self, now_s: float) -> Iterator[Packet]:
        """Yield the packets that are due, and forget them."""
        while self._heap and self._heap[0][0] <= now_s:
            _, _, packet = heapq.heappop(self._heap)
            self._bytes -= len(packet.data)
            yield packet
