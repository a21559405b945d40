"""The netdev family's operations, typed: what devices, queues and page pools there are, and binding memory to queues.

What reads opens a netlink socket of its own unless it is given one; what binds is given one, since the binding lives as
long as that socket. Interfaces are those of the network namespace that the socket was opened in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from devmem_tcp import refusals
from devmem_tcp.errors import BindError, BrokenError, KernelError
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.uapi import netdev as abi
from devmem_tcp.uapi.netdev import Command, QueueType
from devmem_tcp.uapi.netlink import AttributeNames, Attributes, attr_s32, attr_u32, attr_uint, nest, spell


@dataclass(frozen=True, slots=True)
class Device:
    """One network device, as netdev dev-get tells; the features are bit masks."""

    ifindex: int
    xdp_features: int
    xdp_rx_metadata_features: int
    xsk_features: int


@dataclass(frozen=True, slots=True)
class LeasedQueue:
    """The other end of a leased queue; ``netns_id`` None: it is in the same network namespace."""

    ifindex: int
    queue: int
    netns_id: int | None


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue that is up, and what feeds it: ``dmabuf_id`` 0 and neither flag: host memory."""

    ifindex: int
    queue: int
    type: QueueType
    napi_id: int | None
    dmabuf_id: int
    io_uring: bool
    xsk: bool
    lease: LeasedQueue | None


@dataclass(frozen=True, slots=True)
class NapiInstance:
    """One NAPI instance: what serves queues. ``pid`` None: in interrupts, not in a thread of its own."""

    ifindex: int
    napi_id: int
    irq: int | None
    pid: int | None
    defer_hard_irqs: int
    gro_flush_timeout_ns: int
    irq_suspend_timeout_ns: int


@dataclass(frozen=True, slots=True)
class PagePool:
    """One page pool. ``inflight`` counts pages in the pool's own caches too; ``detach_time_s`` is of CLOCK_BOOTTIME.

    With a ``detach_time_s`` the driver has let go of it, and it waits for its last pages. ``ifindex`` 0: so is the
    device.
    """

    pool_id: int
    ifindex: int
    napi_id: int | None
    inflight: int
    inflight_bytes: int
    detach_time_s: int | None
    dmabuf_id: int  # 0: not of a dma-buf
    io_uring: bool


@dataclass(frozen=True, slots=True)
class PagePoolStatistics:
    """The counters of one page pool, by the names of the specification: ``alloc-fast``, ``recycle-ring`` …"""

    pool_id: int
    ifindex: int
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """The counters of one queue that its driver keeps, by the names of the specification: ``rx-alloc-fail`` …

    They start anew when the queue does, and binding restarts it.
    """

    ifindex: int
    queue: int
    type: QueueType
    counters: Mapping[str, int]


# --- reading --------------------------------------------------------------------------------------------------------


def devices(ifindex: int | None = None, *, netlink: GenericNetlink | None = None) -> list[Device]:
    """Return all network devices of this namespace, or one.

    Kernel: netdev dev-get.

    Raises:
        KernelError: ENODEV: no such device; ENOENT: the kernel has no netdev family (before Linux 6.3).
    """
    if ifindex is None:
        found = _dump(netlink, Command.DEV_GET, b"", abi.DEV_NAMES)
    else:
        with _opened(netlink) as nl, _hinted():
            found = [nl.request(Command.DEV_GET, attr_u32(abi.Dev.IFINDEX, ifindex), attributes=abi.DEV_NAMES)]
    with _understood(Command.DEV_GET):
        return [
            Device(
                ifindex=each.u32(abi.Dev.IFINDEX),
                xdp_features=each.u64(abi.Dev.XDP_FEATURES, 0),
                xdp_rx_metadata_features=each.u64(abi.Dev.XDP_RX_METADATA_FEATURES, 0),
                xsk_features=each.u64(abi.Dev.XSK_FEATURES, 0),
            )
            for each in found
        ]


def queues(ifindex: int, *, netlink: GenericNetlink | None = None) -> list[Queue]:
    """Return the RX and TX queues of a device; none while it is down.

    Kernel: netdev queue-get; net/core/netdev-genl.c, netdev_nl_queue_dump_one.

    Raises:
        KernelError: ENODEV: no such device.
    """
    found = _dump(netlink, Command.QUEUE_GET, attr_u32(abi.Queue.IFINDEX, ifindex), abi.QUEUE_NAMES)
    with _understood(Command.QUEUE_GET):
        return [_queue(each) for each in found]


def napis(ifindex: int, *, netlink: GenericNetlink | None = None) -> list[NapiInstance]:
    """Return the NAPI instances of a device; none while it is down.

    Kernel: netdev napi-get.

    Raises:
        KernelError: ENODEV: no such device.
    """
    found = _dump(netlink, Command.NAPI_GET, attr_u32(abi.Napi.IFINDEX, ifindex), abi.NAPI_NAMES)
    with _understood(Command.NAPI_GET):
        return [
            NapiInstance(
                ifindex=each.u32(abi.Napi.IFINDEX),
                napi_id=each.u32(abi.Napi.ID),
                irq=each.u32(abi.Napi.IRQ, None),
                pid=each.u32(abi.Napi.PID, None),
                defer_hard_irqs=each.u32(abi.Napi.DEFER_HARD_IRQS, 0),
                gro_flush_timeout_ns=each.uint(abi.Napi.GRO_FLUSH_TIMEOUT, 0),
                irq_suspend_timeout_ns=each.uint(abi.Napi.IRQ_SUSPEND_TIMEOUT, 0),
            )
            for each in found
        ]


def page_pools(ifindex: int | None = None, *, netlink: GenericNetlink | None = None) -> list[PagePool]:
    """Return the page pools of a device, or all; detached ones too.

    Kernel: netdev page-pool-get; older kernels dump all pools, so the list is filtered here.
    """
    found = _dump(netlink, Command.PAGE_POOL_GET, b"", abi.PAGE_POOL_NAMES)
    with _understood(Command.PAGE_POOL_GET):
        pools = [
            PagePool(
                pool_id=each.uint(abi.PagePool.ID),
                ifindex=each.u32(abi.PagePool.IFINDEX, 0),
                napi_id=each.uint(abi.PagePool.NAPI_ID, None),
                inflight=each.uint(abi.PagePool.INFLIGHT, 0),
                inflight_bytes=each.uint(abi.PagePool.INFLIGHT_MEM, 0),
                detach_time_s=each.uint(abi.PagePool.DETACH_TIME, None),
                dmabuf_id=each.u32(abi.PagePool.DMABUF, 0),
                io_uring=abi.PagePool.IO_URING in each,
            )
            for each in found
        ]
    return [pool for pool in pools if ifindex in (None, pool.ifindex)]


def page_pool_stats(ifindex: int | None = None, *, netlink: GenericNetlink | None = None) -> list[PagePoolStatistics]:
    """Return the counters of the page pools of a device, or of all.

    Kernel: netdev page-pool-stats-get.

    Raises:
        KernelError: EOPNOTSUPP: the kernel was built without CONFIG_PAGE_POOL_STATS.
    """
    found = _dump(netlink, Command.PAGE_POOL_STATS_GET, b"", abi.PAGE_POOL_STATS_NAMES)
    with _understood(Command.PAGE_POOL_STATS_GET):
        pools = []
        for each in found:
            pool = each.nested(abi.PagePoolStats.INFO)
            counters = _counters(each, abi.PagePoolStats, abi.PagePoolStats.ALLOC_FAST)
            pools.append(PagePoolStatistics(pool.uint(abi.PagePool.ID), pool.u32(abi.PagePool.IFINDEX, 0), counters))
    return [pool for pool in pools if ifindex in (None, pool.ifindex)]


def queue_statistics(ifindex: int, *, netlink: GenericNetlink | None = None) -> list[QueueStatistics]:
    """Return the counters of each queue of a device; none while it is down.

    Kernel: netdev qstats-get, scope queue. Not asked while the device is down, when queue-get has no queues: gve of
    Linux 7.3.4 reads counters of rings that are not there then (gve_main.c, gve_get_rx_queue_stats).

    Raises:
        KernelError: ENODEV: no such device; EOPNOTSUPP: its driver keeps no statistics of queues.
    """
    with _opened(netlink) as nl:
        if not queues(ifindex, netlink=nl):
            return []
        scope = attr_uint(abi.Qstats.SCOPE, abi.QSTATS_SCOPE_QUEUE)
        wanted = attr_u32(abi.Qstats.IFINDEX, ifindex) + scope
        found = _dump(nl, Command.QSTATS_GET, wanted, abi.QSTATS_NAMES)
    with _understood(Command.QSTATS_GET):
        return [
            QueueStatistics(
                ifindex=each.u32(abi.Qstats.IFINDEX),
                queue=each.u32(abi.Qstats.QUEUE_ID),
                type=QueueType(each.u32(abi.Qstats.QUEUE_TYPE)),
                counters=_counters(each, abi.Qstats, abi.FIRST_COUNTER),
            )
            for each in found
        ]


# --- binding --------------------------------------------------------------------------------------------------------


def bind_rx(
    netlink: GenericNetlink, ifindex: int, dmabuf_fd: int, rx_queues: Sequence[int], rx_page_size: int | None = None
) -> int:
    """Bind a dma-buf to RX queues, all or none, and return the binding's id. A queue named twice counts once.

    Lifetime: the binding ends when ``netlink`` is closed, by every process that has it. It holds the dma-buf itself:
    ``dmabuf_fd`` may be closed.

    Args:
        rx_page_size: bytes, a power of two from 4096 on; None: 4096, which older kernels and all drivers know.

    Kernel: netdev bind-rx; needs CAP_NET_ADMIN. Restarts each queue; gve takes all down and up for that.

    Raises:
        BindError: refused; ``refusals`` has the ways, and ``hint`` the next step.
    """
    wanted = [attr_u32(abi.Dmabuf.IFINDEX, ifindex), attr_u32(abi.Dmabuf.FD, dmabuf_fd)]
    wanted += [nest(abi.Dmabuf.QUEUES, _queue_id(queue)) for queue in sorted(set(rx_queues))]
    if rx_page_size is not None:
        wanted.append(attr_u32(abi.Dmabuf.RX_PAGE_SIZE, rx_page_size))
    return _bind(netlink, Command.BIND_RX, wanted)


def bind_tx(netlink: GenericNetlink, ifindex: int, dmabuf_fd: int) -> int:
    """Let sockets send from a dma-buf by a device, and return the binding's id.

    Lifetime: as of ``bind_rx``. Close ``netlink`` before the device goes away: the other way round crashes Linux 7.3.

    Kernel: netdev bind-tx; unprivileged.

    Raises:
        BindError: refused; ``refusals`` has the ways, and ``hint`` the next step.
    """
    wanted = [attr_u32(abi.Dmabuf.IFINDEX, ifindex), attr_u32(abi.Dmabuf.FD, dmabuf_fd)]
    return _bind(netlink, Command.BIND_TX, wanted)


def lease_queue(
    ifindex: int, nic_ifindex: int, nic_queue: int, *, nic_netns_id: int | None = None, netlink: GenericNetlink
) -> int:
    """Lease an RX queue of a NIC to a virtual interface (netkit), and return its number there.

    A program in the namespace of the virtual interface can then bind to that queue as if it were the NIC's.

    Lifetime: the lease ends with the virtual interface.

    Args:
        ifindex: the virtual interface.
        nic_ifindex, nic_queue: the NIC and its RX queue.
        nic_netns_id: the NIC's network namespace, as a number of this one (ip netns list-id); None: this one.

    Kernel: netdev queue-create; needs CAP_NET_ADMIN in the first user namespace.

    Raises:
        KernelError: EOPNOTSUPP without an extack: this kernel has no leasing; others are in ``refusals``.
    """
    lease = [attr_u32(abi.Lease.IFINDEX, nic_ifindex), nest(abi.Lease.QUEUE, _queue_id(nic_queue))]
    if nic_netns_id is not None:
        lease.append(attr_s32(abi.Lease.NETNS_ID, nic_netns_id))
    wanted = [attr_u32(abi.Queue.IFINDEX, ifindex), attr_u32(abi.Queue.TYPE, QueueType.RX)]
    with _hinted():
        made = netlink.request(Command.QUEUE_CREATE, *wanted, nest(abi.Queue.LEASE, *lease), attributes=abi.QUEUE_NAMES)
    with _understood(Command.QUEUE_CREATE):
        return made.u32(abi.Queue.ID)


def _bind(netlink: GenericNetlink, command: Command, wanted: Sequence[bytes]) -> int:
    try:
        with _hinted():
            bound = netlink.request(command, *wanted, attributes=abi.DMABUF_NAMES)
    except KernelError as error:
        raise BindError(
            error.errno or 0, error.call, extack=error.extack, attr=error.attr, hint=error.hint
        ) from error.__cause__
    with _understood(command):
        return bound.u32(abi.Dmabuf.ID)


def _queue_id(queue: int) -> bytes:
    return attr_u32(abi.Queue.ID, queue) + attr_u32(abi.Queue.TYPE, QueueType.RX)


# --- common to all --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(netlink: GenericNetlink | None) -> Iterator[GenericNetlink]:
    """Give the socket that was given, or one for the block."""
    if netlink is not None:
        yield netlink
    else:
        with GenericNetlink(abi.FAMILY) as opened:
            yield opened


def _dump(netlink: GenericNetlink | None, command: Command, wanted: bytes, names: AttributeNames) -> list[Attributes]:
    with _opened(netlink) as nl, _hinted():
        return nl.dump(command, wanted, attributes=names)


@contextlib.contextmanager
def _hinted() -> Iterator[None]:
    """Give a KernelError of the block the hint that ``refusals`` has for it."""
    try:
        yield
    except KernelError as error:
        known = refusals.find(error)
        if known is not None:
            error.hint = known.fix
        raise


@contextlib.contextmanager
def _understood(command: Command) -> Iterator[None]:
    """Raise a ValueError of the block, about what the kernel sent, as BrokenError."""
    try:
        yield
    except ValueError as error:
        raise BrokenError(f"netdev {spell(command)}: the kernel's answer makes no sense: {error}") from error


def _queue(found: Attributes) -> Queue:
    lease = None
    if abi.Queue.LEASE in found:
        other = found.nested(abi.Queue.LEASE)
        queue = other.nested(abi.Lease.QUEUE).u32(abi.Queue.ID)
        lease = LeasedQueue(other.u32(abi.Lease.IFINDEX), queue, other.s32(abi.Lease.NETNS_ID, None))
    return Queue(
        ifindex=found.u32(abi.Queue.IFINDEX),
        queue=found.u32(abi.Queue.ID),
        type=QueueType(found.u32(abi.Queue.TYPE)),
        napi_id=found.u32(abi.Queue.NAPI_ID, None),
        dmabuf_id=found.u32(abi.Queue.DMABUF, 0),
        io_uring=abi.Queue.IO_URING in found,
        xsk=abi.Queue.XSK in found,
        lease=lease,
    )


def _counters(found: Attributes, kinds: type[IntEnum], first: int) -> Mapping[str, int]:
    known = {int(kind) for kind in kinds}
    return MappingProxyType({spell(kinds(kind)): found.uint(kind) for kind in found if kind >= first and kind in known})
