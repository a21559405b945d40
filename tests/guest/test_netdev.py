"""Every operation of ``kernel.netdev`` against Linux and a NIC's own driver: run in a guest of the lab.

    devmem-tcp lab run -- .venv/bin/pytest tests/guest/test_netdev.py

The NIC is NETIF, driven by gve; its queue 0 is not bound here: that is refused (ERANGE), and makes 7.3.4 warn.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Final

import pytest

from container import netkit
from devmem_tcp import refusals
from devmem_tcp.buffers import Buffer
from devmem_tcp.errors import BindError, KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.memory import DmaHeap, Udmabuf
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.uapi import netdev as abi
from devmem_tcp.uapi.netdev import Command, QueueType
from devmem_tcp.uapi.netlink import attr_u32, nest

NIC: Final = os.environ["NETIF"]
LO: Final = 1
NOWHERE: Final = 9999  # neither an interface's index nor an open fd
NOBODY: Final = 65534
PAGE: Final = 4096
PAGES: Final = 256


@pytest.fixture(scope="module")
def nic() -> int:
    return socket.if_nametoindex(NIC)


@pytest.fixture(scope="module", autouse=True)
def header_split() -> None:
    run("ethtool", "-G", NIC, "tcp-data-split", "on")


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    with Udmabuf().allocate(PAGES * PAGE) as made:
        yield made


@pytest.fixture
def netlink() -> Iterator[GenericNetlink]:
    with GenericNetlink(abi.FAMILY) as opened:
        yield opened


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def fd_of(buffer: Buffer) -> int:
    assert buffer.dmabuf_fd is not None
    return buffer.dmabuf_fd


def bound(nic: int) -> dict[int, int]:
    """Return the binding of each bound RX queue."""
    found = netdev.queues(nic)
    assert all(queue.dmabuf_id == 0 for queue in found if queue.type is QueueType.TX)
    return {queue.queue: queue.dmabuf_id for queue in found if queue.dmabuf_id}


@contextlib.contextmanager
def refused(number: int, *, extack: str = "", attr: str = "") -> Iterator[None]:
    """Expect a refusal that says just this, and that the table knows."""
    with pytest.raises(BindError) as caught:
        yield
    error = caught.value
    assert (error.errno, error.extack, error.attr) == (number, extack, attr)
    known = refusals.find(error)
    assert known is not None, f"no refusal explains {error}"
    assert error.hint == known.fix


# --- reading --------------------------------------------------------------------------------------------------------


def test_the_nic_is_among_the_devices(nic: int) -> None:
    listed = netdev.devices()
    assert {LO, nic} <= {device.ifindex for device in listed}
    assert netdev.devices(nic) == [device for device in listed if device.ifindex == nic]


def test_each_rx_queue_has_a_page_pool_with_pages_out(nic: int) -> None:
    pools = netdev.page_pools(nic)
    serving = {queue.napi_id for queue in netdev.queues(nic) if queue.type is QueueType.RX}
    assert {pool.napi_id for pool in pools if pool.detach_time_s is None} == serving
    assert all(pool.inflight * PAGE == pool.inflight_bytes > 0 for pool in pools)
    assert {pool.pool_id for pool in netdev.page_pool_stats(nic)} == {pool.pool_id for pool in pools}
    assert all(pool.counters["alloc-slow"] > 0 for pool in netdev.page_pool_stats(nic))


def test_counters_of_each_queue(nic: int) -> None:
    found = netdev.queue_statistics(nic)
    assert {(each.type, each.queue) for each in found} == {(each.type, each.queue) for each in netdev.queues(nic)}
    assert all("rx-alloc-fail" in each.counters for each in found if each.type is QueueType.RX)
    assert all("tx-bytes" in each.counters for each in found if each.type is QueueType.TX)


def test_a_device_that_is_not_there() -> None:
    for read in (netdev.devices, netdev.queues, netdev.napis, netdev.queue_statistics):
        with pytest.raises(KernelError) as caught:
            read(NOWHERE)
        assert caught.value.errno == errno.ENODEV
        assert "ip -brief link" in caught.value.hint


def test_a_driver_without_statistics() -> None:
    with pytest.raises(KernelError) as caught:
        netdev.queue_statistics(LO)
    assert (caught.value.errno, caught.value.attr) == (errno.EOPNOTSUPP, "ifindex")


# --- bind-rx --------------------------------------------------------------------------------------------------------


def test_a_binding_shows_in_its_queues_and_page_pools_and_ends_with_its_socket(nic: int, buffer: Buffer) -> None:
    with GenericNetlink(abi.FAMILY) as netlink:
        dmabuf_id = netdev.bind_rx(netlink, nic, fd_of(buffer), [1, 2, 2])
        assert dmabuf_id > 0
        assert bound(nic) == {1: dmabuf_id, 2: dmabuf_id}
        pools = [pool for pool in netdev.page_pools(nic) if pool.dmabuf_id]
        assert [pool.dmabuf_id for pool in pools] == [dmabuf_id] * 2
        assert sum(pool.inflight for pool in pools) == PAGES
    assert bound(nic) == {}
    assert not any(pool.dmabuf_id for pool in netdev.page_pools(nic))


def test_ids_are_never_used_twice(nic: int, buffer: Buffer) -> None:
    with GenericNetlink(abi.FAMILY) as netlink:
        first = netdev.bind_tx(netlink, nic, fd_of(buffer))
    with GenericNetlink(abi.FAMILY) as netlink:
        assert netdev.bind_rx(netlink, nic, fd_of(buffer), [1]) > first


def test_a_binding_outlives_the_fd_of_its_memory(nic: int, netlink: GenericNetlink) -> None:
    with Udmabuf().allocate(PAGE) as buffer:
        dmabuf_id = netdev.bind_rx(netlink, nic, fd_of(buffer), [1])
    assert bound(nic) == {1: dmabuf_id}


def test_a_binding_lasts_until_the_last_copy_of_its_socket_is_closed(nic: int, buffer: Buffer) -> None:
    with GenericNetlink(abi.FAMILY) as netlink:
        dmabuf_id = netdev.bind_rx(netlink, nic, fd_of(buffer), [1])
        copy = os.dup(netlink.fileno())
    try:
        assert bound(nic) == {1: dmabuf_id}
    finally:
        os.close(copy)
    assert bound(nic) == {}


def test_one_socket_may_hold_several_bindings(nic: int, buffer: Buffer, netlink: GenericNetlink) -> None:
    first = netdev.bind_rx(netlink, nic, fd_of(buffer), [1])
    second = netdev.bind_rx(netlink, nic, fd_of(buffer), [2])
    assert bound(nic) == {1: first, 2: second}


def test_a_bound_queue_is_refused_and_so_are_the_others_of_the_request(
    nic: int, buffer: Buffer, netlink: GenericNetlink
) -> None:
    held = netdev.bind_rx(netlink, nic, fd_of(buffer), [2])
    with refused(errno.EEXIST, extack="designated queue already memory provider bound"):
        netdev.bind_rx(netlink, nic, fd_of(buffer), [1, 2])
    assert bound(nic) == {2: held}


def test_header_split_off(nic: int, buffer: Buffer, netlink: GenericNetlink) -> None:
    run("ethtool", "-G", NIC, "tcp-data-split", "off")
    try:
        with refused(errno.EINVAL, extack="tcp-data-split is disabled"):
            netdev.bind_rx(netlink, nic, fd_of(buffer), [1])
    finally:
        run("ethtool", "-G", NIC, "tcp-data-split", "on")


def test_no_such_queue_and_none_at_all(nic: int, buffer: Buffer, netlink: GenericNetlink) -> None:
    with refused(errno.EINVAL, attr="queues.id"):
        netdev.bind_rx(netlink, nic, fd_of(buffer), [1, 99])
    with refused(errno.EINVAL, attr="queues"):
        netdev.bind_rx(netlink, nic, fd_of(buffer), [])


def test_no_such_nic_and_one_whose_driver_cannot(buffer: Buffer, netlink: GenericNetlink) -> None:
    with refused(errno.ENODEV):
        netdev.bind_rx(netlink, NOWHERE, fd_of(buffer), [1])
    with refused(errno.EOPNOTSUPP, attr="ifindex"):
        netdev.bind_rx(netlink, LO, fd_of(buffer), [0])


def test_an_fd_that_is_not_open_or_no_dmabuf(nic: int, netlink: GenericNetlink) -> None:
    with refused(errno.EBADF):
        netdev.bind_rx(netlink, nic, NOWHERE, [1])
    with refused(errno.EINVAL):
        netdev.bind_rx(netlink, nic, netlink.fileno(), [1])


@pytest.fixture
def rx_page_size_known(nic: int, buffer: Buffer, netlink: GenericNetlink) -> bool:
    """Whether this kernel has rx-page-size at all: Linux 7.2 does not."""
    with pytest.raises(BindError) as caught:
        netdev.bind_rx(netlink, nic, fd_of(buffer), [1], rx_page_size=1)
    return caught.value.extack != "Unknown attribute type"


def test_rx_page_sizes(nic: int, buffer: Buffer, netlink: GenericNetlink, rx_page_size_known: bool) -> None:
    if not rx_page_size_known:
        with refused(errno.EINVAL, extack="Unknown attribute type", attr="rx-page-size"):
            netdev.bind_rx(netlink, nic, fd_of(buffer), [1], rx_page_size=PAGE)
        return
    with refused(errno.ERANGE, extack="integer out of range", attr="rx-page-size"):
        netdev.bind_rx(netlink, nic, fd_of(buffer), [1], rx_page_size=2048)
    with refused(errno.EINVAL, extack="rx-page-size must be a power of 2", attr="rx-page-size"):
        netdev.bind_rx(netlink, nic, fd_of(buffer), [1], rx_page_size=5000)
    unsupported = refused(errno.EOPNOTSUPP, extack="device does not support: rx_page_size")
    with DmaHeap().allocate(PAGES * PAGE) as in_one_piece, unsupported:
        netdev.bind_rx(netlink, nic, fd_of(in_one_piece), [1], rx_page_size=2 * PAGE)
    with Udmabuf().allocate(PAGE) as half_a_page, pytest.raises(BindError) as caught:
        netdev.bind_rx(netlink, nic, fd_of(half_a_page), [1], rx_page_size=2 * PAGE)
    assert caught.value.errno == errno.EINVAL
    assert "not aligned to niov size" in caught.value.extack
    assert "allocate a multiple of rx_page_size" in caught.value.hint
    bound_at = netdev.bind_rx(netlink, nic, fd_of(buffer), [1], rx_page_size=PAGE)
    assert bound(nic) == {1: bound_at}


def test_receiving_needs_the_privilege_to_bind_and_sending_does_not(nic: int, buffer: Buffer) -> None:
    os.seteuid(NOBODY)
    try:
        with GenericNetlink(abi.FAMILY) as netlink:
            with refused(errno.EPERM):
                netdev.bind_rx(netlink, nic, fd_of(buffer), [1])
            assert netdev.bind_tx(netlink, nic, fd_of(buffer)) > 0
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("queues", "named"),
    [
        ([], "queues"),
        ([attr_u32(abi.Queue.ID, 1)], "queues.type"),
        ([attr_u32(abi.Queue.TYPE, QueueType.RX)], "queues.id"),
        ([attr_u32(abi.Queue.ID, 1), attr_u32(abi.Queue.TYPE, QueueType.TX)], "queues.type"),
    ],
)
def test_linux_names_what_is_bad_or_missing_in_a_raw_request(
    nic: int, buffer: Buffer, netlink: GenericNetlink, queues: list[bytes], named: str
) -> None:
    wanted = [attr_u32(abi.Dmabuf.IFINDEX, nic), attr_u32(abi.Dmabuf.FD, fd_of(buffer))]
    if queues:
        good = nest(abi.Dmabuf.QUEUES, attr_u32(abi.Queue.ID, 1), attr_u32(abi.Queue.TYPE, QueueType.RX))
        wanted += [good, nest(abi.Dmabuf.QUEUES, *queues)]
    with pytest.raises(KernelError) as caught:
        netlink.request(Command.BIND_RX, *wanted, attributes=abi.DMABUF_NAMES)
    assert (caught.value.errno, caught.value.attr) == (errno.EINVAL, named)


def test_a_value_out_of_range_comes_with_the_range(nic: int, netlink: GenericNetlink) -> None:
    with pytest.raises(KernelError) as caught:
        netlink.request(Command.QUEUE_GET, attr_u32(abi.Queue.IFINDEX, 0), attributes=abi.QUEUE_NAMES)
    assert (caught.value.errno, caught.value.attr) == (errno.ERANGE, "ifindex")
    assert caught.value.hint == "ifindex must be 1 to 4294967295"


@pytest.mark.usefixtures("configure")
def test_a_nic_that_is_down_tells_of_no_queue_and_is_not_bound(nic: int, buffer: Buffer) -> None:
    run("ip", "link", "set", NIC, "down")
    try:
        assert netdev.queues(nic) == []
        assert netdev.napis(nic) == []
        assert netdev.queue_statistics(nic) == []
        with GenericNetlink(abi.FAMILY) as netlink, refused(errno.EAGAIN):
            netdev.bind_rx(netlink, nic, fd_of(buffer), [1])
    finally:
        run("ip", "link", "set", NIC, "up")
    assert netdev.queue_statistics(nic)


# --- bind-tx --------------------------------------------------------------------------------------------------------


def test_bind_tx(nic: int, buffer: Buffer, netlink: GenericNetlink) -> None:
    ids = [netdev.bind_tx(netlink, nic, fd_of(buffer)) for _ in range(2)]
    assert 0 < ids[0] < ids[1]
    assert bound(nic) == {}


def test_bind_tx_refused(nic: int, buffer: Buffer, netlink: GenericNetlink) -> None:
    with refused(errno.EOPNOTSUPP, extack="Driver does not support netmem TX"):
        netdev.bind_tx(netlink, LO, fd_of(buffer))
    with refused(errno.ENODEV):
        netdev.bind_tx(netlink, NOWHERE, fd_of(buffer))
    with refused(errno.EBADF):
        netdev.bind_tx(netlink, nic, NOWHERE)
    with refused(errno.EINVAL):
        netdev.bind_tx(netlink, nic, netlink.fileno())


# --- leasing queues -------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    """Make a pair of netkit interfaces, the second with room for one leased queue."""
    netkit("lessor", "lessee", rx_queues=2)
    yield socket.if_nametoindex("lessor"), socket.if_nametoindex("lessee")
    run("ip", "link", "del", "lessor")


def test_a_leased_queue_is_bound_by_the_interface_it_is_leased_to(
    nic: int, pair: tuple[int, int], buffer: Buffer, netlink: GenericNetlink
) -> None:
    _, lessee = pair
    run("ip", "link", "set", "lessor", "up")
    run("ip", "link", "set", "lessee", "up")
    leased = netdev.lease_queue(lessee, nic, 3, netlink=netlink)
    assert leased == 1
    (there,) = [queue for queue in netdev.queues(nic) if queue.lease]
    assert (there.queue, there.lease) == (3, netdev.LeasedQueue(lessee, leased, None))
    with refused(errno.EOPNOTSUPP, extack="Device doesn't support DMA"):
        netdev.bind_rx(netlink, nic, fd_of(buffer), [3])
    with GenericNetlink(abi.FAMILY) as binder:
        dmabuf_id = netdev.bind_rx(binder, lessee, fd_of(buffer), [leased])
        assert {queue.queue: queue.dmabuf_id for queue in netdev.queues(lessee) if queue.dmabuf_id} == {1: dmabuf_id}


def test_leases_that_cannot_be(nic: int, pair: tuple[int, int], netlink: GenericNetlink) -> None:
    lessor, lessee = pair
    netdev.lease_queue(lessee, nic, 3, netlink=netlink)
    for virtual, queue, number, extack in (
        (nic, 1, errno.EINVAL, "Device is not a virtual device"),
        (LO, 1, errno.EINVAL, "Device does not support queue creation"),
        (lessee, 99, errno.ERANGE, ""),
        (lessee, 3, errno.EBUSY, "Device queue in use due to queue leasing"),
        (lessee, 2, errno.EINVAL, "netkit maximum queue limit reached"),
        (lessor, 2, errno.EOPNOTSUPP, "netkit can only lease against the peer device"),
        (NOWHERE, 2, errno.ENODEV, ""),
    ):
        with pytest.raises(KernelError) as caught:
            netdev.lease_queue(virtual, nic, queue, netlink=netlink)
        assert (caught.value.errno, caught.value.extack) == (number, extack)
        assert caught.value.hint, f"no refusal explains {caught.value}"
    with pytest.raises(KernelError) as caught:
        netdev.lease_queue(lessee, LO, 0, netlink=netlink)
    assert caught.value.extack == "Lease device is a virtual device"
