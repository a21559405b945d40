"""What the device says of itself: the device descriptor and its options. All big-endian.

Layout: struct gve_device_descriptor and struct gve_device_option_*, gve_adminq.h; what the driver makes of them:
gve_adminq.c, gve_enable_supported_features.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from devmem_tcp.lab.gvnic.flow_rules import MAX_FLOW_RULES
from devmem_tcp.lab.gvnic.steering import RSS_KEY_BYTES, RSS_TABLE_SIZE

RING_ENTRIES: Final = 1024
MAX_RING_ENTRIES: Final = 4096
MIN_RING_ENTRIES: Final = 256
BUFFER_BYTES: Final = 4096  # with less the driver would split to half pages (gve_get_pkt_buf_size)
HEADER_BUFFER_BYTES: Final = 256  # not 0: header split can be turned on (gve_header_split_supported)

_DESCRIPTOR: Final = Struct("!Q2xHHHHHHH6sHH6x")
_OPTION: Final = Struct("!HHI")  # id, bytes that follow, required features: none

_MODIFY_RING: Final = 1 << 0  # enum gve_sup_feature_mask
_JUMBO_FRAMES: Final = 1 << 2
_BUFFER_SIZES: Final = 1 << 4
_FLOW_STEERING: Final = 1 << 5
_RSS_CONFIG: Final = 1 << 7
_ALL: Final = _MODIFY_RING | _JUMBO_FRAMES | _BUFFER_SIZES | _FLOW_STEERING | _RSS_CONFIG


def describe(mac: bytes, queues: int, mtu: int) -> bytes:
    """Return the descriptor and its options.

    Args:
        mac: 6 bytes.
        queues: how many TX queues, and how many RX queues, the driver should make.
        mtu: the largest, in bytes; the driver starts with it.
    """
    options = b"".join(
        _OPTION.pack(number, len(body), 0) + body
        for number, body in (
            (0x4, Struct("!II").pack(_ALL, 0)),  # DQO_RDA
            (0x6, _pack_ring_sizes()),  # MODIFY_RING
            (0x8, Struct("!IH2x").pack(_JUMBO_FRAMES, mtu)),  # JUMBO_FRAMES
            (0xA, Struct("!IHH").pack(_BUFFER_SIZES, BUFFER_BYTES, HEADER_BUFFER_BYTES)),  # BUFFER_SIZES
            (0xB, Struct("!III").pack(_FLOW_STEERING, 0, MAX_FLOW_RULES)),  # FLOW_STEERING
            (0xE, Struct("!IHH").pack(_RSS_CONFIG, RSS_KEY_BYTES, RSS_TABLE_SIZE)),  # RSS_CONFIG
        )
    )
    total = _DESCRIPTOR.size + len(options)
    counters = 2 * queues  # one a queue; the driver allocates them though DQO uses none
    descriptor = _DESCRIPTOR.pack(0, RING_ENTRIES, RING_ENTRIES, queues, mtu, counters, 0, 0, mac, 6, total)
    return descriptor + options


def _pack_ring_sizes() -> bytes:
    sizes = (MAX_RING_ENTRIES, MAX_RING_ENTRIES, MIN_RING_ENTRIES, MIN_RING_ENTRIES)
    return Struct("!IHHHH").pack(_MODIFY_RING, *sizes)
