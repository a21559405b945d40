"""Each check of the probe, against a kernel of Python, files that a test made up, and this machine."""

from __future__ import annotations

import errno
import gzip
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from devmem_tcp.errors import BrokenError, KernelError
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.ethtool import Channels, DriverInfo, Feature, Rings, Rss, RuleTable
from devmem_tcp.kernel.netdev import LeasedQueue, PagePool, PagePoolStatistics, Queue, QueueStatistics
from devmem_tcp.probe import binding, memory, network, nic, system, usage
from devmem_tcp.probe.finding import looked_at
from devmem_tcp.probe.link import Link, XdpMode, read_link
from devmem_tcp.sys import calls, cuda
from devmem_tcp.sys.cuda import CudaDriver
from devmem_tcp.types import HeaderSplitMode, Severity
from devmem_tcp.uapi import netlink as nl
from devmem_tcp.uapi.netdev import Command, QueueType
from devmem_tcp.uapi.netlink import Message
from netlink_kernel import FAMILY_ID, FAMILY_VERSION, PORT, Datagram, FakeKernel, ack, entry

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR
ALL_COMMANDS = (Command.DEV_GET, Command.BIND_RX, Command.BIND_TX)
RTM_NEWLINK, RTM_GETLINK, IFLA_MTU, IFLA_XDP, IFLA_XDP_ATTACHED = 16, 18, 4, 43, 2
IFINFOMSG = struct.Struct("<BxHiII")
UP, LOWER_UP = 0x1, 0x10000


class Machine(FakeKernel):
    """A kernel whose netdev family has ``commands``, and whose binds are refused with ``refusal``."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.commands: Sequence[int] | None = ALL_COMMANDS
        self.refusal = (errno.EBADF, b"")
        self.link = link_answer()

    def _family(self, request: Message) -> Sequence[Datagram]:
        _, wanted = nl.parse_generic(request.payload)
        name = wanted.string(nl.CTRL_ATTR_FAMILY_NAME)
        if name == "netdev" and self.commands is None:
            return [ack(request, -errno.ENOENT)]
        number = nl.GENL_ID_CTRL if name == "nlctrl" else FAMILY_ID
        found = nl.attr_u16(nl.CTRL_ATTR_FAMILY_ID, number) + nl.attr_u32(nl.CTRL_ATTR_VERSION, FAMILY_VERSION)
        each = (nl.nest(index, nl.attr_u32(1, command)) for index, command in enumerate(self.commands or (), 1))
        return [entry(request, found, nl.nest(6, *each)), ack(request)]

    def _answer(self, request: Message) -> Sequence[Datagram]:
        if request.kind == RTM_GETLINK:
            return self.link(request)
        number, extra = self.refusal
        return [ack(request, -number, *([extra] if extra else []))]


def link_answer(flags: int = UP | LOWER_UP, mtu: int = 1500, xdp: int = 0) -> Callable[[Message], Sequence[Datagram]]:
    """Make what rtnetlink answers about an interface."""
    attributes = nl.attr_u32(IFLA_MTU, mtu) + nl.nest(IFLA_XDP, nl.attr_u8(IFLA_XDP_ATTACHED, xdp))
    payload = IFINFOMSG.pack(0, 1, 7, flags, 0) + attributes
    return lambda request: [nl.message(RTM_NEWLINK, 0, request.sequence, payload, port=PORT)]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    monkeypatch.setattr(calls, "open_netlink", lambda protocol: made)
    yield made
    assert made.closed


class FakeNic:
    """What the checks ask of a NIC; a healthy one, but for what a test says otherwise."""

    def __init__(self, **answers: Any) -> None:
        self.nic, self.ifindex = "eth7", 7
        healthy = {
            "rings": Rings(1, 1, 1, 1, HeaderSplitMode.ON, None, None),
            "features": {"rx-ntuple-filter": Feature(on=True, fixed=False)},
            "rule_table": RuleTable(1024, (3,), False),
            "rx_queues": 4,
            "channels": Channels(0, 0, 4, 0, 0, 8),
            "rss": Rss((0, 1, 0, 1), b"", 0),
            "driver": DriverInfo("gve", "", "", ""),
        }
        for name, answer in {**healthy, **answers}.items():
            setattr(self, name, lambda answer=answer: self._give(answer))

    @staticmethod
    def _give(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer


NONE = KernelError(errno.EOPNOTSUPP, "ethtool eth7")
OFF = Rings(1, 1, 1, 1, HeaderSplitMode.OFF, 0, 4096)
CHECKS: list[tuple[str, dict[str, Any], Severity, str, str]] = [
    ("header split", {}, OK, "on", ""),
    ("header split", {"rings": OFF}, OK, "off; can", "sudo ethtool -G eth7 tcp-data-split on"),
    (
        "header split",
        {"rings": OFF._replace(hds_thresh=256)},
        WARNING,
        "256 bytes",
        "sudo ethtool -G eth7 hds-thresh 0",
    ),
    ("header split", {"rings": OFF._replace(header_split=HeaderSplitMode.UNKNOWN)}, ERROR, "does not say", "lab shell"),
    ("header split", {"rings": NONE}, ERROR, "has none", "lab shell"),
    ("header split", {"rings": KernelError(errno.ENODEV, "ethtool -g eth7")}, WARNING, "could not be found out", ""),
    ("ntuple rules", {}, OK, "on; 1 of 1,024", ""),
    ("ntuple rules", {"features": {"rx-ntuple-filter": Feature(False, False)}}, OK, "off; can", "-K eth7 ntuple on"),
    ("ntuple rules", {"features": {"rx-ntuple-filter": Feature(False, True)}}, ERROR, "has none", "lab shell"),
    ("ntuple rules", {"features": {}}, ERROR, "has none", "lab shell"),
    ("RX queues", {}, OK, "4", ""),
    ("RX queues", {"rx_queues": 1}, ERROR, "1, of 8", "sudo ethtool -L eth7 combined 4"),
    ("RX queues", {"rx_queues": 1, "channels": Channels(1, 1, 0, 3, 3, 0)}, ERROR, "1, of 3", "ethtool -L eth7 rx 3"),
    ("RX queues", {"rx_queues": 1, "channels": Channels(1, 1, 0, 1, 1, 0)}, ERROR, "no more", "lab shell"),
    ("RX queues", {"rx_queues": NONE}, ERROR, "tells of none", "lab shell"),
    ("RSS", {}, OK, "a table of 4, onto queues 0, 1", ""),
    ("RSS", {"rss": Rss((), b"", 0)}, ERROR, "no indirection table", "lab shell"),
    ("RSS", {"rss": NONE}, ERROR, "has none", "lab shell"),
]


@pytest.mark.parametrize(("name", "answers", "severity", "found", "fix"), CHECKS)
def test_checks_of_a_nic(name: str, answers: dict[str, Any], severity: Severity, found: str, fix: str) -> None:
    check = looked_at(name, lambda: nic.NECESSARY[name](FakeNic(**answers)))  # type: ignore[arg-type]
    assert (check.name, check.severity) == (name, severity)
    assert found in check.found
    assert fix in check.fix
    assert bool(check.fix) == bool(fix)
    assert check.needed or severity is WARNING


@pytest.mark.parametrize(
    ("attached", "severity", "fix"),
    [
        (XdpMode.NONE, OK, ""),
        (XdpMode.DRIVER, ERROR, "sudo ip link set dev eth7 xdpdrv off"),
        (XdpMode.GENERIC, ERROR, "sudo ip link set dev eth7 xdpgeneric off"),
        (XdpMode.OFFLOADED, ERROR, "sudo ip link set dev eth7 xdpoffload off"),
        (XdpMode.SEVERAL, ERROR, "sudo ip link set dev eth7 xdpdrv off && sudo ip link set dev eth7 xdpgeneric off"),
    ],
)
def test_xdp(kernel: Machine, attached: XdpMode, severity: Severity, fix: str) -> None:
    kernel.link = link_answer(xdp=attached)
    check = nic.xdp(FakeNic())  # type: ignore[arg-type]
    assert (check.severity, check.fix.partition("   #")[0]) == (severity, fix)


@pytest.mark.parametrize(
    ("flags", "severity", "found"), [(UP | LOWER_UP, OK, "up"), (UP, WARNING, "carrier"), (0, WARNING, "down")]
)
def test_link(kernel: Machine, flags: int, severity: Severity, found: str) -> None:
    kernel.link = link_answer(flags)
    check = nic.link(FakeNic())  # type: ignore[arg-type]
    assert check.severity is severity
    assert found in check.found


def test_rtnetlink_is_read_and_its_refusals_too(kernel: Machine) -> None:
    kernel.link = link_answer(mtu=4148, xdp=2)
    assert read_link(7) == Link(up=True, carrier=True, mtu=4148, xdp=XdpMode.GENERIC)
    (request,) = kernel.requests
    assert IFINFOMSG.unpack_from(request.payload)[2] == 7
    kernel.link = lambda request: [ack(request, -errno.ENODEV)]
    with pytest.raises(KernelError) as refused:
        read_link(7)
    assert refused.value.errno == errno.ENODEV


@pytest.mark.parametrize(
    "answer", [b"", b"rubbish", nl.message(RTM_NEWLINK, 0, 1, b"short"), nl.message(99, 0, 1, bytes(32))]
)
def test_nonsense_of_rtnetlink_is_told(kernel: Machine, answer: bytes) -> None:
    kernel.link = lambda request: [answer]
    with pytest.raises(BrokenError):
        read_link(7)


# --- binding, privilege, the family ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("commands", "severity", "found"),
    [
        (ALL_COMMANDS, OK, "bind-rx and bind-tx"),
        (ALL_COMMANDS[:2], WARNING, "no bind-tx"),
        (ALL_COMMANDS[:1], ERROR, "no bind-rx"),
        (None, ERROR, "has none"),
    ],
)
def test_netdev_family(kernel: Machine, commands: Sequence[int] | None, severity: Severity, found: str) -> None:
    kernel.commands = commands
    check = system.netdev_family()
    assert check.severity is severity
    assert found in check.found
    assert ("lab shell" in check.fix) is (severity is not OK)


def attribute_ifindex() -> bytes:
    """Point at the first attribute of a request: ifindex."""
    return nl.attr_u32(nl.NLMSGERR_ATTR_OFFS, nl.NLMSGHDR.size + nl.GENLMSGHDR.size)


def words(text: str) -> bytes:
    return nl.attr_string(nl.NLMSGERR_ATTR_MSG, text)


@pytest.mark.parametrize(
    ("refusal", "severity", "found"),
    [
        ((errno.EBADF, b""), OK, "takes this NIC"),
        ((errno.EPERM, b""), WARNING, "not asked"),
        ((errno.EOPNOTSUPP, attribute_ifindex()), ERROR, "queue management"),
        ((errno.EOPNOTSUPP, words("Device doesn't support DMA")), ERROR, "cannot reach memory by itself"),
        ((errno.ENXIO, words("of a kernel to come")), ERROR, "of a kernel to come"),
    ],
)
def test_binding(kernel: Machine, refusal: tuple[int, bytes], severity: Severity, found: str) -> None:
    kernel.refusal = refusal
    check = nic.queue_management(FakeNic())  # type: ignore[arg-type]
    assert check.severity is severity
    assert found in check.found
    command, asked = nl.parse_generic(kernel.requests[-1].payload)
    assert command == Command.BIND_RX
    assert asked.u32(3) >= 1 << 30, "an fd that some process could have"
    assert asked.nested(2).u32(1) == 3, "the last queue: gve warns about queue 0"


def test_a_leased_queue_is_not_asked_for(kernel: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netdev, "queues", lambda ifindex: [queue(1), queue(2), leased(3)])
    assert nic.queue_management(FakeNic()).severity is OK  # type: ignore[arg-type]
    assert nl.parse_generic(kernel.requests[-1].payload)[1].nested(2).u32(1) == 2


@pytest.mark.parametrize(
    ("up", "queues", "severity", "found", "fix"),
    [
        (True, (0, 1, 2), OK, "1, 2; header split, RSS", ""),
        (True, (0,), ERROR, "none", "sudo devmem-tcp lease NIC QUEUE --to eth7 --netns PID"),
        (False, (), ERROR, "while the interface is down", "sudo ip link set dev eth7 up"),
    ],
)
def test_leased_queues_of_a_virtual_interface(
    monkeypatch: pytest.MonkeyPatch,
    up: bool,
    queues: Sequence[int],
    severity: Severity,
    found: str,
    fix: str,
) -> None:
    monkeypatch.setattr(nic, "read_link", lambda ifindex: Link(up, up, 1500, XdpMode.NONE))
    monkeypatch.setattr(netdev, "queues", lambda ifindex: [queue(number) for number in queues])
    check = nic.leased_queues(FakeNic())  # type: ignore[arg-type]
    assert check.severity is severity
    assert found in check.found
    assert fix in check.fix


def test_a_virtual_interface_is_not_asked_for_what_is_the_hosts() -> None:
    virtual = FakeNic(driver=DriverInfo("netkit", "", "", ""))
    assert list(nic.checks_of(virtual, nic.NECESSARY)) == ["leased queues", "XDP", "binding", "sending"]  # type: ignore[arg-type]
    assert nic.checks_of(FakeNic(), nic.NECESSARY) == nic.NECESSARY  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("refusal", "severity"),
    [((errno.EBADF, b""), OK), ((errno.EOPNOTSUPP, words("Driver does not support netmem TX")), WARNING)],
)
def test_sending(kernel: Machine, refusal: tuple[int, bytes], severity: Severity) -> None:
    kernel.refusal = refusal
    check = nic.sending(FakeNic())  # type: ignore[arg-type]
    assert check.severity is severity
    assert nl.parse_generic(kernel.requests[-1].payload)[0] == Command.BIND_TX


def test_a_bind_that_succeeds_is_no_answer(kernel: Machine) -> None:
    kernel.answer = lambda request: [entry(request, nl.attr_u32(4, 1)), ack(request)]
    with pytest.raises(BrokenError):
        binding.ask_rx(7, 1)


def test_privilege(kernel: Machine) -> None:
    assert system.privilege().severity is OK
    kernel.refusal = (errno.EOPNOTSUPP, attribute_ifindex())
    assert system.privilege().severity is OK
    kernel.refusal = (errno.EPERM, b"")
    check = system.privilege()
    assert check.severity is ERROR
    assert "broker" in check.fix
    kernel.commands = None
    assert system.privilege().found.startswith("not asked")


# --- the machine ----------------------------------------------------------------------------------------------------


class Files:
    """procfs, sysfs and device nodes that a test makes up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, contents: Mapping[str, str | bytes]) -> None:
        self.contents = dict(contents)
        monkeypatch.setattr(calls, "read_text", lambda path: str(self._get(path)))
        monkeypatch.setattr(calls, "read_bytes", self._get)
        monkeypatch.setattr(calls, "directory_entries", lambda path: str(self._get(path)).split())
        monkeypatch.setattr(calls, "open_device", lambda path: self._get(path) and os.open(os.devnull, os.O_RDWR))

    def _get(self, path: str) -> Any:
        found = self.contents.get(path, errno.ENOENT)
        if isinstance(found, int):
            raise OSError(found, os.strerror(found), path)
        return found


RELEASE = {"/proc/sys/kernel/osrelease": "7.3.4\n"}


@pytest.mark.parametrize(
    ("files", "severity", "found"),
    [
        (
            {"/proc/config.gz": gzip.compress(b"CONFIG_NET_DEVMEM=y\nCONFIG_PAGE_POOL=y\n")},
            OK,
            "without CONFIG_UDMABUF",
        ),
        (
            {"/boot/config-7.3.4": b"CONFIG_PAGE_POOL=y\n# CONFIG_NET_DEVMEM is not set\n"},
            ERROR,
            "without CONFIG_NET_D",
        ),
        ({}, OK, "neither"),
    ],
)
def test_kernel_options(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], severity: Severity, found: str
) -> None:
    Files(monkeypatch, {**RELEASE, **files})
    check = system.config()
    assert check.severity is severity
    assert found in check.found


def test_limits_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = "Max locked memory         8388608              unlimited            bytes     \n"
    files = Files(monkeypatch, {"/proc/self/limits": limits, "/proc/sys/net/core/optmem_max": "131072\n"})
    assert system.locked_memory().found.startswith("8,192 KiB")
    assert system.option_memory().severity is OK
    files.contents |= {"/proc/self/limits": "", "/proc/sys/net/core/optmem_max": "20480\n"}
    assert system.locked_memory().severity is WARNING
    assert "131072" in system.option_memory().fix


UDMABUF = {"/dev/udmabuf": "a node"}
PARAMETERS = "/sys/module/udmabuf/parameters"


@pytest.mark.parametrize(
    ("files", "usable", "found", "fix"),
    [
        ({}, False, "no /dev/udmabuf", "sudo modprobe udmabuf"),
        ({"/dev/udmabuf": errno.EACCES}, False, "Permission denied", "chmod g+rw /dev/udmabuf"),
        (UDMABUF, True, "hidden", ""),
        (
            {**UDMABUF, f"{PARAMETERS}/size_limit_mb": "64\n", f"{PARAMETERS}/list_limit": "1024\n"},
            True,
            "64 MiB a buffer, of at most 1,024 pieces",
            f"echo 1024 | sudo tee {PARAMETERS}/size_limit_mb",
        ),
        ({**UDMABUF, f"{PARAMETERS}/size_limit_mb": "4096\n"}, True, "4,096 MiB", ""),
        ({**UDMABUF, f"{PARAMETERS}/size_limit_mb": "2147483647\n"}, True, "any size a buffer", ""),
    ],
)
def test_udmabuf(monkeypatch: pytest.MonkeyPatch, files: Any, usable: bool, found: str, fix: str) -> None:
    Files(monkeypatch, files)
    exporter = memory.udmabuf()
    assert exporter.usable is usable
    assert found in exporter.check.found
    assert fix in exporter.check.fix
    assert bool(fix) == bool(exporter.check.fix)


HEAPS = {"/dev/dma_heap": "system cma", "/dev/dma_heap/system": "a node"}


@pytest.mark.parametrize(
    ("files", "usable", "found"),
    [
        ({}, False, "none"),
        ({**HEAPS, "/dev/dma_heap/cma": errno.EACCES}, True, "system; not for this process: cma"),
        ({"/dev/dma_heap": "system", "/dev/dma_heap/system": errno.EACCES}, False, "not for this process: system"),
    ],
)
def test_dma_heaps(monkeypatch: pytest.MonkeyPatch, files: Any, usable: bool, found: str) -> None:
    Files(monkeypatch, files)
    exporter = memory.dma_heaps()
    assert exporter.usable is usable
    assert found in exporter.check.found


class FakeCuda:
    """libcuda.so.1 with two GPUs, of which the first exports dma-bufs; ``failed`` is what cuInit answers."""

    def __init__(self, failed: int = 0) -> None:
        self.failed = failed

    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's names
        return self.failed

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13020
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, gpu: Any, index: int) -> int:  # noqa: N802
        gpu._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, gpu: Any) -> int:  # noqa: N802
        assert attribute == 124
        value._obj.value = int(gpu.value == 0)
        return 0


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> FakeCuda:
        loaded.append(name)
        return FakeCuda()

    monkeypatch.setattr(calls, "load_library", load)
    assert cuda.driver() == CudaDriver(0, 13020, (True, False))
    assert loaded == ["libcuda.so.1"]
    exporter = memory.cuda_memory()
    assert exporter.usable
    assert "CUDA 13.2; 1 of 2 GPUs" in exporter.check.found
    assert exporter.check.fix
    monkeypatch.setattr(calls, "load_library", lambda name: FakeCuda(100))
    assert cuda.driver() == CudaDriver(100)
    assert not memory.cuda_memory().usable


def test_a_machine_without_a_cuda_driver_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(calls, "load_library", refuse)
    exporter = memory.cuda_memory()
    assert exporter.check.severity is OK
    assert "not found" in exporter.check.found


def test_one_exporter_is_enough_and_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: CudaDriver(100))
    files = Files(monkeypatch, UDMABUF)
    *_, last = memory.memory_checks()
    assert (last.severity, last.found) == (OK, "by udmabuf")
    files.contents.clear()
    *_, last = memory.memory_checks()
    assert (last.severity, last.fix.startswith("sudo modprobe udmabuf")) == (ERROR, True)


@pytest.mark.parametrize(
    ("mtu", "found", "advice"),
    [
        (1500, "IPv4 fills 35%", True),
        (4148, "IPv4 fills 100% of its pages, IPv6 fills 100%", False),
        (4168, "IPv4 fills 50% of its pages, IPv6 fills 100%", False),
        (8244, "IPv4 fills 100%", False),
        (8264, "IPv6 fills 100%", False),
        (9000, "IPv4 fills 73%", True),
        (40, "IPv4 fills 0%", True),
    ],
)
def test_mtu(kernel: Machine, mtu: int, found: str, advice: bool) -> None:
    kernel.link = link_answer(mtu=mtu)
    check = network.mtu(FakeNic())  # type: ignore[arg-type]
    assert check.severity is OK
    assert found in check.found
    assert bool(check.fix) is advice


def test_retransmission(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(monkeypatch, {})
    assert "120 s, fixed" in network.retransmission().found
    files.contents["/proc/sys/net/ipv4/tcp_rto_max_ms"] = "120000\n"
    assert "200 ms to 120 s" in network.retransmission().found
    files.contents["/proc/sys/net/ipv4/tcp_rto_min_us"] = "5000\n"
    check = network.retransmission()
    assert "5 ms to 120 s" in check.found
    assert check.fix.startswith("sudo sysctl -w net.ipv4.tcp_rto_max_ms=1000")
    files.contents["/proc/sys/net/ipv4/tcp_rto_max_ms"] = "1000\n"
    assert network.retransmission().fix == ""


# --- what is in use, and what was left ------------------------------------------------------------------------------


def pool(number: int, **changed: Any) -> PagePool:
    fields = {
        "pool_id": number,
        "ifindex": 7,
        "napi_id": None,
        "inflight": 10,
        "inflight_bytes": 40960,
        "detach_time_s": None,
        "dmabuf_id": 0,
        "io_uring": False,
    }
    return PagePool(**{**fields, **changed})


def test_page_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    Files(monkeypatch, {"/proc/uptime": "100.00 5.00\n"})
    pools = [pool(1), pool(2, dmabuf_id=4, inflight=3), pool(3, detach_time_s=97)]
    monkeypatch.setattr(netdev, "page_pools", lambda ifindex: pools)
    counted = [PagePoolStatistics(1, 7, {"alloc-slow": 5, "recycle-ring": 7, "recycle-cached": 1})]
    monkeypatch.setattr(netdev, "page_pool_stats", lambda ifindex: counted)
    check = usage.page_pools(FakeNic())  # type: ignore[arg-type]
    assert (check.severity, check.found) == (
        OK,
        "3 with 23 pages out, 3 of them of dma-bufs; 5 allocated slowly, 8 recycled",
    )
    pools[2] = pool(3, detach_time_s=90, inflight=2)
    check = usage.page_pools(FakeNic())  # type: ignore[arg-type]
    assert check.severity is WARNING
    assert "1 let go, waiting for 2 pages" in check.found


def queue(number: int, dmabuf_id: int = 0, kind: QueueType = QueueType.RX) -> Queue:
    return Queue(7, number, kind, None, dmabuf_id, False, False, None)


def leased(number: int, dmabuf_id: int = 0) -> Queue:
    return replace(queue(number, dmabuf_id), lease=LeasedQueue(9, 1, 0))


def test_leased_queues_are_told_on_the_host_and_their_pages_not_in_the_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [queue(0), leased(2), leased(3)]
    monkeypatch.setattr(netdev, "queues", lambda ifindex: found)
    host = FakeNic(rss=Rss((0, 0), b"", 0))
    assert usage.bound_queues(host).found == "none now; leased to virtual interfaces: 2, 3"  # type: ignore[arg-type]
    found[:] = [queue(0), queue(1, 4)]
    container = FakeNic(driver=DriverInfo("netkit", "", "", ""), rss=NONE)
    assert usage.bound_queues(container).found == "1 (dmabuf id 4)"  # type: ignore[arg-type]
    assert "on the host" in usage.page_pools(container).found  # type: ignore[arg-type]


def test_bound_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [queue(0), queue(1), queue(1, 9, QueueType.TX)]
    failed = [QueueStatistics(7, 1, QueueType.RX, {"rx-alloc-fail": 0})]
    monkeypatch.setattr(netdev, "queues", lambda ifindex: found)
    monkeypatch.setattr(netdev, "queue_statistics", lambda ifindex: failed)
    check = usage.bound_queues(FakeNic())  # type: ignore[arg-type]
    assert (check.severity, check.found) == (OK, "none now")
    found[1] = queue(1, 4)
    check = usage.bound_queues(FakeNic())  # type: ignore[arg-type]
    assert (check.severity, check.fix) == (WARNING, "sudo ethtool -X eth7 equal 1")
    assert "2 of 4 hash buckets" in check.found
    off = FakeNic(rss=Rss((0, 0), b"", 0))
    assert usage.bound_queues(off).found == "1 (dmabuf id 4)"  # type: ignore[arg-type]
    failed[0] = QueueStatistics(7, 1, QueueType.RX, {"rx-alloc-fail": 12})
    check = usage.bound_queues(off)  # type: ignore[arg-type]
    assert check.severity is WARNING
    assert "12 times" in check.found
