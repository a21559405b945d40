"""TCP segmentation as a NIC does it (TSO): one superframe in, frames of at most one MSS of payload out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.checksum import MAX_SUM, ones_sum, piece_sums, pseudo_header_sum
from devmem_tcp.lab.frames import PROTOCOL_TCP, FrameBytes, ParsedFrame, parse

MAX_SEGMENTS: Final = 4096
"""What one superframe may become. 256 KiB by the smallest MSS that IPv4 hosts use, 88, is fewer."""

_MAX_IP_LENGTH: Final = 0xFFFF
_IPV6_BYTES: Final = 40  # not counted by its payload length

_FIN: Final = 0x01
_PSH: Final = 0x08
_CWR: Final = 0x80


class SegmentError(DevmemError):
    """A frame cannot be segmented as asked: not TCP, headers of another length, an MSS out of range."""


def segment(frame: FrameBytes, header_length: int, mss: int, *, ids: int = 1) -> list[bytes]:
    """Cut a TCP superframe into the frames that go on the wire; lengths, numbers, flags and checksums are made right.

    What each frame has of its own: IPv4's id counts up; TCP's sequence number goes on by the payload before it; FIN
    and PSH are left on the last frame alone, CWR on the first alone (RFC 3168 section 6.1.2). The IP lengths and the
    checksums of the superframe need not be right. A payload that fits one MSS gives one frame.

    Args:
        frame: an Ethernet frame of TCP over IPv4 or IPv6, up to any length.
        header_length: bytes of all its headers, Ethernet's to TCP's, as the sender states them.
        mss: payload bytes of every frame but the last.
        ids: how far IPv4's id goes on from frame to frame: more than 1 where each is a smaller superframe itself.

    Raises:
        SegmentError: the frame is not whole, valid TCP; its headers are not ``header_length`` long; ``mss`` is not
            positive, gives frames too long for IP, or more than MAX_SEGMENTS of them.
    """
    parsed = parse(frame, superframe=True)
    _check(parsed, header_length, mss)
    payload = memoryview(frame)[header_length : header_length + parsed.payload_length]
    headers = _headers(bytes(frame[:header_length]), parsed, payload, mss, ids)
    return [b"".join((header, payload[index * mss : (index + 1) * mss])) for index, header in enumerate(headers)]


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


@lru_cache(maxsize=64)
def _own_fields(version: int, ip: int, tcp: int, header_length: int) -> np.dtype[Any]:
    """Return the layout of headers as far as each segment has its own; IP's start at ``ip``, TCP's at ``tcp``."""
    fields = {"sequence": (">u4", tcp + 4), "flags": ("u1", tcp + 13), "tcp_checksum": (">u2", tcp + 16)}
    if version == 4:
        fields |= {"ip_length": (">u2", ip + 2), "id": (">u2", ip + 4), "ip_checksum": (">u2", ip + 10)}
    else:
        fields |= {"ip_length": (">u2", ip + 4)}
    formats, offsets = zip(*fields.values(), strict=True)
    return np.dtype({"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": header_length})


def _headers(header: bytes, parsed: ParsedFrame, payload: memoryview, mss: int, ids: int) -> list[bytes]:
    """Return the headers of every segment, made of the superframe's.

    What all segments share is summed once, with the fields that differ at 0. Each one's checksums then need its own
    fields and payload alone.
    """
    ip, tcp = parsed.l2_length, parsed.l4_offset
    own = _own_fields(parsed.version, ip, tcp, len(header))
    shared = bytearray(header)
    first = np.frombuffer(header, own)[0]
    blank = np.frombuffer(shared, own)
    for name in own.fields or ():
        blank[name] = 0

    payload_sums = piece_sums(payload, mss) if payload else np.zeros(1, np.int64)
    index = np.arange(len(payload_sums))
    l4_bytes = parsed.l4_length + np.minimum(mss, len(payload) - index * mss)
    sequence = int(first["sequence"]) + index * mss & 0xFFFFFFFF
    flags = np.full(len(index), int(first["flags"]))
    flags[1:] &= ~_CWR
    flags[:-1] &= ~(_FIN | _PSH)

    rows = np.frombuffer(shared * len(index), own)
    rows["sequence"] = sequence
    rows["flags"] = flags
    tcp_sum = ones_sum(shared[tcp:], pseudo_header_sum(parsed.src, parsed.dst, PROTOCOL_TCP, 0))
    rows["tcp_checksum"] = _checksums(tcp_sum + l4_bytes + sequence + flags + payload_sums)
    if parsed.version == 4:
        ip_bytes = parsed.l3_length + l4_bytes
        identification = int(first["id"]) + index * ids & 0xFFFF
        rows["ip_length"] = ip_bytes
        rows["id"] = identification
        rows["ip_checksum"] = _checksums(ones_sum(shared[ip:tcp]) + ip_bytes + identification)
    else:
        rows["ip_length"] = parsed.l3_length + l4_bytes - _IPV6_BYTES
    made = rows.tobytes()
    return [made[at : at + len(header)] for at in range(0, len(made), len(header))]


def _checksums(sums: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return what checksum fields must hold, from sums not folded; none of these is 0, since a length is in it."""
    return MAX_SUM - 1 - (sums - 1) % MAX_SUM
