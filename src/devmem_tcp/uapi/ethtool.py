"""The ethtool ABI as data: the generic netlink family "ethtool", and the ioctl SIOCETHTOOL with its structs.

Sources: include/uapi/linux/ethtool_netlink_generated.h, ethtool.h and if.h. The structs are native-endian, but for
the fields of flow specs, which are in network order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from devmem_tcp.uapi.netlink import AttributeNames

# --- generic netlink -------------------------------------------------------------------------------------------------

FAMILY_NAME: Final = "ethtool"


class Command(IntEnum):
    """ETHTOOL_MSG_* that user space sends."""

    FEATURES_GET = 11
    FEATURES_SET = 12
    RINGS_GET = 15
    RINGS_SET = 16
    CHANNELS_GET = 17
    CHANNELS_SET = 18


class Header(IntEnum):
    """ETHTOOL_A_HEADER_*: inside attribute 1 of every request."""

    DEV_INDEX = 1
    DEV_NAME = 2
    FLAGS = 3


class Rings(IntEnum):
    """ETHTOOL_A_RINGS_*."""

    HEADER = 1
    RX_MAX = 2
    TX_MAX = 5
    RX = 6
    TX = 9
    TCP_DATA_SPLIT = 11
    HDS_THRESH = 17
    HDS_THRESH_MAX = 18


TCP_DATA_SPLIT_UNKNOWN: Final = 0  # when it is set: as the driver likes
TCP_DATA_SPLIT_DISABLED: Final = 1
TCP_DATA_SPLIT_ENABLED: Final = 2


class Channels(IntEnum):
    """ETHTOOL_A_CHANNELS_*."""

    HEADER = 1
    RX_MAX = 2
    TX_MAX = 3
    COMBINED_MAX = 5
    RX_COUNT = 6
    TX_COUNT = 7
    COMBINED_COUNT = 9


class Features(IntEnum):
    """ETHTOOL_A_FEATURES_*."""

    HEADER = 1
    HW = 2
    WANTED = 3
    ACTIVE = 4
    NOCHANGE = 5


class Bitset(IntEnum):
    """ETHTOOL_A_BITSET_*."""

    NOMASK = 1
    SIZE = 2
    BITS = 3


BITSET_BITS_BIT: Final = 1


class BitsetBit(IntEnum):
    """ETHTOOL_A_BITSET_BIT_*."""

    INDEX = 1
    NAME = 2
    VALUE = 3


def _names(attributes: type[IntEnum]) -> AttributeNames:
    """Return an attribute set's names in the words of Documentation/netlink/specs/ethtool.yaml."""
    header = AttributeNames({one: one.name.lower().replace("_", "-") for one in Header})
    return AttributeNames({one: one.name.lower().replace("_", "-") for one in attributes}, {1: header})


RINGS_NAMES: Final = _names(Rings)
CHANNELS_NAMES: Final = _names(Channels)
FEATURES_NAMES: Final = _names(Features)

# --- ioctl -----------------------------------------------------------------------------------------------------------

SIOCETHTOOL: Final = 0x8946
SIOCGIFHWADDR: Final = 0x8927

IFNAMSIZ: Final = 16
IFREQ_SIZE: Final = 40

ETHTOOL_GDRVINFO: Final = 0x03
ETHTOOL_GPERMADDR: Final = 0x20
ETHTOOL_GRXRINGS: Final = 0x2D
ETHTOOL_GRXCLSRLCNT: Final = 0x2E
ETHTOOL_GRXCLSRULE: Final = 0x2F
ETHTOOL_GRXCLSRLALL: Final = 0x30
ETHTOOL_SRXCLSRLDEL: Final = 0x31
ETHTOOL_SRXCLSRLINS: Final = 0x32
ETHTOOL_GRSSH: Final = 0x46
ETHTOOL_SRSSH: Final = 0x47

TCP_V4_FLOW: Final = 0x01
TCP_V6_FLOW: Final = 0x05
FLOW_EXT: Final = 0x80000000
FLOW_MAC_EXT: Final = 0x40000000
FLOW_RSS: Final = 0x20000000
FLOW_FLAGS: Final = FLOW_EXT | FLOW_MAC_EXT | FLOW_RSS

FLOW_NAMES: Final = {
    0x01: "tcp4",
    0x02: "udp4",
    0x03: "sctp4",
    0x05: "tcp6",
    0x06: "udp6",
    0x07: "sctp6",
    0x09: "ah4",
    0x0A: "esp4",
    0x0B: "ah6",
    0x0C: "esp6",
    0x0D: "ip4",
    0x0E: "ip6",
    0x12: "ether",
}
"""Flow types in ethtool's words."""

RX_CLS_LOC_SPECIAL: Final = 0x80000000
RX_CLS_LOC_ANY: Final = 0xFFFFFFFF
RX_CLS_FLOW_WAKE: Final = 0xFFFFFFFFFFFFFFFE
RX_CLS_FLOW_DISC: Final = 0xFFFFFFFFFFFFFFFF

ETH_RXFH_INDIR_NO_CHANGE: Final = 0xFFFFFFFF

DRVINFO: Final = struct.Struct("=I32s32s32s32s32s12x5I")
"""struct ethtool_drvinfo, 196 bytes: cmd, driver, version, fw_version, bus_info, erom_version, five counts."""

PERM_ADDR: Final = struct.Struct("=II")
"""struct ethtool_perm_addr without its data, 8 bytes: cmd, size."""

RXFH: Final = struct.Struct("=IIIIBB2x4x")
"""struct ethtool_rxfh without rss_config, 24 bytes: cmd, rss_context, indir_size, key_size, hfunc, input_xfrm."""

FLOW_SPEC: Final = struct.Struct("=I52s20s52s20s4xQI4x")
"""struct ethtool_rx_flow_spec, 168 bytes: flow_type, h_u, h_ext, m_u, m_ext, ring_cookie, location."""

TCPIP4_SPEC: Final = struct.Struct("!4s4sHHB3x")
"""struct ethtool_tcpip4_spec, 16 bytes, in network order: ip4src, ip4dst, psrc, pdst, tos."""

TCPIP6_SPEC: Final = struct.Struct("!16s16sHHB3x")
"""struct ethtool_tcpip6_spec, 40 bytes, in network order: ip6src, ip6dst, psrc, pdst, tclass."""

RXNFC_HEAD: Final = struct.Struct("=IIQ")
"""struct ethtool_rxnfc up to its flow spec, 16 bytes: cmd, flow_type, data."""

RXNFC_SIZE: Final = 192
RULE_CNT_OFFSET: Final = RXNFC_HEAD.size + FLOW_SPEC.size  # 184
RULE_LOCS_OFFSET: Final = RULE_CNT_OFFSET + 4

_U32: Final = struct.Struct("=I")
_LOCATION_OFFSET: Final = 160
_HARDWARE_ADDRESS_OFFSET: Final = IFNAMSIZ + 2  # behind sa_family


class Rxnfc(NamedTuple):
    """struct ethtool_rxnfc as the kernel answers it."""

    data: int
    spec: bytes
    rule_cnt: int
    locations: tuple[int, ...]


def pack_ifreq(name: str, pointer: int = 0) -> bytearray:
    """Pack struct ifreq with an interface's name and, for SIOCETHTOOL, the address of the argument.

    Raises:
        ValueError: the name is empty or longer than the kernel allows.
    """
    encoded = name.encode()
    if not 0 < len(encoded) < IFNAMSIZ:
        raise ValueError(f"an interface name has 1 to {IFNAMSIZ - 1} bytes, got {name!r}")
    return bytearray(struct.pack(f"={IFNAMSIZ}sQ{IFREQ_SIZE - IFNAMSIZ - 8}x", encoded, pointer))


def unpack_hardware_address(ifreq: bytes | bytearray) -> bytes:
    """Return the six bytes that SIOCGIFHWADDR answers."""
    return bytes(ifreq[_HARDWARE_ADDRESS_OFFSET : _HARDWARE_ADDRESS_OFFSET + 6])


def pack_rxnfc(command: int, *, spec: bytes = b"", location: int | None = None, rule_cnt: int = 0) -> bytearray:
    """Pack struct ethtool_rxnfc, with room for ``rule_cnt`` locations.

    Args:
        spec: struct ethtool_rx_flow_spec, or nothing.
        location: put into the spec.

    Raises:
        ValueError: a number does not fit its field, or the spec is not of its size.
    """
    if len(spec) not in (0, FLOW_SPEC.size):
        raise ValueError(f"struct ethtool_rx_flow_spec has {FLOW_SPEC.size} bytes, not {len(spec)}")
    request = bytearray(max(RXNFC_SIZE, RULE_LOCS_OFFSET + 4 * rule_cnt))
    try:
        RXNFC_HEAD.pack_into(request, 0, command, 0, 0)
        request[RXNFC_HEAD.size : RXNFC_HEAD.size + len(spec)] = spec
        _U32.pack_into(request, RULE_CNT_OFFSET, rule_cnt)
        if location is not None:
            _U32.pack_into(request, RXNFC_HEAD.size + _LOCATION_OFFSET, location)
    except struct.error as error:
        raise ValueError(f"struct ethtool_rxnfc: {error}") from None
    return request


def unpack_rxnfc(answer: bytes | bytearray) -> Rxnfc:
    """Unpack struct ethtool_rxnfc as the kernel left it; ``locations`` are as many as it counts and there is room for.

    Raises:
        ValueError: shorter than the struct.
    """
    if len(answer) < RXNFC_SIZE:
        raise ValueError(f"struct ethtool_rxnfc has {RXNFC_SIZE} bytes, not {len(answer)}")
    _, _, data = RXNFC_HEAD.unpack_from(answer)
    spec = bytes(answer[RXNFC_HEAD.size : RULE_CNT_OFFSET])
    (count,) = _U32.unpack_from(answer, RULE_CNT_OFFSET)
    room = min(count, (len(answer) - RULE_LOCS_OFFSET) // 4)
    return Rxnfc(data, spec, count, struct.unpack_from(f"={room}I", answer, RULE_LOCS_OFFSET))


def with_location(spec: bytes, location: int) -> bytes:
    """Return a flow spec at another location."""
    return spec[:_LOCATION_OFFSET] + _U32.pack(location) + spec[_LOCATION_OFFSET + _U32.size :]


def pack_rxfh(
    command: int,
    *,
    indir: Sequence[int] = (),
    indir_size: int | None = None,
    key: bytes = b"",
    input_xfrm: int = 0,
    context: int = 0,
) -> bytearray:
    """Pack struct ethtool_rxfh with an indirection table and a hash key; the hash function is left as it is.

    Args:
        indir: a queue for each hash bucket.
        indir_size: if not the number of ``indir``: 0 asks for the default table, ETH_RXFH_INDIR_NO_CHANGE for none.
        key: the hash key, or nothing.
        input_xfrm: as the kernel answers it: 0 would turn a symmetric hash off.
        context: RSS context, 0 the NIC's own.

    Raises:
        ValueError: a number does not fit its field.
    """
    size = len(indir) if indir_size is None else indir_size
    try:
        head = RXFH.pack(command, context, size, len(key), 0, input_xfrm)
        return bytearray(head + struct.pack(f"={len(indir)}I", *indir) + key)
    except struct.error as error:
        raise ValueError(f"struct ethtool_rxfh: {error}") from None


def pack_rxfh_query(indir_size: int = 0, key_size: int = 0, *, context: int = 0) -> bytearray:
    """Pack ETHTOOL_GRSSH with room for a table and a key; with none, the kernel answers just their sizes."""
    head = RXFH.pack(ETHTOOL_GRSSH, context, indir_size, key_size, 0, 0)
    return bytearray(head + bytes(4 * indir_size + key_size))


class Rxfh(NamedTuple):
    """struct ethtool_rxfh as the kernel answers it; ``indir`` and ``key`` are empty where there was no room."""

    indir_size: int
    key_size: int
    hfunc: int
    input_xfrm: int
    indir: tuple[int, ...]
    key: bytes


def unpack_rxfh(answer: bytes | bytearray) -> Rxfh:
    """Unpack an answer to ETHTOOL_GRSSH.

    Raises:
        ValueError: it is shorter than the sizes in it say, and yet holds more than them.
    """
    _, _, indir_size, key_size, hfunc, input_xfrm = RXFH.unpack_from(answer)
    if len(answer) == RXFH.size:
        return Rxfh(indir_size, key_size, hfunc, input_xfrm, (), b"")
    end = RXFH.size + 4 * indir_size
    if len(answer) < end + key_size:
        raise ValueError(f"struct ethtool_rxfh for {indir_size} entries and {key_size} bytes of key is longer")
    indir = struct.unpack_from(f"={indir_size}I", answer, RXFH.size)
    return Rxfh(indir_size, key_size, hfunc, input_xfrm, indir, bytes(answer[end : end + key_size]))
