"""DQO descriptors and completions of the gVNIC, bit for bit: the one place that knows them. All little-endian.

Layout: drivers/net/ethernet/google/gve/gve_desc_dqo.h.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from functools import cache
from struct import Struct
from typing import Final

# --- transmit: struct gve_tx_pkt_desc_dqo; the context descriptors share its size and the place of the type ---

TX_DESCRIPTOR: Final = Struct("<QB3xHH")  # buffer address, type and flags, completion tag, size
TX_TYPE_MASK: Final = 0x1F
TX_END_OF_PACKET: Final = 1 << 5
TX_CHECKSUM: Final = 1 << 6
TX_REPORT_EVENT: Final = 1 << 7
TX_SIZE_MASK: Final = 0x3FFF


class TxType(IntEnum):
    """Type of a TX descriptor."""

    GENERAL_CONTEXT = 0x4
    TSO_CONTEXT = 0x5
    PACKET = 0xC


# struct gve_tx_tso_context_desc_dqo, within the first 8 bytes, which in a packet descriptor are the address.
TSO_TOTAL_MASK: Final = 0xFFFFFF
TSO_MSS_SHIFT: Final = 32
TSO_MSS_MASK: Final = 0x3FFF
TSO_HEADER_SHIFT: Final = 48
TSO_HEADER_MASK: Final = 0xFF

TX_MAX_PACKET_BYTES: Final = 0x3FFFF  # "the total length of the TSO to be <= 262143", gve_prep_tso
TX_MAX_PLAIN_BYTES: Final = 9728  # "the size of a non-TSO packet be within [17, 9728]", gve_tx_add_skb_no_copy_dqo
TX_MIN_PLAIN_BYTES: Final = 17
TX_MIN_MSS: Final = 88  # GVE_TX_MIN_TSO_MSS_DQO
TX_MAX_MSS: Final = 9728

# --- transmit completion: struct gve_tx_compl_desc ---

TX_COMPLETION: Final = Struct("<HH4x")  # queue id, type and generation; tag or ring head
TX_GENERATION_FIELD: Final = 0  # of TX_COMPLETION
TX_GENERATION_OFFSET: Final = 0  # in bytes
TX_COMPLETION_TYPE_SHIFT: Final = 11
TX_GENERATION: Final = 1 << 15
TX_COMPLETION_PACKET: Final = 0x2 << TX_COMPLETION_TYPE_SHIFT
TX_COMPLETION_DESCRIPTOR: Final = 0x4 << TX_COMPLETION_TYPE_SHIFT
MAX_QUEUE_ID: Final = (1 << 11) - 1

# --- receive: struct gve_rx_desc_dqo ---

RX_DESCRIPTOR: Final = Struct("<H6xQQ8x")  # buffer id, buffer address, header buffer address

# --- receive completion: struct gve_rx_compl_desc_dqo ---

RX_COMPLETION: Final = Struct("<BBHHHB3xHHI12x")
"""Kind, error bits, packet type, length with generation, header length with RSC and split bits, status bits, buffer id,
segment length of a superframe, hash."""

RX_COMPLETION_KIND: Final = 1
RX_GENERATION_FIELD: Final = 3  # of RX_COMPLETION
RX_GENERATION_OFFSET: Final = 4  # in bytes
RX_MAX_LENGTH: Final = (1 << 14) - 1
RX_GENERATION: Final = 1 << 14
RX_MAX_HEADER: Final = (1 << 10) - 1
RX_RSC: Final = 1 << 10
RX_SPLIT: Final = 1 << 11


class RxError(IntFlag):
    """Error bits of an RX completion."""

    NONE = 0
    IPV6_EXTENSION = 1 << 1  # the driver then trusts no checksum (gve_rx_skb_csum)
    RX_ERROR = 1 << 2  # the driver then drops the packet (gve_rx_dqo)


class RxStatus(IntFlag):
    """Status bits of an RX completion."""

    DONE = 1 << 0
    END_OF_PACKET = 1 << 1
    HEADER_OVERFLOW = 1 << 2
    L3_L4_PROCESSED = 1 << 3
    IP_CHECKSUM_ERROR = 1 << 4
    L4_CHECKSUM_ERROR = 1 << 5


# --- packet types: the device's own numbers, told to the driver by the packet type map ---


class L3(IntEnum):
    """enum gve_l3_type, gve_adminq.h."""

    UNKNOWN = 0
    OTHER = 1
    IPV4 = 2
    IPV6 = 3


class L4(IntEnum):
    """enum gve_l4_type, gve_adminq.h."""

    UNKNOWN = 0
    OTHER = 1
    TCP = 2
    UDP = 3
    ICMP = 4
    SCTP = 5


PACKET_TYPES: Final = 1024
_L4_BITS: Final = 3


def packet_type(l3: L3, l4: L4) -> int:
    """Return the number under which packets of these protocols are reported."""
    return l3 << _L4_BITS | l4


@cache
def packet_type_map() -> bytes:
    """Return the map that tells the driver what each packet type is: a byte of L3 and one of L4 for each of 1024."""
    table = bytearray(2 * PACKET_TYPES)
    for l3 in L3:
        for l4 in L4:
            place = 2 * packet_type(l3, l4)
            table[place : place + 2] = bytes((l3, l4))
    return bytes(table)
