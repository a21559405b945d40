"""Counters of RX queues that never go back, of the kernel's, which start anew whenever a queue does."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from devmem_tcp.errors import KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.attachment import Registry
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import PAGE_SIZE, QueueStats
from devmem_tcp.uapi.netdev import FAMILY, QueueType

_BYTES: Final = "rx-bytes"
_ALLOC_FAIL: Final = "rx-alloc-fail"


class QueueCounters:
    """The counters of one NIC's RX queues since it was opened. Thread-safe.

    Binding and unbinding restart a queue, and its counters with it (gve: all queues'): what they were at the last
    sample is then added to what comes.
    """

    def __init__(self, ifindex: int, rx_queues: int, registry: Registry) -> None:
        self._ifindex = ifindex
        self._rx_queues = rx_queues
        self._registry = registry
        self._lock = threading.Lock()
        self._past: dict[tuple[int, str], int] = {}  # by queue and name: what restarts took away
        self._last: dict[tuple[int, str], int] = {}

    def sample(self) -> tuple[QueueStats, ...]:
        """Return each RX queue's counters; all that is known of one that is down is its past.

        Kernel: netdev queue-get, page-pool-get, qstats-get.
        """
        with self._lock, GenericNetlink(FAMILY) as netlink:
            queues = {
                one.queue: one for one in netdev.queues(self._ifindex, netlink=netlink) if one.type is QueueType.RX
            }
            pools = netdev.page_pools(self._ifindex, netlink=netlink)
            now = {one.queue: one.counters for one in self._counted(netlink) if one.type is QueueType.RX}
            return tuple(
                self._stats_of(queue, queues.get(queue), now.get(queue, {}), pools) for queue in range(self._rx_queues)
            )

    def _counted(self, netlink: GenericNetlink) -> Sequence[netdev.QueueStatistics]:
        """Return what the driver counts of queues; nothing, if it does not: of leased queues, the NIC's counts."""
        try:
            return netdev.queue_statistics(self._ifindex, netlink=netlink)
        except KernelError as refused:
            if refused.errno != errno.EOPNOTSUPP:
                raise
            return ()

    def _stats_of(
        self, number: int, queue: netdev.Queue | None, now: Mapping[str, int], pools: Sequence[netdev.PagePool]
    ) -> QueueStats:
        dmabuf_id, napi_id = (queue.dmabuf_id, queue.napi_id) if queue is not None else (0, None)
        binding = self._registry.rx.get(dmabuf_id)
        mine = (pool for pool in pools if dmabuf_id and (pool.dmabuf_id, pool.napi_id) == (dmabuf_id, napi_id))
        return QueueStats(
            queue=number,
            dmabuf_id=dmabuf_id,
            rx_bytes=self._total(number, _BYTES, now),
            rx_alloc_fail=self._total(number, _ALLOC_FAIL, now),
            pages_total=binding.buffer.size_bytes // PAGE_SIZE if binding is not None else 0,
            pages_inflight=sum(pool.inflight for pool in mine),
        )

    def _total(self, queue: int, name: str, now: Mapping[str, int]) -> int:
        key, value = (queue, name), now.get(name, 0)
        last = self._last.get(key, 0)
        if value < last:
            self._past[key] = self._past.get(key, 0) + last
        self._last[key] = value
        return self._past.get(key, 0) + value
