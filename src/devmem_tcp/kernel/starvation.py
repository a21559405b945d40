"""Why nothing comes: who holds the pages of a queue.

The kernel tells no socket that its queue is out of pages: the NIC drops, and the drops are counted. Nor does it tell
how many pages are free. So this is a judgement from outside.
"""

from __future__ import annotations

from typing import Final

from devmem_tcp.endpoints import tell_holders
from devmem_tcp.kernel.attachment import Registry

_MUCH: Final = 4  # a quarter: the NIC's ring and the driver's caches keep pages too, of a small Buffer most of them


def starvation(registry: Registry, queue: int, waited_s: float) -> str:
    """Say who holds the pages of an RX queue, if tokens that are out stand for much of its Buffer; else nothing."""
    bound = next((binding for binding in list(registry.rx.values()) if queue in binding.queues), None)
    if bound is None:
        return ""
    holders = [holder for holder in bound.holders() if holder.queue == queue]
    tokens = sum(holder.tokens for holder in holders)
    if not tokens:
        return ""
    stats = registry.queue_stats(queue)
    if tokens * _MUCH < stats.pages_total:
        return ""
    return (
        f"nothing came over RX queue {queue} for {waited_s:.1f} s; of its {stats.pages_total} pages are held: "
        f"{tell_holders(holders)}; {stats.rx_alloc_fail} packets were dropped for want of a page since it was bound"
    )
