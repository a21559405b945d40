"""What ``kernel.netdev`` asks for and makes of the answers, against a kernel of Python; tests/guest has Linux."""

from __future__ import annotations

import errno

import pytest

from devmem_tcp.errors import BindError, BrokenError, KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.uapi import netdev as abi
from devmem_tcp.uapi import netlink as nl
from devmem_tcp.uapi.netdev import Command, QueueType
from devmem_tcp.uapi.netlink import Message, attr_u32, attr_uint, nest
from netlink_kernel import FAMILY_VERSION, FakeKernel, ack, done, entry, faked

IFINDEX = 2


kernel = pytest.fixture(faked)


def lists(kernel: FakeKernel, *entries: bytes) -> None:
    """Have every dump answered by ``entries``."""
    kernel.answer = lambda request: [entry(request, attrs, flags=nl.NLM_F_MULTI) for attrs in entries] + [done(request)]


def asked(kernel: FakeKernel, command: Command, *attrs: bytes) -> None:
    """Check that the last request was this."""
    assert kernel.requests[-1].payload == nl.generic(command, FAMILY_VERSION, *attrs)


def queue_attrs(queue: int, kind: QueueType, *more: bytes) -> bytes:
    known = attr_u32(abi.Queue.ID, queue) + attr_u32(abi.Queue.TYPE, kind) + attr_u32(abi.Queue.IFINDEX, IFINDEX)
    return known + b"".join(more)


def test_queues_and_what_feeds_them(kernel: FakeKernel) -> None:
    leased = nest(abi.Lease.QUEUE, attr_u32(abi.Queue.ID, 4), attr_u32(abi.Queue.TYPE, 0))
    lease = nest(abi.Queue.LEASE, leased, attr_u32(abi.Lease.IFINDEX, 9), nl.attr_s32(abi.Lease.NETNS_ID, 5))
    near = nest(abi.Queue.LEASE, leased, attr_u32(abi.Lease.IFINDEX, 9))
    lists(
        kernel,
        queue_attrs(0, QueueType.RX, attr_u32(abi.Queue.NAPI_ID, 77), attr_u32(abi.Queue.DMABUF, 3)),
        queue_attrs(1, QueueType.RX, nest(abi.Queue.IO_URING), lease),
        queue_attrs(2, QueueType.RX, near),
        queue_attrs(0, QueueType.TX, nest(abi.Queue.XSK)),
    )
    found = netdev.queues(IFINDEX)
    asked(kernel, Command.QUEUE_GET, attr_u32(abi.Queue.IFINDEX, IFINDEX))
    assert [(each.queue, each.type) for each in found] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert [each.dmabuf_id for each in found] == [3, 0, 0, 0]
    assert [each.napi_id for each in found] == [77, None, None, None]
    assert [each.io_uring for each in found] == [False, True, False, False]
    assert [each.xsk for each in found] == [False, False, False, True]
    assert found[1].lease == netdev.LeasedQueue(ifindex=9, queue=4, netns_id=5)
    assert found[2].lease == netdev.LeasedQueue(ifindex=9, queue=4, netns_id=None)
    assert found[0].lease is None


def test_page_pools_of_one_device_or_of_all(kernel: FakeKernel) -> None:
    def pool(pool_id: int, *more: bytes) -> bytes:
        return attr_uint(abi.PagePool.ID, pool_id) + b"".join(more)

    lists(
        kernel,
        pool(
            6,
            attr_u32(abi.PagePool.IFINDEX, IFINDEX),
            attr_uint(abi.PagePool.INFLIGHT, 256),
            attr_uint(abi.PagePool.INFLIGHT_MEM, 1 << 40),
            attr_u32(abi.PagePool.DMABUF, 3),
        ),
        pool(5, attr_u32(abi.PagePool.IFINDEX, IFINDEX + 1), attr_uint(abi.PagePool.DETACH_TIME, 99)),
        pool(4, nest(abi.PagePool.IO_URING)),  # its device is gone
    )
    assert [each.pool_id for each in netdev.page_pools()] == [6, 5, 4]
    asked(kernel, Command.PAGE_POOL_GET)
    assert netdev.page_pools(IFINDEX) == [netdev.PagePool(6, IFINDEX, None, 256, 1 << 40, None, 3, False)]
    (detached,) = netdev.page_pools(IFINDEX + 1)
    assert (detached.detach_time_s, detached.dmabuf_id) == (99, 0)
    (orphan,) = netdev.page_pools(0)
    assert orphan.io_uring


def test_page_pool_counters_by_name(kernel: FakeKernel) -> None:
    info = nest(abi.PagePoolStats.INFO, attr_uint(abi.PagePool.ID, 6), attr_u32(abi.PagePool.IFINDEX, IFINDEX))
    lists(kernel, info + attr_uint(abi.PagePoolStats.ALLOC_FAST, 7) + attr_uint(1000, 1))
    assert netdev.page_pool_stats(IFINDEX) == [netdev.PagePoolStatistics(6, IFINDEX, {"alloc-fast": 7})]
    assert netdev.page_pool_stats(IFINDEX + 1) == []


def test_counters_are_not_asked_for_while_the_device_is_down(kernel: FakeKernel) -> None:
    lists(kernel)
    assert netdev.queue_statistics(IFINDEX) == []
    asked(kernel, Command.QUEUE_GET, attr_u32(abi.Queue.IFINDEX, IFINDEX))
    assert len(kernel.requests) == 1


def test_counters_of_queues_by_name(kernel: FakeKernel) -> None:
    def answer(request: Message) -> list[bytes]:
        if request.payload[0] == Command.QUEUE_GET:
            return [entry(request, queue_attrs(1, QueueType.RX)), done(request)]
        found = attr_u32(abi.Qstats.IFINDEX, IFINDEX) + attr_u32(abi.Qstats.QUEUE_TYPE, 0)
        found += attr_u32(abi.Qstats.QUEUE_ID, 1) + attr_uint(abi.Qstats.RX_ALLOC_FAIL, 1 << 33) + attr_uint(999, 1)
        return [entry(request, found), done(request)]

    kernel.answer = answer
    wanted = netdev.QueueStatistics(IFINDEX, 1, QueueType.RX, {"rx-alloc-fail": 1 << 33})
    assert netdev.queue_statistics(IFINDEX) == [wanted]
    scope = attr_uint(abi.Qstats.SCOPE, abi.QSTATS_SCOPE_QUEUE)
    asked(kernel, Command.QSTATS_GET, attr_u32(abi.Qstats.IFINDEX, IFINDEX), scope)


def test_bind_rx_names_each_queue_once_and_a_page_size_only_if_asked(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [entry(request, attr_u32(abi.Dmabuf.ID, 12)), ack(request)]
    first = [attr_u32(abi.Dmabuf.IFINDEX, IFINDEX), attr_u32(abi.Dmabuf.FD, 8)]
    rx = [nest(abi.Dmabuf.QUEUES, attr_u32(1, queue), attr_u32(3, 0)) for queue in (1, 3)]
    with GenericNetlink(abi.FAMILY) as netlink:
        assert netdev.bind_rx(netlink, IFINDEX, 8, [3, 1, 3]) == 12
        asked(kernel, Command.BIND_RX, *first, *rx)
        for size in (8192, 0):  # 0 is for Linux to refuse
            netdev.bind_rx(netlink, IFINDEX, 8, [3, 1], rx_page_size=size)
            asked(kernel, Command.BIND_RX, *first, *rx, attr_u32(abi.Dmabuf.RX_PAGE_SIZE, size))
        assert netdev.bind_tx(netlink, IFINDEX, 8) == 12
        asked(kernel, Command.BIND_TX, *first)


def test_a_refused_binding_is_a_bind_error_with_the_next_step(kernel: FakeKernel) -> None:
    text = nl.attr_string(nl.NLMSGERR_ATTR_MSG, "tcp-data-split is disabled")
    kernel.answer = lambda request: [ack(request, -errno.EINVAL, text)]
    with GenericNetlink(abi.FAMILY) as netlink, pytest.raises(BindError) as caught:
        netdev.bind_rx(netlink, IFINDEX, 8, [1])
    error = caught.value
    assert (error.errno, error.call, error.extack) == (
        errno.EINVAL,
        "netdev bind-rx",
        "tcp-data-split is disabled",
    )
    assert "tcp-data-split on" in error.hint


def test_a_lease_says_whose_queue_in_which_namespace(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [entry(request, attr_u32(abi.Queue.ID, 1)), ack(request)]
    queue = nest(abi.Lease.QUEUE, attr_u32(abi.Queue.ID, 3), attr_u32(abi.Queue.TYPE, 0))
    lease = [attr_u32(abi.Lease.IFINDEX, 2), queue]
    first = [attr_u32(abi.Queue.IFINDEX, 9), attr_u32(abi.Queue.TYPE, 0)]
    with GenericNetlink(abi.FAMILY) as netlink:
        assert netdev.lease_queue(9, 2, 3, netlink=netlink) == 1
        asked(kernel, Command.QUEUE_CREATE, *first, nest(abi.Queue.LEASE, *lease))
        netdev.lease_queue(9, 2, 3, nic_netns_id=0, netlink=netlink)
        asked(kernel, Command.QUEUE_CREATE, *first, nest(abi.Queue.LEASE, *lease, nl.attr_s32(abi.Lease.NETNS_ID, 0)))


def test_a_kernel_without_leasing_says_so(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [ack(request, -errno.EOPNOTSUPP)]
    with GenericNetlink(abi.FAMILY) as netlink, pytest.raises(KernelError, match="newer kernel") as caught:
        netdev.lease_queue(9, 2, 3, netlink=netlink)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_an_answer_without_what_was_asked_for_is_an_error(kernel: FakeKernel) -> None:
    with GenericNetlink(abi.FAMILY) as netlink, pytest.raises(BrokenError, match=r"bind-rx.*attribute 4 is missing"):
        netdev.bind_rx(netlink, IFINDEX, 8, [1])
    lists(kernel, attr_u32(abi.Queue.ID, 0))
    with pytest.raises(BrokenError, match=r"queue-get.*makes no sense"):
        netdev.queues(IFINDEX)
