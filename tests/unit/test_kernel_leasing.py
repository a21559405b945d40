"""Leasing queues and what the lessee sees, against a kernel of Python; ``tests/guest/test_leasing.py`` has Linux."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from devmem_tcp.errors import BindError, BrokenError, KernelError, NicSettingError
from devmem_tcp.kernel import leasing, lessee
from devmem_tcp.kernel.ethtool import DriverInfo, Ethtool
from devmem_tcp.kernel.leasing import lease_queue, lease_words, leased_queues
from devmem_tcp.kernel.lessee import LesseeNic, open_kernel_nic
from devmem_tcp.kernel.netns import HERE, NetworkNamespace, known_number, namespace_path, number_of
from devmem_tcp.memory import Host
from devmem_tcp.sys import namespaces
from devmem_tcp.types import FlowRule
from devmem_tcp.uapi import netdev as abi
from devmem_tcp.uapi import netlink as nl
from devmem_tcp.uapi.netdev import QueueType
from devmem_tcp.uapi.netlink import Message, attr_s32, attr_u32
from netlink_kernel import PORT, Datagram, FakeKernel, ack, done, entry, faked

RTM_NEWNSID, RTM_GETNSID, NETNSA_NSID, NETNSA_FD = 88, 90, 1, 3
LO = 1

kernel = pytest.fixture(faked)


@pytest.fixture
def here() -> Iterator[NetworkNamespace]:
    with NetworkNamespace(HERE) as opened:
        yield opened


# --- namespaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("box", "/run/netns/box"),
        ("4711", "/proc/4711/ns/net"),
        (4711, "/proc/4711/ns/net"),
        ("/var/run/docker/netns/f00", "/var/run/docker/netns/f00"),
        ("./x", "./x"),
        ("٣", "/run/netns/٣"),
    ],
)
def test_a_namespace_is_a_name_a_process_or_a_path(name: str | int, path: str) -> None:
    assert namespace_path(name) == path


def test_a_namespace_that_is_not_there() -> None:
    with pytest.raises(KernelError, match="open /run/netns/not-there") as refused:
        NetworkNamespace("not-there")
    assert refused.value.errno == errno.ENOENT
    assert "ip netns list" in refused.value.hint


def test_who_may_not_enter_is_told_so_and_nothing_is_done_here(
    here: NetworkNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(fd: int) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(namespaces, "enter_network_namespace", deny)
    done_here: list[int] = []
    with pytest.raises(KernelError, match="setns") as refused:
        here.run(lambda: done_here.append(1))
    assert "CAP_SYS_ADMIN" in refused.value.hint
    assert done_here == []


def numbers(*known: int) -> Callable[[Message], Sequence[Datagram]]:
    """Answer each RTM_GETNSID with the next number, and acknowledge each RTM_NEWNSID."""
    left = list(known)

    def answer(request: Message) -> Sequence[Datagram]:
        if request.kind == RTM_NEWNSID:
            return [ack(request)]
        payload = struct.pack("<Bxxx", 0) + attr_s32(NETNSA_NSID, left.pop(0))
        return [nl.message(RTM_NEWNSID, 0, request.sequence, payload, port=PORT)]

    return answer


def test_a_namespace_has_a_number_or_is_given_one(kernel: FakeKernel, here: NetworkNamespace) -> None:
    kernel.answer = numbers(3)
    assert number_of(here) == 3
    assert [one.kind for one in kernel.requests] == [RTM_GETNSID]
    kernel.answer = numbers(-1, 0)
    assert number_of(here) == 0
    wanted = bytes(4) + attr_u32(NETNSA_FD, here.fd)
    assert [(one.kind, one.payload) for one in kernel.requests[1:]] == [
        (RTM_GETNSID, wanted),
        (RTM_NEWNSID, wanted + attr_s32(NETNSA_NSID, -1)),
        (RTM_GETNSID, wanted),
    ]
    kernel.answer = numbers(-1)
    assert known_number(here) is None


def answers(datagram: bytes) -> Callable[[Message], Sequence[Datagram]]:
    return lambda request: [datagram]


def test_what_makes_no_sense_or_is_refused(kernel: FakeKernel, here: NetworkNamespace) -> None:
    kernel.answer = numbers(-1, -1)
    with pytest.raises(BrokenError, match=r"gave .* no number"):
        number_of(here)
    for nonsense in (b"rubbish", nl.message(RTM_NEWNSID, 0, 1, bytes(4)), nl.message(RTM_NEWNSID, 0, 1, b"")):
        kernel.answer = answers(nonsense)
        with pytest.raises(BrokenError, match="makes no sense"):
            number_of(here)
    kernel.answer = lambda request: [ack(request, -errno.EPERM)]
    with pytest.raises(KernelError) as refused:
        number_of(here)
    assert (refused.value.errno, refused.value.call) == (errno.EPERM, "rtnetlink getnsid")


# --- leasing --------------------------------------------------------------------------------------------------------


class Gve:
    """A NIC whose driver is gve, as far as it is asked."""

    nic, ifindex = "eth7", 7

    def driver(self) -> DriverInfo:
        return DriverInfo("gve", "", "", "")


def test_queue_0_of_gve_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "_create", lambda *wanted: pytest.fail("Linux was asked"))
    gve: Any = Gve()
    with pytest.raises(KernelError) as refused:
        lease_queue(gve, 0, "nk1")
    assert refused.value.errno == errno.ERANGE
    assert "lease queue 1 or higher" in refused.value.hint


def test_the_command_that_leases(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    gve: Any = Gve()
    before, _, wanted = lease_words(gve, 3, "lo")[0].partition(" --json ")
    assert before == "ynl --family netdev --do queue-create"
    lease = {"ifindex": 7, "queue": {"type": "rx", "id": 3}}
    assert json.loads(wanted.strip("'")) == {"ifindex": LO, "type": "rx", "lease": lease}
    monkeypatch.setattr(namespaces, "enter_network_namespace", lambda fd: None)
    kernel.answer = numbers(5, -1)
    (line,) = lease_words(gve, 3, "lo", HERE)
    assert line.startswith(f"nsenter --net={HERE} ynl ")
    assert json.loads(line.partition(" --json ")[2].strip("'"))["lease"] == lease | {"netns-id": 5}
    comment, line = lease_words(gve, 3, "lo", HERE)
    assert comment.startswith("#")
    assert '"netns-id": "N"' in line


def test_no_such_interface_there(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "enter_network_namespace", lambda fd: None)
    gve: Any = Gve()
    with pytest.raises(KernelError) as refused:
        lease_queue(gve, 3, "nothere0", HERE)
    assert refused.value.errno == errno.ENODEV
    assert refused.value.hint == f"interfaces: nsenter --net={HERE} ip -brief link"
    kernel.close()  # it was asked nothing


# --- the lessee -----------------------------------------------------------------------------------------------------


def has_queues(kernel: FakeKernel, rx: int) -> None:
    """Have the interface's queues listed: ``rx`` RX queues and one TX queue."""

    def answer(request: Message) -> Sequence[Datagram]:
        kinds = [(queue, QueueType.RX) for queue in range(rx)] + [(0, QueueType.TX)]
        listed = (
            attr_u32(abi.Queue.ID, queue) + attr_u32(abi.Queue.TYPE, kind) + attr_u32(abi.Queue.IFINDEX, LO)
            for queue, kind in kinds
        )
        return [*(entry(request, one, flags=nl.NLM_F_MULTI) for one in listed), done(request)]

    kernel.answer = answer


class Control:
    """What binds for a NIC; a test says what is refused."""

    def __init__(self, refusal: BindError) -> None:
        self.refusal = refusal

    def attach(self, dmabuf_fd: int, queues: Sequence[int], rx_page_size: int) -> Any:
        raise self.refusal

    def close(self) -> None: ...


@pytest.fixture
def control() -> Any:
    return Control(BindError(errno.EINVAL, "netdev bind-rx", extack="tcp-data-split is disabled"))


def test_all_rx_queues_but_the_first_are_leased(kernel: FakeKernel) -> None:
    for rx, leased in ((0, ()), (1, ()), (3, (1, 2))):
        has_queues(kernel, rx)
        assert leased_queues(LO) == leased


def test_settings_are_refused_with_the_hosts_command(kernel: FakeKernel, control: Any) -> None:
    has_queues(kernel, 3)
    with LesseeNic("lo", control) as nic:
        assert (nic.capabilities.rx_queues, nic.capabilities.rss_table_size) == (3, 0)
        assert (nic.capabilities.settings, nic.capabilities.hds_thresh) == (False, False)
        assert (nic.header_split.value, nic.rss_table, nic.ntuple_rules) == ("unknown", (), ())
        changes: list[tuple[Callable[[], object], str]] = [
            (lambda: nic.set_header_split("on"), "ethtool -G {} tcp-data-split on"),
            (lambda: nic.set_hds_thresh(0), "ethtool -G {} hds-thresh 0"),
            (lambda: nic.set_rss(equal=2), "ethtool -X {} equal 2"),
            (lambda: nic.add_ntuple(FlowRule(1, dst_port=5201)), "ethtool -N {} flow-type"),
        ]
        for change, words in changes:
            with pytest.raises(NicSettingError) as refused:
                change()
            assert refused.value.errno == errno.EOPNOTSUPP
            assert refused.value.call.startswith(words.format("lo"))
            assert "the host's to set" in refused.value.hint
            assert words.format("NIC") in refused.value.hint
        with pytest.raises(ValueError, match="exactly one"):
            nic.set_rss()


def test_a_refused_binding_says_what_the_host_can_do(
    kernel: FakeKernel, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_queues(kernel, 2)
    monkeypatch.setattr("devmem_tcp.kernel.binding.dmabuf_fd", lambda buffer: 5)
    monkeypatch.setattr("devmem_tcp.kernel.counters.QueueCounters.sample", lambda self: ())
    refusals = {
        ("tcp-data-split is disabled", errno.EINVAL): "on the host",
        ("hds-thresh is not zero", errno.EINVAL): "hds-thresh 0",
        ("Device doesn't support DMA", errno.EOPNOTSUPP): "leased to lo are RX queues: 1;",
        ("of a kernel to come", errno.ENXIO): "as it was",
    }
    with LesseeNic("lo", control) as nic, Host().allocate(4096) as buffer:
        for (words, number), hint in refusals.items():
            control.refusal = BindError(number, "netdev bind-rx", extack=words, hint="as it was")
            with pytest.raises(BindError) as refused:
                nic.bind_rx(buffer, [1])
            assert hint in refused.value.hint


def test_what_counts_nothing_is_no_error(kernel: FakeKernel, control: Any) -> None:
    has_queues(kernel, 2)
    with LesseeNic("lo", control) as nic:
        listing = kernel.answer
        kernel.answer = lambda request: (
            [ack(request, -errno.EOPNOTSUPP)]
            if request.payload[0] == abi.Command.QSTATS_GET
            else [done(request)]
            if request.payload[0] == abi.Command.PAGE_POOL_GET
            else listing(request)
        )
        found = nic.queue_stats(1)
    assert (found.queue, found.dmabuf_id, found.rx_bytes, found.pages_inflight) == (1, 0, 0, 0)


@pytest.mark.parametrize(("driver", "kind"), [("netkit", "LesseeNic"), ("gve", "KernelNic")])
def test_an_interface_is_opened_as_what_it_is(
    driver: str, kind: str, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ethtool, "driver", lambda self: DriverInfo(driver, "", "", ""))
    for one in ("LesseeNic", "KernelNic"):
        monkeypatch.setattr(lessee, one, lambda name, control, one=one: one)
    opened: Any = open_kernel_nic("lo", control)
    assert opened == kind
