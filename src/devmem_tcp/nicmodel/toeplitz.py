"""The Toeplitz hash of receive side scaling, bit for bit as NICs compute it.

Key and input are strings of bits, the most significant first. Every 1 bit of the input, at position p, xors the 32 key
bits from p on into the hash. So what one input byte adds depends on its position and value alone: it is looked up in a
table per position, and a hash is one lookup a byte. Definition and test vectors: Microsoft, "RSS Hashing Types" and
"Verifying the RSS Hash Calculation". Input layout: source address, destination address, source port, destination port,
each in network order.
"""

from __future__ import annotations

from functools import reduce
from operator import getitem, xor
from typing import Final

import numpy as np

from devmem_tcp.nicmodel.flow import ADDRESS_BYTES, Flow, check_port
from devmem_tcp.types import Address, Family, U8Array, U32Array

MICROSOFT_KEY: Final = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
"""The key of the published verification suite; 40 bytes, enough for an IPv6 4-tuple."""

HASH_BYTES: Final = 4


class Toeplitz:
    """A Toeplitz hash over one key. Hashes inputs of up to ``max_input_bytes``, 4 less than the key has.

    Raises:
        ValueError: the key is too short to hash even one byte.
    """

    __slots__ = ("_tables", "key")

    def __init__(self, key: bytes = MICROSOFT_KEY) -> None:
        if len(key) <= HASH_BYTES:
            raise ValueError(f"a Toeplitz key must have more than {HASH_BYTES} bytes, got {len(key)}")
        self.key: Final = bytes(key)
        self._tables: Final = tuple(_byte_table(self.key, position) for position in range(len(key) - HASH_BYTES))

    @property
    def max_input_bytes(self) -> int:
        return len(self._tables)

    def hash_bytes(self, data: bytes) -> int:
        """Return the hash of ``data``, an unsigned 32-bit number.

        Raises:
            ValueError: ``data`` is longer than ``max_input_bytes``.
        """
        self._check_length(len(data))
        return reduce(xor, map(getitem, self._tables, data), 0)

    def hash_rows(self, rows: U8Array) -> U32Array:
        """Return the hash of every row: shape (n,), uint32, of ``rows``, shape (n, input bytes), uint8.

        Raises:
            ValueError: rows are longer than ``max_input_bytes``.
        """
        self._check_length(rows.shape[1])
        hashes = np.zeros(rows.shape[0], np.uint32)
        for table, column in zip(self._tables, rows.T, strict=False):
            hashes ^= np.array(table, np.uint32)[column]
        return hashes

    def hash_tcp4(self, src: bytes, dst: bytes, sport: int, dport: int) -> int:
        """Return the hash of an IPv4 TCP packet; addresses are packed, 4 bytes each."""
        return self.hash_bytes(_addresses(Family.TCP4, src, dst) + _ports(sport, dport))

    def hash_ip4(self, src: bytes, dst: bytes) -> int:
        """Return the hash of an IPv4 packet by its addresses alone; packed, 4 bytes each."""
        return self.hash_bytes(_addresses(Family.TCP4, src, dst))

    def hash_tcp6(self, src: bytes, dst: bytes, sport: int, dport: int) -> int:
        """Return the hash of an IPv6 TCP packet; addresses are packed, 16 bytes each."""
        return self.hash_bytes(_addresses(Family.TCP6, src, dst) + _ports(sport, dport))

    def hash_ip6(self, src: bytes, dst: bytes) -> int:
        """Return the hash of an IPv6 packet by its addresses alone; packed, 16 bytes each."""
        return self.hash_bytes(_addresses(Family.TCP6, src, dst))

    def hash_text(self, src: Address, dst: Address) -> int:
        """Return the hash of a TCP packet from (address, port) ``src`` to ``dst``, both as text.

        Raises:
            ValueError: as ``Flow.between``.
        """
        flow = Flow.between(src, dst)
        return self.hash_bytes(flow.src + flow.dst + _ports(flow.sport, flow.dport))

    def _check_length(self, length: int) -> None:
        if length > self.max_input_bytes:
            raise ValueError(
                f"a {len(self.key)}-byte Toeplitz key hashes up to {self.max_input_bytes} bytes, got {length}"
            )


def _byte_table(key: bytes, position: int) -> tuple[int, ...]:
    """Compute what each of the 256 values of the input byte at ``position`` xors into the hash."""
    window = int.from_bytes(key[position : position + HASH_BYTES + 1], "big")  # 40 bits: a byte has 8 windows of 32
    table = [0]
    for bit in range(8):  # from the least significant input bit, whose window starts last
        contribution = (window >> (bit + 1)) & 0xFFFFFFFF
        table += [contribution ^ lower for lower in table]
    return tuple(table)


def _addresses(family: Family, src: bytes, dst: bytes) -> bytes:
    size = ADDRESS_BYTES[family]
    if len(src) != size or len(dst) != size:
        raise ValueError(f"packed addresses of {family.value} have {size} bytes, got {len(src)} and {len(dst)}")
    return src + dst


def _ports(sport: int, dport: int) -> bytes:
    check_port("source port", sport)
    check_port("destination port", dport)
    return (sport << 16 | dport).to_bytes(4, "big")
