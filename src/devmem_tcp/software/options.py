"""What can be chosen of a software NIC when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from devmem_tcp.types import PAGE_SIZE

MAX_RX_QUEUES: Final = 64
MAX_FRAG_SIZE: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class SoftwareOptions:
    """Settings of a software NIC.

    Args:
        rx_queues: RX queues it has, 2 to 64.
        frag_size: largest frag in bytes, a multiple of 4096; adjacent free pages arrive as one frag up to this size.
            4096 gives the kernel's own shape.
        hostile_seed: None, or the seed of hostile mode: every choice that is legal for a NIC but nasty for a program
            (1-byte and unaligned frags, linear heads, host frags mid-connection, offsets out of order, few pages, late
            completions) is made, the same ones for the same seed.
        congestion: TCP congestion control of its sockets. ``auto``: cubic or reno on loopback addresses where the
            system allows it, untouched elsewhere; ``system``: never touched; else the name of one, for every socket.
    """

    rx_queues: int = 16
    frag_size: int = 1 << 20
    hostile_seed: int | None = None
    congestion: str = "auto"

    def __post_init__(self) -> None:
        if not 2 <= self.rx_queues <= MAX_RX_QUEUES:
            raise ValueError(f"rx_queues must be 2 to {MAX_RX_QUEUES}, got {self.rx_queues}")
        if self.frag_size % PAGE_SIZE or not PAGE_SIZE <= self.frag_size <= MAX_FRAG_SIZE:
            raise ValueError(f"frag_size must be a multiple of {PAGE_SIZE} up to {MAX_FRAG_SIZE}, got {self.frag_size}")
