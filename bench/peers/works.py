"""What every peer is asked to do, as data: sizes, numbers of messages and connections. Sizes in bytes."""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec

from loopback import MIB

SIZES: Final = (4 << 10, 64 << 10, MIB, 16 * MIB, 64 * MIB, 256 * MIB)
ROUND_TRIP_SIZE: Final = 4 << 10
ROUND_TRIPS: Final = 2000
CONNECTIONS: Final = (1, 8, 64, 512)
CONNECTION_SIZE: Final = 64 << 10
MOST_MESSAGES: Final = 16384
FEWEST_MESSAGES: Final = 4
FEWEST_ON_EACH: Final = 64  # of many connections, so that what begins and ends a connection's part weighs little


class Kind(Enum):
    """What is measured by a work."""

    THROUGHPUT = "throughput"
    ROUND_TRIP = "round trip"
    CONNECTIONS = "connections"


class Work(msgspec.Struct, frozen=True):
    """One thing to do: ``messages`` of ``size_bytes`` on each connection; for a round trip, there and back."""

    kind: Kind
    size_bytes: int
    messages: int
    connections: int = 1

    @property
    def total_bytes(self) -> int:
        """All payload that goes one way."""
        return self.size_bytes * self.messages * self.connections

    @property
    def warm_up_messages(self) -> int:
        """How many messages go before, on each connection: enough for the windows of TCP to have grown."""
        return max(1, self.messages // 8)

    @property
    def name(self) -> str:
        if self.kind is Kind.CONNECTIONS:
            return str(self.connections)
        return size_name(self.size_bytes)


def size_name(size_bytes: int) -> str:
    """Write a power of two as people do: 4 KiB, 256 MiB."""
    return f"{size_bytes // MIB} MiB" if size_bytes >= MIB else f"{size_bytes >> 10} KiB"


def works(total_bytes: int, round_trips: int = ROUND_TRIPS) -> list[Work]:
    """List all works, about ``total_bytes`` each.

    Less where messages are small; never under four messages, or 64 on each connection.
    """
    listed = [
        Work(Kind.THROUGHPUT, size, min(MOST_MESSAGES, max(FEWEST_MESSAGES, total_bytes // size))) for size in SIZES
    ]
    listed.append(Work(Kind.ROUND_TRIP, ROUND_TRIP_SIZE, round_trips))
    for count in CONNECTIONS:
        each = max(FEWEST_ON_EACH, total_bytes // (CONNECTION_SIZE * count))
        listed.append(Work(Kind.CONNECTIONS, CONNECTION_SIZE, each, count))
    return listed
