"""Ethernet frames as a NIC's parser sees them: which headers there are, how long, and where the payload starts.

The parser believes nothing. A length field that points past the end, a header cut short, an unknown protocol: parsing
stops there, and what follows is payload. It reads no byte past the frame's end and raises on no input.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple, TypeAlias

FrameBytes: TypeAlias = bytes | bytearray | memoryview
"""A whole Ethernet frame without its check sequence. A memoryview has one dimension, of bytes."""

ETHERNET_BYTES: Final = 14
ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_ARP: Final = 0x0806
ETHERTYPE_IPV6: Final = 0x86DD

PROTOCOL_ICMP: Final = 1
PROTOCOL_TCP: Final = 6
PROTOCOL_UDP: Final = 17
PROTOCOL_ICMPV6: Final = 58

_VLAN_BYTES: Final = 4
_VLAN_TYPES: Final = frozenset({0x8100, 0x88A8})  # IEEE 802.1Q customer and service tags
_MAX_VLAN_TAGS: Final = 2

_IPV4_MIN_BYTES: Final = 20
_IPV4_FRAGMENT_BITS: Final = 0x3FFF  # "more fragments" and the offset
_IPV6_BYTES: Final = 40
_PLAIN_IP: Final = {4: _IPV4_MIN_BYTES, 6: _IPV6_BYTES}  # headers without options or extensions
_ARP_BYTES: Final = 28  # for IPv4 over Ethernet
_ARP_KIND: Final = (1, ETHERTYPE_IPV4, 6, 4)  # Ethernet, IPv4, and the lengths of their addresses
_TCP_MIN_BYTES: Final = 20
_UDP_BYTES: Final = 8
_ICMP_BYTES: Final = 8

# IPv6 extension headers, RFC 8200 section 4; lengths count units of 8 bytes after the first 8, AH's of 4.
_HOP_BY_HOP: Final = 0
_ROUTING: Final = 43
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51
_DESTINATION_OPTIONS: Final = 60
_MOBILITY: Final = 135
_EXTENSIONS: Final = frozenset({_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION_OPTIONS, _MOBILITY})
_EXTENSION_MIN_BYTES: Final = 8
_MAX_EXTENSIONS: Final = 8  # RFC 8504 section 5.3 lets a node stop here

_U16: Final = Struct("!H")
_IPV4: Final = Struct("!BxHxxHxBxx4s4s")  # version and header length; total length; fragment; protocol; addresses
_IPV6: Final = Struct("!BxxxHBx16s16s")  # version; payload length; next header; addresses
_EXTENSION: Final = Struct("!BBHxxxx")  # next header; length; in a fragment header: offset and "more fragments"
_ARP: Final = Struct("!HHBBxx6x4s6x4s")  # kinds and lengths; sender's and target's IPv4 addresses
_PORTS: Final = Struct("!HH")
_TCP: Final = Struct("!HH8xB")  # ports; header length in the high 4 bits
_UDP: Final = Struct("!HHH")  # ports; length


class ParsedFrame(NamedTuple):
    """What ``parse`` found. Lengths and offsets in bytes; a header that is missing or malformed has length 0.

    Addresses are packed in network order: 4 bytes for IPv4, 16 for IPv6, none otherwise; of an ARP packet they are the
    sender's and the target's IPv4 addresses. ``protocol`` is IP's number of what follows the IP headers, also where
    that could not be parsed. Payload is all that follows the last header that was understood, up to the end that IP
    (or UDP) states: Ethernet padding is left out.
    """

    ether_type: int  # behind any VLAN tags; 0 if there is no whole Ethernet header
    version: int  # of IP: 4, 6, or 0
    protocol: int  # 0 if not IP
    src: bytes
    dst: bytes
    sport: int  # TCP's and UDP's, else 0
    dport: int
    fragment: bool  # a piece of an IP packet, even the first: its transport header is not looked at
    l2_length: int  # with VLAN tags
    l3_length: int  # with IPv4 options, IPv6 extension headers; of ARP, the packet
    l4_length: int  # with TCP options
    payload_offset: int  # the three together
    payload_length: int

    @property
    def is_tcp(self) -> bool:
        """A TCP segment with its whole, valid header, not an IP fragment."""
        return self.protocol == PROTOCOL_TCP and self.l4_length > 0

    @property
    def is_udp(self) -> bool:
        """A UDP datagram with a valid header, not an IP fragment."""
        return self.protocol == PROTOCOL_UDP and self.l4_length > 0

    @property
    def is_icmp(self) -> bool:
        """An ICMP or ICMPv6 message, not an IP fragment."""
        return self.protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6) and self.l4_length > 0

    @property
    def l4_offset(self) -> int:
        """Where the transport header starts."""
        return self.payload_offset - self.l4_length

    @property
    def l4_bytes(self) -> int:
        """Bytes of transport header and payload together: the length that a pseudo header states."""
        return self.l4_length + self.payload_length


_Network: TypeAlias = tuple[int, int, bytes, bytes, bool, int, int]
"""What the network layer says: version, protocol, src, dst, fragment and l3_length of ParsedFrame, and where the packet
ends. A plain tuple, since one is made of every packet."""


def parse(frame: FrameBytes, *, superframe: bool = False) -> ParsedFrame:
    """Find the headers and the payload of an Ethernet frame; never raises.

    Understands up to two VLAN tags, ARP, IPv4 with options, IPv6 with extension headers, TCP, UDP, ICMP and ICMPv6.
    Checksums are not looked at. Behind an IPv6 routing header that still has stops to make, nothing is parsed: the
    destination that transport checksums count is not the one in the IP header (RFC 8200 section 8.1).

    Args:
        frame: any bytes at all.
        superframe: an IP length of 0 means "up to the end of the frame", as in packets of more than 64 KiB that are yet
            to be segmented ("BIG TCP"); otherwise it is an error.
    """
    size = len(frame)
    if size < ETHERNET_BYTES:
        return ParsedFrame(0, 0, 0, b"", b"", 0, 0, False, 0, 0, 0, 0, size)
    l2_length = ETHERNET_BYTES
    ether_type: int = _U16.unpack_from(frame, 12)[0]
    if ether_type in _VLAN_TYPES:
        ether_type, l2_length = _skip_vlan_tags(frame, ether_type)

    network = None
    if ether_type == ETHERTYPE_IPV4:
        network = _read_ipv4(frame, l2_length, superframe)
    elif ether_type == ETHERTYPE_IPV6:
        network = _read_ipv6(frame, l2_length, superframe)
    elif ether_type == ETHERTYPE_ARP:
        network = _read_arp(frame, l2_length)
    if network is None:
        return ParsedFrame(ether_type, 0, 0, b"", b"", 0, 0, False, l2_length, 0, 0, l2_length, size - l2_length)

    version, protocol, src, dst, fragment, l3_length, end = network
    l4_offset = l2_length + l3_length
    sport = dport = l4_length = 0
    if not fragment:
        sport, dport, l4_length, end = _read_transport(frame, version, protocol, l4_offset, end)
    payload_offset = l4_offset + l4_length
    return ParsedFrame(
        ether_type, version, protocol, src, dst, sport, dport, fragment,
        l2_length, l3_length, l4_length, payload_offset, end - payload_offset,
    )  # fmt: skip  # by position: this runs for every packet


def _skip_vlan_tags(frame: FrameBytes, ether_type: int) -> tuple[int, int]:
    """Return the EtherType behind the VLAN tags, and where its packet starts."""
    offset = ETHERNET_BYTES
    for _ in range(_MAX_VLAN_TAGS):
        if ether_type not in _VLAN_TYPES or len(frame) < offset + _VLAN_BYTES:
            break
        ether_type = _U16.unpack_from(frame, offset + 2)[0]
        offset += _VLAN_BYTES
    return ether_type, offset


def _read_ipv4(frame: FrameBytes, offset: int, superframe: bool) -> _Network | None:
    available = len(frame) - offset
    if available < _IPV4_MIN_BYTES:
        return None
    version_and_length, total, fragment, protocol, src, dst = _IPV4.unpack_from(frame, offset)
    header_bytes = (version_and_length & 0xF) * 4
    if total == 0 and superframe:
        total = available
    if version_and_length >> 4 != 4 or not _IPV4_MIN_BYTES <= header_bytes <= total <= available:
        return None
    return 4, protocol, src, dst, fragment & _IPV4_FRAGMENT_BITS != 0, header_bytes, offset + total


def _read_ipv6(frame: FrameBytes, offset: int, superframe: bool) -> _Network | None:
    available = len(frame) - offset - _IPV6_BYTES
    if available < 0:
        return None
    version, payload, protocol, src, dst = _IPV6.unpack_from(frame, offset)
    if payload == 0 and superframe:
        payload = available
    if version >> 4 != 6 or payload > available:
        return None
    start = offset + _IPV6_BYTES
    end = start + payload
    fragment = False
    if protocol in _EXTENSIONS:
        protocol, start, fragment = _skip_extensions(frame, protocol, start, end)
    return 6, protocol, src, dst, fragment, start - offset, end


def _skip_extensions(frame: FrameBytes, protocol: int, offset: int, end: int) -> tuple[int, int, bool]:
    """Return the protocol behind the extension headers, where it starts, and whether the packet is a fragment.

    An extension header that is not understood ends the walk: its own number is the protocol, which no transport has.
    """
    for _ in range(_MAX_EXTENSIONS):
        if protocol not in _EXTENSIONS or end - offset < _EXTENSION_MIN_BYTES:
            break
        following, length, third = _EXTENSION.unpack_from(frame, offset)
        if protocol == _FRAGMENT:
            size = _EXTENSION_MIN_BYTES
            if third & 0xFFF9:  # offset or "more fragments"; neither: an atomic fragment, RFC 6946
                return following, offset + size, True
        elif protocol == _AUTHENTICATION:
            size = (length + 2) * 4
        else:
            size = (length + 1) * 8
        if size > end - offset or (protocol == _ROUTING and third & 0xFF):  # segments left
            break
        protocol, offset = following, offset + size
    return protocol, offset, False


def _read_arp(frame: FrameBytes, offset: int) -> _Network | None:
    if len(frame) - offset < _ARP_BYTES:
        return None
    hardware, network, hardware_bytes, network_bytes, sender, target = _ARP.unpack_from(frame, offset)
    if (hardware, network, hardware_bytes, network_bytes) != _ARP_KIND:
        return None
    return 0, 0, sender, target, False, _ARP_BYTES, offset + _ARP_BYTES


def _read_transport(frame: FrameBytes, version: int, protocol: int, offset: int, end: int) -> tuple[int, int, int, int]:
    """Return source port, destination port, header length, and where the payload ends."""
    available = end - offset
    if protocol == PROTOCOL_TCP:
        if available >= _TCP_MIN_BYTES:
            sport, dport, data_offset = _TCP.unpack_from(frame, offset)
            header_bytes = (data_offset >> 4) * 4
            if _TCP_MIN_BYTES <= header_bytes <= available:
                return sport, dport, header_bytes, end
    elif protocol == PROTOCOL_UDP:
        if available >= _UDP_BYTES:
            sport, dport, length = _UDP.unpack_from(frame, offset)
            if _UDP_BYTES <= length <= available:
                return sport, dport, _UDP_BYTES, offset + length
    elif protocol == (PROTOCOL_ICMP if version == 4 else PROTOCOL_ICMPV6) and available >= _ICMP_BYTES:
        return 0, 0, _ICMP_BYTES, end
    return 0, 0, 0, end


def _bits(*spans: tuple[int, int]) -> int:
    """Return the bits of a frame's first _READ_BYTES bytes that lie in bytes ``spans``, from and to."""
    return sum((1 << 8 * (end - start)) - 1 << 8 * (_READ_BYTES - end) for start, end in spans)


_READ_BYTES: Final = 67  # as far as parse reads plain TCP over IPv6: the TCP header's length
_READ: Final = {
    4: _bits((12, 15), (16, 18), (20, 22), (23, 24), (26, 38), (46, 47)),
    6: _bits((12, 15), (18, 21), (22, 58), (66, 67)),
}
"""By version of IP, the bits on which ``parse`` bases what it says of untagged TCP with neither IP options nor
extension headers."""


class FlowParser:
    """``parse`` with a memory of one frame: what it said of that holds for those of the same flow and length."""

    __slots__ = ("_bits", "_mask", "_parsed", "_size")

    def __init__(self) -> None:
        self._size = self._mask = 0
        self._bits = 1  # what no frame has under mask 0
        self._parsed = parse(b"")

    def parse(self, frame: FrameBytes) -> ParsedFrame:
        """Return what ``parse(frame)`` does."""
        head = int.from_bytes(frame[:_READ_BYTES], "big")
        if head & self._mask == self._bits and len(frame) == self._size:
            return self._parsed
        parsed = parse(frame)
        if parsed.is_tcp and parsed.l2_length == ETHERNET_BYTES and parsed.l3_length == _PLAIN_IP[parsed.version]:
            self._mask = _READ[parsed.version] >> 8 * max(_READ_BYTES - len(frame), 0)
            self._bits, self._size, self._parsed = head & self._mask, len(frame), parsed
        return parsed
