"""Checks of what is in use now, and of what dead programs left."""

from __future__ import annotations

from typing import Final

from devmem_tcp.errors import KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.ethtool import Ethtool
from devmem_tcp.kernel.journal import Entry, Journal, current_process, is_alive
from devmem_tcp.kernel.leasing import is_lessee
from devmem_tcp.nicmodel.isolation import isolation_warnings
from devmem_tcp.probe.finding import ok, warning
from devmem_tcp.sys import calls
from devmem_tcp.types import ProbeCheck
from devmem_tcp.uapi.netdev import QueueType

_LINGERING_S: Final = 5.0  # the kernel looks at pools that were let go once a second; net/core/page_pool.c
_ALLOC_FAIL: Final = "rx-alloc-fail"
_FIX: Final = "; fix: "


def page_pools(nic: Ethtool) -> ProbeCheck:
    """Which page pools the NIC has, how many pages are out, and whether one waits for pages that nobody returns."""
    name, needed = "page pools", "no pool that its NIC has let go waits for pages"
    if is_lessee(nic):
        return ok(name, "those of leased queues are told on the host", needed)
    pools = netdev.page_pools(nic.ifindex)
    uptime_s = float(calls.read_text("/proc/uptime").split()[0])  # of CLOCK_BOOTTIME, as is detach_time_s
    out = sum(pool.inflight for pool in pools)
    bound = sum(pool.inflight for pool in pools if pool.dmabuf_id)
    found = f"{len(pools)} with {out:,} pages out, {bound:,} of them of dma-bufs; {_statistics(nic)}"
    waiting = [
        pool for pool in pools if pool.detach_time_s is not None and uptime_s - pool.detach_time_s > _LINGERING_S
    ]
    if waiting:
        pages = sum(pool.inflight for pool in waiting)
        fix = "ss -tmn   # a socket still holds them, read or unread: end its program"
        return warning(name, f"{found}; {len(waiting)} let go, waiting for {pages:,} pages", needed, fix)
    return ok(name, found, needed)


def _statistics(nic: Ethtool) -> str:
    try:
        counted = netdev.page_pool_stats(nic.ifindex)
    except KernelError:
        return "no statistics (CONFIG_PAGE_POOL_STATS)"
    slow = sum(pool.counters.get("alloc-slow", 0) for pool in counted)
    recycled = sum(pool.counters.get("recycle-ring", 0) + pool.counters.get("recycle-cached", 0) for pool in counted)
    return f"{slow:,} allocated slowly, {recycled:,} recycled"


def bound_queues(nic: Ethtool) -> ProbeCheck:
    """Whether RSS sends strangers' traffic to a bound queue, and whether one has run out of pages."""
    name, needed = "bound queues", "RSS keeps off them, and they have pages left"
    queues = [queue for queue in netdev.queues(nic.ifindex) if queue.type is QueueType.RX]
    bound = {queue.queue: queue.dmabuf_id for queue in queues if queue.dmabuf_id}
    leased = [str(queue.queue) for queue in queues if queue.lease is not None]
    texts = [f"{queue} (dmabuf id {dmabuf_id})" for queue, dmabuf_id in sorted(bound.items())]
    found = ", ".join(texts) or "none now"
    if leased:
        found += f"; leased to virtual interfaces: {', '.join(leased)}"
    if not bound or is_lessee(nic):
        return ok(name, found, needed)
    for text in isolation_warnings(nic.rss().table, (), bound, nic=nic.nic):
        cause, _, fix = text.partition(_FIX)
        return warning(name, f"{found}; {cause}", needed, f"sudo {fix}")
    counted = [one for one in netdev.queue_statistics(nic.ifindex) if one.type is QueueType.RX and one.queue in bound]
    failed = sum(one.counters.get(_ALLOC_FAIL, 0) for one in counted)
    if failed:
        fix = "# return tokens sooner or bind a larger Buffer; in the program, nic.stats().holders says who holds them"
        return warning(name, f"{found}; no page was free {failed:,} times since the bind", needed, fix)
    return ok(name, found, needed)


def journal() -> ProbeCheck:
    """Whether programs that died left NIC settings changed."""
    name, needed = "journal", "no change left by a program that died"
    fix = "devmem-tcp doctor --restore"
    left: list[Entry] = []
    in_force: list[Entry] = []
    unreadable = []
    for kept in Journal.candidates():
        try:
            entries = kept.entries() if kept.exists() else []
        except KernelError:
            unreadable.append(kept.directory)
            continue
        for entry in entries:
            (in_force if _owned(entry) else left).append(entry)
    if left:
        owners: dict[tuple[str, int], list[str]] = {(entry.owner.name, entry.owner.pid): [] for entry in left}
        for entry in left:
            owners[entry.owner.name, entry.owner.pid].append(entry.words)
        texts = [f"{owner} (process {pid}): {', '.join(words)}" for (owner, pid), words in owners.items()]
        return warning(name, f"{len(left)} left by {'; by '.join(texts)}", needed, f"sudo {fix}")
    notes = [f"{len(in_force)} changes in force, of living programs"] if in_force else []
    notes += [f"{directory} is closed to this user" for directory in unreadable]
    return ok(name, "; ".join(notes) or "nothing left", needed, f"sudo {fix}" if unreadable else "")


def _owned(entry: Entry) -> bool:
    """Whether the program that made a change may still be there to undo it."""
    here = current_process()
    if entry.owner.boot_id != here.boot_id:
        return False
    return entry.owner.pid_namespace != here.pid_namespace or is_alive(entry.owner)
