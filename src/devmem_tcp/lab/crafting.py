"""Make whole Ethernet frames, with right lengths and checksums, and answer as a simple host would.

For host processes on the lab's wire, and for tests. A ``Path`` says from whom to whom; IPv4 or IPv6 follows from its
addresses.
"""

from __future__ import annotations

from ipaddress import ip_address
from struct import Struct
from typing import Final, NamedTuple

from devmem_tcp.lab.checksum import fill_ip_checksum, fill_l4_checksum, verify_l4
from devmem_tcp.lab.frames import (
    ETHERNET_BYTES,
    ETHERTYPE_ARP,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    FrameBytes,
    ParsedFrame,
    parse,
)

BROADCAST: Final = b"\xff" * 6

_TTL: Final = 64
_NEIGHBOUR_HOP_LIMIT: Final = 255  # RFC 4861 section 7.1: anything less came from afar and is ignored
_IPV6_ADDRESS_BYTES: Final = 16
_DONT_FRAGMENT: Final = 0x4000

_ETHERNET: Final = Struct("!6s6sH")
_IPV4: Final = Struct("!BBHHHBBH4s4s")
_IPV6: Final = Struct("!IHBB16s16s")
_TCP: Final = Struct("!HHIIBBHHH")
_UDP: Final = Struct("!HHHH")
_ICMP: Final = Struct("!BBHI")  # type; code; checksum; echo's identifier and number, or reserved
_ARP: Final = Struct("!HHBBH6s4s6s4s")

_ARP_REQUEST: Final = 1
_ARP_REPLY: Final = 2
_ECHO_REQUEST: Final = {PROTOCOL_ICMP: 8, PROTOCOL_ICMPV6: 128}
_ECHO_REPLY: Final = {PROTOCOL_ICMP: 0, PROTOCOL_ICMPV6: 129}
_NEIGHBOUR_SOLICITATION: Final = 135
_NEIGHBOUR_ADVERTISEMENT: Final = 136
_SOLICITED_AND_OVERRIDE: Final = 0x60000000
_TARGET_LINK_ADDRESS: Final = bytes([2, 1])  # option type, and its length in units of 8 bytes


class Path(NamedTuple):
    """From whom to whom a frame goes: MAC addresses of 6 bytes, IP addresses packed, both of one version."""

    src_mac: bytes
    dst_mac: bytes
    src: bytes
    dst: bytes

    @classmethod
    def between(cls, src_mac: str, src: str, dst_mac: str, dst: str) -> Path:
        """Make a path from text: ``02:00:00:00:00:01`` and ``10.0.0.1`` or ``fd00::1``, for both ends.

        Raises:
            ValueError: an address does not parse, or the two are not of one IP version.
        """
        packed = ip_address(src).packed, ip_address(dst).packed
        if len(packed[0]) != len(packed[1]):
            raise ValueError(f"{src} and {dst} are not of one IP version")
        return cls(bytes.fromhex(src_mac.replace(":", "")), bytes.fromhex(dst_mac.replace(":", "")), *packed)

    def back(self) -> Path:
        """Return the way back."""
        return Path(self.dst_mac, self.src_mac, self.dst, self.src)


def tcp_frame(
    path: Path,
    sport: int,
    dport: int,
    payload: FrameBytes = b"",
    *,
    sequence: int = 0,
    acknowledgement: int = 0,
    flags: int = 0x10,
    window: int = 0xFFFF,
    options: bytes = b"",
    identification: int = 0,
) -> bytes:
    """Make a TCP segment; with more payload than one packet holds, a superframe to segment.

    Args:
        path: its ends.
        sport, dport: TCP ports.
        payload: up to any length; the IP length is 0 where it cannot be stated ("BIG TCP").
        sequence, acknowledgement, flags, window: header fields; the flags are ACK alone unless given.
        options: TCP options, padded here with zeros to a multiple of 4 bytes; 40 at most.
        identification: IPv4's id field.
    """
    options += bytes(-len(options) % 4)
    data_offset = (_TCP.size + len(options)) // 4 << 4
    header = _TCP.pack(sport, dport, sequence, acknowledgement, data_offset, flags, window, 0, 0)
    return _ip_frame(path, PROTOCOL_TCP, b"".join((header, options, payload)), identification=identification)


def udp_frame(path: Path, sport: int, dport: int, payload: FrameBytes = b"") -> bytes:
    """Make a UDP datagram."""
    header = _UDP.pack(sport, dport, _UDP.size + len(payload), 0)
    return _ip_frame(path, PROTOCOL_UDP, b"".join((header, payload)))


def echo_request(path: Path, identifier: int, number: int, payload: FrameBytes = b"") -> bytes:
    """Make what ``ping`` sends: an ICMP echo request, or ICMPv6's."""
    protocol = PROTOCOL_ICMP if len(path.src) == 4 else PROTOCOL_ICMPV6
    header = _ICMP.pack(_ECHO_REQUEST[protocol], 0, 0, identifier << 16 | number)
    return _ip_frame(path, protocol, b"".join((header, payload)))


def arp_request(src_mac: bytes, src: bytes, dst: bytes) -> bytes:
    """Ask everybody who has the IPv4 address ``dst``; MAC addresses of 6 bytes, IP addresses of 4."""
    return _arp(_ARP_REQUEST, Path(src_mac, BROADCAST, src, dst), target_mac=bytes(6))


def answer(frame: FrameBytes, mac: bytes, addresses: frozenset[bytes]) -> bytes | None:
    """Answer a frame as the host with this MAC address and these IP addresses would.

    It answers ARP requests, IPv6 neighbour solicitations, and ICMP and ICMPv6 echo requests with right checksums:
    enough to be found and pinged. It does not answer on a VLAN, nor defend its address against a second owner.

    Args:
        frame: any frame at all.
        mac: the host's MAC address, 6 bytes.
        addresses: its IP addresses, packed.

    Returns:
        The frame to send, or None if there is nothing to say.
    """
    parsed = parse(frame)
    if parsed.l2_length != ETHERNET_BYTES or not any(parsed.src):
        return None
    if parsed.ether_type == ETHERTYPE_ARP:
        return _answer_arp(frame, parsed, mac, addresses)
    if not parsed.is_icmp or not verify_l4(frame, parsed):
        return None
    kind = frame[parsed.l4_offset]
    back = Path(mac, bytes(frame[6:12]), parsed.dst, parsed.src)
    if kind == _ECHO_REQUEST[parsed.protocol] and parsed.dst in addresses:
        rest = frame[parsed.l4_offset + 4 : parsed.payload_offset + parsed.payload_length]
        return _ip_frame(back, parsed.protocol, b"".join((bytes([_ECHO_REPLY[parsed.protocol], 0, 0, 0]), rest)))
    if kind == _NEIGHBOUR_SOLICITATION and parsed.protocol == PROTOCOL_ICMPV6:
        payload = frame[parsed.payload_offset : parsed.payload_offset + parsed.payload_length]
        wanted = bytes(payload[:_IPV6_ADDRESS_BYTES])
        if len(wanted) == _IPV6_ADDRESS_BYTES and wanted in addresses:
            header = _ICMP.pack(_NEIGHBOUR_ADVERTISEMENT, 0, 0, _SOLICITED_AND_OVERRIDE)
            message = header + wanted + _TARGET_LINK_ADDRESS + mac
            return _ip_frame(back._replace(src=wanted), PROTOCOL_ICMPV6, message, hop_limit=_NEIGHBOUR_HOP_LIMIT)
    return None


def _answer_arp(frame: FrameBytes, parsed: ParsedFrame, mac: bytes, addresses: frozenset[bytes]) -> bytes | None:
    operation = int.from_bytes(frame[parsed.l2_length + 6 : parsed.l2_length + 8], "big")
    if operation != _ARP_REQUEST or parsed.dst not in addresses:
        return None
    asker = bytes(frame[parsed.l2_length + 8 : parsed.l2_length + 14])
    return _arp(_ARP_REPLY, Path(mac, asker, parsed.dst, parsed.src), target_mac=asker)


def _arp(operation: int, path: Path, *, target_mac: bytes) -> bytes:
    packet = _ARP.pack(1, ETHERTYPE_IPV4, 6, 4, operation, path.src_mac, path.src, target_mac, path.dst)
    return _ETHERNET.pack(path.dst_mac, path.src_mac, ETHERTYPE_ARP) + packet


def _ip_frame(path: Path, protocol: int, message: bytes, *, identification: int = 0, hop_limit: int = _TTL) -> bytes:
    """Put Ethernet and IP headers before a transport header and payload, and fill in the checksums."""
    size = len(message)
    if len(path.src) == 4:
        total = _IPV4.size + size
        stated = total if total <= 0xFFFF else 0
        ether_type = ETHERTYPE_IPV4
        header = _IPV4.pack(0x45, 0, stated, identification, _DONT_FRAGMENT, hop_limit, protocol, 0, path.src, path.dst)
    else:
        ether_type = ETHERTYPE_IPV6
        header = _IPV6.pack(6 << 28, size if size <= 0xFFFF else 0, protocol, hop_limit, path.src, path.dst)
    frame = bytearray().join((_ETHERNET.pack(path.dst_mac, path.src_mac, ether_type), header, message))
    parsed = parse(frame, superframe=True)
    fill_ip_checksum(frame, parsed)
    fill_l4_checksum(frame, parsed)
    return bytes(frame)
