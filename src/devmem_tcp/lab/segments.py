"""TCP segmentation as a NIC does it (TSO): one superframe in, frames of at most one MSS of payload out."""

from __future__ import annotations

from struct import Struct
from typing import Final

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.checksum import MAX_SUM, ones_sum, pseudo_header_sum
from devmem_tcp.lab.frames import PROTOCOL_TCP, FrameBytes, ParsedFrame, parse

MAX_SEGMENTS: Final = 4096
"""What one superframe may become. 256 KiB by the smallest MSS that IPv4 hosts use, 88, is fewer."""

_MAX_IP_LENGTH: Final = 0xFFFF
_IPV6_BYTES: Final = 40  # not counted by its payload length

_U16: Final = Struct("!H")
_LENGTH_AND_ID: Final = Struct("!HH")
_U32: Final = Struct("!I")
_SEQUENCE_MODULUS: Final = 1 << 32

_FIN: Final = 0x01
_PSH: Final = 0x08
_CWR: Final = 0x80


class SegmentError(DevmemError):
    """A frame cannot be segmented as asked: not TCP, headers of another length, an MSS out of range."""


def segment(frame: FrameBytes, header_length: int, mss: int) -> list[bytes]:
    """Cut a TCP superframe into the frames that go on the wire; lengths, numbers, flags and checksums are made right.

    What each frame has of its own: IPv4's id counts up; TCP's sequence number goes on by the payload before it; FIN
    and PSH are left on the last frame alone, CWR on the first alone (RFC 3168 section 6.1.2). The IP lengths and the
    checksums of the superframe need not be right. A payload that fits one MSS gives one frame.

    Args:
        frame: an Ethernet frame of TCP over IPv4 or IPv6, up to any length.
        header_length: bytes of all its headers, Ethernet's to TCP's, as the sender states them.
        mss: payload bytes of every frame but the last.

    Raises:
        SegmentError: the frame is not whole, valid TCP; its headers are not ``header_length`` long; ``mss`` is not
            positive, gives frames too long for IP, or more than MAX_SEGMENTS of them.
    """
    parsed = parse(frame, superframe=True)
    _check(parsed, header_length, mss)
    headers = _Headers(bytearray(frame[:header_length]), parsed)
    payload = memoryview(frame)[header_length : header_length + parsed.payload_length]
    last = max(len(payload) - 1, 0) // mss
    return [headers.join(index, index * mss, payload[index * mss :][:mss], index == last) for index in range(last + 1)]


def _check(parsed: ParsedFrame, header_length: int, mss: int) -> None:
    if not parsed.is_tcp:
        raise SegmentError("only a whole TCP segment over IPv4 or IPv6 can be segmented")
    if header_length != parsed.payload_offset:
        raise SegmentError(f"the headers have {parsed.payload_offset} bytes, the sender says {header_length}")
    if mss < 1:
        raise SegmentError(f"an MSS is positive, got {mss}")
    payload_bytes = parsed.payload_length
    ip_bytes = parsed.l3_length + parsed.l4_length + min(mss, payload_bytes)
    if ip_bytes - (_IPV6_BYTES if parsed.version == 6 else 0) > _MAX_IP_LENGTH:
        raise SegmentError(f"segments of {mss} bytes do not fit an IP packet")
    if payload_bytes > mss * MAX_SEGMENTS:
        raise SegmentError(f"{payload_bytes} bytes by an MSS of {mss} are more than {MAX_SEGMENTS} segments")


class _Headers:
    """The headers of a superframe, from which those of each segment are made.

    Sums of what all segments share are taken once, with the fields that differ at 0. Each segment's checksums then
    need its own fields and payload alone.
    """

    def __init__(self, headers: bytearray, parsed: ParsedFrame) -> None:
        self._headers = headers
        self._parsed = parsed
        self._ip = parsed.l2_length
        self._tcp = parsed.l4_offset
        self._flags = headers[self._tcp + 13]
        self._first_sequence: int = _U32.unpack_from(headers, self._tcp + 4)[0]

        _U32.pack_into(headers, self._tcp + 4, 0)
        headers[self._tcp + 13] = 0
        _U16.pack_into(headers, self._tcp + 16, 0)
        pseudo = pseudo_header_sum(parsed.src, parsed.dst, PROTOCOL_TCP, 0)
        self._tcp_sum = ones_sum(headers[self._tcp :], pseudo)
        if parsed.version == 4:
            self._first_id: int = _U16.unpack_from(headers, self._ip + 4)[0]
            _LENGTH_AND_ID.pack_into(headers, self._ip + 2, 0, 0)
            _U16.pack_into(headers, self._ip + 10, 0)
            self._ip_sum = ones_sum(headers[self._ip : self._tcp])

    def join(self, index: int, offset: int, payload: memoryview, last: bool) -> bytes:
        """Return the frame of segment ``index``, whose payload starts at ``offset`` of the superframe's."""
        headers, tcp = self._headers, self._tcp
        l4_bytes = self._parsed.l4_length + len(payload)
        self._write_ip(index, self._parsed.l3_length + l4_bytes)

        sequence = (self._first_sequence + offset) % _SEQUENCE_MODULUS
        flags = self._flags
        if index > 0:
            flags &= ~_CWR
        if not last:
            flags &= ~(_FIN | _PSH)
        _U32.pack_into(headers, tcp + 4, sequence)
        headers[tcp + 13] = flags  # the low byte of its 16-bit word
        tcp_sum = ones_sum(payload, self._tcp_sum + l4_bytes + sequence + flags)
        _U16.pack_into(headers, tcp + 16, MAX_SUM ^ tcp_sum)
        return b"".join((headers, payload))

    def _write_ip(self, index: int, ip_bytes: int) -> None:
        headers, ip = self._headers, self._ip
        if self._parsed.version == 6:
            _U16.pack_into(headers, ip + 4, ip_bytes - _IPV6_BYTES)
            return
        identification = (self._first_id + index) & 0xFFFF
        _LENGTH_AND_ID.pack_into(headers, ip + 2, ip_bytes, identification)
        header_sum = ones_sum(b"", self._ip_sum + ip_bytes + identification)
        _U16.pack_into(headers, ip + 10, MAX_SUM ^ header_sum)
