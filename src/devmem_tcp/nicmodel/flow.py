"""TCP flows and addresses as a NIC sees them: IP version, packed addresses, ports."""

from __future__ import annotations

import ipaddress
from typing import Final, NamedTuple, TypeAlias

from devmem_tcp.types import Address, Family

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

ADDRESS_BYTES: Final = {Family.TCP4: 4, Family.TCP6: 16}
MAX_PORT: Final = 0xFFFF

_MAPPED_PREFIX_BITS: Final = 96  # of ::ffff:0:0/96, RFC 4291 section 2.5.5.2


class Flow(NamedTuple):
    """One direction of a TCP connection. For a received packet ``src`` is the remote end, ``dst`` this one.

    Addresses are packed in network order: 4 bytes for TCP4, 16 for TCP6.
    """

    family: Family
    src: bytes
    dst: bytes
    sport: int
    dport: int

    @classmethod
    def between(cls, src: Address, dst: Address) -> Flow:
        """Make the flow of packets from (address, port) ``src`` to ``dst``, both as text.

        An IPv4-mapped address (``::ffff:10.0.0.2``, as a dual-stack socket reports) gives a TCP4 flow: that is what is
        on the wire. A scope (``fe80::1%eth0``) is dropped: packets carry none.

        Raises:
            ValueError: not an address (host names are not looked up), two IP versions, or a port out of range.
        """
        src_family, src_packed = pack_address(src[0])
        dst_family, dst_packed = pack_address(dst[0])
        if src_family is not dst_family:
            raise ValueError(f"{src[0]} and {dst[0]} are not of one IP version")
        check_port("source port", src[1])
        check_port("destination port", dst[1])
        return cls(src_family, src_packed, dst_packed, src[1], dst[1])


def pack_address(text: str) -> tuple[Family, bytes]:
    """Return the flow family and packed bytes of an IP address; IPv4-mapped ones count as IPv4.

    Raises:
        ValueError: ``text`` is not an IPv4 or IPv6 address.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return (Family.TCP4 if address.version == 4 else Family.TCP6), address.packed


def parse_network(text: str) -> Network:
    """Return the set of addresses that ``text`` (an address, or CIDR) stands for; IPv4-mapped ones count as IPv4.

    Bits right of the prefix are cleared, as a NIC ignores what its mask hides; a scope is dropped.

    Raises:
        ValueError: ``text`` is neither an address nor CIDR.
    """
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not an IPv4 or IPv6 address, with or without /prefix") from error
    address: ipaddress.IPv4Address | ipaddress.IPv6Address = interface.ip
    prefix_bits = interface.network.prefixlen
    if isinstance(address, ipaddress.IPv6Address) and prefix_bits >= _MAPPED_PREFIX_BITS:
        mapped = address.ipv4_mapped
        if mapped is not None:
            address, prefix_bits = mapped, prefix_bits - _MAPPED_PREFIX_BITS
    return ipaddress.ip_network((address.packed, prefix_bits), strict=False)  # packed: without scope


def check_port(what: str, port: int) -> None:
    """Raise ValueError unless ``port`` is 0 to 65535; ``what`` names it in the message."""
    if not 0 <= port <= MAX_PORT:
        raise ValueError(f"{what} must be 0 to {MAX_PORT}, got {port}")
