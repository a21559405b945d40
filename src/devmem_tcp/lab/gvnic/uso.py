"""UDP segmentation offload: one large datagram in, datagrams of at most ``size`` bytes of payload out."""

from __future__ import annotations

from struct import Struct
from typing import Final

from devmem_tcp.lab.checksum import fill_ip_checksum, fill_l4_checksum
from devmem_tcp.lab.frames import ParsedFrame

_U16: Final = Struct("!H")
_LENGTH_AND_ID: Final = Struct("!HH")
_IPV6_BYTES: Final = 40  # not counted by its payload length


def udp_segments(frame: bytearray, parsed: ParsedFrame, size: int) -> list[bytearray]:
    """Cut a UDP packet into datagrams with right lengths, checksums and, over IPv4, ids that count up.

    The socket option UDP_SEGMENT leads here (SKB_GSO_UDP_L4, gve_tx_dqo.c, gve_prep_tso).

    Args:
        frame: an Ethernet frame.
        parsed: what ``parse`` said of it: UDP.
        size: payload bytes of every datagram but the last, positive.
    """
    headers = memoryview(frame)[: parsed.payload_offset]
    payload = memoryview(frame)[parsed.payload_offset : parsed.payload_offset + parsed.payload_length]
    datagrams = []
    for number, start in enumerate(range(0, len(payload), size)):
        datagram = bytearray().join((headers, payload[start : start + size]))
        l4_bytes = len(datagram) - parsed.l4_offset
        _U16.pack_into(datagram, parsed.l4_offset + 4, l4_bytes)
        if parsed.version == 4:
            (first_id,) = _U16.unpack_from(datagram, parsed.l2_length + 4)
            ids = (parsed.l3_length + l4_bytes, (first_id + number) & 0xFFFF)
            _LENGTH_AND_ID.pack_into(datagram, parsed.l2_length + 2, *ids)
        else:
            _U16.pack_into(datagram, parsed.l2_length + 4, parsed.l3_length - _IPV6_BYTES + l4_bytes)
        fill_ip_checksum(datagram)
        fill_l4_checksum(datagram)
        datagrams.append(datagram)
    return datagrams
