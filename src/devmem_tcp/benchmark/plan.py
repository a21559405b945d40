"""What is measured, as data: works, their order, the memory they need. Sizes in bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum
from typing import Final

import msgspec

from devmem_tcp.types import PAGE_SIZE

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

SIZES: Final = tuple(4**n for n in range(6, 16))  # 4 KiB to 1 GiB
QUICK_SIZES: Final = (4 * KIB, 64 * KIB, MIB, 16 * MIB)
CONNECTIONS: Final = (1, 8, 64, 512)
QUICK_CONNECTIONS: Final = (1, 8, 64)
ROUND_TRIP_SIZE: Final = 4 * KIB
CONNECTION_SIZE: Final = 64 * KIB

_SMALL_MESSAGE: Final = 16 * MIB
_SMALL_RX: Final = 64 * MIB
"""What messages up to _SMALL_MESSAGE are received into: so that a processor's cache does not see gigabytes go round."""

_SHARE_MESSAGES: Final = 8
"""How many messages each of many senders has room for: with few, every message costs the receiver a frame of credit."""

_FDS_BESIDES: Final = 64  # of the process itself, of the NIC, of the session that the ends talk by
_FDS_PER_CONNECTION: Final = 4  # control and data connection, epoll, eventfd


class Kind(Enum):
    """What a work measures."""

    THROUGHPUT = "throughput"
    ROUND_TRIP = "round-trip"
    CONNECTIONS = "connections"


class Driver(Enum):
    """Which drivers of sessions are used, at both ends."""

    BLOCKING = "blocking"
    ASYNCIO = "asyncio"


class Form(Enum):
    """How messages are sent: each with a frame of its own, or as one series."""

    MESSAGES = "messages"
    SERIES = "series"


class Work(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to measure: messages of one size, one after the other, on each of so many connections."""

    kind: Kind
    size_bytes: int
    driver: Driver = Driver.BLOCKING
    form: Form = Form.MESSAGES
    connections: int = 1

    @property
    def name(self) -> str:
        """Say it in words."""
        many = f" on {self.connections} connections" if self.kind is Kind.CONNECTIONS else ""
        trip = ", round trip" if self.kind is Kind.ROUND_TRIP else ""
        return f"{self.form.value} of {size_name(self.size_bytes)}, {self.driver.value}{trip}{many}"

    @property
    def landing_bytes(self) -> int:
        """The least memory to receive into: a message of every connection, in whole pages."""
        return self.connections * whole_pages(self.size_bytes)

    @property
    def fds(self) -> int:
        """How many fds the end that has more of them needs."""
        return _FDS_BESIDES + _FDS_PER_CONNECTION * self.connections


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is to be measured.

    Attributes:
        works: each once a round.
        rounds: how often; every round in another order.
        seconds: how long the measured part of a work takes, about.
        seed: of the orders.
    """

    works: list[Work]
    rounds: int
    seconds: float
    seed: int

    def schedule(self) -> list[list[Work]]:
        """Return the works of every round, shuffled, the same for the same seed."""
        dice = random.Random(self.seed)
        return [dice.sample(self.works, len(self.works)) for _ in range(self.rounds)]


class Pools(msgspec.Struct, frozen=True):
    """How large the Buffers of both ends are: small ones for small messages, large ones for the others."""

    rx_small: int
    rx_large: int
    rx_many: int  # for many connections, which have even shares of it
    tx_small: int
    tx_large: int

    @classmethod
    def of(cls, works: Sequence[Work], limit_bytes: int) -> Pools:
        """Return what the works need, no Buffer above ``limit_bytes``. 0: none."""
        many = [work for work in works if work.kind is Kind.CONNECTIONS]
        small = [work for work in works if is_small(work) and work not in many]
        large = [work for work in works if not is_small(work)]
        most = max((work.landing_bytes for work in many), default=0)
        largest = max((work.landing_bytes for work in large), default=0)
        return cls(
            rx_small=min(limit_bytes, _SMALL_RX) if small else 0,
            rx_large=min(limit_bytes, 2 * largest),
            rx_many=min(limit_bytes, max(_SMALL_RX, _SHARE_MESSAGES * most)) if many else 0,
            tx_small=max((whole_pages(work.size_bytes) for work in (*small, *many)), default=0),
            tx_large=max((whole_pages(work.size_bytes) for work in large), default=0),
        )

    def rx(self, work: Work) -> int:
        """Return the size of the Buffer that a work receives into."""
        if work.kind is Kind.CONNECTIONS:
            return self.rx_many
        return self.rx_small if is_small(work) else self.rx_large

    def tx(self, work: Work) -> int:
        """Return the size of the Buffer that a work sends from."""
        return self.tx_small if is_small(work) else self.tx_large

    @property
    def rx_bytes(self) -> int:
        """What the receiving end allocates; for round trips it sends from a few pages more."""
        return self.rx_small + self.rx_large + self.rx_many

    @property
    def tx_bytes(self) -> int:
        """What the sending end allocates; for round trips it receives into a Buffer as ``rx_small`` besides."""
        return self.tx_small + self.tx_large + self.rx_small


def is_small(work: Work) -> bool:
    """Whether a work uses the small Buffers."""
    return work.size_bytes <= _SMALL_MESSAGE


def whole_pages(size_bytes: int) -> int:
    """Return the bytes of the pages that so many bytes take."""
    return max(1, -(-size_bytes // PAGE_SIZE)) * PAGE_SIZE


def list_works(sizes: Sequence[int], connections: Sequence[int], only: frozenset[str]) -> list[Work]:
    """List what to measure.

    Args:
        sizes: of the messages of throughput.
        connections: numbers of connections.
        only: values of Kind, Driver and Form; of an Enum none of whose values is named, all are meant.
    """
    ways = [(driver, form) for driver in Driver for form in Form]
    works = [Work(Kind.THROUGHPUT, size, driver, form) for size in sizes for driver, form in ways]
    works += [Work(Kind.ROUND_TRIP, ROUND_TRIP_SIZE, driver, form) for driver, form in ways]
    works += [Work(Kind.CONNECTIONS, CONNECTION_SIZE, connections=count) for count in connections]
    return [work for work in works if all(_is_meant(choice, only) for choice in (work.kind, work.driver, work.form))]


def _is_meant(choice: Kind | Driver | Form, only: frozenset[str]) -> bool:
    named = only & {other.value for other in type(choice)}
    return not named or choice.value in named


def size_name(size_bytes: int) -> str:
    """Write a size as people do: 4 KiB, 1 GiB, 1,000 bytes."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit:,} {name}"
    return f"{size_bytes:,} bytes"
