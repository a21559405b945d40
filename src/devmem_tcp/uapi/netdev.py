"""The generic netlink family ``netdev``: its commands and attributes, as data.

Source: Documentation/netlink/specs/netdev.yaml and include/uapi/linux/netdev.h. Names are the specification's, in
capitals; a kernel that is older than a command or an attribute refuses it.
"""

from __future__ import annotations

from enum import IntEnum
from types import MappingProxyType
from typing import Final

from devmem_tcp.uapi.netlink import AttributeNames

FAMILY: Final = "netdev"


class Command(IntEnum):
    """What may be asked. QSTATS_GET is only a dump; BIND_RX and what follows are only requests."""

    DEV_GET = 1
    PAGE_POOL_GET = 5
    PAGE_POOL_STATS_GET = 9
    QUEUE_GET = 10
    NAPI_GET = 11
    QSTATS_GET = 12
    BIND_RX = 13
    NAPI_SET = 14
    BIND_TX = 15
    QUEUE_CREATE = 16


class QueueType(IntEnum):
    """The direction of a queue; each has numbers of its own, from 0."""

    RX = 0
    TX = 1


QSTATS_SCOPE_QUEUE: Final = 1  # statistics of each queue; without it, of the whole device


class Dev(IntEnum):
    """Attributes of a device."""

    IFINDEX = 1
    XDP_FEATURES = 3
    XDP_ZC_MAX_SEGS = 4
    XDP_RX_METADATA_FEATURES = 5
    XSK_FEATURES = 6


class PagePool(IntEnum):
    """Attributes of a page pool."""

    ID = 1
    IFINDEX = 2
    NAPI_ID = 3
    INFLIGHT = 4
    INFLIGHT_MEM = 5
    DETACH_TIME = 6
    DMABUF = 7
    IO_URING = 8


class PagePoolStats(IntEnum):
    """Attributes of a page pool's statistics; INFO holds its ID and IFINDEX."""

    INFO = 1
    ALLOC_FAST = 8
    ALLOC_SLOW = 9
    ALLOC_SLOW_HIGH_ORDER = 10
    ALLOC_EMPTY = 11
    ALLOC_REFILL = 12
    ALLOC_WAIVE = 13
    RECYCLE_CACHED = 14
    RECYCLE_CACHE_FULL = 15
    RECYCLE_RING = 16
    RECYCLE_RING_FULL = 17
    RECYCLE_RELEASED_REFCNT = 18


class Napi(IntEnum):
    """Attributes of a NAPI instance."""

    IFINDEX = 1
    ID = 2
    IRQ = 3
    PID = 4
    DEFER_HARD_IRQS = 5
    GRO_FLUSH_TIMEOUT = 6
    IRQ_SUSPEND_TIMEOUT = 7
    THREADED = 8


class Queue(IntEnum):
    """Attributes of a queue; DMABUF, IO_URING and XSK say what feeds it."""

    ID = 1
    IFINDEX = 2
    TYPE = 3
    NAPI_ID = 4
    DMABUF = 5
    IO_URING = 6
    XSK = 7
    LEASE = 8


class Qstats(IntEnum):
    """Attributes of statistics; from 8 on they are counters."""

    IFINDEX = 1
    QUEUE_TYPE = 2
    QUEUE_ID = 3
    SCOPE = 4
    RX_PACKETS = 8
    RX_BYTES = 9
    TX_PACKETS = 10
    TX_BYTES = 11
    RX_ALLOC_FAIL = 12
    RX_HW_DROPS = 13
    RX_HW_DROP_OVERRUNS = 14
    RX_CSUM_COMPLETE = 15
    RX_CSUM_UNNECESSARY = 16
    RX_CSUM_NONE = 17
    RX_CSUM_BAD = 18
    RX_HW_GRO_PACKETS = 19
    RX_HW_GRO_BYTES = 20
    RX_HW_GRO_WIRE_PACKETS = 21
    RX_HW_GRO_WIRE_BYTES = 22
    RX_HW_DROP_RATELIMITS = 23
    TX_HW_DROPS = 24
    TX_HW_DROP_ERRORS = 25
    TX_CSUM_NONE = 26
    TX_NEEDS_CSUM = 27
    TX_HW_GSO_PACKETS = 28
    TX_HW_GSO_BYTES = 29
    TX_HW_GSO_WIRE_PACKETS = 30
    TX_HW_GSO_WIRE_BYTES = 31
    TX_HW_DROP_RATELIMITS = 32
    TX_STOP = 33
    TX_WAKE = 34


FIRST_COUNTER: Final = Qstats.RX_PACKETS


class Lease(IntEnum):
    """Attributes of a lease: which queue of which device, in which network namespace."""

    IFINDEX = 1
    QUEUE = 2
    NETNS_ID = 3


class Dmabuf(IntEnum):
    """Attributes of a binding; QUEUES is there once for each queue, and holds its ``Queue.ID`` and ``TYPE``."""

    IFINDEX = 1
    QUEUES = 2
    FD = 3
    ID = 4
    RX_PAGE_SIZE = 5


DEV_NAMES: Final = AttributeNames.of(Dev)
PAGE_POOL_NAMES: Final = AttributeNames.of(PagePool)
PAGE_POOL_STATS_NAMES: Final = AttributeNames.of(PagePoolStats, MappingProxyType({PagePoolStats.INFO: PAGE_POOL_NAMES}))
NAPI_NAMES: Final = AttributeNames.of(Napi)
QSTATS_NAMES: Final = AttributeNames.of(Qstats)
QUEUE_ID_NAMES: Final = AttributeNames.of(Queue)
LEASE_NAMES: Final = AttributeNames.of(Lease, MappingProxyType({Lease.QUEUE: QUEUE_ID_NAMES}))
QUEUE_NAMES: Final = AttributeNames.of(Queue, MappingProxyType({Queue.LEASE: LEASE_NAMES}))
DMABUF_NAMES: Final = AttributeNames.of(Dmabuf, MappingProxyType({Dmabuf.QUEUES: QUEUE_ID_NAMES}))
