"""Internet checksums (RFC 1071): sums, and those of IP, TCP, UDP and ICMP headers, verified and filled in place.

Since 65536 is 1 modulo 65535, the ones' complement sum of 16-bit words is the remainder of the data read as one large
number, or as numbers of 32 bits added up. A remainder of 0 stands for two sums, 0 and 0xffff: the sum is 0 only where
every byte is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt

from devmem_tcp.lab.frames import (
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    FrameBytes,
    ParsedFrame,
    parse,
)

MAX_SUM: Final = 0xFFFF

_U16: Final = Struct("!H")
_LITTLE_U32: Final = np.dtype("<u4")
_NUMPY_PAYS_FROM_BYTES: Final = 768  # below, the call itself costs more than one large number

_IPV4_CHECKSUM_OFFSET: Final = 10
_PLAIN_IP_BYTES: Final = {4: 20, 6: 40}  # headers that end with the addresses
_L4_CHECKSUM_OFFSETS: Final = {PROTOCOL_TCP: 16, PROTOCOL_UDP: 6, PROTOCOL_ICMP: 2, PROTOCOL_ICMPV6: 2}


def ones_sum(data: FrameBytes, start: int = 0) -> int:
    """Return the ones' complement sum of big-endian 16-bit words, 0 to 0xffff; odd data is padded with a zero byte.

    Sums chain: ``ones_sum(b, ones_sum(a))`` is the sum of ``a + b`` where ``a`` has an even length.

    Args:
        data: the bytes to add.
        start: any sum of what comes before, folded or not, not negative.
    """
    size = len(data)
    if size < _NUMPY_PAYS_FROM_BYTES:
        total = int.from_bytes(data, "big") << (8 if size & 1 else 0)
    else:
        total = _large_sum(data, size)
    return _fold(total + start)


def _fold(total: int) -> int:
    return total % MAX_SUM or (MAX_SUM if total else 0)


def _large_sum(data: FrameBytes, size: int) -> int:
    """Return the sum, not folded, at the speed of NumPy: of little-endian words, then turned round.

    The sum of words with swapped bytes is the sum with swapped bytes (RFC 1071 section 2B), and to swap the bytes of a
    16-bit number is to multiply it by 256, modulo 65535.
    """
    words, rest = divmod(size, _LITTLE_U32.itemsize)
    swapped = int(np.add.reduce(np.frombuffer(data, _LITTLE_U32, words)))  # NumPy adds them up in 64 bits
    if rest:
        swapped += int.from_bytes(data[size - rest :], "little")
    return swapped << 8


def piece_sums(data: FrameBytes, size: int) -> npt.NDArray[np.int64]:
    """Return the sums, not folded, of pieces of ``size`` bytes each; the last takes what is left. Shape (pieces,).

    Args:
        data: the bytes to cut up.
        size: positive. Pieces of a multiple of 4 bytes are summed at the speed of NumPy, others one by one.
    """
    if size % _LITTLE_U32.itemsize:
        return np.array([ones_sum(data[at : at + size]) for at in range(0, len(data), size)], np.int64)
    whole, words = len(data) // size, size // _LITTLE_U32.itemsize
    pieces = np.frombuffer(data, _LITTLE_U32, whole * words).reshape(whole, words)
    sums = np.add.reduce(pieces, axis=1, dtype=np.int64) << 8  # as in _large_sum
    rest = data[whole * size :]
    return np.append(sums, ones_sum(rest)) if rest else sums


def checksum(data: FrameBytes, start: int = 0) -> int:
    """Return what the checksum field of ``data``, now holding 0, must hold: the complement of ``ones_sum``."""
    return MAX_SUM ^ ones_sum(data, start)


def pseudo_header_sum(src: bytes, dst: bytes, protocol: int, l4_bytes: int) -> int:
    """Return the sum, not folded, of the pseudo header that TCP, UDP and ICMPv6 checksums cover.

    Args:
        src, dst: packed IP addresses, both of 4 or both of 16 bytes.
        protocol: IP's number of the transport protocol.
        l4_bytes: its header and payload together.
    """
    return int.from_bytes(src, "big") + int.from_bytes(dst, "big") + protocol + l4_bytes


def verify_l4(frame: FrameBytes, parsed: ParsedFrame | None = None) -> bool:
    """Say whether the checksum of a TCP, UDP, ICMP or ICMPv6 packet is right.

    A UDP checksum of 0 means none: right over IPv4 (RFC 768), wrong over IPv6 (RFC 8200 section 8.1). False also where
    there is nothing to verify: IP fragments, and frames with no valid header of these (``parsed.l4_length`` is 0).

    Args:
        frame: an Ethernet frame.
        parsed: what ``parse`` said of it, if that is known.
    """
    parsed = parse(frame) if parsed is None else parsed
    if parsed.l4_length == 0:
        return False
    if parsed.protocol == PROTOCOL_UDP and not any(_checksum_field(frame, parsed)):
        return parsed.version == 4
    return _l4_sum(frame, parsed) == MAX_SUM


def fill_l4_checksum(frame: bytearray | memoryview, parsed: ParsedFrame | None = None) -> bool:
    """Write the right checksum into a TCP, UDP, ICMP or ICMPv6 packet, whatever is there now.

    Args:
        frame: an Ethernet frame, changed in place.
        parsed: what ``parse`` said of it, if that is known.

    Returns:
        False where there is none to write: IP fragments, and frames with no valid header of these.
    """
    return fill_l4_checksums((frame,), parse(frame) if parsed is None else parsed)


def fill_l4_checksums(frames: Sequence[bytearray | memoryview], parsed: ParsedFrame) -> bool:
    """As ``fill_l4_checksum`` of each frame, at less cost: all are frames of which ``parse`` says the same."""
    if parsed.l4_length == 0:
        return False
    at = parsed.l4_offset + _L4_CHECKSUM_OFFSETS[parsed.protocol]
    for frame in frames:
        _U16.pack_into(frame, at, 0)
    start, end, pseudo = _covered(parsed)
    covered = [memoryview(frame)[start:end] for frame in frames]
    sums = [ones_sum(covered[0])] if len(covered) == 1 else piece_sums(b"".join(covered), end - start).tolist()
    for frame, total in zip(frames, sums, strict=True):
        value = MAX_SUM ^ _fold(total + pseudo)
        if value == 0 and parsed.protocol == PROTOCOL_UDP:
            value = MAX_SUM  # 0 would mean "no checksum" (RFC 768); both count as 0 in a sum
        _U16.pack_into(frame, at, value)
    return True


def verify_ip(frame: FrameBytes, parsed: ParsedFrame | None = None) -> bool:
    """Say whether the IPv4 header checksum is right; True for IPv6, which has none, and False for anything else."""
    parsed = parse(frame) if parsed is None else parsed
    if parsed.version == 4:
        return ones_sum(frame[parsed.l2_length : parsed.l4_offset]) == MAX_SUM
    return parsed.version == 6


def fill_ip_checksum(frame: bytearray | memoryview, parsed: ParsedFrame | None = None) -> bool:
    """Write the right IPv4 header checksum, whatever is there now; returns False, having done nothing, if not IPv4."""
    parsed = parse(frame) if parsed is None else parsed
    if parsed.version != 4:
        return False
    at = parsed.l2_length + _IPV4_CHECKSUM_OFFSET
    _U16.pack_into(frame, at, 0)
    _U16.pack_into(frame, at, checksum(frame[parsed.l2_length : parsed.l4_offset]))
    return True


def _l4_sum(frame: FrameBytes, parsed: ParsedFrame) -> int:
    start, end, pseudo = _covered(parsed)
    return ones_sum(memoryview(frame)[start:end], pseudo)


def _covered(parsed: ParsedFrame) -> tuple[int, int, int]:
    """Return which bytes of a frame its transport checksum covers, from and to, and the sum of what else it does."""
    start, size = parsed.l4_offset, parsed.l4_bytes
    if parsed.protocol == PROTOCOL_ICMP:
        return start, start + size, 0
    if parsed.l3_length == _PLAIN_IP_BYTES[parsed.version]:  # the addresses lie just before: summed with the rest
        return start - 2 * len(parsed.src), start + size, parsed.protocol + size
    return start, start + size, pseudo_header_sum(parsed.src, parsed.dst, parsed.protocol, size)


def _checksum_field(frame: FrameBytes, parsed: ParsedFrame) -> FrameBytes:
    at = parsed.l4_offset + _L4_CHECKSUM_OFFSETS[parsed.protocol]
    return frame[at : at + 2]
